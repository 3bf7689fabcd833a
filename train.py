"""Train LongVILA-R1: chain-of-thought SFT -> GRPO -> evaluation. The story of a run.

    torchrun --nproc_per_node 2 train.py      the whole pipeline on a toy, on two CPU cores
    torchrun --nproc_per_node 8 train.py --data rows.jsonl --video_dir videos/      GRPO on 8 GPUs,
                                              from a published 7B checkpoint
    python train.py --preset hour --dry_run   its settings, ranks, memory, first prompt; or --help

One GRPO step (section 4 of the paper; grpo_step below tells it in this order):

    rows -> features (cached) -> prompts -> rollout: G answers each       look, rollout.sample
         -> reward -> advantage (B, G)                                    method.reward, .advantages
         -> pack [prompt | r_1 ... r_G] -> log-probs -> loss -> backward  mrsp.py, model.py, .loss
         -> optimizer -> engine.sync

The method is grpo.py, or what `--method FILE.py` puts in its place (kit/method.py). A run starts
from a checkpoint and rows; the preset "toy" makes its own first (kit/toy.py). SFT runs if
--sft_data names rows, evaluation if --test_data does.

Ranks = dp x sp (mrsp.Mesh). The sp ranks of a sequence encode its video together, sample for some
of its prompts each, and train their share of its tokens; the dp groups take every dp-th prompt of
a batch. Gradients are summed over all ranks and the loss is divided by global counts, so that any
number of ranks trains the same model. --fsdp shards the parameters over all of them.

Outputs (--output_dir): report.html (every test question with its frames, before and after RL),
summary.json, metrics.jsonl (kit/run.METRICS explains each), samples.jsonl, answers_*.jsonl,
lost.jsonl (rows left out), curves.png, frames.png, and the checkpoints sft/ and model/.

B groups of a pass, G answers a prompt, R tokens of the longest, M target tokens of all.
Check this file alone:  pytest tests/test_train.py
"""

import math
from dataclasses import asdict, dataclass, field

import torch

import grpo
import mrsp
import sft
from data import DataError, Example
from eval import evaluate, swap_media
from kit import plan, report, toy
from kit.actors import Actors, begin_grpo, make_actors
from kit.method import Method
from kit.presets import read_settings
from kit.ranks import find_ranks, reported
from kit.run import EMPTY, Meter, Run, check_mismatch
from kit.vllm_engine import engine_kind
from model import Prompt
from rollout import Response, sample

# ------------------------------------------------------------------------------ one GRPO step


@dataclass
class Group:
    """A prompt of the batch, and what becomes of it."""

    example: Example
    prompt: Prompt
    seed: int  # of its sampling
    update: int  # which optimizer step of the batch trains it
    answers: list[Response] = field(default_factory=list)  # G
    grades: list[dict] = field(default_factory=list)  # G, the parts of each reward
    advantage: torch.Tensor | None = None  # (G,)
    trained: bool = True  # does it teach anything?


