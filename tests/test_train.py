"""The whole run: options, one GRPO step on one and two ranks, learning, the smoke test."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from conftest import read_jsonl, run_ranks, says

import data
import grpo
import mrsp
import sft
import train
from families import load
from families.vila import VILA
from grpo import Config
from kit.actors import Actors, begin_grpo, make_actors
from kit.method import Method
from kit.presets import read_settings
from kit.ranks import Ranks
from kit.run import METRICS, Run
from model import ModelError
from rollout import Response, Sampling, TorchEngine, copy_policy

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
                group.append(Response(ids, torch.zeros(length), says(right), True))
            packed = mrsp.pack([prompt], [[r.ids for r in group]])
            own = self.policy.model if isinstance(self.policy, TorchEngine) else self.policy
            with torch.no_grad():  # by this rank alone: the others sample for other prompts
                logps, _ = own.policy(mrsp.shard(packed, mrsp.Mesh()), sampling.temperature)
            logps = logps.split([len(r.ids) for r in group])
            wrong = 0.01 * (key % 3)  # a mismatch that differs from prompt to prompt
            out.append([replace(r, logps=x + wrong) for r, x in zip(group, logps, strict=True)])
        return out

    def sync(self, model):
        if isinstance(self.policy, TorchEngine):
            self.policy.sync(model)

    def sleep(self):
        pass


def gold_of(model, rows, wrong=0) -> dict:
    """What FixedEngine takes for right, by prompt; nothing for the first `wrong` rows."""
    letters = ["Z"] * wrong + [row.answer for row in rows[wrong:]]
    return {int(model.prompt(row).ids.sum()): x for row, x in zip(rows, letters)}


def step_of(model, reference, engine, optimizer, batch, step, config, **more):
    """One GRPO step -> its metrics; more: of Actors."""
    method = more.pop("method", None) or Method()
    actors = Actors(model, reference, engine, optimizer, method, config, **more)
    return train.grpo_step(actors, batch, step)[0]


def rows_of(folder, count: int) -> list:
    return data.load_rows(f"{folder}/rl.jsonl")[:count]


def untrained(folder, dtype=torch.float64) -> VILA:
    return load(f"{folder}/init").to(dtype)


def at_most(count: int, **more) -> Config:
    """CONFIG for one update of this many prompts, without KL unless `more` says so."""
    return replace(CONFIG, **{"prompts": count, "update_prompts": count, "kl_coef": 0.0} | more)


def sgd(model, lr=0.0):
    return torch.optim.SGD(model.policy.parameters(), lr)


CONFIG = Config(
    prompts=5, update_prompts=3, micro_prompts=2, group=4, temperature=0.8, lr=1e-4, kl_coef=0.1
)


def three_steps(folder, dtype, average, sp=1, fsdp=False):
    """Three GRPO steps (two updates each, the second off-policy) -> metrics, parameters."""
    torch.set_num_threads(1)
    rows = rows_of(folder, 15)
    model, reference = untrained(folder, dtype), untrained(folder, dtype).requires_grad_(False)
    with torch.no_grad():  # so that the KL term is not zero
        reference.policy.model.norm.weight.mul_(0.7)
    model.tower.requires_grad_(False)
    model.projector.requires_grad_(False)
    model.mesh = reference.mesh = mrsp.make_mesh(sp, "auto", 4, 2)
    sampler = model
    if fsdp:
        sampler = TorchEngine(model, dtype=dtype)
        model.enable_gradient_checkpointing()
        model.shard_parameters(dtype)
        reference.shard_parameters(dtype)
    engine = FixedEngine(sampler, gold_of(model, rows))
    optimizer = torch.optim.AdamW(model.policy.parameters(), lr=CONFIG.lr)
    seen = []
    for step in range(3):
        batch = rows[step * 5 : step * 5 + (5, 5, 1)[step]]
        config = replace(CONFIG, average=average)
        metrics = step_of(model, reference, engine, optimizer, batch, step, config)
        seen.append({k: v for k, v in metrics.items() if not k.startswith("seconds")})
    return seen, {k: mrsp.whole(v).detach().clone() for k, v in model.policy.state_dict().items()}


def _rank(rank, folder, dtype, average, sp, fsdp, out):
    torch.save(three_steps(folder, dtype, average, sp, fsdp), f"{out}/{rank}.pt")


@pytest.fixture(scope="session")
def one_rank(toy):
    """three_steps in one process, computed once for each setting."""
    return cache(partial(three_steps, toy))


SLOW = pytest.mark.slow
DOUBLE, SINGLE = (torch.float64, 1e-9), (torch.float32, 1e-5)
RANKS = [  # world, sp, fsdp, (dtype, tolerance), average
    (2, 2, True, DOUBLE, "token"),
    pytest.param(2, 1, False, DOUBLE, "sequence", marks=SLOW),
    pytest.param(2, 1, False, DOUBLE, "token", marks=SLOW),
    pytest.param(2, 1, False, SINGLE, "token", marks=SLOW),
    pytest.param(2, 2, False, DOUBLE, "sequence", marks=SLOW),
    pytest.param(2, 1, True, DOUBLE, "token", marks=SLOW),
    pytest.param(4, 2, True, DOUBLE, "token", marks=SLOW),
    pytest.param(2, 2, True, SINGLE, "token", marks=SLOW),
]


@pytest.mark.parametrize("world, sp, fsdp, precision, average", RANKS)
def test_many_ranks_train_like_one(toy, one_rank, tmp_path, world, sp, fsdp, precision, average):
    """Same loss, gradient norm, metrics and parameters after three steps; 5 prompts on 2 ranks in
    updates of 3 and 2, answers of 1 to 8 tokens; in the last step rank 1 has no prompt."""
    dtype, tolerance = precision
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


@pytest.mark.parametrize("thinking", [True, False])
def test_bare_answers_earn_their_reward_in_non_thinking_mode(toy, thinking):
    model, rows = untrained(toy, torch.float32), rows_of(toy, 2)
    model.recipe = replace(model.recipe, thinking=thinking)

    class Letters(TorchEngine):
        def generate(self, prompts, n, *rest):
            out = super().generate(prompts, n, *rest)
            return [[replace(r, text="ABCD"[g]) for g, r in enumerate(group)] for group in out]

    metrics = step_of(model, None, Letters(model), sgd(model), rows, 0, at_most(2))
    assert (metrics["accuracy"], metrics["format"]) == ((0, 0) if thinking else (0.25, 1))


def test_groups_of_equal_reward_are_skipped_and_counted_and_change_nothing(toy):
    """The same step with all groups packed (a KL weight of 1e-15 keeps them) moves the same way."""
    rows, after, packed = rows_of(toy, 4), [], []
    for kl_coef in (0.0, 1e-15):
        model = untrained(toy)
        engine = FixedEngine(untrained(toy), gold_of(model, rows, wrong=2))
        model.policy.register_forward_pre_hook(lambda m, args: packed.append(len(args[0].ids)))
        config = at_most(4, micro_prompts=8, kl_coef=kl_coef)
        metrics = step_of(model, untrained(toy), engine, sgd(model, 1.0), rows, 0, config)
        assert metrics["skipped_groups"] == 2 and metrics["grad_norm"] > 1e-3
        after.append({k: v.detach().clone() for k, v in model.policy.state_dict().items()})
    assert packed == [2, 4]  # one pass each: none for the old log-probs
    for name, value in after[0].items():
        assert (value - after[1][name]).abs().max() < 1e-9, name


def test_a_batch_that_teaches_nothing_changes_nothing(toy):
    """Nor does momentum, or weight decay."""
    model, rows = untrained(toy), rows_of(toy, 2)
    optimizer = torch.optim.AdamW(model.policy.parameters(), lr=0.1, weight_decay=0.5)
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    for wrong in (0, 2):  # of 2 rows: the first step moves, the second has no advantage
        engine = FixedEngine(untrained(toy), gold_of(model, rows, wrong))
        config = at_most(2, mean_mismatch=99, max_mismatch=99)
        metrics = step_of(model, None, engine, optimizer, rows, 0, config)
        now = {k: v.clone() for k, v in model.policy.state_dict().items()}
        same = all(torch.equal(now[name], before[name]) for name in now)
        assert same == (wrong == 2) == (metrics["grad_norm"] == 0)
        before = now


@pytest.mark.parametrize("kl, lora, copied", [(0.1, 0, True), (0.0, 0, False), (0.1, 2, False)])
def test_a_reference_of_its_own_is_made_where_it_is_needed(toy, tmp_path, kl, lora, copied):
    line = f"--preset small --model {toy}/init --output_dir {tmp_path} --checkpointing false "
    line += f"--grpo.kl_coef {kl} --grpo.lora_rank {lora}"
    settings, method, _ = read_settings(line.split())
    with Run(settings, Ranks()) as run:
        actors = make_actors(run, method, "torch")
    assert (actors.reference is not None) == copied
    assert isinstance(actors.engine, TorchEngine) and actors.engine.model is actors.model
    if copied:
        own = {id(p) for p in actors.model.policy.parameters()}
        assert not own & {id(p) for p in actors.reference.policy.parameters()}
        assert actors.reference.tower is actors.model.tower  # nothing else is copied
    begin_grpo(actors)
    with actors.referring() as reference:
        assert reference is (actors.model if lora else actors.reference)


def test_grpo_begins_with_sampler_and_reference_as_the_policy_is_then(toy):
    model = untrained(toy, torch.float32)
    engine, reference = TorchEngine(model, dtype=torch.float32), copy_policy(model, torch.float32)
    with torch.no_grad():
        model.policy.model.norm.weight.mul_(1.5)  # as SFT would
    actors = Actors(model, reference, engine, None, Method(), CONFIG)
    begin_grpo(actors)
    for other in (engine.model, reference):
        assert other.policy.model.norm.weight.equal(model.policy.model.norm.weight)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.policy.parameters()}
    assert {id(p) for p in actors.optimizer.param_groups[0]["params"]} == trained
    assert not any(p.requires_grad for p in reference.policy.parameters())


def test_two_updates_with_kl_equal_the_loss_written_out(toy):
    """The second update takes its ratio against the policy before the first, and both the KL
    against the reference: the same by hand, from G copies of each prompt."""
    rows, config = rows_of(toy, 4), at_most(4, update_prompts=2, kl_coef=0.5, grad_clip=1e9)
    ours, ref, hand, start = (untrained(toy) for _ in range(4))
    ref.policy.model.norm.weight.data.mul_(0.7)
    engine = FixedEngine(start, gold_of(ours, rows))
    prompts = [hand.prompt(r) for r in rows]
    answers = engine.generate(prompts, 4, Sampling(config.temperature), None)
    step_of(ours, ref, engine, sgd(ours, 0.5), rows, 0, config)

    scores = [[grpo.reward(a.text, r, config)["reward"] for a in g] for g, r in zip(answers, rows)]
    adv = grpo.advantages(torch.tensor(scores), config)
    groups = [[a.ids for a in g] for g in answers]

    def logp(policy, i):
        return policy(mrsp.pack(*mrsp.copies([prompts[i]], [groups[i]])[:2]), 0.8)[0]

    with torch.no_grad():
        old, fixed = [logp(hand, i) for i in range(4)], [logp(ref, i) for i in range(4)]
    optimizer = sgd(hand, 0.5)
    for update in ((0, 1), (2, 3)):
        losses = []
        for i in update:
            a = torch.cat([adv[i, g].expand(len(ids)) for g, ids in enumerate(groups[i])])
            now = logp(hand, i)
            rho, d = (now - old[i]).exp(), fixed[i] - now
            loss = -torch.min(rho * a, rho.clamp(0.8, 1.3) * a)
            loss = torch.where(a < 0, torch.min(loss, -3 * a), loss)
            losses.append(loss + 0.5 * (d.exp() - d - 1))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    for name, value in ours.policy.state_dict().items():
        assert (value - hand.policy.state_dict()[name]).abs().max() < 1e-6, name
    moved = ours.policy.model.norm.weight - start.policy.model.norm.weight
    assert moved.abs().max() > 1e-3


def test_seeds_follow_the_prompt_and_not_the_rank(toy, model):
    rows, seen = rows_of(toy, 5), {}

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
    engine = TorchEngine(untrained(toy, torch.float32))
    config = at_most(4, kl_coef=1e-3, max_mismatch=0.1)  # with KL, no group is left out
    for norm, factor, message in (
        (engine.model.policy.model.norm, 3.0, "sampler and trainer.*--grpo.max_mismatch 0.1"),
        (model.policy.model.norm, torch.nan, "trainer by nan"),  # nan is no agreement either
    ):
        norm.weight.data.mul_(factor)
        with pytest.raises(ModelError, match=message):
            step_of(model, model, engine, sgd(model), rows_of(toy, 4), 0, config)


def all_at_once(n: int) -> Config:
    return Config(prompts=n, update_prompts=n, micro_prompts=n, group=8, top_p=1.0, kl_coef=0.0)


def test_a_reward_that_differs_from_prompt_to_prompt_rises(toy, model):
    """From random weights: every other prompt is rewarded for words of even length, the rest for
    words of odd length; at first about half of the words are."""
    rows = data.load_rows(str(toy / "rl.jsonl"))[::6]
    model.recipe = replace(model.recipe, max_tokens=4)

    def reward(text, example, config):
        right = [len(word) % 2 == rows.index(example) % 2 for word in text.split()]
        return {"reward": sum(right) / max(len(right), 1), "accuracy": 0.0, "format": 0.0}

    method, config = Method(), all_at_once(len(rows))
    method.names["reward"] = reward
    optimizer, engine = torch.optim.AdamW(model.policy.parameters(), lr=3e-3), TorchEngine(model)
    history = []
    while len(history) < 40 and (not history or history[-1] < 0.95):
        found = step_of(model, None, engine, optimizer, rows, len(history), config, method=method)
        history.append(found["reward"])
    assert history[0] < 0.65 and history[-1] >= 0.95, history


@SLOW
def test_overfitting_24_fixed_prompts_drives_the_reward_to_one(toy, model):
    """From a model that knows the format and guesses: the right letter with 40 %, each other one
    with 20 %."""
    rows = rows_of(toy, 24)
    guess = "<think> guess {0} </think> <answer> {0} </answer>"
    guesses = [replace(r, response=guess.format(x)) for r in rows for x in "ABCD" + r.answer]
    config = sft.SFTConfig(
        steps=120, groups=4, texts=10, train="llm", optimizer="muon", lr=2e-3, muon_lr=0.01
    )
    sft.train(model, guesses, config)
    config = replace(all_at_once(24), scale_std=False)
    optimizer, engine = torch.optim.AdamW(model.policy.parameters(), lr=3e-4), TorchEngine(model)
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
# Muon computes in bfloat16, which is slow on most CPUs.
SMALLER = (
    "--toy.base 2 --toy.sft 2 --toy.rl 4 --toy.test 2 --toy.other 2 --toy.images_stage.groups 2 "
    "--toy.base_stage.groups 2 --toy.images_stage.optimizer adamw --sft.optimizer adamw "
    "--toy.base_stage.optimizer adamw"
).split()


def check_files(out, questions: int) -> dict:
    """What a run of SMALLEST leaves in its folder, in numbers and in pictures -> its summary."""
    summary = json.loads((out / "summary.json").read_text())
    names = "seed chance sft control grpo questions trained_on lost seconds settings"
    assert set(summary) == set(names.split()) and summary["questions"] == questions
    assert summary["settings"]["grpo"]["prompts"] == 4 and "recipe" in summary["settings"]
    scores = {"accuracy", "by_category", "by_frames", "other_environment", "wrong_video"}
    assert set(summary["grpo"]) >= scores and set(summary["grpo"]["by_frames"]) == {"4", "8"}
    assert summary["chance"] == 0.25 and "total" in summary["seconds"]
    stages = [line["stage"] for line in read_jsonl(out / "metrics.jsonl")]
    assert stages == ["images"] * 2 + ["base"] * 2 + ["sft"] * 4 + ["grpo"] * 2
    sample = read_jsonl(out / "samples.jsonl")[0]
    assert sample["num_frames"] == 8 and len(sample["responses"]) == 8
    assert {"text", "reward", "accuracy", "format"} <= set(sample["responses"][0])
    for name in ("curves.png", "frames.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    for name, stage in (("before", "sft"), ("after", "grpo")):
        answers = read_jsonl(out / f"answers_{name}.jsonl")
        assert len({a["problem_id"] for a in answers}) == len(answers) == questions
        assert sum(a["accuracy"] for a in answers) / questions == summary[stage]["accuracy"]
        assert all(f'"{a["problem_id"]}"' in page for a in answers)
    return summary


def test_a_run_of_the_toy_leaves_its_numbers_pictures_and_answers(tmp_path, capsys):
    out = tmp_path / "run"
    where = ["--output_dir", str(out), "--cache_dir", str(tmp_path / "c")]
    train.main([*where, *SMALLEST, *SMALLER])
    check_files(out, 10)
    assert "after GRPO" in capsys.readouterr().out


@SLOW
def test_the_whole_pipeline_runs_on_two_ranks_and_its_model_scores_the_same_again(tmp_path):
    out, cache = tmp_path / "run", tmp_path / "c"

    def python(command: str, *options):
        """What it prints."""
        words = [sys.executable, *command.split(), *options, "--cache_dir", str(cache)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 train.py --output_dir"
    printed = python(launch, str(out), *SMALLEST)
    summary = check_files(out, 30)
    assert (out / "report.html").read_text(encoding="utf-8").count("url(data:image/jpeg") == 6
    kept = {file.name: file.stat().st_ino for file in cache.iterdir()}
    again = python("eval.py --model", str(out / "model"))
    assert f"accuracy {summary['grpo']['accuracy']:.4f}" in again
    # evaluation found every embedding that training had computed
    assert kept == {file.name: file.stat().st_ino for file in cache.iterdir()}
    assert len(kept) > 20 and all(name.endswith(".safetensors") for name in kept)
    assert "after GRPO" in printed and str(out) in printed
