"""Packing changes nothing: log-probs and gradients equal those of separate sequences."""

import pytest
import torch
from conftest import answers, run_ranks

import mrsp

LENGTHS = [[5, 1, 3], [1], [2, 7, 2, 1]]  # ragged groups, with answers of one token


@pytest.fixture
def policy(model):
    """The toy VILA in float64, everywhere."""
    torch_norms(model.double().policy)
    return model


def torch_norms(policy):
    """transformers' RMSNorm computes in float32 whatever it is given, which would limit what a test
    can see to 1e-7; torch's own replaces it, in float64."""
    for name, norm in list(policy.named_modules()):
        if hasattr(norm, "variance_epsilon"):
            size, eps = norm.weight.shape[0], norm.variance_epsilon
            policy.set_submodule(name, torch.nn.RMSNorm(size, eps, dtype=torch.float64))
            policy.get_submodule(name).weight.data.copy_(norm.weight)


def random_grads(model, logp, seed=3):
    """Parameter gradients for a random upstream gradient on the log-probs."""
    model.zero_grad()
    g = torch.Generator().manual_seed(seed)
    (logp * torch.randn(logp.shape, generator=g, dtype=logp.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def separate_logp(model, prompts, branches):
    """NAIVE, independent of mrsp.py: each prompt + answer alone, by unmodified sdpa."""
    body = model.policy.model
    body.set_attn_implementation("sdpa")
    out = []
    for prompt, group in zip(prompts, branches, strict=True):
        for ids in group:
            both = torch.cat([prompt.ids, ids])[None]
            x = body.get_input_embeddings()(both)
            if prompt.media is not None:
                x = x.index_copy(1, prompt.media_at, prompt.media[None].to(x.dtype))
            hidden = body(inputs_embeds=x, use_cache=False).last_hidden_state[0]
            logits = model.policy.lm_head(hidden[len(prompt.ids) - 1 : -1])
            out.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    body.set_attn_implementation("mrsp")
    return torch.cat(out)


def assert_same_grads(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, b[name].abs().max().item())
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("form", ["dense", "blocks"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_logprobs_and_gradients_equal_separate_sequences(
    policy, prompts, form, checkpointing, monkeypatch
):
    monkeypatch.setattr(mrsp, "DENSE_LIMIT", 0 if form == "blocks" else 10**9)
    branches = answers(policy, LENGTHS)
    expected = separate_logp(policy, prompts, branches)
    expected_grads = random_grads(policy, expected)
    policy.train()
    if checkpointing:
        policy.enable_gradient_checkpointing()
    logp, _ = policy(mrsp.pack(prompts, branches))
    assert (logp - expected).abs().max() < 1e-9
    assert_same_grads(random_grads(policy, logp), expected_grads, 1e-9)


def test_copies_give_the_same_as_the_shared_prefix(policy, prompts):
    branches = answers(policy, LENGTHS)
    shared, _ = policy(mrsp.pack(prompts, branches))
    naive, _ = policy(mrsp.pack(*mrsp.copies(prompts, branches)))
    assert (shared - naive).abs().max() < 1e-9


def test_one_answer_does_not_see_another(policy, prompts):
    branches = answers(policy, [[4, 4]])
    before, _ = policy(mrsp.pack(prompts[:1], branches))
    changed = [[branches[0][0], answers(policy, [[4]], seed=9)[0][0]]]
    after, _ = policy(mrsp.pack(prompts[:1], changed))
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] - after[4:]).abs().max() > 1e-3


def test_mrope_positions_are_packed_row_by_row():
    """Three position rows: answers resume at the maximum over all rows, plus one."""
    positions = torch.tensor([[0, 1, 1, 2], [0, 5, 6, 2], [0, 1, 2, 2]])
    none = torch.zeros(0, dtype=torch.long)

    class P:
        ids, media, media_at = torch.arange(4), None, none

    P.positions = positions
    packed = mrsp.pack([P], [[torch.tensor([1, 2]), torch.tensor([3])]])
    assert packed.positions.shape == (3, 1, 7)
    assert packed.positions[:, 0, :4].equal(positions)
    assert packed.positions[:, 0, 4:].tolist() == [[7, 8, 7]] * 3


def test_context_tokens_are_given_and_not_predicted(policy, prompts):
    branches = answers(policy, [[5, 4]])
    every, _ = policy(mrsp.pack(prompts[:1], branches))
    packed = mrsp.pack(prompts[:1], branches, [[2, 3]])
    some, _ = policy(packed)
    assert torch.equal(packed.targets, torch.cat([branches[0][0][2:], branches[0][1][3:]]))
    assert torch.allclose(some, torch.cat([every[2:5], every[8:9]]), atol=1e-12)


def test_pad_and_mask_put_each_value_in_its_place(model, prompts):
    packed = mrsp.pack(prompts, answers(model, LENGTHS))
    values, mask = packed.pad(torch.arange(1.0, len(packed.targets) + 1))
    assert values.shape == mask.shape == (3, 4, 7)
    assert [[int(m) for m in row.sum(-1)] for row in mask] == [
        [5, 1, 3, 0],
        [1, 0, 0, 0],
        [2, 7, 2, 1],
    ]
    assert values[mask == 1].tolist() == list(range(1, len(packed.targets) + 1))


def test_bad_input_is_refused(model, prompts):
    with pytest.raises(ValueError, match="empty"):
        mrsp.pack(prompts[:1], [[torch.zeros(0, dtype=torch.long)]])
    with pytest.raises(ValueError, match="groups"):
        mrsp.pack(prompts[:2], [[torch.tensor([1])]])
    with pytest.raises(ValueError, match="mrsp=Layout"):
        model.policy.model(input_ids=torch.tensor([[1, 2]]))
    packed = mrsp.pack(prompts[:1], answers(model, [[2]]))
    with pytest.raises(ValueError, match="no attention_mask"):
        q = torch.zeros(1, 4, 3, 8)
        mrsp.mrsp_attention(None, q, q, q, torch.ones(1, 3), packed.layout)


def test_a_window_shorter_than_the_sequence_is_refused():
    """Rule (*) has none: the answers would see less of the prompt than the layout says."""
    q, layout = torch.zeros(1, 2, 5, 4), mrsp.Layout(*(torch.zeros(1, 5),) * 4)
    with pytest.raises(ValueError, match="this layer one of 4 tokens"):
        mrsp.mrsp_attention(None, q, q, q, None, mrsp=layout, sliding_window=4)
    mrsp.mrsp_attention(None, q, q, q, None, mrsp=layout, sliding_window=5)


def _even_rank(rank):
    parts = [["a", "b"], []][rank]
    assert mrsp.even(parts, None, sharded=True) == [["a", "b"], [None, None]][rank]
    assert mrsp.even(parts, None, sharded=False) is parts  # no communication: ranks may differ


def test_with_sharded_parameters_every_rank_gets_as_many_parts_as_the_busiest():
    assert mrsp.even(["a"], None, sharded=True) == ["a"]
    run_ranks(_even_rank, 2)
