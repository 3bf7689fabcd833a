"""Train LongVILA-R1: [base] -> chain-of-thought SFT -> GRPO -> evaluation. The story of a run.

    torchrun --nproc_per_node 2 train.py            the whole pipeline on a toy, on two CPU cores
    python train.py                                 the same in one process
    torchrun --nproc_per_node 8 train.py --data rows.jsonl --video_dir videos/     on 8 GPUs: GRPO
                                                    from a published 7B checkpoint (PRESETS)
    python train.py --preset hour --dry_run ...     its settings, memory and first prompt
    torchrun --nproc_per_node 2 train.py --help     every setting, with a sentence each

One GRPO step (section 4 of the paper; grpo_step below tells it in this order):

    rows -> features (cached) -> prompts -> rollout: G answers each       engine.generate
         -> reward (B, G) -> advantage (B, G)                             grpo.py
         -> pack [prompt | r_1 ... r_G] -> log-probs -> loss -> backward  mrsp.py, model.py
         -> optimizer -> engine.sync

Ranks = dp x sp (mrsp.Mesh). The sp ranks of a sequence encode its video together, sample for some
of its prompts each, and train their share of its tokens; the dp groups take every dp-th prompt of
a batch. Gradients are summed over all ranks and the loss is divided by global counts, so that any
number of ranks trains the same model. --fsdp shards the parameters over all of them.

The toy is the real thing, small: mp4 files, decord, the VILA classes from a checkpoint folder,
every stage. Its "images" and "base" stages stand for the pretrained model that the paper starts
from. All other presets start from a published checkpoint (--model, a folder or a hub id) and skip
what comes before; SFT runs if --sft_data names rows, the evaluation if --test_data does.

Outputs (--output_dir): report.html (every test question with its frames, before and after RL),
summary.json, metrics.jsonl, samples.jsonl, answers_before.jsonl, answers_after.jsonl, lost.jsonl
(rows that --on_bad_video skip left out), curves.png, frames.png, sft/ and model/ (checkpoints in
the published layout, with recipe.json for eval.py; init/ and base/ are the toy's before SFT),
data/ (the toy's).
Each metric is explained in METRICS.

Check this file alone:  pytest tests/test_train.py
"""

import argparse
import inspect
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser

import data
import eval as evaluation
import grpo
import mrsp
import sft
from data import DataError
from families import load
from grpo import GRPOConfig
from kit import report
from kit.decode import Loader
from kit.plan import SHAPES, memory
from kit.toy import ToyConfig, toy_make
from model import THINKING, ModelError, Recipe
from rollout import RolloutConfig, RolloutError, Sampling, TorchEngine, engine_kind, make_engine
from sft import SFTConfig

METRICS = {
    "loss": "supervised: mean negative log-likelihood; GRPO: the policy loss (near 0 on-policy)",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of AdamW at this step",
    "tokens": "target tokens of the step, over all ranks",
    "reward": "mean reward of all sampled answers",
    "accuracy": "share of sampled answers that are right",
    "format": "share of sampled answers in the <think> <answer> format",
    "length": "mean tokens of an answer",
    "finished": "share of answers that ended by themselves, not at max_tokens",
    "lost_rows": "rows of the batch left out because their media do not decode (--on_bad_video)",
    "skipped_groups": "prompts whose answers all got the same reward: they teach nothing",
    "clip_fraction": "share of trained tokens whose gradient a clip cut off; 0 on-policy",
    "kl": "mean k3 estimate of KL(policy || reference); 0 if the coefficient is 0",
    "ratio_error": "mean |ratio - 1| at the trained tokens; 0 on-policy",
    "tis_weight": "mean importance weight of trained tokens (--grpo_tis_cap); 1 without",
    "entropy": "mean entropy (nats) of the policy at the trained tokens",
    "mismatch_mean": "mean |log-prob of the sampler - log-prob of the trainer|, first update",
    "mismatch_max": "the largest of those; near 0, or sampler and trainer see different inputs",
    "prompt_tokens": "prompt tokens of all answers sampled: each answer has its prompt's",
    "prefilled_tokens": "those that were computed: the answers of a prompt share one prefill",
    "cache_hits": "embeddings found in the cache since the start; of a sequence one rank counts",
    "cache_misses": "embeddings that had to be computed",
    "cache_bytes": "embeddings held in memory now, by one rank of each sequence",
    "seconds_encode": "decoding and encoding, or reading embeddings",
    "seconds_rollout": "sampling",
    "seconds_train": "log-probs, backward, optimizer",
    "seconds_sync": "new weights to the sampler",
}


