"""The sampler: same prompts, same log-probs as the trainer, the right distribution."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import answers, deepstack, run_ranks, wide_prompt

import data
import eval as evaluation
import mrsp
import train
from families.vila import VILA
from grpo import GRPOConfig
from model import ModelError
from rollout import (
    RolloutConfig,
    RolloutError,
    Sampling,
    TorchEngine,
    make_engine,
    salt,
    sample,
)


def test_sampler_logprobs_equal_the_trainers_for_the_same_tokens(model, prompts):
    sampling = Sampling(temperature=0.7, max_tokens=12)
    out = TorchEngine(model).generate(prompts, 5, sampling, [3, 1, 2])
    packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
    trainer, _ = model(packed, temperature=0.7)
    sampler = torch.cat([r.logps for group in out for r in group])
    assert (trainer - sampler).abs().max() < 1e-4
    wrong, _ = model(packed, temperature=1.0)  # and the check can fail
    assert (wrong - sampler).abs().max() > 1e-2


def test_deepstack_log_probs_equal_transformers_and_the_samplers(model):
    """Media in any order, at any position; several prompts, one without media."""
    model, d = deepstack(model), 128
    sizes = ((5, 40, 12, -20), (9, 30, 7, 300), (0, 11, 2), (6, 0, 8))
    prompts = [wide_prompt(model, *size, seed=i) for i, size in enumerate(sizes)]
    out = TorchEngine(model).generate(prompts, 3, Sampling(max_tokens=7))
    packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
    trainer = model(packed)[0].detach()
    assert (trainer - torch.cat([r.logps for group in out for r in group])).abs().max() < 1e-4
    expected, body = [], model.llm.model
    body.set_attn_implementation("sdpa")
    for prompt, group in zip(prompts, out):
        p = len(prompt.ids)
        for r in group:
            after = prompt.positions.max() + 1 + torch.arange(len(r.ids))
            x, mask = body.embed_tokens(torch.cat([prompt.ids, r.ids]))[None], None
            if prompt.media is not None:
                mask = torch.zeros(x.shape[:2], dtype=torch.bool)
                mask[0, prompt.media_at] = True
                rows = prompt.media[prompt.media_at.argsort()]
                x = x.masked_scatter(mask[..., None], rows[:, :d])
                mask = dict(visual_pos_masks=mask, deepstack_visual_embeds=rows[:, d:].split(d, -1))
            positions = torch.cat([prompt.positions, after.expand(3, -1)], 1)[:, None]
            with torch.no_grad():
                hidden = body(inputs_embeds=x, position_ids=positions, **mask or {})[0]
                logps = model.llm.lm_head(hidden)[0, p - 1 : -1].log_softmax(-1)
            expected.append(logps.gather(-1, r.ids[:, None])[:, 0])
    assert (trainer - torch.cat(expected)).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"\(40, 128\).* 40 media tokens .* 384 wide"):
        narrow = replace(prompts[0], media=prompts[0].media[:, :d])
        TorchEngine(model).generate([narrow], 1, Sampling())


def test_a_salt_tells_positions_apart_and_leaves_text_at_the_end_out(model):
    deepstack(model)
    short, long = (wide_prompt(model, 7, 20, n, 30).positions for n in (4, 90))
    assert salt(short) == salt(long)
    seen = {salt(short), salt(torch.arange(40).expand(3, -1))}
    assert salt(torch.arange(9).expand(3, -1)) in seen and len(seen) == 2
    for row, at, by in (
        (0, 9, 1),
        (1, 26, -2),
        (2, 7, 1),
        (0, 30, 1),
        (slice(3), slice(27, 99), 1),
    ):
        moved = short.clone()
        moved[row, at] += by
        seen.add(salt(moved))
    assert len(seen) == 7


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
            last[model.media_tokens[0]] = -torch.inf
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
    expected[model.media_tokens[0]] = 0
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
        model.llm.get_input_embeddings().weight[model.media_tokens[0]] *= 100
    for temperature in (0.0, 1.0):
        out = TorchEngine(model).generate(prompts, 1, Sampling(temperature, max_tokens=10))
        assert all((r.ids != model.media_tokens[0]).all() for group in out for r in group)


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
    p[model.media_tokens[0]] = -torch.inf
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


def test_top_k_samples_only_from_the_k_most_likely_tokens(model, prompts):
    with torch.no_grad():
        every = torch.arange(model.llm.config.vocab_size)
        p, _ = model(mrsp.pack(prompts[:1], [[v[None] for v in every]]))
    p[model.media_tokens[0]] = -torch.inf
    engine = TorchEngine(model)
    for k in (1, 3):
        (out,) = engine.generate(prompts[:1], 300, Sampling(top_k=k, max_tokens=1), [3])
        assert {int(r.ids[0]) for r in out} == set(p.topk(k).indices.tolist())
    out = engine.generate(prompts, 4, Sampling(0.7, top_k=3, max_tokens=6))
    packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
    trainer, _ = model(packed, 0.7)  # the log-probs are those of all tokens
    assert (trainer - torch.cat([r.logps for g in out for r in g])).abs().max() < 1e-4

    def ids(k):
        out = engine.generate(prompts, 4, Sampling(top_k=k, max_tokens=6))
        return [r.ids.tolist() for group in out for r in group]

    assert ids(0) == ids(len(every)) == ids(10**6) != ids(3)  # all tokens, and more than there are


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_text_ends_an_answer_and_stays_in_its_text(model, prompts, temperature):
    """An answer is what it is without the stop, cut behind the token that completes it."""
    n, engine = 4 if temperature else 1, TorchEngine(model)
    sampling = Sampling(temperature, max_tokens=12)
    free = [r for g in engine.generate(prompts, n, sampling) for r in g]
    words = [r.text.split() for r in free]
    # A word, a part of one, one over two tokens, the last possible token, one that never comes.
    stops = [words[0][4], words[1][2][1:], f"{words[2][6]} {words[2][7]}", words[0][11], "nowhere"]
    for stop in stops:
        sampling = Sampling(temperature, max_tokens=12, stop=stop)
        out = [r for g in engine.generate(prompts, n, sampling) for r in g]
        assert any(stop in r.text for r in out) == (stop != "nowhere")
        for r, whole in zip(out, free):
            tokens = whole.ids.tolist()
            tokens = tokens[: len(tokens) - whole.finished]  # the end token is no text
            texts = [model.tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
            at = next((i for i, text in enumerate(texts) if stop in text), len(whole.ids) - 1)
            assert r.ids.tolist() == whole.ids.tolist()[: at + 1]
            assert torch.allclose(r.logps, whole.logps[: at + 1], atol=1e-5)
            assert (stop in r.text) == (stop in whole.text)
            assert r.finished == (stop in r.text or whole.finished)


def test_prompt_tokens_that_were_computed_are_counted(model, prompts):
    engine = TorchEngine(model, batch_prompts=2)
    length = sum(len(p.ids) for p in prompts)
    for calls, n in enumerate((1, 5), 1):  # once for all answers to a prompt
        engine.generate(prompts, n, Sampling(max_tokens=2))
        assert engine.prefilled == calls * length


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"tp": 0}, "counts >= 1"),
        ({"max_seqs": 0}, "counts >= 1"),
        ({"prefill_tokens": 0}, "counts >= 1"),
        ({"max_len": -1}, "counts >= 1"),
        ({"max_len": 0}, "counts >= 1"),
        ({"memory": 0.0}, "0 < memory < 1"),
        ({"memory": 1.0}, "0 < memory < 1"),
        ({"kv_gb": -1.0}, "kv_gb > 0"),
        ({"kv_gb": 0.0}, "kv_gb > 0"),
        ({"sleep_level": 0}, "sleep_level must be 1 or 2, not 0"),
        ({"sleep_level": 3}, "sleep_level must be 1 or 2, not 3"),
    ],
)
def test_impossible_settings_of_an_engine_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**bad)
    assert RolloutConfig(kv_gb=0.5, max_len=9, sleep_level=1).tp == 1


def test_a_negative_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k >= 0"):
        Sampling(top_k=-1)


def test_features_that_do_not_fit_are_refused(model, prompts):
    engine, video, text = TorchEngine(model), prompts[0], prompts[2]
    for bad in (
        replace(video, media=video.media[:, :64]),
        replace(video, media=video.media[1:]),
        replace(video, media=None),
        replace(text, media=video.media),
    ):
        with pytest.raises(ValueError, match="prompt 1: media features are .* 128 wide"):
            engine.generate([text, bad], 2, Sampling(max_tokens=2))


def test_the_engine_is_chosen_by_name(model, monkeypatch):
    assert make_engine("torch", model).policy is model
    copied = make_engine("torch", model, dtype=torch.bfloat16, copied=True)
    assert copied.policy is not model and copied.policy.llm.dtype == torch.bfloat16
    with pytest.raises(RolloutError, match="--rollout must be vllm or torch, not fast"):
        make_engine("fast", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(make_engine(None, model), TorchEngine)


@pytest.fixture
def no_vllm(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "vllm":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_without_the_package_vllm_says_what_to_install(model, no_vllm):
    with pytest.raises(RolloutError, match="--rollout vllm needs .*requirements-gpu.txt"):
        make_engine("vllm", model)


def test_a_run_without_the_package_ends_before_anything_is_made(no_vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "pipeline", None)
    with pytest.raises(SystemExit, match="error: .*requirements-gpu.txt.*--rollout torch"):
        train.main(["--rollout", "vllm", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rollout fast", "rollout must be vllm or torch, not 'fast'"),
        ("--rollout_tp 2", "--rollout_tp 2 must divide --sp 1"),
        ("--rollout_tp 0", "counts >= 1"),
        ("--rollout_memory 1.5", "0 < memory < 1"),
        ("--rollout_sleep_level 3", "sleep_level must be 1 or 2"),
        ("--grpo_tis_cap -1", "tis_cap >= 0"),
        ("--grpo_mean_mismatch 0", "mismatch limits > 0"),
        ("--grpo_max_mismatch 0", "mismatch limits > 0"),
    ],
)
def test_settings_of_rollouts_are_checked_before_anything_runs(
    options, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "pipeline", None)  # not a whole run, if one is let through
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        train.main([*options.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


class Says(TorchEngine):
    """An engine whose log-probs are off by a constant."""

    off = 0.0

    def generate(self, *args):
        out = super().generate(*args)
        return [[replace(r, logps=r.logps + self.off) for r in group] for group in out]


@pytest.mark.parametrize(
    "cap, off, weight",
    [(0.0, 0.3, 1.0), (2.0, -0.3, 1.34986), (2.0, 0.3, 0.74082), (1.2, -0.3, 1.2)],
)
def test_a_step_weighs_tokens_by_what_the_sampler_said_of_them(toy, model, cap, off, weight):
    """And moves the policy that many times as far: in both updates, the second off-policy."""
    rows, engine = data.load_rows(str(toy / "rl.jsonl"))[:4], Says(model)
    model.tower.requires_grad_(False)
    model.projector.requires_grad_(False)
    config = GRPOConfig(
        prompts=4, update_prompts=2, group=4, kl_coef=0.0, accuracy_weight=0.0, tis_cap=cap,
        mean_mismatch=1.0, grad_clip=1e9,
    )  # fmt: skip
    norms = []
    for engine.off, settings in ((0.0, replace(config, tis_cap=0.0)), (off, config)):
        grade = lambda text, *_: {"reward": len(text) / 50, "accuracy": 0.0, "format": 0.0}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.grpo, "reward", grade)
            optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.0)
            metrics, _ = train.grpo_step(model, None, engine, optimizer, rows, 0, settings)
        norms.append(metrics["grad_norm"])
    assert metrics["tis_weight"] == pytest.approx(weight, abs=1e-4)
    assert metrics["mismatch_mean"] == pytest.approx(0.3, abs=1e-4)
    assert norms[1] == pytest.approx(weight * norms[0], rel=1e-3) and norms[0] > 1e-3


def test_a_mean_mismatch_stops_training(toy, model):
    rows, engine = data.load_rows(str(toy / "rl.jsonl"))[:2], Says(model)
    engine.off = 0.2  # less than a single token may be off
    config = GRPOConfig(prompts=2, update_prompts=2, group=4, kl_coef=0.1)
    optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.0)
    with pytest.raises(ModelError, match="by 0.2 on average.*--grpo_mean_mismatch 0.1"):
        train.grpo_step(model, model, engine, optimizer, rows, 0, config)
    engine.off = 0.05
    train.grpo_step(model, model, engine, optimizer, rows, 0, config)
    with pytest.raises(ModelError, match="0.05 at most.*--grpo_max_mismatch 0.04"):
        train.grpo_step(
            model, model, engine, optimizer, rows, 0, replace(config, max_mismatch=0.04)
        )


def test_settings_of_sampling_reach_the_engine(toy, model):
    """The stop text and top-k of recipe and options; what was computed is counted a step."""
    rows, seen = data.load_rows(str(toy / "rl.jsonl"))[:4], []

    class Recorder(TorchEngine):
        def generate(self, prompts, n, sampling, seeds=None):
            seen.append((n, sampling))
            return super().generate(prompts, n, sampling, seeds)

    model.recipe = replace(model.recipe, stop="B", max_tokens=5)
    config = GRPOConfig(
        prompts=4, group=4, kl_coef=0.0, temperature=0.9, top_p=0.8, top_k=7,
    )  # fmt: skip
    engine, optimizer = Recorder(model), torch.optim.SGD(model.llm.parameters(), lr=0.0)
    for step in range(2):
        metrics, _ = train.grpo_step(model, None, engine, optimizer, rows, step, config)
        lengths = sum(len(model.prompt(r).ids) for r in rows)
        assert (metrics["prefilled_tokens"], metrics["prompt_tokens"]) == (lengths, 4 * lengths)
    assert seen == [(4, Sampling(0.9, 0.8, 5, 7, "B"))] * 2
    seen.clear()
    evaluation.evaluate(model, engine, rows)
    assert seen == [(1, Sampling(0.0, max_tokens=5, stop="B"))]


def _sample_rank(rank, folder):
    model, sampling = VILA.from_pretrained(f"{folder}/init"), Sampling(max_tokens=4)
    prompts = [model.prompt(row, num_frames=3) for row in data.load_rows(f"{folder}/rl.jsonl")[:3]]
    lengths = [len(p.ids) for p in prompts]
    expected = TorchEngine(model).generate(prompts, 2, sampling, [7, 8, 9])
    mesh, calls = mrsp.make_mesh(2), []
    # One engine each: rank 0 samples for prompts 0 and 2. One for both: all of them, on each rank.
    for tp, dealt in ((1, lengths[rank::2]), (2, lengths)):
        engine = TorchEngine(model)
        engine.tp = tp
        engine.wake, engine.sleep = (partial(calls.append, name) for name in ("wake", "sleep"))
        found = sample(engine, prompts, [7, 8, 9], 2, sampling, mesh)
        for a, b in zip(sum(found, []), sum(expected, []), strict=True):
            assert a.ids.equal(b.ids) and torch.allclose(a.logps, b.logps, atol=1e-5)
            assert (a.text, a.finished) == (b.text, b.finished)
        assert engine.prefilled == sum(dealt) and len(found) == 3
    assert calls == ["wake", "sleep"] * 2


def test_the_ranks_of_a_sequence_share_the_sampling_and_get_all_answers_in_order(toy):
    run_ranks(_sample_rank, 2, str(toy))
