"""A run: its files, clocks and metrics. Nothing of the method.

    a step's numbers of all ranks    Meter      sums, means under a mask, seconds -> one dict
    runs/NAME/*.jsonl                Run        logs, stages, rows that were left out

Check this file alone:  pytest tests/test_run.py
"""

import json
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import mrsp
import sft
from data import DataError
from families import load
from kit.decode import Loader
from kit.ranks import Ranks
from model import ModelError, MultiModal

# ------------------------------------------------------------------------------------- metrics

METRICS = {
    "loss": "supervised: mean negative log-likelihood; GRPO: the policy loss (near 0 on-policy)",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of AdamW at this step",
    "tokens": "target tokens of the step, over all ranks",
    "reward": "mean reward of all sampled answers; so for every part that a reward has",
    "accuracy": "share of sampled answers that are right (a part of the reward)",
    "format": "share of sampled answers in the <think> <answer> format (a part of the reward)",
    "length": "mean tokens of an answer",
    "finished": "share of answers that ended by themselves, not at max_tokens",
    "lost_rows": "rows of the batch left out because their media do not decode (--on_bad_video)",
    "skipped_groups": "prompts whose answers all have advantage 0: they teach nothing",
    "clip_fraction": "share of trained tokens whose gradient a clip cut off; 0 on-policy",
    "kl": "mean k3 estimate of KL(policy || reference); 0 if the coefficient is 0",
    "ratio_error": "mean |ratio - 1| at the trained tokens; 0 on-policy",
    "tis_weight": "mean importance weight of trained tokens (--grpo.tis_cap); 1 without",
    "entropy": "mean entropy (nats) of the policy at the trained tokens",
    "mismatch_mean": "mean |log-prob of the sampler - log-prob of the trainer|, first update",
    "mismatch_max": "the largest of those; near 0, or sampler and trainer see different inputs",
    "prompt_tokens": "prompt tokens of all answers sampled: each answer has its prompt's",
    "prefilled_tokens": "those that were computed: the answers of a prompt share one prefill",
    "cache_hits": "embeddings found in the cache since the start; of a sequence one rank counts",
    "cache_misses": "embeddings that had to be computed",
    "cache_bytes": "embeddings held in memory now, by one rank of each sequence",
    "seconds_encode": "decoding and encoding, or reading embeddings",
    "seconds_rollout": "sampling, and rewards",
    "seconds_train": "log-probs, backward, optimizer",
    "seconds_sync": "new weights to the sampler",
}

# What a step says in which all rows were left out; "format" only where a reward has that part.
EMPTY = {name: 0.0 for name in METRICS if name != "format"}


class Meter:
    """The numbers of one step, collected on each rank and put together by read().

        mean      of values, or of those under a mask, over all ranks (a rank without any: weight 0)
        total     over all ranks; what the ranks of a sequence share counts once
        own       over all ranks; what each rank did by itself
        largest   over all ranks; nan if one is nan
        clock     seconds of a block, mean over ranks

    >>> meter = Meter(mrsp.Mesh())
    >>> meter.mean("kl", torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))
    >>> meter.total("tokens", 2)
    >>> meter.read()
    {'kl': 2.0, 'tokens': 2.0}
    """

    def __init__(self, mesh: mrsp.Mesh):
        self.mesh = mesh
        self.sums = defaultdict(lambda: [0.0, 0.0])  # name: sum, weight (0: a plain sum)
        self.most = {}

    def mean(self, name: str, values, mask=None) -> None:
        values = torch.as_tensor(values, dtype=torch.float64)
        mask = torch.ones_like(values) if mask is None else mask.to(values)
        self.sums[name][0] += (values.detach() * mask).sum().item()
        self.sums[name][1] += mask.sum().item()

    def total(self, name: str, value: float) -> None:
        self.own(name, float(value) / self.mesh.sp)

    def own(self, name: str, value: float) -> None:
        self.sums[name][0] += float(value)

    def largest(self, name: str, values) -> None:
        found = torch.as_tensor(values, dtype=torch.float64).detach().max().item()
        self.most[name] = maximum([self.most.get(name, 0.0), found])

    def cache(self, cache: mrsp.EmbeddingCache) -> None:
        """Its counters, since the start of the run."""
        for name in ("hits", "misses", "bytes"):
            self.total(f"cache_{name}", getattr(cache, name))

    @contextmanager
    def clock(self, name: str):
        start = time.time()
        yield
        self.sums[name][0] += time.time() - start
        self.sums[name][1] = 1.0  # one value of this rank, however often it runs

    def read(self) -> dict[str, float]:
        """All numbers so far, equal on all ranks. One exchange of a small dict from each rank."""
        every = [(dict(self.sums), self.most)]
        if not mrsp.alone():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, (dict(self.sums), self.most))
        found = {}
        for name in sorted({name for sums, _ in every for name in sums}):
            value = sum(sums[name][0] for sums, _ in every if name in sums)
            weight = sum(sums[name][1] for sums, _ in every if name in sums)
            found[name] = value / weight if weight else value
        for name in sorted({name for _, most in every for name in most}):
            found[name] = maximum([most[name] for _, most in every if name in most])
        return found