@dataclass(frozen=True)
class RunConfig:
    """What to run, on what."""

    output_dir: str = "runs/toy"  # where everything is written
    model: str | None = None  # checkpoint folder or hub id; default: the toy, pretrained here
    data: str | None = "rl.jsonl"  # rows for GRPO; the toy's are in its own folder
    video_dir: str | None = None  # folder of the rows' media; default: that of the rows
    test_data: str | None = "test.jsonl"  # rows that the model is evaluated on; default: not at all
    dry_run: bool = False  # show settings, memory and the first prompt; load no weights
    seed: int = 0  # of data, weights, batches and sampling
    rl_seed: int | None = None  # of batches and sampling in GRPO; default: as seed
    rollout: str | None = None  # sampler: vllm or torch; default: vllm with a GPU, if installed
    careful_prefill: str = "<think> seen"  # control: the SFT model, forced to begin like this
    frame_counts: str = "8,16,32,64"  # frames of the scaling curve
    show_every: int = 20  # GRPO steps between two decoded rollouts in samples.jsonl
    cache_dir: str | None = None  # folder of embeddings kept across runs; None: in memory only
    cache_gb: float = 100.0  # size limit of that folder; least recently used embeddings go first
    sp: int = 1  # ranks that share a sequence (sequence parallelism); divides the number of ranks
    sp_attention: str = "auto"  # ulysses, gather, ring, ulysses+gather, ulysses+ring, or auto
    fsdp: bool = False  # shard parameters, gradients and optimizer over all ranks from SFT on
    dtype: str = "float32"  # or bfloat16: precision of sharded layers; masters: float32
    checkpointing: bool = False  # keep only layer inputs for backward, and run layers twice
    on_bad_video: str = "error"  # or skip: leave rows that cannot be used out, count and list them
    decode_ahead: int = 1  # videos that child processes open beforehand; 0: decode without them
    decode_seconds: float = 120.0  # a decoder that gives nothing for so long is stopped

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.frame_counts) or self.show_every < 1:
            raise ValueError(f"need frame_counts like 8,16 and show_every >= 1: {self}")
        if self.dtype not in ("float32", "bfloat16") or (self.dtype != "float32" and not self.fsdp):
            raise ValueError(f"dtype must be float32, or bfloat16 with --fsdp true: {self}")
        if self.on_bad_video not in ("error", "skip"):
            raise ValueError(f"on_bad_video must be error or skip, not {self.on_bad_video!r}")
        if self.decode_ahead < 0 or self.decode_seconds <= 0:
            raise ValueError(f"need decode_ahead >= 0 and decode_seconds > 0: {self}")
        if self.rollout not in (None, "vllm", "torch"):
            raise ValueError(f"rollout must be vllm or torch, not {self.rollout!r}")
        if self.sp < 1 or self.cache_gb <= 0:
            raise ValueError(f"need sp >= 1 and cache_gb > 0: {self}")
        mrsp.choose_method(self.sp_attention, 1, 1, 1)  # an unknown one is a ValueError


@dataclass(frozen=True)
class Preset:
    """All settings of a run; every field of every part is an option --PART_FIELD (--FIELD for
    run's)."""

    run: RunConfig = field(default_factory=RunConfig)
    recipe: Recipe = field(default_factory=Recipe)
    toy: ToyConfig = field(default_factory=ToyConfig)
    images: SFTConfig = field(default_factory=SFTConfig)
    base: SFTConfig = field(default_factory=SFTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self):
        if self.run.sp % self.rollout.tp:
            raise ValueError(
                f"--rollout_tp {self.rollout.tp} must divide --sp {self.run.sp}: the ranks of an "
                "engine have to hold the same prompts"
            )
        if self.run.fsdp and self.sft.optimizer == "muon":
            raise ValueError("muon needs whole matrices: --sft_optimizer adamw, or --fsdp false")


# The sources of the numbers: P the paper, LRL its released code's defaults (both in grpo.py's
# GRPOConfig too, for what is not set here), V VILA's nearest public SFT recipe, ours: our choice.
QWEN = Preset(
    run=RunConfig(
        output_dir="runs/qwen2.5-vl-7b",
        model="Qwen/Qwen2.5-VL-7B-Instruct",  # P: one of the two models of its efficiency figure
        data=None, test_data=None,
        cache_dir="runs/embeddings",  # ours: 100 GB of embeddings, for all runs
        sp=4,  # P: SP degree of the efficiency figure
        fsdp=True, dtype="bfloat16", checkpointing=True,  # ours: 7B on 80 GB
    ),
    recipe=Recipe(
        num_frames=256,  # P: its figure has 8 to 1,024
        max_tokens=2048,  # LRL
        max_pixels=128 * 28 * 28,  # ours: 64 tokens a frame, near the 71 of the paper's hour
    ),
    sft=SFTConfig(
        data="", train="llm",  # no SFT unless --sft_data is given; tower frozen
        groups=64, texts=1, steps=562,  # ours: an epoch of the paper's 36K samples
        lr=2e-5, warmup=0.03, weight_decay=0.0,  # V
    ),
    grpo=GRPOConfig(
        group=8,  # P
        prompts=512, update_prompts=128,  # LRL
        steps=133,  # ours: an epoch of the paper's 68K samples
    ),
    rollout=RolloutConfig(max_len=32768, memory=0.5),  # ours: 16k of video, question, answer
)  # fmt: skip

# ours: fewer videos a step, because the embeddings of each take 1 to 2 GB.
LONG = replace(QWEN.grpo, prompts=32, update_prompts=8)