@dataclass
class Pass:
    """One forward pass: some groups in one pack, of which this rank holds its share. A pass without
    groups is the smallest pack there is under a mask of zeros: it has a loss of 0."""

    share: mrsp.Share
    mask: torch.Tensor  # (B, G, R): 1.0 at the tokens of answers
    advantage: torch.Tensor  # (B, G)
    fixed: dict  # sampler_logp and, where needed, old_logp and ref_logp: (B, G, R) each

    def log_probs(self, model, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the answers' tokens, (B, G, R) each: stage 2 of MR-SP. All
        ranks of a sequence have all of them, and the same loss, but each the gradient of its own
        tokens alone (mrsp.collect): summed over ranks, each token counts once."""
        logp, entropy = model.policy(self.share, temperature)  # (M,) each
        return self.share.pack.pad(logp)[0], self.share.pack.pad(entropy)[0]


def grpo_step(a: Actors, batch: list, step: int, soon: list = ()) -> tuple[dict, list[Group]]:
    """One rollout batch and its updates. batch: the Examples of all ranks; soon: the next batch.
    Returns the step's metrics, equal on all ranks, and the groups of this rank's sequence."""
    c, model, engine = a.config, a.model, a.engine
    meter = Meter(model.mesh)  # sums, and means under a mask; read() puts all ranks' together

    # 1. Rollout: one Prompt for sampler, policy and reference; G answers to each.
    with meter.clock("seconds_encode"):
        groups = look(a, batch, soon, step, meter)  # stage 1 of MR-SP
    with meter.clock("seconds_rollout"):
        before = engine.prefilled
        prompts = [group.prompt for group in groups]
        seeds = [group.seed for group in groups]
        answers = sample(engine, prompts, seeds, c.group, a.sampling, model.mesh)
        meter.total("prompt_tokens", c.group * sum(len(prompt.ids) for prompt in prompts))
        meter.own("prefilled_tokens", (engine.prefilled - before) / engine.tp)

        # 2. Reward and advantage, of each group by itself (timed with the rollout).
        grade(a, groups, answers, meter)

    # 3. Pack the groups of each update; old and reference log-probs, before any weight changes.
    with meter.clock("seconds_train"):
        model.train()
        updates = []
        for u in range(math.ceil(len(batch) / c.update_prompts)):
            own = [group for group in groups if group.update == u]
            passes = make_passes(a, own, meter, on_policy=u == 0)
            updates.append((passes, count(own, model.mesh)))

        # 4. Loss, backward, optimizer step.
        for u, (passes, totals) in enumerate(updates):
            for one in passes:
                logp, entropy = one.log_probs(model, c.temperature)  # stage 2 of MR-SP
                loss, seen = a.method.loss(logp, one.advantage, one.mask, c, **one.fixed, **totals)
                loss.backward()
                meter.total("loss", loss.item() / len(updates))
                for name, values in (seen | {"entropy": entropy}).items():
                    meter.mean(name, values, one.mask)
                if u == 0:  # before anything has changed: sampler and trainer must agree
                    gap = (logp - one.fixed["sampler_logp"]).abs() * one.mask
                    meter.mean("mismatch_mean", gap, one.mask)
                    meter.largest("mismatch_max", gap)
            if u == 0:
                check_mismatch(meter.read(), c)
            meter.mean("grad_norm", update(a))
    with meter.clock("seconds_sync"):
        engine.sync(model)
    meter.cache(model.cache)
    return EMPTY | meter.read() | {"lr": c.lr}, groups


def look(a: Actors, batch: list, soon: list, step: int, meter: Meter) -> list[Group]:
    """Stage 1 of MR-SP: the prompts that this rank's sequence trains, every dp-th row of an update.
    Rows whose media do not decode are left out, and counted; `a.lost` None: they end the run."""
    model, mesh, size = a.model, a.model.mesh, a.config.update_prompts

    def deal(rows: list) -> list[tuple[int, Example]]:
        """[(place in the batch, row)] for this sequence."""
        numbered = list(enumerate(rows))
        chunks = [numbered[i : i + size] for i in range(0, len(rows), size)]
        return [pair for chunk in chunks for pair in chunk[mesh.dp_rank :: mesh.dp]]

    def see(examples: list) -> list[Prompt]:
        return [model.prompt(e, group=mesh.sp_group) for e in examples]

    dealt = deal(batch)
    model.prefetch([e for _, e in dealt + deal(soon)], group=mesh.sp_group)  # opened beforehand
    _, prompts = model.usable([e for _, e in dealt], see, a.lost)  # the others are in a.lost now
    kept = [(i, e) for i, e in dealt if not a.lost or e not in a.lost]
    meter.total("lost_rows", len(dealt) - len(kept))
    base = (a.seed * 10**6 + step) * 10**6  # seeds follow the prompt, not the rank
    paired = zip(kept, prompts, strict=True)
    return [Group(e, prompt, base + i, i // size) for (i, e), prompt in paired]


def grade(a: Actors, groups: list[Group], answers: list, meter: Meter) -> None:
    """The reward of every answer with its parts, and each group's advantages (G,). A group without
    an advantage teaches nothing, unless there is a KL term."""
    thinking = a.model.recipe.thinking
    rewards = torch.zeros(len(groups), a.config.group)
    for group, own, row in zip(groups, answers, rewards):
        group.answers = own
        for g, answer in enumerate(own):
            text = grpo.graded(answer.text, thinking)
            parts = a.method.reward(text, group.example, a.config)
            group.grades.append(parts)
            row[g] = parts["reward"]
            for name, value in parts.items():
                meter.mean(name, value)
            meter.mean("length", len(answer.ids))
            meter.mean("finished", answer.finished)
    advantages = a.method.advantages(rewards, a.config)  # (groups, G)
    informative = grpo.informative(advantages)
    meter.total("skipped_groups", (~informative).sum())
    for group, advantage, some in zip(groups, advantages, informative):
        group.advantage = advantage
        group.trained = bool(some) or a.config.kl_coef > 0


def count(groups: list[Group], mesh: mrsp.Mesh) -> dict[str, int]:
    """Tokens and answers of an update over all ranks; those of a sequence hold the same. Groups
    that teach nothing count: leaving them out of the packs changes nothing but the time."""
    answers = [answer for group in groups for answer in group.answers]
    own = torch.tensor([sum(len(answer.ids) for answer in answers), len(answers)])
    tokens, sequences = (mrsp.all_sum(own) // mesh.sp).tolist()
    return {"total_tokens": tokens, "total_sequences": sequences}


@torch.no_grad()
def make_passes(a: Actors, groups: list[Group], meter: Meter, on_policy: bool) -> list[Pass]:
    """The forward passes of an update: micro_prompts groups each, with the log-probs of the old
    policy and of the reference where they are needed. With sharded parameters all ranks have to run
    equally many passes: some are without groups."""
    size, temperature = a.config.micro_prompts, a.config.temperature
    trained = [group for group in groups if group.trained]
    chunks = [trained[i : i + size] for i in range(0, len(trained), size)]
    passes = []
    for chunk in mrsp.even(chunks, [], a.model.sharded):
        pack, advantage, sampled = a.model.idle(), torch.zeros(1, 1), torch.zeros(1)
        if chunk:
            ids = [[answer.ids for answer in group.answers] for group in chunk]
            pack = mrsp.pack([group.prompt for group in chunk], ids)
            advantage = torch.stack([group.advantage for group in chunk])
            sampled = torch.cat([answer.logps for group in chunk for answer in group.answers])
        share = mrsp.shard(pack, a.model.mesh)
        sampled, mask = pack.pad(sampled.to(pack.ids.device))  # (B, G, R) each
        mask = mask * bool(chunk)
        meter.total("tokens", mask.sum())
        one = Pass(share, mask, advantage.to(mask.device), {"sampler_logp": sampled})
        if not on_policy:  # in the first update the old policy is the policy itself
            one.fixed["old_logp"] = one.log_probs(a.model, temperature)[0]
        if a.config.kl_coef:
            with a.referring() as reference:
                one.fixed["ref_logp"] = one.log_probs(reference, temperature)[0]
        passes.append(one)
    return passes


def update(a: Actors) -> float:
    """One optimizer step; returns the norm of the gradient before clipping, over all ranks; not
    finite: an error. Without a gradient no step: momentum and weight decay alone would move."""
    trained = [p for p in a.model.parameters() if p.requires_grad]
    norm = mrsp.join_gradients(trained, a.config.grad_clip)
    if norm > 0:
        a.optimizer.step()
    a.optimizer.zero_grad()
    return norm


# ------------------------------------------------------------------------------- the stages


def train_grpo(run: Run, a: Actors, rows: list) -> None:
    """config.steps rollout batches, each logged; every show_every-th with a decoded question."""
    c = a.config
    begin_grpo(a)  # the policy as it is now becomes sampler and reference; its optimizer is made
    batches = [*sft.batches(rows, c.prompts, c.steps, a.seed), []]
    seen = 0  # prompt tokens
    bar = run.bar("grpo", c.steps)(range(c.steps))
    for step in bar:
        metrics, groups = grpo_step(a, batches[step], step, soon=batches[step + 1])
        run.write("metrics.jsonl", {"stage": "grpo", "step": step} | metrics)
        seen += metrics["prompt_tokens"]
        bar.set_postfix(accuracy=round(metrics["accuracy"], 2))
        if groups and (step % run.settings.more.show_every == 0 or step + 1 == c.steps):
            run.show(a.model, step, groups[0])
    if not seen:
        raise DataError("GRPO had no row to learn from: all were left out, as said above")
    a.model.merge_adapters()


def pipeline(run: Run, method: Method, kind: str) -> dict:
    """Every stage in order. Returns the summary."""
    s = run.settings
    rl = run.rows(s.run.data)
    taught = run.rows(s.run.sft_data) if s.run.sft_data else []
    test = run.rows(s.run.test_data) if s.run.test_data else []
    a = make_actors(run, method, kind)
    found = run.describe(test, rl + taught)

    def test_on(rows: list, name: str, file: str = "", **how) -> dict:
        """Greedy answers to rows, graded; as eval.py does it. file: of the run, for the answers."""
        with run.stage("eval"):
            a.engine.sync(a.model)
            how |= {"ranks": run.ranks, "bar": f"eval {name}"}
            result = evaluate(a.model, a.engine, rows, method, **how)
            a.engine.sleep()
            for record in result["records"] if file else ():
                run.write(file, record)
        return {key: result[key] for key in ("accuracy", "by_category")}

    # 1. Chain-of-thought SFT.
    if taught:
        run.supervised(a.model, taught, s.sft, "sft")
        run.save(a.model, "sft")
    if test:
        found["sft"] = test_on(test, "before GRPO", "answers_before.jsonl")
        if s.eval.prefill:
            found["control"] = test_on(test, "control", prefill=s.eval.prefill)
    # 2. GRPO.
    with run.stage("grpo"):
        train_grpo(run, a, rl)
    run.save(a.model, "model")
    # 3. Evaluation, and what else is asked (EvalConfig).
    if test:
        found["grpo"] = after = test_on(test, "after GRPO", "answers_after.jsonl")
        if s.eval.frames:
            curve = {str(n): test_on(test, f"{n} frames", num_frames=n) for n in s.eval.frames}
            after["by_frames"] = {n: result["accuracy"] for n, result in curve.items()}
        if s.eval.other_data:
            others = run.rows(s.eval.other_data)
            after["other_environment"] = test_on(others, "other environment")["accuracy"]
        if s.eval.wrong_media:
            after["wrong_video"] = test_on(swap_media(test), "wrong video")["accuracy"]
    a.engine.close()
    found["lost"] = run.list_lost()
    return found | {"seconds": run.seconds | {"total": run.age}, "settings": asdict(s)}


def main(argv=None) -> dict | None:
    """Settings, checks, all stages, the report."""
    with reported():
        settings, method, notes = read_settings(argv)
        ranks = find_ranks()
        if settings.run.dry_run:
            return plan.show(settings, notes, ranks)
        kind = engine_kind(settings.run.rollout, settings.for_gpus)
        lines = plan.check(settings, ranks)  # before anything large is loaded or written
        ranks.join(alone=settings.ranks.fsdp or kind == "vllm")
        with Run(settings, ranks) as run:
            run.start_logs()
            if settings.makes_toy:  # its data and its checkpoint
                run.settings = toy.prepare(run)
                lines = plan.check(run.settings, ranks)
            run.say("\n".join(notes + lines))
            summary = pipeline(run, method, kind)
            ranks.leave()
            if ranks.rank == 0:  # the others need not wait while videos are decoded for it
                report.finish(run, summary)
            return summary


if __name__ == "__main__":
    main()
