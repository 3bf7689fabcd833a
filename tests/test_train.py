"""The whole run: options, one GRPO step on one and two ranks, learning, the smoke test."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_ranks

import data
import grpo
import mrsp
import sft
import train
from families.vila import VILA
from grpo import Config
from kit.actors import Actors
from kit.method import Method
from kit.run import METRICS
from model import ModelError
from rollout import Response, Sampling, TorchEngine

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class FixedEngine:
    """Gives every prompt the answers it was built with, whatever the policy: random tokens of
    different lengths, some of them right (so that advantages are not zero). The log-probs are the
    policy's own (a TorchEngine's copy of it, if its parameters are sharded)."""

    tp, prefilled = 1, 0

    def __init__(self, policy, gold: dict):
        self.policy, self.gold = policy, gold

    def generate(self, prompts, n, sampling, seeds):
        out = []
        for prompt in prompts:
            key = int(prompt.ids.sum())
            g = torch.Generator().manual_seed(key)
            group = []
            for i in range(n):
                length = int(torch.randint(1, 9, (1,), generator=g))
                ids = torch.randint(8, 40, (length,), generator=g)
                right = self.gold[key] if i % 3 == key % 2 else "Z"
                text = f"<think> x </think> <answer> {right} </answer>"
                group.append(Response(ids, torch.zeros(length), text, True))
            packed = mrsp.pack([prompt], [[r.ids for r in group]])
            own = getattr(self.policy, "policy", self.policy)
            own = own if isinstance(own, VILA) else self.policy
            with torch.no_grad():  # by this rank alone: the others sample for other prompts
                logps = own.policy(mrsp.shard(packed, mrsp.Mesh()), sampling.temperature)[0].split(
                    [len(r.ids) for r in group]
                )
            wrong = 0.01 * (key % 3)  # a mismatch that differs from prompt to prompt
            out.append([replace(r, logps=x + wrong) for r, x in zip(group, logps, strict=True)])
        return out

    def sync(self, model):
        if isinstance(self.policy, TorchEngine):
            self.policy.sync(model)

    wake = sleep = lambda self: None


def step_of(model, reference, engine, optimizer, batch, step, config, **more):
    """One GRPO step -> its metrics; more: of Actors."""
    method = more.pop("method", None) or Method()
    actors = Actors(model, reference, engine, optimizer, method, config, **more)
    return train.grpo_step(actors, batch, step)[0]


CONFIG = Config(
    prompts=5, update_prompts=3, micro_prompts=2, group=4, temperature=0.8, lr=1e-4,
    kl_coef=0.1,
)  # fmt: skip


def three_steps(folder, dtype, average, sp=1, fsdp=False):
    """Three GRPO steps (two updates each, the second off-policy) -> metrics, parameters."""
    torch.set_num_threads(1)
    rows = data.load_rows(f"{folder}/rl.jsonl")[:15]
    model = VILA.from_pretrained(f"{folder}/init").to(dtype)
    reference = VILA.from_pretrained(f"{folder}/init").to(dtype).requires_grad_(False)
    with torch.no_grad():  # so that the KL term is not zero
        reference.llm.model.norm.weight.mul_(0.7)
    model.tower.requires_grad_(False)
    model.projector.requires_grad_(False)
    model.mesh = reference.mesh = mrsp.make_mesh(sp, "auto", 4, 2)
    sampler = model
    if fsdp:
        sampler = TorchEngine(model, dtype=dtype)
        model.enable_gradient_checkpointing()
        model.shard_parameters(dtype)
        reference.shard_parameters(dtype)
    gold = {int(model.prompt(row).ids.sum()): row.answer for row in rows}
    engine = FixedEngine(sampler, gold)
    optimizer = torch.optim.AdamW(model.llm.parameters(), lr=CONFIG.lr)
    seen = []
    for step in range(3):
        batch = rows[step * 5 : step * 5 + (5, 5, 1)[step]]
        config = replace(CONFIG, average=average)
        metrics = step_of(model, reference, engine, optimizer, batch, step, config)
        seen.append({k: v for k, v in metrics.items() if not k.startswith("seconds")})
    return seen, {k: mrsp.whole(v).detach().clone() for k, v in model.llm.state_dict().items()}


def _rank(rank, folder, dtype, average, sp, fsdp, out):
    torch.save(three_steps(folder, dtype, average, sp, fsdp), f"{out}/{rank}.pt")


@pytest.fixture(scope="session")
def one_rank(toy):
    """three_steps in one process, computed once for each setting."""
    known = {}

    def get(dtype, average):
        if (dtype, average) not in known:
            known[dtype, average] = three_steps(toy, dtype, average)
        return known[dtype, average]

    return get


MORE_RANKS = [
    (2, 1, False, torch.float64, 1e-9, "token"),
    (2, 1, False, torch.float32, 1e-5, "token"),
    (2, 2, False, torch.float64, 1e-9, "sequence"),
    (2, 1, True, torch.float64, 1e-9, "token"),
    (4, 2, True, torch.float64, 1e-9, "token"),
    (2, 2, True, torch.float32, 1e-5, "token"),
]


@pytest.mark.parametrize(
    "world, sp, fsdp, dtype, tolerance, average",
    [
        (2, 1, False, torch.float64, 1e-9, "sequence"),
        (2, 2, True, torch.float64, 1e-9, "token"),
        *[pytest.param(*how, marks=pytest.mark.slow) for how in MORE_RANKS],
    ],
)
def test_many_ranks_train_like_one(
    toy, one_rank, tmp_path, world, sp, fsdp, dtype, tolerance, average
):
    """Same loss, gradient norm, metrics and parameters after three steps; 5 prompts on 2 ranks in
    updates of 3 and 2, answers of 1 to 8 tokens; in the last step rank 1 has no prompt."""
    one, params = one_rank(dtype, average)
    run_ranks(_rank, world, str(toy), dtype, average, sp, fsdp, str(tmp_path))
    assert one[0]["grad_norm"] > 1e-3 and one[2]["kl"] > 1e-4 and one[0]["accuracy"] > 0
    for rank in range(world):
        two, params2 = torch.load(tmp_path / f"{rank}.pt")
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                if not name.startswith("cache"):
                    assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name
        for name, value in params.items():
            assert (value - params2[name]).abs().max() <= tolerance, name


def test_groups_of_equal_reward_are_skipped_and_counted_and_change_nothing(toy, model):
    rows = data.load_rows(str(toy / "rl.jsonl"))[:3]
    gold = {}
    for i, row in enumerate(rows):
        gold[int(model.prompt(row).ids.sum())] = (
            row.answer if i else "Z"
        )  # the first group: all wrong
    model.tower.requires_grad_(False)
    packed = []
    model.policy.register_forward_pre_hook(lambda m, args: packed.append(len(args[0].ids)))
    engine = FixedEngine(VILA.from_pretrained(toy / "init"), gold)
    optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.0)
    config = replace(CONFIG, prompts=3, update_prompts=3, micro_prompts=8, kl_coef=0.0)
    metrics = step_of(model, None, engine, optimizer, rows, 0, config)
    assert metrics["skipped_groups"] == 1 and packed == [2]  # one pass: no old, no reference pass


@pytest.mark.parametrize("thinking", [True, False])
def test_bare_answers_earn_their_reward_in_non_thinking_mode(toy, thinking):
    model, rows = VILA.from_pretrained(toy / "init"), data.load_rows(str(toy / "rl.jsonl"))[:2]
    model.recipe = replace(model.recipe, thinking=thinking)

    class Letters(TorchEngine):
        def generate(self, prompts, n, *rest):
            out = super().generate(prompts, n, *rest)
            return [[replace(r, text="ABCD"[g]) for g, r in enumerate(group)] for group in out]

    optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.0)
    config = replace(CONFIG, prompts=2, update_prompts=2, group=4, kl_coef=0.0)
    metrics = step_of(model, None, Letters(model), optimizer, rows, 0, config)
    assert (metrics["accuracy"], metrics["format"]) == ((0, 0) if thinking else (0.25, 1))


def test_leaving_out_groups_of_equal_reward_changes_nothing(toy):
    """The same step with all groups packed (a KL weight of 1e-15 keeps them) moves the same way."""
    rows, after = data.load_rows(str(toy / "rl.jsonl"))[:4], []
    for kl_coef in (0.0, 1e-15):
        model = VILA.from_pretrained(toy / "init").double()
        gold = {
            int(model.prompt(r).ids.sum()): r.answer if i > 1 else "Z" for i, r in enumerate(rows)
        }
        config = replace(CONFIG, prompts=4, update_prompts=4, kl_coef=kl_coef)
        optimizer = torch.optim.SGD(model.llm.parameters(), lr=1.0)
        metrics = step_of(model, model, FixedEngine(model, gold), optimizer, rows, 0, config)
        assert metrics["skipped_groups"] == 2 and metrics["grad_norm"] > 1e-3
        after.append({k: v.detach().clone() for k, v in model.llm.state_dict().items()})
    for name, value in after[0].items():
        assert (value - after[1][name]).abs().max() < 1e-9, name


def test_two_updates_with_kl_equal_the_loss_written_out(toy):
    """The second update takes its ratio against the policy before the first, and both the KL
    against the reference: the same by hand, from G copies of each prompt."""
    rows = data.load_rows(str(toy / "rl.jsonl"))[:4]
    config = replace(CONFIG, prompts=4, update_prompts=2, kl_coef=0.5, grad_clip=1e9)
    ours, ref, hand = (VILA.from_pretrained(toy / "init").double() for _ in range(3))
    ref.llm.model.norm.weight.data.mul_(0.7)
    gold = {int(ours.prompt(r).ids.sum()): r.answer for r in rows}
    engine = FixedEngine(VILA.from_pretrained(toy / "init").double(), gold)
    prompts = [hand.prompt(r) for r in rows]
    answers = engine.generate(prompts, 4, Sampling(config.temperature), None)
    optimizer = torch.optim.SGD(ours.llm.parameters(), lr=0.5)
    step_of(ours, ref, engine, optimizer, rows, 0, config)

    scores = [[grpo.reward(a.text, r, config)["reward"] for a in g] for g, r in zip(answers, rows)]
    adv = grpo.advantages(torch.tensor(scores), config)
    groups = [[a.ids for a in g] for g in answers]
    logp = lambda m, i: m(mrsp.pack(*mrsp.copies([prompts[i]], [groups[i]])[:2]), 0.8)[0]  # noqa: E731
    with torch.no_grad():
        old, fixed = [logp(hand, i) for i in range(4)], [logp(ref, i) for i in range(4)]
    optimizer = torch.optim.SGD(hand.llm.parameters(), lr=0.5)
    for update in ((0, 1), (2, 3)):
        total, count = 0.0, 0
        for i in update:
            now, start = logp(hand, i), 0
            for g, ids in enumerate(groups[i]):
                for t in range(start, start + len(ids)):
                    rho, a = (now[t] - old[i][t]).exp(), adv[i, g]
                    clipped = rho.clamp(0.8, 1.3)
                    loss = -torch.min(rho * a, clipped * a)
                    loss = torch.min(loss, -3 * a) if a < 0 else loss
                    d = fixed[i][t] - now[t]
                    total, count = total + loss + 0.5 * (d.exp() - d - 1), count + 1
                start += len(ids)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    start = VILA.from_pretrained(toy / "init").double().llm.state_dict()
    for name, value in ours.llm.state_dict().items():
        assert (value - hand.llm.state_dict()[name]).abs().max() < 1e-6, name
    assert (ours.llm.model.norm.weight - start["model.norm.weight"]).abs().max() > 1e-3


def test_seeds_follow_the_prompt_and_not_the_rank(toy, model):
    rows, seen = data.load_rows(str(toy / "rl.jsonl"))[:5], {}

    class Recorder(TorchEngine):
        def generate(self, prompts, n, sampling, seeds):
            seen.setdefault(self.world, {}).update(zip([p.text for p in prompts], seeds))
            raise StopIteration

    meshes = [mrsp.Mesh(), *(mrsp.Mesh(r, dp=2) for r in (0, 1))]
    meshes += [mrsp.Mesh(r, outer=2) for r in (0, 1)]  # two ranks of a sequence deal its prompts
    for model.mesh in meshes:
        engine = Recorder(model)
        engine.world = model.mesh.dp, model.mesh.sp
        with pytest.raises(StopIteration):
            step_of(model, None, engine, None, rows, 3, CONFIG)
    assert seen[1, 1] == seen[2, 1] == seen[1, 2] and len(set(seen[1, 1].values())) == 5


def test_a_sampler_that_sees_other_weights_stops_training(toy, model):
    rows = data.load_rows(str(toy / "rl.jsonl"))[:4]
    engine = TorchEngine(VILA.from_pretrained(toy / "init"))
    with torch.no_grad():
        engine.policy.llm.model.norm.weight.mul_(3.0)
    optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.0)
    config = replace(CONFIG, prompts=4, update_prompts=4, kl_coef=1e-3, max_mismatch=0.1)
    with pytest.raises(ModelError, match="sampler and trainer.*--grpo.max_mismatch 0.1"):
        step_of(model, model, engine, optimizer, rows, 0, config)
    with torch.no_grad():
        model.llm.model.norm.weight.fill_(torch.nan)  # nan is no agreement either
    with pytest.raises(ModelError, match="trainer by nan"):
        step_of(model, model, engine, optimizer, rows, 0, config)


@pytest.mark.slow
def test_overfitting_24_fixed_prompts_drives_the_reward_to_one(toy, model):
    """From a model that knows the format and guesses: the right letter with 40 %, each other one
    with 20 %."""
    rows = data.load_rows(str(toy / "rl.jsonl"))[:24]
    guesses = [
        replace(r, response=f"<think> guess {x} </think> <answer> {x} </answer>")
        for r in rows for x in "ABCD" + r.answer
    ]  # fmt: skip
    config = sft.SFTConfig(
        steps=120, groups=4, texts=10, train="llm", optimizer="muon", lr=2e-3, muon_lr=0.01
    )
    sft.train(model, guesses, config)
    config = Config(
        prompts=24, update_prompts=24, micro_prompts=24, group=8, top_p=1.0, lr=3e-4,
        weight_decay=0.0, kl_coef=0.0, scale_std=False,
    )  # fmt: skip
    optimizer, engine = torch.optim.AdamW(model.llm.parameters(), lr=3e-4), TorchEngine(model)
    history = []
    for step in range(100):
        metrics = step_of(model, None, engine, optimizer, rows, step, config)
        history.append(metrics["reward"])
        if history[-1] > 0.99:
            break
    assert history[0] < 0.7 and history[-1] > 0.99, history[::10]


def test_every_metric_is_explained(one_rank):
    metrics, _ = one_rank(torch.float32, "token")
    assert set(metrics[0]) <= set(METRICS) and {"reward", "accuracy", "format"} <= set(metrics[0])


# ---------------------------------------------------------------------------------- smoke test

SMALLEST = (
    "--toy.base 8 --toy.sft 4 --toy.rl 8 --toy.test 6 --toy.other 4 --toy.images_stage.steps 2 "
    "--toy.images_stage.groups 8 --toy.base_stage.steps 2 --toy.base_stage.groups 4 "
    "--sft.steps 4 --sft.groups 4 --grpo.steps 2 --grpo.prompts 4 --grpo.update_prompts 2 "
    "--eval.frames 4 8 --recipe.num_frames 8 --recipe.max_tokens 6"
).split()


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_two_ranks_and_its_model_scores_the_same_again(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["train.py", "--output_dir", str(out), "--cache_dir", str(tmp_path / "c"), *SMALLEST]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == set(
        "seed chance sft control grpo questions trained_on lost seconds settings".split()
    )
    assert summary["settings"]["grpo"]["prompts"] == 4 and "recipe" in summary["settings"]
    assert set(summary["grpo"]) >= {
        "accuracy",
        "by_category",
        "by_frames",
        "other_environment",
        "wrong_video",
    }
    assert set(summary["grpo"]["by_frames"]) == {"4", "8"} and summary["questions"] == 30
    assert summary["chance"] == 0.25 and "total" in summary["seconds"]
    stages = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").open()]
    assert stages == ["images"] * 2 + ["base"] * 2 + ["sft"] * 4 + ["grpo"] * 2
    sample = json.loads((out / "samples.jsonl").open().readline())
    assert (
        sample["num_frames"] == 8
        and len(sample["responses"]) == 8
        and {"text", "reward", "accuracy", "format"} <= set(sample["responses"][0])
    )
    for name in ("curves.png", "frames.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for name, stage in (("before", "sft"), ("after", "grpo")):
        answers = [json.loads(line) for line in (out / f"answers_{name}.jsonl").open()]
        assert len({a["problem_id"] for a in answers}) == len(answers) == 30
        assert sum(a["accuracy"] for a in answers) / 30 == summary[stage]["accuracy"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("url(data:image/jpeg") == 6 and all(
        f'"{a["problem_id"]}"' in page for a in answers
    )
    kept = {file.name: file.stat().st_ino for file in (tmp_path / "c").iterdir()}
    command = [sys.executable, "eval.py", "--model", str(out / "model")]
    command += ["--cache_dir", str(tmp_path / "c")]
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert f"accuracy {summary['grpo']['accuracy']:.4f}" in again.stdout, again.stderr[-2000:]
    # evaluation found every embedding that training had computed
    assert kept == {file.name: file.stat().st_ino for file in (tmp_path / "c").iterdir()}
    assert len(kept) > 20 and all(name.endswith(".safetensors") for name in kept)
    assert "after GRPO" in done.stdout and "GRPO" in done.stdout and str(out) in done.stdout