PRESETS = {
    "toy": Preset(
        recipe=Recipe(
            max_tokens=24, template="{problem} Think, then answer.", data="../data/test.jsonl"
        ),
        images=SFTConfig(
            data="base_images.jsonl", steps=100, groups=192, texts=4, micro_batches=4, train="all",
            optimizer="muon", lr=2e-3,
        ),
        base=SFTConfig(
            data="base.jsonl", steps=350, groups=32, texts=4, micro_batches=4, train="llm",
            optimizer="muon", lr=2e-3,
        ),
        sft=SFTConfig(data="sft.jsonl", steps=60, groups=16, texts=8, train="llm", lr=6e-4),
        grpo=GRPOConfig(
            steps=250, prompts=32, update_prompts=32, micro_prompts=16, top_p=1.0, lr=3e-4,
            weight_decay=0.0, kl_coef=0.0, scale_std=False,
        ),
        rollout=RolloutConfig(kv_gb=1.0, eager=True),
    ),
    "qwen2.5-vl-7b": QWEN,
    "longvila-7b": replace(
        QWEN,
        run=replace(
            QWEN.run,
            output_dir="runs/longvila-7b",
            model="Efficient-Large-Model/LongVILA-R1-7B",  # P
        ),
        recipe=Recipe(
            num_frames=512,  # P: where its figure of accuracy over frames ends
            max_tokens=2048,  # LRL
        ),
        grpo=LONG,
        # ours: up to 257 tokens a frame (16k in all, if config.json says TSP)
        rollout=RolloutConfig(max_len=139_264, memory=0.5),
    ),
    "hour": replace(
        QWEN,
        run=replace(QWEN.run, output_dir="runs/hour", sp=8),  # P: an hour on one node of 8 GPUs
        recipe=Recipe(
            num_frames=3600,  # P: an hour at a frame a second
            max_tokens=2048,  # LRL
            max_pixels=145 * 28 * 28,  # P: 256k tokens in all, 71 a frame; 252 x 448 pixels of 16:9
        ),
        grpo=LONG,
        rollout=RolloutConfig(max_len=270_000, memory=0.5),  # ours: 256k, question and answer
    ),
    "max-frames": replace(
        QWEN,
        run=replace(QWEN.run, output_dir="runs/max-frames", sp=8),
        recipe=Recipe(
            num_frames=8192,  # P: the most frames of a video
            max_tokens=2048,  # LRL
            max_pixels=65 * 28 * 28,  # ours: 246k tokens, as many as the paper's hour
        ),
        grpo=LONG,
        rollout=RolloutConfig(max_len=270_000, memory=0.5),  # ours: as above
    ),
    "omni": replace(
        QWEN,
        run=replace(
            QWEN.run,
            output_dir="runs/omni",
            model="Qwen/Qwen2.5-Omni-7B",  # LRL: its audio model, the Thinker alone
        ),
        recipe=Recipe(
            num_frames=64,  # ours; with the audio track, 25 tokens a second
            max_tokens=2048,  # LRL
            max_pixels=128 * 28 * 28,  # the least that the family's processor makes of a frame
        ),
    ),
    "text": replace(
        QWEN,
        run=replace(QWEN.run, output_dir="runs/text", model="Qwen/Qwen2.5-7B-Instruct", sp=1),
        recipe=Recipe(
            template=THINKING.replace(", based on the video", ""),
            max_tokens=2048,  # LRL
        ),
        rollout=RolloutConfig(max_len=8192, memory=0.5),  # ours
    ),
}  # fmt: skip
# The first command of the README: the paper's setting where there are GPUs, the toy elsewhere.
DEFAULT = "qwen2.5-vl-7b" if torch.cuda.is_available() else "toy"


def sentences(cls) -> dict[str, str]:
    """The comment behind each field of a config dataclass: its help text."""
    found = {}
    for base in reversed([c for c in cls.__mro__ if c is not object]):
        found |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(base), re.MULTILINE))
    return found


def parse_options(argv: list[str]) -> Preset:
    """Command line -> Preset. --preset NAME gives the defaults; an unknown option is an error."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), help="named settings")
    chosen, rest = first.parse_known_args(argv)
    # Who names rows or a checkpoint does not mean the toy.
    own = {a.partition("=")[0] for a in rest} & {"--data", "--video_dir", "--model"}
    name = chosen.preset or ("qwen2.5-vl-7b" if own else DEFAULT)
    # One flat dataclass for each part, its fields prefixed with the part's name.
    parts, flat = vars(PRESETS[name]), []
    for name, part in parts.items():
        helps, columns = sentences(type(part)), []
        for f in fields(part):
            column = field(default=getattr(part, f.name), metadata={"help": helps[f.name]})
            columns.append((f.name if name == "run" else f"{name}_{f.name}", f.type, column))
        flat.append(make_dataclass(name, columns))
    parser = HfArgumentParser(flat, parents=[first], allow_abbrev=False)
    *values, _, unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if unknown:
        raise DataError(f"unknown option {' '.join(unknown)}; see python train.py --help")
    built = {}
    for (name, part), value in zip(parts.items(), values):
        try:
            built[name] = type(part)(*asdict(value).values())
        except ValueError as error:
            raise DataError(f"options of {name}: {error}") from None
    try:
        return Preset(**built)
    except ValueError as error:
        raise DataError(error) from None


# ------------------------------------------------------------------------------------- one run


class Run:
    """Ranks, files and clocks of a run: everything around the method."""

    def __init__(self, config: RunConfig):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world % config.sp:
            raise DataError(
                f"--sp {config.sp} does not divide the {self.world} rank(s): start with "
                f"torchrun --nproc_per_node {config.sp} train.py"
            )
        cuda, self.rollout = torch.cuda.is_available(), engine_kind(config.rollout)
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
        if cuda:
            if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
                raise DataError(
                    f"more ranks than the {torch.cuda.device_count()} GPU(s) of this machine: "
                    "start with a smaller torchrun --nproc_per_node"
                )
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if self.world > 1:
            dist.init_process_group(backend)
        elif config.fsdp or self.rollout == "vllm":  # one rank, without torchrun
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.config, self.out = config, Path(config.output_dir)
        # Paths of rows start here; an absolute one stays as it is.
        self.base = self.out / "data" if config.model is None else Path()
        for name in ("output_dir", "cache_dir"):
            try:
                Path(getattr(config, name) or self.out).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--{name}: {error}") from None
        self.seconds, self.started = defaultdict(float), time.time()
        # {row: why it is left out}; by its Example, as another file may have the same ids.
        self.lost = {} if config.on_bad_video == "skip" else None
        self.loader = Loader(config.decode_ahead, config.decode_seconds)

    def start_logs(self) -> None:
        """Empty those of an earlier run, once nothing stands in the way of this one."""
        if self.rank == 0:
            for name in ("metrics", "samples", "lost", "answers_before", "answers_after"):
                (self.out / f"{name}.jsonl").write_text("")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def bar(self, name: str, total: int | None = None):
        """Wraps a loop in a progress bar with the time left, on rank 0."""
        return lambda items: tqdm(items, name, total, disable=self.rank > 0)

    def write(self, name: str, line: dict) -> None:
        """Append a line to a .jsonl file of the run, on rank 0."""
        if self.rank == 0:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def stage(self, name: str):
        """Add the time of the block to a stage; the next one starts when all ranks are there."""
        start = time.time()
        yield
        if self.world > 1:
            dist.barrier()
        self.seconds[name] += time.time() - start

    def rows(self, path: str) -> list:
        bad = None if self.lost is None else []
        rows = data.load_rows(str(self.base / path), self.config.video_dir, bad)
        for where, message in bad or []:
            self.lost[where] = message
            self.say(f"left out: {message}")
        return rows

    def list_lost(self) -> int:
        """Rows left out, on any rank, in lost.jsonl; returns how many."""
        found = [self.lost or {}]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, self.lost or {})
        every = {row: message for part in found for row, message in part.items()}
        for row, message in sorted((getattr(row, "id", row), m) for row, m in every.items()):
            self.write("lost.jsonl", {"row": row, "error": message})
        return len(every)

    def supervised(self, model, config: SFTConfig, name: str, seed: int) -> None:
        """One supervised stage on the rows that its config names."""
        rows = self.rows(config.data)
        log = lambda step, m: self.write("metrics.jsonl", {"stage": name, "step": step} | m)  # noqa: E731
        with self.stage(name):
            bar = self.bar(name, config.steps)
            sft.train(model, rows, config, seed, bar, log, self.lost)

    def evaluate(
        self, model, engine, rows: list, name: str, num_frames=None, prefill="", answers=None
    ) -> dict:
        """evaluation.evaluate with this run's ranks and a bar. answers: a .jsonl file for them."""
        with self.stage("eval"):
            engine.sync(model)
            engine.wake()
            result = evaluation.evaluate(
                model, engine, rows, num_frames, prefill,
                rank=self.rank, world=self.world, bar=self.bar(f"eval {name}"),
            )  # fmt: skip
            engine.sleep()
            for record in result["records"] if answers else ():
                self.write(answers, record)
            return result

    def save(self, model, name: str) -> None:
        """Write a checkpoint folder; rank 0 writes."""
        with self.stage("save"):
            model.save_pretrained(self.out / name, write=self.rank == 0)