def maximum(values: list[float]) -> float:
    """The largest, or nan if one is nan (which max() would pass over)."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def check_mismatch(metrics: dict, config) -> None:
    """ModelError, on all ranks alike, if the sampler's log-probs are not the trainer's."""
    mean, most = metrics.get("mismatch_mean", 0.0), metrics.get("mismatch_max", 0.0)
    if not (mean <= config.mean_mismatch and most <= config.max_mismatch):  # nan is no agreement
        raise ModelError(
            "log-probs of the sampled tokens differ between sampler and trainer by "
            f"{mean:.3g} on average, {most:.3g} at most (limits --grpo.mean_mismatch "
            f"{config.mean_mismatch}, --grpo.max_mismatch {config.max_mismatch}): they see "
            "different inputs or weights, or compute in too different a precision"
        )


# --------------------------------------------------------------------------------------- a run


class Run:
    """The files, clocks and media of a training run: everything around the method."""

    LOGS = ("metrics", "samples", "lost", "answers_before", "answers_after")

    def __init__(self, settings, ranks: Ranks):
        """settings: kit.presets.Settings. All ranks; the process group is made here."""
        self.ranks, self.settings, self.media = ranks, settings, settings.media
        self.out = Path(settings.run.output_dir)
        for option, folder in (("output_dir", self.out), ("cache_dir", self.media.cache_dir)):
            try:
                Path(folder or self.out).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--{option}: {error}") from None
        self.seconds = defaultdict(float)
        self.started = time.time()
        # {row: why it is left out}; by its Example, as another file may have the same ids.
        self.lost = {} if self.media.on_bad_video == "skip" else None
        self.loader = Loader(self.media.decode_ahead, self.media.decode_seconds)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.loader.close()  # or the exit would wait for a decoder that hangs

    def start_logs(self) -> None:
        """Empty those of an earlier run, once nothing stands in the way of this one."""
        if self.ranks.rank == 0:
            for name in self.LOGS:
                (self.out / f"{name}.jsonl").write_text("")

    def say(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(text, flush=True)

    def bar(self, name: str, total: int | None = None):
        """Wraps a loop in a progress bar with the time left, on rank 0."""
        return lambda items: tqdm(items, name, total, disable=self.ranks.rank > 0)

    def write(self, name: str, line: dict) -> None:
        """Append a line to a .jsonl file of the run, on rank 0."""
        if self.ranks.rank == 0:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def stage(self, name: str):
        """Add the time of the block to a stage; the next one starts when all ranks are there."""
        start = time.time()
        yield
        if self.ranks.world > 1:
            dist.barrier()
        self.seconds[name] += time.time() - start

    def rows(self, path: str) -> list:
        """The rows of a data set; bad ones are an error, or are left out (--on_bad_video skip)."""
        bad = None if self.lost is None else []
        rows = data.load_rows(path, self.settings.run.video_dir, bad)
        for where, message in bad or []:
            self.lost[where] = message
            self.say(f"left out: {message}")
        return rows

    def load_policy(self, folder: str | Path, whole: bool = True) -> MultiModal:
        """The model of a checkpoint on this rank's device, as the settings say. All ranks. whole:
        with its decoder, which else is read when it is sharded."""
        s = self.settings
        model = load(folder, decoder=whole)
        model._apply(lambda x: x if x.is_meta else x.to(self.ranks.device))
        model.recipe, model.loader = s.recipe, self.loader
        limit = int(s.media.cache_gb * 2**30)
        model.cache = mrsp.EmbeddingCache(s.media.cache_dir, max_disk_bytes=limit)
        heads = model.policy.config.num_attention_heads, model.policy.config.num_key_value_heads
        model.mesh = mrsp.make_mesh(s.ranks.sp, s.ranks.sp_attention, *heads)
        if s.ranks.checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def supervised(self, model, rows: list, config: sft.SFTConfig, name: str) -> None:
        """One supervised stage, logged."""

        def log(step: int, metrics: dict) -> None:
            self.write("metrics.jsonl", {"stage": name, "step": step} | metrics)

        with self.stage(name):
            bar = self.bar(name, config.steps)
            sft.train(model, rows, config, self.settings.more.seed, bar, log, self.lost)

    def save(self, model, name: str) -> None:
        """Write a checkpoint folder; rank 0 writes."""
        with self.stage("save"):
            model.save_pretrained(self.out / name, write=self.ranks.rank == 0)

    def show(self, model, step: int, group) -> None:
        """Show the data: a question with its sampled answers (train.Group), in samples.jsonl, and
        its first answer on the screen."""
        if self.ranks.rank == 0:
            e = group.example
            answers = [{"text": a.text} | parts for a, parts in zip(group.answers, group.grades)]
            line = {"step": step, "problem_id": e.id, "question": e.problem, "answer": e.answer}
            frames = e.media and e.media[0].num_frames or model.recipe.frames
            line |= {"num_frames": frames, "prompt": group.prompt.text, "responses": answers}
            self.write("samples.jsonl", line)
            asked, first = " / ".join(e.problem.splitlines()), answers[0]
            tqdm.write(f"step {step}: {asked} -> {first['text']} reward {first['reward']:g}")

    def describe(self, test: list, trained: list) -> dict:
        """Of the test rows, for the summary: how many questions; the accuracy of guessing; how many
        of them are among the rows that are trained on (those are not held out)."""
        known = {(e.media, e.problem) for e in trained}
        found = {"seed": self.settings.more.seed, "questions": len(test)}
        if test:
            found["chance"] = sum(1 / len(e.options) for e in test if e.options) / len(test)
            found["trained_on"] = sum((e.media, e.problem) in known for e in test)
        return found

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    def list_lost(self) -> int:
        """Rows left out, on any rank, in lost.jsonl; returns how many."""
        found = [self.lost or {}]
        if self.ranks.world > 1:
            found = [None] * self.ranks.world
            dist.all_gather_object(found, self.lost or {})
        every = {row: message for part in found for row, message in part.items()}
        for row, message in sorted((getattr(row, "id", row), m) for row, m in every.items()):
            self.write("lost.jsonl", {"row": row, "error": message})
        return len(every)
