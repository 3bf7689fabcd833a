"""The sampler: same prompts, same log-probs as the trainer, the right distribution."""

import pytest
import torch
from conftest import answers

import mrsp
from rollout import Sampling, TorchEngine


def test_sampler_logprobs_equal_the_trainers_for_the_same_tokens(model, prompts):
    sampling = Sampling(temperature=0.7, max_tokens=12)
    out = TorchEngine(model).generate(prompts, 5, sampling, [3, 1, 2])
    packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
    trainer, _ = model(packed, temperature=0.7)
    sampler = torch.cat([r.logps for group in out for r in group])
    assert (trainer - sampler).abs().max() < 1e-4
    wrong, _ = model(packed, temperature=1.0)  # and the check can fail
    assert (wrong - sampler).abs().max() > 1e-2


def test_greedy_equals_argmax_of_a_full_forward_pass(model, prompts):
    out = TorchEngine(model).generate(prompts, 1, Sampling(temperature=0.0, max_tokens=6))
    for prompt, (response,) in zip(prompts, out, strict=True):
        ids = []
        for _ in range(len(response.ids)):
            # one more dummy token, whose log-prob vector we read through every candidate
            vocab = model.llm.config.vocab_size
            packed = mrsp.pack([prompt], [[torch.tensor([*ids, v]) for v in range(vocab)]])
            with torch.no_grad():
                logp, _ = model(packed)
            last = packed.pad(logp)[0][0, :, len(ids)]
            last[model.media_token] = -torch.inf
            ids.append(int(last.argmax()))
        assert ids == response.ids.tolist()


def test_answers_depend_on_the_seed_and_not_on_the_batch(model, prompts):
    sampling = Sampling(max_tokens=8)
    engine = TorchEngine(model)
    together = engine.generate(prompts, 3, sampling, [5, 6, 7])
    alone = [
        engine.generate([p], 3, sampling, [s])[0] for p, s in zip(prompts, (5, 6, 7), strict=True)
    ]
    small = TorchEngine(model, batch_prompts=2).generate(prompts, 3, sampling, [5, 6, 7])
    other = engine.generate(prompts, 3, sampling, [8, 9, 10])
    ids = lambda out: [[r.ids.tolist() for r in group] for group in out]  # noqa: E731
    assert ids(together) == ids(alone) == ids(small) != ids(other)