# --------------------------------------------------------------------------------------- GRPO


def grpo_step(
    model, reference, engine, optimizer, batch: list, step: int, config: GRPOConfig,
    seed: int = 0, soon: list = (), lost: dict | None = None,
) -> tuple[dict, dict]:  # fmt: skip
    """One rollout batch and its updates. batch: the global list of Examples; of each update's share
    the ranks of one sequence (model.mesh) take every dp-th together. soon: the next batch. lost:
    takes {row: message} of those whose media do not decode; None: that is an error. Returns the
    step's metrics (equal on all ranks) and one decoded sample of this rank."""
    trained, mesh = [p for p in model.parameters() if p.requires_grad], model.mesh
    sums, clock = defaultdict(float), time.time()  # sums of this rank, added up at the end

    # 1. Rollout. One Prompt for sampler, policy and reference; seeds follow it, not the rank.
    def dealt(batch):
        numbered, n = list(enumerate(batch)), config.update_prompts
        return [numbered[i : i + n][mesh.dp_rank :: mesh.dp] for i in range(0, len(batch), n)]

    shares, planned = dealt(batch), sum(dealt(batch) + dealt(soon), [])
    model.ahead([e for _, e in planned], group=mesh.sp_group)
    see = lambda examples: [model.prompt(e, group=mesh.sp_group) for e in examples]  # noqa: E731
    # Stage 1 of MR-SP; rows that cannot be seen are left out.
    examples, prompts = model.usable([e for share in shares for _, e in share], see, lost)
    sums["lost_rows"] = sum(map(len, shares)) - len(examples)
    shares = [[(i, e) for i, e in share if not lost or e not in lost] for share in shares]
    seeds = [(seed * 10**6 + step) * 10**6 + i for share in shares for i, _ in share]
    sums["seconds_encode"], clock = time.time() - clock, time.time()
    recipe, limits = model.recipe, (config.temperature, config.top_p)
    sampling = Sampling(*limits, recipe.max_tokens, config.top_k, recipe.stop)
    engine.wake()
    # Each rank of the sequence (with tensor parallelism: each group of tp ranks) samples for some.
    dealt, before = slice(mesh.sp_rank // engine.tp, None, mesh.sp // engine.tp), engine.prefilled
    answers = engine.generate(prompts[dealt], config.group, sampling, seeds[dealt])
    answers = mrsp.gather_dealt(answers, len(prompts), mesh.sp_group, engine.tp)  # b lists of G
    engine.sleep()
    if mesh.sp_rank % engine.tp == 0:
        sums["prefilled_tokens"] = engine.prefilled - before
        sums["prompt_tokens"] = config.group * sum(len(p.ids) for p in prompts[dealt])

    # 2. Reward and advantage, (b, G). Groups of equal rewards have advantage 0 and are left out;
    # their tokens still count in the mean, so that leaving them out changes nothing but the time.
    weights = config.accuracy_weight, config.format_weight
    graded = [
        [
            grpo.reward(grpo.graded(a.text, recipe.thinking), e.answer, e.options, *weights)
            for a in group
        ]
        for group, e in zip(answers, examples)
    ]
    rewards = torch.tensor([[g["reward"] for g in group] for group in graded])
    rewards = rewards.view(len(prompts), config.group)  # (0, G) on a rank without prompts
    advantage = grpo.advantages(rewards, config.scale_std)
    useful = grpo.informative(rewards) | (config.kl_coef > 0)
    for answer, grade in zip(sum(answers, []), sum(graded, [])):
        for name, value in grade.items():
            sums[name] += value
        sums["length"] += len(answer.ids)
        sums["finished"] += answer.finished
        sums["answers"] += 1
    sums["skipped_groups"] = float((~grpo.informative(rewards)).sum())
    sums["seconds_rollout"], clock = time.time() - clock, time.time()

    # 3. Pack the groups of each update; take the log-probs that must precede the first update.
    model.train()
    updates, first = [], 0
    for u, share in enumerate(shares):
        mine, first = range(first, first + len(share)), first + len(share)
        tokens = sum(len(a.ids) for i in mine for a in answers[i])
        counts = torch.tensor([tokens, len(share) * config.group])
        totals = (mrsp.all_sum(counts) // mesh.sp).tolist()  # tokens and answers on all ranks
        kept, micro = [i for i in mine if useful[i]], []
        n = config.micro_prompts
        parts = [kept[k : k + n] for k in range(0, len(kept), n)]
        if model.sharded:  # every rank gathers parameters equally often
            parts += [[]] * (mrsp.all_max(len(parts)) - len(parts))
        for rows in parts:
            packed, flat_sampled, old, ref = model.idle(), torch.zeros(1), None, None
            if rows:
                group_ids = [[a.ids for a in answers[i]] for i in rows]
                packed = mrsp.pack([prompts[i] for i in rows], group_ids)
                flat_sampled = torch.cat([a.logps for i in rows for a in answers[i]])
            packed = mrsp.shard(packed, mesh)  # stage 2 of MR-SP: this rank's tokens and media
            with torch.no_grad():
                if u > 0:  # the first update is on-policy: there is nothing to compute
                    old, _ = packed.pad(model.policy(packed, config.temperature)[0])
                if config.kl_coef:
                    ref, _ = packed.pad(reference.policy(packed, config.temperature)[0])
            adv = advantage[rows] if rows else torch.zeros(1, 1)
            micro.append((packed, adv, flat_sampled, old, ref, bool(rows)))
        updates.append((micro, totals))

    # 4. Loss, backward, optimizer step.
    for u, (micro, totals) in enumerate(updates):
        for packed, adv, flat_sampled, old, ref, real in micro:
            flat_logp, entropy = model.policy(packed, config.temperature)
            logp, mask = packed.pad(flat_logp)  # (b, G, R)
            flat_sampled, adv = flat_sampled.to(logp), adv.to(logp.device)
            sampled, _ = packed.pad(flat_sampled)
            loss, parts = grpo.grpo_loss(logp, adv, mask, config, old, ref, sampled, *totals)
            (loss * real).backward()
            if not real:
                continue
            for name, value in parts.items():
                sums[name] += value.item()
            sums["loss"] += loss.item() / len(updates)
            sums["entropy"] += entropy.sum().item()
            if u == 0:  # the sampler's log-probs against the trainer's, before anything changed
                gap = (flat_logp.detach() - flat_sampled).abs()
                sums["gap"] += gap.sum().item()
                sums["gap_tokens"] += len(gap)
                sums["gap_max"] = max(sums["gap_max"], gap.max().item())
        if u == 0:
            check_mismatch(sums, config)
        mrsp.all_reduce_gradients(trained)
        norm = mrsp.clip_gradients(trained, config.grad_clip)
        if totals[0]:  # else all its rows were left out: no step of momentum and decay alone
            optimizer.step()
        optimizer.zero_grad()
        sums["grad_norm"] += norm / len(updates)
    sums["seconds_train"], clock = time.time() - clock, time.time()
    engine.sync(model)
    sums["seconds_sync"] = time.time() - clock

    sample = {}
    if examples:
        e = examples[0]
        sample = {"step": step, "problem_id": e.id, "question": e.problem, "answer": e.answer}
        frames = e.media and e.media[0].num_frames or model.recipe.frames
        sample |= {"num_frames": frames, "prompt": prompts[0].text}
        sample["responses"] = [{"text": a.text} | g for a, g in zip(answers[0], graded[0])]
    cache = model.cache
    sums |= {"cache_hits": cache.hits, "cache_misses": cache.misses, "cache_bytes": cache.bytes}
    return reduce_metrics(sums, config, mesh), sample


def check_mismatch(sums: dict, config: GRPOConfig) -> None:
    """ModelError, on all ranks alike, if the sampler's log-probs are not the trainer's."""
    found = torch.tensor([sums["gap"], sums["gap_tokens"]], dtype=torch.float64)
    gap, count = mrsp.all_sum(found).tolist()
    largest, mean = torch.tensor(sums["gap_max"]), gap / max(count, 1)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    sums["gap_max"] = largest.item()
    limits = config.mean_mismatch, config.max_mismatch
    if not (mean <= limits[0] and sums["gap_max"] <= limits[1]):  # nan is no agreement either
        raise ModelError(
            "log-probs of the sampled tokens differ between sampler and trainer by "
            f"{mean:.3g} on average, {sums['gap_max']:.3g} at most (limits --grpo_mean_mismatch "
            f"{limits[0]}, --grpo_max_mismatch {limits[1]}): they see different inputs or weights, "
            "or compute in too different a precision"
        )


def reduce_metrics(sums: dict, config: GRPOConfig, mesh: mrsp.Mesh) -> dict:
    """Sums of this rank -> the step's metrics over all ranks (see METRICS). The ranks of a sequence
    have the same sums: the first of them counts, except for the seconds."""
    largest, names = sums.pop("gap_max"), sorted(SUMS)
    if mesh.sp_rank > 0:
        own = ("seconds", "prompt", "prefilled")  # what each rank did by itself
        sums = defaultdict(float, {n: v for n, v in sums.items() if n.startswith(own)})
    values = mrsp.all_sum(torch.tensor([sums[n] for n in names], dtype=torch.float64))
    t = dict(zip(names, values.tolist()))
    answers, tokens = max(t["answers"], 1), max(t["tokens"], 1)
    out = {n: t[n] / answers for n in ("reward", "accuracy", "format", "length", "finished")}
    out |= {n: t[n] / tokens for n in ("kl", "entropy", "ratio_error")}
    out |= {"clip_fraction": t["clipped"] / tokens, "lr": config.lr}
    out |= {"tis_weight": t["tis"] / tokens}
    out |= {n: t[n] for n in ("loss", "skipped_groups", "lost_rows", "tokens")}
    out |= {n: t[n] for n in ("prompt_tokens", "prefilled_tokens")}
    out |= {n: t[n] for n in ("cache_hits", "cache_misses", "cache_bytes")}
    out["grad_norm"] = t["grad_norm"] / mesh.dp
    out |= {"mismatch_mean": t["gap"] / max(t["gap_tokens"], 1), "mismatch_max": largest}
    seconds = ("seconds_encode", "seconds_rollout", "seconds_train", "seconds_sync")
    return out | {n: t[n] / mesh.dp / mesh.sp for n in seconds}


SUMS = (
    "reward accuracy format length finished answers skipped_groups lost_rows tokens clipped kl "
    "entropy loss ratio_error tis grad_norm gap gap_tokens cache_hits cache_misses cache_bytes "
    "prompt_tokens prefilled_tokens seconds_encode seconds_rollout seconds_train seconds_sync"
).split()


def train_grpo(run: Run, model, reference, engine, config: GRPOConfig, rows: list) -> None:
    """The GRPO stage: config.steps rollout batches. reference: becomes a copy of the model as it is
    now; None if no KL is asked for."""
    engine.sync(model)
    model.requires_grad_(False)
    model.llm.requires_grad_(True)  # tower and projector are frozen in RL, as for VILA in the paper
    if reference is not None:
        reference.requires_grad_(False)
        with torch.no_grad():
            for own, new in zip(reference.llm.parameters(), model.llm.parameters()):
                own.copy_(new)  # sharded alike: each rank copies its own share
    seed = run.config.seed if run.config.rl_seed is None else run.config.rl_seed
    if config.lora_rank:  # the reference has none
        model.add_adapters(config.lora_rank, config.lora_alpha, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    with run.stage("grpo"):
        plan = [*sft.batches(rows, config.prompts, config.steps, seed), []]
        bar, seen = run.bar("grpo", config.steps)(range(config.steps)), 0
        for step in bar:
            metrics, sample = grpo_step(
                model, reference, engine, optimizer, plan[step], step, config, seed,
                plan[step + 1], run.lost,
            )  # fmt: skip
            run.write("metrics.jsonl", {"stage": "grpo", "step": step} | metrics)
            seen += metrics["prompt_tokens"]
            bar.set_postfix(accuracy=round(metrics["accuracy"], 2), length=round(metrics["length"]))
            if step % run.config.show_every == 0 or step + 1 == config.steps:
                if sample and run.rank == 0:  # show the data: one question and one of its answers
                    run.write("samples.jsonl", sample)
                    first = sample["responses"][0]
                    asked = " / ".join(sample["question"].splitlines())
                    tqdm.write(f"step {step}: {asked} -> {first['text']} reward {first['reward']}")
    if not seen:
        raise DataError("GRPO had no row to learn from: all were left out, as said above")
    model.merge_adapters()


# ---------------------------------------------------------------------------------------- main

PLAN = """\
LongVILA-R1 in miniature, {world} rank(s) on {device}; every stage shows the time it has left:
  1 data    {videos} videos (mp4) with questions; train and test videos are disjoint
  2 base    a tiny VILA learns to see and to read: stands for the pretrained model
  3 SFT     chains of thought, careful and hasty ones mixed
  4 GRPO    {steps} steps, {prompts} prompts x {group} answers; reward: right answer, right format
  5 test    {questions} questions on videos never trained on, greedy, after the last step
Everything goes to {out}/"""
PLAN_7B = """\
{model}, {world} rank(s) on {device}: {sft}GRPO on {data}, {steps} steps, {prompts} prompts x
{group} answers, {frames} frames a video. Everything goes to {out}/"""


def pipeline(run: Run, preset: Preset) -> dict:
    """Every stage in order. Returns the summary."""
    c, seed, toy = run.config, run.config.seed, preset.run.model is None
    folder = c.model or str(run.out / "init")
    if toy:
        with run.stage("data"):
            toy_make(
                run.out, preset.toy, preset.recipe, seed, run.rank, run.world, run.bar("videos")
            )
    rl, test = run.rows(c.data), run.rows(c.test_data) if c.test_data else []
    model, dtype = load(folder).to(run.device), getattr(torch, c.dtype)
    run.start_logs()
    model.recipe = preset.recipe
    model.cache = mrsp.EmbeddingCache(c.cache_dir, max_disk_bytes=int(c.cache_gb * 2**30))
    model.loader = run.loader
    heads = model.llm.config.num_attention_heads, model.llm.config.num_key_value_heads
    try:
        model.mesh = mrsp.make_mesh(c.sp, c.sp_attention, *heads)
    except ValueError as error:
        raise ModelError(error) from None
    run.say(f"ranks: data parallel {model.mesh.dp}; {model.mesh.why}; sampler: {run.rollout}")
    if run.rollout == "torch" and preset.rollout.tp > 1:
        raise RolloutError("--rollout_tp is vLLM's: add --rollout vllm, or leave it out")
    if c.checkpointing:
        model.enable_gradient_checkpointing()
    for name in ("images", "base") if toy else ():
        run.supervised(model, getattr(preset, name), name, seed)
    if toy:
        run.save(model, "base")
    if dtype != torch.float32 and (preset.sft.train == "llm" or not preset.sft.data):
        model.cast_encoder(dtype)  # it is not trained
    engine, reference = None, None
    if run.rollout == "torch":  # under FSDP it copies the decoder, while that is whole
        engine = make_engine("torch", model, dtype=dtype, copied=c.fsdp)
    if preset.grpo.kl_coef:
        reference = TorchEngine(model, dtype=dtype).policy  # a copy of the decoder
    for part in (model, reference) if c.fsdp else ():
        if part is not None:
            part.shard_parameters(dtype)
    if engine is None:  # vLLM takes of the GPU what sharding leaves
        engine = make_engine("vllm", model, preset.rollout, dtype)
        engine.sleep()
    found = {"seed": seed, "questions": len(test)}
    score = lambda rows, *rest, **how: run.evaluate(model, engine, rows, *rest, **how)["accuracy"]  # noqa: E731
    both = lambda result: {k: result[k] for k in ("accuracy", "by_category")}  # noqa: E731
    if preset.sft.data:
        run.supervised(model, preset.sft, "sft", seed)
        run.save(model, "sft")
    if test:
        chance = [1 / len(e.options) if e.options else 0.0 for e in test]
        found["chance"] = sum(chance) / len(test)
        before = run.evaluate(model, engine, test, "before GRPO", answers="answers_before.jsonl")
        found["sft"] = both(before)
    if toy:
        control = run.evaluate(model, engine, test, "control", prefill=c.careful_prefill)
        found["control"] = both(control)

    train_grpo(run, model, reference, engine, preset.grpo, rl)
    run.save(model, "model")
    if test:
        found["grpo"] = both(
            run.evaluate(model, engine, test, "GRPO", answers="answers_after.jsonl")
        )
    if toy:
        counts = map(int, c.frame_counts.split(","))
        found["grpo"] |= {
            "by_frames": {str(n): score(test, f"{n} frames", num_frames=n) for n in counts},
            "other_environment": score(run.rows("test_other.jsonl"), "other environment"),
            "wrong_video": score(evaluation.swap_media(test), "wrong video"),
        }
    engine.close()
    found["lost"] = run.list_lost()
    return found | {"seconds": run.seconds | {"total": time.time() - run.started}}


# ------------------------------------------------------------------ before a run on a checkpoint


def prepare(preset: Preset, world: int) -> tuple[list[str], list[str]]:
    """Look at all that a run on a checkpoint needs before anything large is loaded: memory and the
    first prompt as lines to show, and a line for each thing that is missing, with what to do."""
    c, recipe, rows, model, lines, lacks = preset.run, preset.recipe, [], None, [], []
    sampler = "torch"
    try:
        sampler = engine_kind(c.rollout)
        if c.data is None:
            raise DataError(
                "no rows: give --data FILE.jsonl, with --video_dir DIR, or take --preset toy"
            )
        for path in filter(None, (c.data, preset.sft.data, c.test_data)):
            bad = [] if c.on_bad_video == "skip" else None
            found = data.load_rows(path, c.video_dir, bad)
            if path == preset.sft.data:
                sft.check_rows(found)
            rows += found
    except (DataError, RolloutError) as error:
        lacks.append(str(error))
    if world % c.sp:
        lacks.append(
            f"--sp {c.sp} does not divide the {world} rank(s): start with torchrun "
            f"--nproc_per_node {c.sp} (or a multiple), or take another --sp"
        )
    files = sorted({m.path for e in rows for m in e.media})
    if gone := [path for path in files if not os.path.isfile(path)]:
        (lacks if c.on_bad_video == "error" or len(gone) == len(files) else lines).append(
            f"{len(gone)} of {len(files)} media files are missing, the first is {gone[0]}: "
            "download them, or give the folder that the rows' paths start from as --video_dir"
        )
    try:
        model = load(c.model, weights=False)
        model.recipe, model.loader = recipe, Loader(min(c.decode_ahead, 1), c.decode_seconds)
        for e in rows:
            model.check_question(e)
        lines, lacks_memory = memory_plan(preset, model, world, sampler)
        lacks += lacks_memory
        if rows and not gone:
            first = rows[0]
            try:
                media = [model.measure(m, recipe.frames, first.id) for m in first.media]
            finally:
                model.loader.close()
            prompt = model.build_prompt(first, media, recipe.thinking)
            length, most = len(prompt.ids) + recipe.max_tokens, preset.rollout.max_len
            if sampler == "vllm" and most and length > most:
                lacks.append(
                    f"the first prompt and its answer of {recipe.max_tokens} have {length} tokens: "
                    f"more than --rollout_max_len {most}"
                )
            lines.append(
                f"first prompt: {len(prompt.ids)} tokens, {len(prompt.media_at)} of them media, "
                f"positions up to {int(prompt.positions.max())}:\n{prompt.text}"
            )
    except (DataError, ModelError) as error:
        skipped = c.on_bad_video == "skip" and getattr(error, "question", "")
        (lines if skipped else lacks).append(f"--model {error}" if model is None else str(error))
    return lines, lacks


def memory_plan(preset: Preset, model, world: int, sampler: str) -> tuple[list[str], list[str]]:
    """plan.memory of a GRPO step on a 640 x 360 video of 2 seconds a frame (with its sound, where
    that is heard; or 1,000 words of text), as lines; a line more if it is not here."""
    c, recipe, config, gib = preset.run, preset.recipe, model.llm.config, 2**30
    question = data.Example("", "why " * 100, (), "", "", (), "", "")
    media, n = [], recipe.max_frames if recipe.fps else recipe.num_frames
    if "video" in model.takes:
        media = [model.blank("video", n, 360, 640, 2.0 * np.arange(n))]
        if "audio" in model.takes:
            sound = torch.empty(model.heard(2 * n * 16000), model.media_width, device="meta")
            media = [media[0]._replace(track=sound)]
    else:
        question = replace(question, problem="why " * 1000)
    tokens = len(model.build_prompt(question, media, recipe.thinking).ids)
    shape = {name: getattr(config, name) for name in SHAPES["qwen2.5-vl-7b"] if name != "head_dim"}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = 4 if c.dtype == "float32" else 2
    part = memory(
        shape | {"head_dim": head}, tokens, preset.grpo.group * recipe.max_tokens, world, c.sp,
        c=wide, chunk=max(1, min(8192, 2**28 // config.vocab_size)),
        prefill=preset.rollout.prefill_tokens if sampler == "vllm" else None,
    )  # fmt: skip
    tower = wide * sum(p.numel() for p in model.tower.parameters())
    part = {"tower": tower} | part | {"total": part["total"] + tower}
    where = f"without a GPU, its memory for {world} ranks"
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world
    if torch.cuda.is_available():
        where, have = "a GPU", torch.cuda.get_device_properties(0).total_memory
    lines = [f"memory of each of {world} ranks in GiB, prompts of {tokens:,} tokens, --sp {c.sp}:"]
    lines += [f"  {name:12s} {value / gib:8.3f}" for name, value in part.items()]
    lines.append(f"  {'(here)':12s} {have / gib:8.3f}  {where}")
    if torch.cuda.is_available() and sampler == "torch":
        lines.append("sampler: torch, which is slow; for vLLM: pip install -r requirements-gpu.txt")
    if part["total"] < 0.92 * have:
        return lines, []
    return lines, [
        f"memory: a rank needs {part['total'] / gib:.0f} GiB, {have / gib:.0f} GiB are here "
        f"({where}): start on 8 GPUs of 80 GB with torchrun --nproc_per_node 8, or take fewer "
        "--recipe_num_frames, more ranks a sequence (--sp) or a smaller --model"
    ]


def dry_run(preset: Preset) -> None:
    """Show the settings and what prepare() finds, for 8 ranks or those that are here; the toy is
    made in a folder of its own, of one video."""
    world, toy = int(os.environ.get("WORLD_SIZE", 8)), preset.run.model is None
    if int(os.environ.get("RANK", 0)) > 0:
        return
    for name, part in vars(preset).items():
        if toy or name not in ("toy", "images", "base"):
            print(f"{name}: " + ", ".join(f"{k}={v!r}" for k, v in asdict(part).items()))
    with tempfile.TemporaryDirectory() as folder:
        if toy:
            toy_make(Path(folder), ToyConfig(1, 1, 1, 1, 1), preset.recipe, preset.run.seed)
            run = replace(preset.run, model=f"{folder}/init", data=f"{folder}/data/rl.jsonl")
            preset = replace(preset, run=replace(run, test_data=None), sft=SFTConfig(data=""))
        lines, lacks = prepare(preset, max(world, preset.run.sp))
    print("\n".join(lines))
    if lacks:
        raise DataError("missing for this run:\n  " + "\n  ".join(lacks))


def main(argv=None) -> dict | None:
    run = None
    try:
        preset = parse_options(sys.argv[1:] if argv is None else argv)
        if preset.run.dry_run:
            return dry_run(preset)
        if preset.run.model is not None:
            lacks = prepare(preset, int(os.environ.get("WORLD_SIZE", 1)))[1]
            if lacks:
                raise DataError("missing for this run:\n  " + "\n  ".join(lacks))
        run, toy, c = Run(preset.run), preset.toy, preset.grpo
        run.say(
            (PLAN if preset.run.model is None else PLAN_7B).format(
                world=run.world, device=run.device, out=run.out, steps=c.steps, prompts=c.prompts,
                group=c.group, questions=5 * toy.test, frames=preset.recipe.num_frames,
                videos=toy.base + toy.sft + toy.rl + toy.test + toy.other, model=preset.run.model,
                data=preset.run.data, sft=f"SFT on {preset.sft.data}, " if preset.sft.data else "",
            )
        )  # fmt: skip
        summary = pipeline(run, preset)
    except (DataError, ModelError, RolloutError) as error:
        # Before there is a run all ranks say the same: the first of them is enough.
        sys.exit(f"error: {error}" if run or int(os.environ.get("RANK", 0)) == 0 else 1)
    finally:
        if run:  # or the exit would wait for a decoder that hangs
            run.loader.close()
    if run.rank == 0:
        summary["settings"] = {name: asdict(part) for name, part in vars(preset).items()}
        (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        report.plot_curves(run.out / "metrics.jsonl", run.out / "curves.png")
        pictures = {run.out / "curves.png": "curves over the steps of GRPO"}
        if "by_frames" in summary.get("grpo", {}):
            report.plot_frames(summary, run.out / "frames.png")
            pictures[run.out / "frames.png"] = "accuracy over the number of frames"
    if summary["questions"]:
        run.say(f"\n{report.table(summary)}\n")
    run.say(f"Look at the pictures and samples.jsonl in {run.out}/, ask again with")
    rows, known = f" --data {preset.run.test_data or 'ROWS.jsonl'}", preset.recipe.data
    rows += f" --video_dir {preset.run.video_dir}" if preset.run.video_dir else ""
    rows = "" if known and (run.out / "model" / known).is_file() else rows
    run.say(f"    python eval.py --model {run.out}/model{rows}\nthen read mrsp.py and grpo.py.")
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.rank == 0 and summary["questions"]:  # last: no other rank waits while videos are decoded
        files = {"before GRPO": "answers_before.jsonl", "after GRPO": "answers_after.jsonl"}
        report.write_report(
            run.out / "report.html", f"{run.out.name}: before and after GRPO",
            data.load_rows(str(run.base / preset.run.test_data), preset.run.video_dir, []),
            {name: report.read_answers(run.out / file) for name, file in files.items()},
            preset.recipe.frames, pictures, report.table(summary), loader=run.loader,
        )  # fmt: skip
        run.say(f"Every question with its frames and answers: {run.out}/report.html")
    return summary


if __name__ == "__main__":
    main()
