"""The sampler's contract, kept by both engines; then what is TorchEngine's own, and sampling as a
part of a training step. What is vLLM's own: test_vllm.py, which also says how to run its half of
these tests; without the package that half is skipped.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import zoo
from conftest import RECIPE, deepstack, run_ranks, wide_prompt
from tokenizers import decoders
from zoo import texts_of, tiny_qwen

import data
import grpo
import mrsp
import rollout
import train
from families import load
from kit import vllm_engine
from kit.actors import Actors
from kit.method import Method
from kit.vllm_engine import RolloutConfig, VLLMEngine, make_engine
from rollout import RolloutError, Sampling, TorchEngine

CONFIG = RolloutConfig(kv_gb=0.25)
KINDS = ("vila", "vila untied", "qwen", "qwen untied", "deep", "deep untied")
SAMPLINGS = (
    Sampling(max_tokens=10),
    Sampling(0.7, max_tokens=10),
    Sampling(top_p=0.6, max_tokens=10),
    Sampling(0.7, top_p=0.8, top_k=9, max_tokens=10),
)

# ------------------------------------------------------------------ a model, its engine, prompts


@dataclass
class Stand:
    """A model, its engine (one for all tests of a file) and prompts of every kind."""

    model: torch.nn.Module
    engine: TorchEngine | VLLMEngine
    prompts: list
    start: dict  # the model's weights as they were made

    def out(self, n=8, sampling=SAMPLINGS[0], seeds=None):
        return self.engine.generate(self.prompts, n, sampling, seeds)

    def gap(self, sampling=SAMPLINGS[0], n=4):
        return gap(self.model, self.prompts, self.out(n, sampling), sampling.temperature)

    @torch.no_grad()
    def scale(self, weight, factor, rows=slice(None)):
        """Multiply rows of a weight, and hand it to the engine."""
        weight[rows] *= factor
        self.engine.sync(self.model)

    @property
    def table(self):
        return self.model.policy.model.get_input_embeddings().weight


@torch.no_grad()
def gaps(model, prompts, out, temperature=1.0):
    """|log-prob of the sampler - log-prob of the trainer| of each token."""
    logps, _ = model(mrsp.pack(prompts, [[r.ids for r in group] for group in out]), temperature)
    return (logps - torch.cat([r.logps for r in flat(out)])).abs()


def gap(*what) -> float:
    return gaps(*what).max().item()


@torch.no_grad()
def allowed(model, prompts, answers, temperature=1.0):
    """Probabilities (M, V) of what may be sampled in place of each token of the answers, by a
    forward pass over whole sequences; media tokens may not."""
    pack = mrsp.pack(prompts, answers)
    inputs = model.policy.inputs(pack.ids, pack.media, pack.media_at)
    body, at = model.policy.model, {"position_ids": pack.positions, "mrsp": pack.layout}
    hidden = body(**inputs, **at, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.policy.lm_head(hidden[pack.hidden_at]).double() / temperature
    logits[:, list(model.media_tokens)] = -torch.inf
    return logits.softmax(-1)


def first_token(model, prompt, temperature=1.0):
    return allowed(model, [prompt], [[torch.tensor([0])]], temperature)[0]


def flat(out):
    return [r for group in out for r in group]


def tokens_of(out):
    return [[r.ids.tolist() for r in group] for group in out]


def build(toy, kind):
    """(model, prompts): media of the family, short and long text. "deep": the decoder of a Qwen3-VL
    (deepstack) and made-up prompts; text goes on beyond the prompt's length in one of them."""
    rows = data.load_rows(str(toy / "rl.jsonl"))
    text = next(r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text")
    long = replace(text, problem=" ".join([text.problem] * 6))
    if kind.startswith("vila"):
        model = load(toy / "init")
        if "untied" in kind:
            torch.manual_seed(1)
            model.policy.config.tie_word_embeddings = False
            head = torch.randn_like(model.policy.lm_head.weight) / 20
            model.policy.lm_head.weight = torch.nn.Parameter(head)
            # Words without spaces between: a stop text can be longer than a token.
            model.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        with torch.no_grad():  # answers that the model is neither sure of nor indifferent to
            model.policy.model.norm.weight.mul_(2)
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
        other = zoo.video(torch.randn(3, 2, 4, 128, generator=g), 2.0)
        several = [*wide, *model.features(image, 1), *other]
        media = [model.build_prompt(rows[7], m) for m in (wide, several)] + [model.prompt(image)]
    return model, [*media, model.prompt(text), model.prompt(long)]


@pytest.fixture(scope="session")
def group():
    """The trainer's process group of one rank, as a run makes it. vLLM keeps to the first it sees:
    the files that share this fixture share the group."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.all_reduce(torch.ones(1))  # the engines are gone, the group is not
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(toy, request):
    """The Stand of an engine and a kind of model. One vLLM engine at a time: its counters belong to
    the last one started."""
    engine, kind = request.param
    if engine == "vllm":
        pytest.importorskip("vllm")
        request.getfixturevalue("group")
    model, prompts = build(toy, kind)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    stand = Stand(model, make_engine(engine, model, CONFIG), prompts, start)
    yield stand
    stand.engine.close()


@pytest.fixture
def stand(made):
    """The Stand with the weights and the empty caches of its start."""
    made.model.load_state_dict(made.start)
    made.model.recipe = RECIPE
    if isinstance(made.engine, VLLMEngine) and made.engine.llm is None:
        made.engine.restart()
    made.engine.sync(made.model)
    return made


def on(*kinds, engines=("torch", "vllm")):
    """A test of these policies under both engines, the first of them fast."""
    pairs = []
    for engine in engines:
        for kind in kinds:
            marks = () if kind == kinds[0] else pytest.mark.slow
            pairs.append(pytest.param((engine, kind), marks=marks, id=f"{engine}-{kind}"))
    return pytest.mark.parametrize("made", pairs, indirect=True)


# ------------------------------------------------------------- what every engine does, both of them


@on(*KINDS)
def test_log_probs_equal_the_trainers(stand):
    """Those of the full softmax, also under top-p and top-k: the same ones that are trained."""
    for sampling in SAMPLINGS:
        out = stand.out(4, sampling)
        assert gap(stand.model, stand.prompts, out, sampling.temperature) < 1e-4
        assert gap(stand.model, stand.prompts, out, 1.3) > 1e-2  # and the check can fail


@on("vila", "vila untied", "qwen", "deep")
def test_greedy_is_the_argmax_of_a_forward_pass_over_whole_sequences(stand):
    stand.scale(stand.model.policy.model.norm.weight, 3)  # no two tokens are within rounding
    prompts = stand.prompts * 6
    out = stand.engine.generate(prompts, 1, Sampling(0.0, max_tokens=12))
    best = allowed(stand.model, prompts, [[r.ids for r in group] for group in out]).argmax(-1)
    assert best.equal(torch.cat([r.ids for r in flat(out)])) and len(out) == len(prompts)
    for r in flat(out):
        assert r.text == stand.model.tokenizer.decode(r.ids[: len(r.ids) - r.finished])
    assert len({tuple(r.ids.tolist()) for r in flat(out)}) == len(stand.prompts)


@on("vila")
def test_answers_depend_on_seed_and_prompt_and_all_differ(stand):
    one = tokens_of(stand.out(4, seeds=[5, 6, 7, 8]))
    alone = [
        stand.engine.generate([p], 4, SAMPLINGS[0], [s])[0]
        for p, s in zip(stand.prompts, (5, 6, 7, 8))
    ]
    assert one == tokens_of(stand.out(4, seeds=[5, 6, 7, 8])) == tokens_of(alone)
    for a, b in zip(one, tokens_of(stand.out(4, seeds=[15, 16, 17, 18]))):
        assert a != b
    huge = [2**61 + 5, 10**19, 3, 4]  # a run's seeds grow with its seed, step and prompt
    assert tokens_of(stand.out(4, seeds=huge)) == tokens_of(stand.out(4, seeds=huge))
    # Neighbouring seeds of one prompt: answer g of one seed is not answer g - 1 of the next.
    same = stand.engine.generate([stand.prompts[0]] * 3, 4, SAMPLINGS[0], [5, 6, 7])
    assert len({tuple(r.ids.tolist()) for r in flat(same)}) == 12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@on("vila")
def test_first_tokens_follow_the_policys_distribution(stand, temperature):
    n, model, prompt = 2000, stand.model, stand.prompts[1]
    banned = model.media_tokens[0]
    stand.scale(stand.table, 1.5, banned)  # the token that is never sampled would be a likely one
    (out,) = stand.engine.generate([prompt], n, Sampling(temperature, max_tokens=1), [11])
    count = torch.bincount(torch.cat([r.ids for r in out]), minlength=len(stand.table))
    assert count.sum() == n and count[banned] == 0

    def excess(t):
        """Chi-square of the counts, in standard deviations above its mean."""
        expected = n * first_token(model, prompt, t)
        keep = expected > 5
        chi2 = ((count - expected)[keep] ** 2 / expected[keep]).sum()
        return (chi2 - keep.sum()) / (2 * keep.sum()) ** 0.5

    assert excess(temperature) < 5
    assert excess(1.7 - temperature) > 10  # and the check can fail


@on("vila")
def test_top_k_and_top_p_sample_from_the_most_likely_tokens_alone(stand):
    """top-p: those whose probabilities add up to it, and the last one needed."""
    p = first_token(stand.model, stand.prompts[0])
    order = p.sort(descending=True)
    nucleus = order.indices[(order.values.cumsum(-1) - order.values) < 0.4].tolist()
    for sampling, likely in (
        (Sampling(top_k=1, max_tokens=1), order.indices[:1].tolist()),
        (Sampling(top_k=4, max_tokens=1), order.indices[:4].tolist()),
        (Sampling(top_p=0.4, max_tokens=1), nucleus),
    ):
        (out,) = stand.engine.generate(stand.prompts[:1], 500, sampling, [3])
        assert {int(r.ids[0]) for r in out} == set(likely) and len(likely) < 0.5 * len(p)
    ids = {k: tokens_of(stand.out(4, Sampling(top_k=k, max_tokens=6))) for k in (0, len(p), 3)}
    assert ids[0] == ids[len(p)] != ids[3]  # 0: all tokens


@on("vila", "qwen", "deep")
def test_media_tokens_are_never_sampled(stand):
    tokens = list(stand.model.media_tokens)
    for temperature in (0.0, 0.1, 1.0):
        stand.scale(stand.table, 100, tokens)
        out = stand.out(1, Sampling(temperature, max_tokens=10))
        assert all(t not in r.ids for t in tokens for r in flat(out))


@on("vila")
def test_an_answer_stops_at_its_end_token(stand, monkeypatch):
    eos = stand.model.eos
    stand.scale(stand.table, 3, eos)  # make it likely
    for most in (30, 3, 1):
        answers = flat(stand.out(8, Sampling(max_tokens=most)))
        lengths = {(len(r.ids), r.finished) for r in answers}
        assert any(ended for _, ended in lengths) and (len(lengths) > 2 or most < 30)
        assert (most, True) in lengths or most == 30
        for r in answers:
            ends = (r.ids == eos).nonzero().flatten().tolist()
            assert ends == ([len(r.ids) - 1] if r.finished else [])
            assert len(r.ids) == len(r.logps) and (r.finished or len(r.ids) == most)
            assert "<|im_end|>" not in r.text
    assert stand.gap(Sampling(max_tokens=30)) < 1e-4
    for ends in (set(), {20}, {20, 21}):  # the policy's, whatever config.json calls eos_token_id
        monkeypatch.setattr(stand.model, "ends", ends)
        answers = flat(stand.out(8, Sampling(max_tokens=30)))
        assert any(eos in r.ids[:-1] for r in answers)
        assert all(r.finished == (r.ids[-1].item() in ends) for r in answers)
        assert {r.ids[-1].item() for r in answers if r.finished} == ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@on("vila", "vila untied")
def test_a_stop_text_ends_an_answer_and_stays_in_its_text(stand, temperature):
    """An answer is what it is without the stop, cut behind the token that completes it."""
    if temperature == 0:
        stand.scale(stand.model.policy.model.norm.weight, 3)  # no two tokens are within rounding
    n, decode = 4 if temperature else 1, stand.model.tokenizer.decode
    free = flat(stand.out(n, Sampling(temperature, max_tokens=12)))
    # A token, the last possible one, a part of one, several.
    some = ((0, 5, 6), (0, 11, 12), (1, 3, 4), (2, 3, 6))
    stops = [decode(free[i].ids[start:end]) for i, start, end in some]
    stops[2] = stops[2][1:]
    if isinstance(stand.engine, VLLMEngine) and " " in stops[3]:
        stops.pop()  # where a tokenizer puts spaces between tokens, the text it looks at has none
    for stop in (*stops, "nowhere"):
        out = flat(stand.out(n, Sampling(temperature, max_tokens=12, stop=stop)))
        assert any(stop in r.text for r in out) == (stop != "nowhere")
        for r, whole in zip(out, free, strict=True):
            texts = [decode(whole.ids[: i + 1]) for i in range(len(whole.ids) - whole.finished)]
            at = next((i for i, text in enumerate(texts) if stop in text), len(whole.ids) - 1)
            assert r.ids.equal(whole.ids[: at + 1])
            assert torch.allclose(r.logps, whole.logps[: at + 1], atol=1e-4)
            assert (stop in r.text) == (stop in whole.text)
            assert r.finished == (stop in r.text or whole.finished)


@on("vila")
def test_a_stop_text_may_be_a_special_token(stand):
    """</answer> is one in the toy's tokenizer."""
    end = stand.model.tokenizer.convert_tokens_to_ids("</answer>")
    stand.scale(stand.table, 3, end)
    answers = flat(stand.out(8, Sampling(max_tokens=30, stop="</answer>")))
    assert any(end in r.ids for r in answers)
    for r in answers:
        assert end not in r.ids[:-1] and (r.ids[-1] == end) <= r.finished


@on("deep")
def test_deepstack_reaches_the_sampler_and_matters(stand):
    """Text between prompts with media, too: what stood in a buffer before is not added."""
    model, prompts = stand.model, stand.prompts
    assert prompts[1].positions.max() > 2 * len(prompts[1].ids) and prompts[3].media is None
    for n, order in ((4, (0, 1, 2, 3, 4)), (3, (3, 1, 4, 0)), (1, (4, 3))):
        some = [prompts[i] for i in order]
        assert gap(model, some, stand.engine.generate(some, n, SAMPLINGS[1]), 0.7) < 1e-4
    out, d = stand.out(4), model.policy.config.hidden_size
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


@on("qwen")
def test_what_cannot_be_sampled_is_refused_before_anything_runs(stand, monkeypatch):
    engine, sampling = stand.engine, SAMPLINGS[0]
    media, text = stand.prompts[0], stand.prompts[3]
    hidden = "_generate" if isinstance(engine, TorchEngine) else "llm"
    with monkeypatch.context() as patch:
        patch.setattr(engine, hidden, None)
        assert engine.generate([], 4, sampling) == []
        with pytest.raises(ValueError, match="greedy"):
            engine.generate([text], 2, Sampling(0.0))
        with pytest.raises(ValueError, match="2 seeds for 5 prompts"):
            engine.generate(stand.prompts, 2, sampling, [1, 2])
        for bad in (
            replace(media, media=media.media[:, :64]),
            replace(media, media=media.media[1:]),
            replace(media, media=None),
            replace(text, media=media.media),
        ):
            with pytest.raises(ValueError, match="prompt 1: media features are .* 128 wide"):
                engine.generate([text, bad], 2, sampling)
    stand.out()  # nothing of this harmed the engine


def _sample_rank(rank, folder):
    model, sampling = load(f"{folder}/init"), Sampling(max_tokens=4)
    prompts = [model.prompt(row, num_frames=3) for row in data.load_rows(f"{folder}/rl.jsonl")[:3]]
    lengths = [len(p.ids) for p in prompts]
    expected = TorchEngine(model).generate(prompts, 2, sampling, [7, 8, 9])
    mesh, calls = mrsp.make_mesh(2), []
    # One engine each: rank 0 samples for prompts 0 and 2. One for both: all of them, on each rank.
    for tp, dealt in ((1, lengths[rank::2]), (2, lengths)):
        engine = TorchEngine(model)
        engine.tp = tp
        engine.sleep = partial(calls.append, "sleep")
        found = rollout.sample(engine, prompts, [7, 8, 9], 2, sampling, mesh)
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert a.ids.equal(b.ids) and torch.allclose(a.logps, b.logps, atol=1e-5)
            assert (a.text, a.finished) == (b.text, b.finished)
        assert engine.prefilled == sum(dealt) and len(found) == 3
    assert calls == ["sleep"] * 2


def test_the_ranks_of_a_sequence_share_the_sampling_and_get_all_answers_in_order(toy):
    run_ranks(_sample_rank, 2, str(toy))


# ------------------------------------------------------------------------------ plain PyTorch alone


def test_features_may_come_in_any_order(model):
    """Of their places, also the levels of deepstack, which transformers wants in the places' order;
    in that order log-probs equal transformers' (test_families.py)."""
    model, sizes = deepstack(model), ((5, 40, 12, -20), (9, 30, 7, 300), (6, 0, 8))
    prompts = [wide_prompt(model, *size, seed=i) for i, size in enumerate(sizes)]
    given = [[r.ids for r in g] for g in TorchEngine(model).generate(prompts, 3, SAMPLINGS[0])]
    ordered = []
    for p in prompts:
        order = p.media_at.argsort()
        media = None if p.media is None else p.media[order]
        ordered.append(replace(p, media=media, media_at=p.media_at[order]))
    assert not prompts[0].media_at.equal(ordered[0].media_at)
    one, other = (model(mrsp.pack(x, given))[0] for x in (prompts, ordered))
    assert torch.allclose(one, other, atol=1e-6)


def test_prefill_in_blocks_or_parts_equals_prefill_with_a_mask(model, prompts, monkeypatch):
    sampling = Sampling(max_tokens=5)
    whole = TorchEngine(model).generate(prompts, 3, sampling)
    others = [TorchEngine(model, batch_prompts=2).generate(prompts, 3, sampling)]
    others.append(TorchEngine(model, batch_tokens=1).generate(prompts, 3, sampling))
    monkeypatch.setattr(mrsp, "DENSE_LIMIT", 0)
    others.append(TorchEngine(model).generate(prompts, 3, sampling))
    for other in others:
        for a, b in zip(flat(whole), flat(other), strict=True):
            assert a.ids.equal(b.ids) and torch.allclose(a.logps, b.logps, atol=1e-4)


def test_prompt_tokens_are_counted_once_for_all_answers_and_the_mode_is_put_back(model, prompts):
    engine = TorchEngine(model.train(), batch_prompts=2)
    for calls, n in enumerate((1, 5), 1):
        engine.generate(prompts, n, Sampling(max_tokens=2))
        assert engine.prefilled == calls * sum(len(p.ids) for p in prompts) and model.training


def test_a_copy_in_bfloat16_keeps_positions_in_float32_and_follows_the_policy(model, prompts):
    """RoPE's frequencies are a buffer: in 8 bits, positions beyond 1,000 would be others."""
    engine = TorchEngine(model, dtype=torch.bfloat16)
    own, new = engine.model.policy, model.policy
    embedding = own.model.get_input_embeddings().weight
    assert own.lm_head.weight is embedding and embedding.dtype == torch.bfloat16
    assert own.model.rotary_emb.inv_freq.equal(new.model.rotary_emb.inv_freq)
    for name in ("tower", "projector", "cache", "tokenizer"):  # not copied
        assert getattr(engine.model, name) is getattr(model, name)
    with torch.no_grad():
        new.model.norm.weight.mul_(1.5)
    assert not own.model.norm.weight.equal(new.model.norm.weight.bfloat16())
    engine.sync(model)
    assert own.model.norm.weight.equal(new.model.norm.weight.bfloat16())
    assert len(engine.generate(prompts, 2, Sampling(max_tokens=3))) == 3
    model.sharded = True
    with pytest.raises(ValueError, match="sampled from a copy"):
        TorchEngine(model).sync(model)


# ------------------------------------------------------------------------ settings, without a model


REFUSED = {
    "counts >= 1": "tp=0 max_seqs=0 prefill_tokens=0 max_len=-1 max_len=0",
    "0 < memory < 1": "memory=0 memory=1",
    "kv_gb > 0": "kv_gb=-1 kv_gb=0",
    "sleep_level must be 1 or 2, not": "sleep_level=0 sleep_level=3",
    "need temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1": (
        "top_p=0 top_p=1.1 temperature=-1 max_tokens=0 top_k=-1"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_settings_are_refused(message):
    for bad in REFUSED[message].split():
        refuse(message, *bad.split("="))
    assert RolloutConfig(kv_gb=0.5, max_len=9, sleep_level=1).tp == 1


def refuse(message, name, value):
    kind = Sampling if hasattr(Sampling, name) else RolloutConfig
    with pytest.raises(ValueError, match=message):
        kind(**{name: float(value)})


def test_a_salt_tells_positions_apart_and_leaves_text_at_the_end_out(model):
    deepstack(model)
    short, long = (wide_prompt(model, 7, 20, n, 30).positions for n in (4, 90))
    assert vllm_engine.salt(short) == vllm_engine.salt(long)
    seen = {vllm_engine.salt(short), vllm_engine.salt(torch.arange(40).expand(3, -1))}
    assert vllm_engine.salt(torch.arange(9).expand(3, -1)) in seen and len(seen) == 2
    places = ((0, 9, 1), (1, 26, -2), (2, 7, 1), (0, 30, 1), (slice(3), slice(27, 99), 1))
    for row, at, by in places:
        moved = short.clone()
        moved[row, at] += by
        seen.add(vllm_engine.salt(moved))
    assert len(seen) == 7


def test_the_engine_is_chosen_by_name(model, monkeypatch):
    assert make_engine("torch", model).model is model
    copied = make_engine("torch", model, dtype=torch.bfloat16, copied=True)
    assert copied.model is not model and copied.model.policy.model.dtype == torch.bfloat16
    with pytest.raises(RolloutError, match="--rollout must be vllm or torch, not fast"):
        make_engine("fast", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(make_engine(None, model), TorchEngine)


@pytest.mark.parametrize("gpu, said", [(False, "finds no GPU.*"), (True, "vllm.*requirements-gpu")])
def test_what_is_meant_for_gpus_never_starts_without_them_by_itself(
    gpu, said, monkeypatch, tmp_path
):
    """A 7B would start on the CPUs, or sample for hours: unless --rollout torch asks for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    line = ["--preset", "hour", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=f"error: these settings are for GPUs.*{said}.*--rollout torch"
    ):
        train.main(line)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="missing for this run"):  # rows, for instance
        train.main([*line, "--rollout", "torch"])
    assert (
        vllm_engine.engine_kind(None) == "torch" == vllm_engine.engine_kind("torch", sharded=True)
    )


def test_without_the_package_vllm_says_what_to_install(model, monkeypatch, tmp_path):
    """Before anything is made: a run ends with one line."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "vllm":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RolloutError, match="--rollout vllm needs .*requirements-gpu.txt"):
        make_engine("vllm", model)
    monkeypatch.setattr(train, "pipeline", None)
    with pytest.raises(SystemExit, match="error: .*requirements-gpu.txt.*--rollout torch"):
        train.main(["--rollout", "vllm", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ in a training step


def step(model, engine, rows, lr=0.0, reference=None, at=0, **settings):
    """One GRPO step -> its metrics, and the groups of its prompts. The reward is the length of the
    text: the untrained toy has no right answers."""
    settings = dict(prompts=len(rows), update_prompts=2, group=4, kl_coef=0.0) | settings
    method = Method()
    method.names["reward"] = length_reward
    model.requires_grad_(False)
    model.policy.requires_grad_(True)
    optimizer = torch.optim.SGD(model.policy.parameters(), lr)
    actors = Actors(model, reference, engine, optimizer, method, grpo.Config(**settings))
    return train.grpo_step(actors, rows, at)


def length_reward(completion, example, config):
    return {"reward": len(completion) / 50, "accuracy": 0.0, "format": 0.0}


class Says(TorchEngine):
    """An engine whose log-probs are off by a constant, and which notes what it is asked for."""

    off = 0.0

    def generate(self, prompts, n, sampling, seeds=None):
        self.asked = getattr(self, "asked", []) + [(n, sampling, seeds)]
        out = super().generate(prompts, n, sampling, seeds)
        return [[replace(r, logps=r.logps + self.off) for r in group] for group in out]


@pytest.fixture
def rows(toy):
    return data.load_rows(str(toy / "rl.jsonl"))[:4]


@pytest.mark.parametrize(
    "cap, off, weight",
    [(0.0, 0.3, 1.0), (2.0, -0.3, 1.34986), (2.0, 0.3, 0.74082), (1.2, -0.3, 1.2)],
)
def test_a_step_weighs_tokens_by_what_the_sampler_said_of_them(rows, model, cap, off, weight):
    """And moves the policy that many times as far: in both updates, the second off-policy."""
    engine, limits = Says(model), dict(mean_mismatch=1.0, grad_clip=1e9)
    plain, _ = step(model, engine, rows, **limits)
    engine.off = off
    metrics, _ = step(model, engine, rows, tis_cap=cap, **limits)
    assert metrics["tis_weight"] == pytest.approx(weight, abs=1e-4)
    assert metrics["mismatch_mean"] == pytest.approx(0.3, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-3)
    assert plain["grad_norm"] > 1e-3


def test_settings_of_sampling_reach_the_engine(rows, model):
    """The stop text and top-k of recipe and options; what was computed is counted a step."""
    engine = Says(model)
    model.recipe = replace(model.recipe, stop="B", max_tokens=5)
    for at in range(2):
        metrics, _ = step(model, engine, rows, at=at, temperature=0.9, top_p=0.8, top_k=7)
        lengths = sum(len(model.prompt(r).ids) for r in rows)
        assert (metrics["prefilled_tokens"], metrics["prompt_tokens"]) == (lengths, 4 * lengths)
    sampling = Sampling(0.9, 0.8, 5, 7, "B")
    seeds = [[10**6 * at + i for i in range(4)] for at in range(2)]
    assert engine.asked == [(4, sampling, seeds[0]), (4, sampling, seeds[1])]
    engine.asked.clear()
    train.evaluate(model, engine, rows)
    assert [asked[:2] for asked in engine.asked] == [(1, Sampling(0.0, max_tokens=5, stop="B"))]