def test_first_tokens_follow_the_policys_distribution(model, prompts):
    n = 4000
    out = TorchEngine(model).generate(prompts[:1], n, Sampling(max_tokens=1), [11])
    count = torch.bincount(
        torch.cat([r.ids for r in out[0]]), minlength=model.llm.config.vocab_size
    ).double()
    every = torch.arange(model.llm.config.vocab_size)
    with torch.no_grad():
        p, _ = model(mrsp.pack(prompts[:1], [[v[None] for v in every]]))
    expected = p.double().exp()
    expected[model.media_token] = 0
    expected = expected / expected.sum() * n
    keep = expected > 5
    chi2 = ((count - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi2 < keep.sum() + 5 * (2 * keep.sum()) ** 0.5  # mean + 5 standard deviations


def test_an_answer_stops_at_its_end_token(model, prompts):
    with torch.no_grad():  # make the end token likely
        model.llm.get_input_embeddings().weight[model.eos] *= 3
    out = TorchEngine(model).generate(prompts, 8, Sampling(max_tokens=30), [0, 1, 2])
    flat = [r for group in out for r in group]
    assert any(r.finished for r in flat) and len({len(r.ids) for r in flat}) > 2
    for r in flat:
        ends = (r.ids == model.eos).nonzero().flatten().tolist()
        assert ends == ([len(r.ids) - 1] if r.finished else [])
        assert len(r.ids) == len(r.logps) and (r.finished or len(r.ids) == 30)
        assert "<|im_end|>" not in r.text


def test_media_tokens_are_never_sampled(model, prompts):
    with torch.no_grad():
        model.llm.get_input_embeddings().weight[model.media_token] *= 100
    for temperature in (0.0, 1.0):
        out = TorchEngine(model).generate(prompts, 1, Sampling(temperature, max_tokens=10))
        assert all((r.ids != model.media_token).all() for group in out for r in group)


def test_top_p_keeps_the_log_probs_of_the_full_softmax(model, prompts):
    out = TorchEngine(model).generate(prompts, 4, Sampling(top_p=0.5, max_tokens=6))
    packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
    trainer, _ = model(packed)
    assert (trainer - torch.cat([r.logps for g in out for r in g])).abs().max() < 1e-4


def test_top_p_samples_only_from_the_nucleus(model, prompts):
    """The most likely tokens whose probabilities sum up to top_p, and the last one needed."""
    n = 500
    with torch.no_grad():
        model.llm.model.norm.weight.mul_(3)  # a peaked distribution
        every = torch.arange(model.llm.config.vocab_size)
        p, _ = model(mrsp.pack(prompts[:1], [[v[None] for v in every]]))
    p[model.media_token] = -torch.inf
    order = p.softmax(-1).sort(descending=True)
    nucleus = set(order.indices[(order.values.cumsum(-1) - order.values) < 0.5].tolist())
    out = TorchEngine(model).generate(prompts[:1], n, Sampling(top_p=0.5, max_tokens=1), [3])
    sampled = {int(r.ids[0]) for r in out[0]}
    assert sampled == nucleus and len(nucleus) < 0.5 * len(every)


def test_prefill_in_blocks_equals_prefill_with_a_mask(model, prompts, monkeypatch):
    sampling = Sampling(max_tokens=5)
    dense = TorchEngine(model).generate(prompts, 3, sampling)
    monkeypatch.setattr(mrsp, "DENSE_LIMIT", 0)
    blocks = TorchEngine(model).generate(prompts, 3, sampling)
    for a, b in zip(sum(dense, []), sum(blocks, [])):
        assert a.ids.equal(b.ids) and torch.allclose(a.logps, b.logps, atol=1e-4)


def test_bad_settings_are_refused(model, prompts):
    with pytest.raises(ValueError, match="greedy"):
        TorchEngine(model).generate(prompts, 2, Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="seeds"):
        TorchEngine(model).generate(prompts, 2, Sampling(), [1])
    for bad in ({"top_p": 0.0}, {"temperature": -1.0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="need temperature"):
            Sampling(**bad)
    assert TorchEngine(model).generate([], 2, Sampling()) == []


def test_the_policys_mode_is_put_back(model, prompts):
    model.train()
    TorchEngine(model).generate(prompts[:1], 1, Sampling(max_tokens=1))
    assert model.training
    assert answers(model, [[2]])[0][0].shape == (2,)


def test_a_copy_in_bfloat16_keeps_positions_in_float32_and_follows_the_policy(model, prompts):
    """RoPE's frequencies are a buffer: in 8 bits, positions beyond 1,000 would be others."""
    engine = TorchEngine(model, dtype=torch.bfloat16)
    own, new = engine.policy.llm, model.llm
    assert own.dtype == torch.bfloat16 and own.lm_head.weight is own.get_input_embeddings().weight
    assert own.model.rotary_emb.inv_freq.equal(new.model.rotary_emb.inv_freq)
    with torch.no_grad():
        new.model.norm.weight.mul_(1.5)
    assert not own.model.norm.weight.equal(new.model.norm.weight.bfloat16())
    engine.sync(model)
    assert own.model.norm.weight.equal(new.model.norm.weight.bfloat16())
    assert len(engine.generate(prompts, 2, Sampling(max_tokens=3))) == 3
    model.sharded = True
    with pytest.raises(ValueError, match="sampled from a copy"):
        TorchEngine(model).sync(model)
