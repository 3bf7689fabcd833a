"""Benchmarks: what the design buys, measured. (What a run needs: train.py --dry_run.)

    python -m kit.bench mrsp        the paper's efficiency figure in miniature, on two CPU cores
    python -m kit.bench rollout     both rollout engines: tokens a second, prefill, weight sync
    python -m kit.bench step        one GRPO step on text: seconds of each phase, as one JSON line
    python -m kit.bench decode      videos decoded ahead of the tower; memory over 2,000 of them
    python -m kit.bench attention   block attention against plain softmax and torch's own kernel
    python -m kit.bench gpu         kernels, sharding, packed steps of 16k and 64k, on a CUDA GPU

A command's options are the fields of its class (--help lists them), its work is run().

mrsp: a GRPO step on one video a rank: G answers of exactly R tokens, reference, policy, optimizer;
gradient checkpointing, and copies one at a time, as long sequences force. The bars are those of the
paper's figure (section 5), with ours; the last one shows the memory that sharding saves.

                    a video is encoded by             trained for each prompt       ranks a sequence
    none          its rank, 3 G times (*)     G copies [prompt | r_g], in turn             1
    stage 1       all ranks, once             the same                                     1
    stage 1+2     all ranks, once             the same                                     S
    ours          all ranks, once             one pack [prompt | r_1 ... r_G]              S
    ours, sp 1    all ranks, once             the same                                     1
    (*) for each rollout, and for each copy, in the reference's and in the policy's pass

Equal in all: frames (random pixels, nothing is decoded), weights, answers. The learning rate is 0,
so each step starts from the same weights, all bars must have the same gradient norm, and the
benchmark fails if they do not. The sampler prefills a prompt once for its G answers, and the tower
takes 16 frames at a time, in all bars: kinder to "none" than the public code is. Bars are
interleaved; what counts is the slowest (fullest) rank, and the median of the repeats. Memory is the
step's peak above what the process held before: the kernel's high-water mark, or CUDA's allocator.

Glossary: as in mrsp.py; T = L / S tokens of a rank. This file alone:  pytest tests/test_bench.py
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_kernel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import grpo
import mrsp
from data import Example, Medium
from families import load
from families.vila import VILA
from kit.decode import Loader
from kit.options import OptionError, parse
from kit.plan import CONFIGS, QWEN_7B, memory, parameters, widths
from kit.ranks import find_ranks, reported
from kit.run import Meter
from kit.toy import write_mp4
from kit.vllm_engine import RolloutConfig, VLLMEngine
from model import Media, Policy, Prompt
from rollout import RolloutError, Sampling, TorchEngine, copy_policy, sample

QUESTION = Example("", "user", (), "", "", (), "video", "")
WORDS = 512  # in the vocabulary of the small models
BARS = {  # encoded once by all ranks? sequence parallel? shared prefix?
    "none": (False, False, False),
    "stage 1": (True, False, False),
    "stage 1+2": (True, True, False),
    "ours": (True, True, True),
    "ours, sp 1": (True, False, True),
}


class Options:
    """What all commands have: their numbers are at least 1."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(isinstance(n, int) and n < 1 for n in numbers):
                raise ValueError(f"--{field.name} must be at least 1")
        if getattr(self, "hidden", 8) % 8:
            raise ValueError(f"--hidden must be a multiple of 8 (4 heads), not {self.hidden}")


@dataclass(frozen=True)
class Small(Options):
    """A benchmark of GRPO on a small model."""

    group: int = 8  # answers to a prompt
    response_tokens: int = 32  # of each answer
    layers: int = 4  # of the decoder
    hidden: int = 128  # width of the decoder
    repeats: int = 3  # of a measurement, for the median


# ------------------------------------------------------------------------------------ measuring


def measure(bars: dict, repeats: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """bars: {name: function that works, and returns a dict of numbers} -> {name: their medians}.
    Bars take turns, so that a slow minute of the machine is every bar's."""
    found = {name: [] for name in bars}
    for repeat in range(warm_up + repeats):
        for name, work in bars.items():
            numbers = work()
            if repeat >= warm_up:
                found[name].append(numbers)
    return {
        name: {number: median(values[number] for values in rows) for number in rows[0]}
        for name, rows in found.items()
    }


def show(row: dict) -> None:
    """A row of results, as a JSON line."""
    shown = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in row.items()}
    print(json.dumps(shown), flush=True)


def timed(work, *arguments) -> dict[str, float]:
    """Seconds of work(*arguments)."""
    begin = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin}


class Laps:
    """Seconds by phase: lap(name) adds what has passed since the last one."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now


class PeakMemory:
    """The most bytes that this process held since the object was made, above those held then."""

    def __init__(self):
        gc.collect()
        self.before = None
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 15)  # M_MMAP_THRESHOLD: freed tensors leave the process
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = self.status("VmRSS")  # memory now
        except (OSError, AttributeError) as error:
            print(f"peak memory is not measured: {error}", file=sys.stderr)

    def read(self) -> int | None:
        """None where the kernel's mark cannot be reset: never a guess."""
        return None if self.before is None else self.status("VmHWM") - self.before

    @staticmethod
    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split(f"{name}:")[1].split()[0])


# ------------------------------------------------------------------------------ one GRPO step


def small_vila(hidden: int, layers: int) -> VILA:
    """Random weights: SigLIP of 48 px, 9 tokens a frame; Qwen2 with 4/2 heads and 512 words, in
    float32. Six tower layers: encoding is then 46 % of "none" at 512 frames (the paper's LongVILA:
    stage 1 takes away 52 %). Answers never end by themselves."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<vila/video>"]
    words = special + [f"word{i}" for i in range(WORDS - len(special))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, special[0]))
    core.add_special_tokens(special)
    llm = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden)
    llm |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    tower = dict(num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    tower |= dict(num_attention_heads=4, image_size=48, patch_size=8, vision_use_head=False)
    torch.manual_seed(0)
    model = VILA.create(
        config={
            "mm_projector_cfg": {"mm_projector_type": "mlp_downsample_2x2_fix"},
            "mm_vision_select_layer": -1,
            "video_encoder": {"_target_": "BasicVideoEncoder", "end_tokens": None},
        },
        llm=llm | {"vocab_size": WORDS},
        tower=tower,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[2]),
        preprocess={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )
    model.ends = set()
    model.requires_grad_(False).policy.requires_grad_(True)  # RL trains the decoder
    return model


def random_videos(count: int, frames: int) -> torch.Tensor:
    """(count, frames, 48, 48, 3) uint8"""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, 48, 48, 3), dtype=torch.uint8, generator=random)


def text_prompt(tokens: int, vocab: int, device="cpu") -> Prompt:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(8, vocab, (tokens,), generator=random).to(device)
    no_media = torch.zeros(0, dtype=torch.long, device=device)
    return Prompt(ids, torch.arange(tokens, device=device), None, no_media, "", tokens)


@torch.no_grad()
def embed(model, video, group=None) -> Prompt:
    """The prompt of a video, frames (F, H, W, 3), encoded by the ranks of `group`. A Prompt (text)
    is what it is."""
    if isinstance(video, Prompt):
        return video
    features = mrsp.encode_parallel(partial(model.encode, at_once=16), video, group)
    return model.build_prompt(QUESTION, [Media("video", features)])


class Trainer:
    """A small model and its GRPO step, on the ranks that torchrun started."""

    def __init__(self, options: Small, kl: bool = False):
        """kl: with a reference."""
        world = find_ranks().world
        if world != options.ranks:
            raise OptionError(f"{options.ranks} ranks are asked for, but torchrun started {world}")
        if world > 1:
            dist.init_process_group("gloo")
        self.group = options.group
        self.tokens = options.response_tokens
        self.model = small_vila(options.hidden, options.layers)
        self.engine = TorchEngine(self.model)
        # The reference is a frozen copy of the decoder.
        self.reference = copy_policy(self.model, torch.float32) if kl else None
        self.optimizer = torch.optim.AdamW(self.model.policy.parameters(), lr=0.0, weight_decay=0.0)
        # Without and with sequence parallelism.
        self.meshes = [mrsp.make_mesh(sp, "auto", 4, 2) for sp in (1, world)]
        self.is_first = self.meshes[0].rank == 0

    def step(self, videos, bar: str) -> dict[str, float]:
        """A GRPO step without files and rewards; equal work for every bar. videos: frames of
        each, or a Prompt (text). -> seconds by phase and in all, grad_norm, peak_bytes (0: not
        known): the largest of each over all ranks."""
        once, sharded, shared = BARS[bar]
        mesh = self.model.mesh = self.meshes[sharded]
        mine = list(range(len(videos)))[mesh.dp_rank :: mesh.dp]
        peak = PeakMemory()
        mrsp.all_sum(torch.zeros(1))  # the ranks start together
        self.laps = Laps()

        # 1. Stage 1: prompts are embedded once, by all ranks, or again wherever they are used.
        ready = list(videos)
        for i, video in enumerate(videos if once else ()):
            prompt = embed(self.model, video, None if mrsp.alone() else dist.group.WORLD)
            ready[i] = prompt if i in mine else None
        for i in mine * (self.group - 1):  # for each rollout; the last one's is kept
            embed(self.model, ready[i])
        prompts = [embed(self.model, ready[i]) for i in mine]
        self.laps.lap("encode")

        # 2. Rollout, dealt among the ranks of a sequence.
        sampling = Sampling(max_tokens=self.tokens)
        answers = sample(self.engine, prompts, mine, self.group, sampling, mesh)
        del prompts
        self.laps.lap("rollout")

        # 3. A pack after the other: all answers of a prompt, or one copy.
        config = grpo.Config(kl_coef=1e-2 if self.reference else 0.0)
        rewards = torch.rand(len(ready), self.group, generator=torch.Generator().manual_seed(0))
        advantage = grpo.advantages(rewards, config)  # (B, G)
        every = list(range(self.group))
        for i, found in zip(mine, answers):
            for part in [every] if shared else [[g] for g in every]:
                ids = [found[g].ids for g in part]
                self.train(ready[i], ids, advantage[i, part][None], config, len(videos))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = mrsp.join_gradients(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.laps.lap("optimizer")
        seconds = self.laps.seconds
        numbers = {"seconds": sum(seconds.values()), "grad_norm": norm, "peak_bytes": peak.read()}
        meter = Meter(mesh)
        for name, value in (seconds | numbers).items():
            meter.largest(name, value or 0)
        return meter.read()

    def train(self, video, ids: list, advantage, config: grpo.Config, prompts: int) -> None:
        """Log-probs of reference and policy, loss and backward of one pack. advantage (1, G)"""
        ref_logp = None
        if self.reference:
            with torch.no_grad():
                ref_logp, _ = self.log_probs(self.reference, video, ids)
            self.laps.lap("reference")
        logp, mask = self.log_probs(self.model, video, ids)  # (1, G, R) each
        total = prompts * self.group * self.tokens
        loss, _ = grpo.loss(logp, advantage, mask, config, ref_logp=ref_logp, total_tokens=total)
        self.laps.lap("logprobs")
        loss.backward()
        self.laps.lap("backward")

    def log_probs(self, policy, video, ids: list) -> tuple:
        pack = mrsp.pack([embed(self.model, video)], [ids])
        self.laps.lap("encode")
        policy.mesh = self.model.mesh
        return pack.pad(policy(pack)[0])  # stage 2: shard and attention, inside


@dataclass(frozen=True)
class Mrsp(Small):
    """seconds and peak memory of a GRPO step: none, stage 1, stage 1+2, ours"""

    frames: tuple[int, ...] = (8, 32, 128, 512)  # frames a video
    ranks: int = 2  # processes, and prompts
    output: str = "runs/bench"  # folder of the results

    def run(self) -> None:
        trainer = Trainer(self, kl=True)
        trainer.model.enable_gradient_checkpointing()
        videos = random_videos(self.ranks, max(self.frames))
        rows = []
        for n, count in enumerate(sorted(self.frames)):
            bars = {bar: partial(trainer.step, videos[:, :count], bar) for bar in BARS}
            found = measure(bars, self.repeats, warm_up=1 if n == 0 else 0)
            norms = [numbers["grad_norm"] for numbers in found.values()]
            if max(norms) / min(norms) - 1 > 1e-3:
                raise RuntimeError(f"{count} frames: the bars' gradients differ in norm: {norms}")
            found["ours"] |= ratios(found)
            for bar, numbers in found.items():
                numbers["peak_bytes"] = int(numbers["peak_bytes"]) or None
                rows.append({"bar": bar, "frames": count} | numbers)
                if trainer.is_first:
                    print(f"{count:5d} frames  {bar:10s} {numbers['seconds']:8.2f} s", flush=True)
        if trainer.is_first:
            out = Path(self.output)
            out.mkdir(parents=True, exist_ok=True)
            (out / "mrsp.json").write_text(json.dumps(rows, indent=2) + "\n")
            plot_mrsp(rows, out / "mrsp.png")
            for name, part in (("decoder", trainer.model.policy), ("tower", trainer.model.tower)):
                print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
            ours = [row for row in rows if row["bar"] == "ours"]
            for row in (asdict(self), *ours):
                show(row)
            print(f"written: {out}/mrsp.json, mrsp.png")


def ratios(found: dict) -> dict[str, float]:
    """How many times faster ours is, and its memory with sharding against that without."""
    ours = found["ours"]
    out = {}
    for bar in ("none", "stage 1", "stage 1+2"):
        out[f"faster_than_{bar}"] = round(found[bar]["seconds"] / ours["seconds"], 3)
    if ours["peak_bytes"]:
        alone = found["ours, sp 1"]["peak_bytes"]
        out["memory_to_sp_1"] = round(ours["peak_bytes"] / alone, 3)
    return out


def plot_mrsp(rows: list, path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((12, 4.8), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    colors = ("#bdbdbd", "#9ecae1", "#4292c6", "#d94801", "#fdae6b")
    for b, (bar, color) in enumerate(zip(BARS, colors)):
        own = [r for r in rows if r["bar"] == bar]
        places = [i + 0.17 * (b - 2) for i in range(len(own))]
        drawn = times.bar(places, [r["seconds"] for r in own], 0.16, color=color, label=bar)
        sizes.bar(places, [(r["peak_bytes"] or 0) / 2**20 for r in own], 0.16, color=color)
        if bar == "ours":
            times.bar_label(drawn, [f"{r['faster_than_none']:.1f}x" for r in own], padding=2)
    times.set(title="seconds a step (above ours: faster than none)", yscale="log")
    times.legend()
    sizes.set(title="peak MiB")
    for axis in (times, sizes):
        axis.set_xticks(range(len(own)), [r["frames"] for r in own])
        axis.set(xlabel="frames a video")
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Step(Small):
    """one GRPO step on a text prompt: seconds of each phase, as one JSON line"""

    prompt_tokens: int = 1024  # of the prompt
    hidden: int = 256  # width of the decoder
    ranks: int = 1  # that share the sequence

    def run(self) -> None:
        trainer = Trainer(self)
        prompts = [text_prompt(self.prompt_tokens, WORDS)]
        step = partial(trainer.step, prompts, "ours")
        line = asdict(self) | measure({"ours": step}, self.repeats)["ours"]
        line["tokens"] = self.prompt_tokens + self.group * self.response_tokens
        if trainer.is_first:
            show(line)


# ------------------------------------------------------------------------------------ rollout


@dataclass(frozen=True)
class Rollout(Small):
    """both rollout engines: tokens a second, prompt tokens computed, seconds of a weight sync"""

    frames: tuple[int, ...] = (8, 32, 128, 512)  # frames a video
    prompts: int = 4  # in a batch

    def run(self) -> None:
        torch.set_num_threads(1)  # as each rank of a training run on CPUs
        model = small_vila(self.hidden, self.layers)
        engines = {"torch": TorchEngine(model, dtype=torch.float32)}  # a copy: its sync copies
        longest = 9 * max(self.frames) + 64 + self.response_tokens
        try:
            engines["vllm"] = VLLMEngine(model, RolloutConfig(max_len=longest))
        except RolloutError as error:
            print(f"vllm is left out: {error}", file=sys.stderr)
        videos = random_videos(self.prompts, max(self.frames))
        for count in self.frames:
            prompts = [embed(model, video[:count]) for video in videos]
            row = {"frames": count, "prompt_tokens": self.group * sum(len(p.ids) for p in prompts)}
            bars = {name: partial(self.sample, e, model, prompts) for name, e in engines.items()}
            for name, numbers in measure(bars, self.repeats).items():
                show(asdict(self) | {"engine": name} | row | numbers)
        for engine in engines.values():
            engine.close()

    def sample(self, engine, model, prompts: list) -> dict[str, float]:
        """prefilled: prompt tokens that were computed; sync: seconds."""
        sync = timed(engine.sync, model)["seconds"]  # and forgets the K/V of the last round
        before = engine.prefilled
        sampling = Sampling(max_tokens=self.response_tokens)
        seeds = list(range(len(prompts)))
        seconds = timed(engine.generate, prompts, self.group, sampling, seeds)["seconds"]
        rate = self.prompts * self.group * self.response_tokens / seconds
        prefilled = engine.prefilled - before
        return dict(prefilled=prefilled, seconds=seconds, tokens_per_second=rate, sync=sync)


# ------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class Decode(Options):
    """seconds to decode and encode a video, and memory after so many, here and in children"""

    frames: int = 64  # of a video of 300
    videos: int = 8  # of 640 x 360 pixels
    decodes: int = 2000  # files opened for the memory
    repeats: int = 3  # of a measurement, for the median
    output: str = "runs/bench"  # folder of the videos

    def run(self) -> None:
        torch.manual_seed(0)
        model = small_vila(128, 2)
        videos = [self.make_video(i) for i in range(self.videos)]
        loaders = {"here": Loader(), "child": Loader(1), "child, ahead": Loader(1)}
        bars = {}
        for name, loader in loaders.items():
            bars[name] = partial(timed, self.encode, model, loader, videos, "ahead" in name)
        found = measure(bars, self.repeats)
        line = {"frames": self.frames}
        for name, numbers in found.items():
            line[f"seconds a video, {name}"] = numbers["seconds"] / self.videos
        show(line)
        self.watch_memory(loaders["child"], videos)
        for loader in loaders.values():
            loader.close()

    def make_video(self, seed: int) -> Medium:
        """Smooth noise that moves: mpeg4 is to have work."""
        path = Path(self.output, f"{seed}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 255, (45, 240, 1), np.uint8)
        picture = noise.repeat(8, 0).repeat(8, 1).repeat(3, 2)  # (360, 1920, 3)
        write_mp4(str(path), np.stack([picture[:, 4 * t : 4 * t + 640] for t in range(300)]), 30)
        return Medium("video", str(path))

    def encode(self, model, loader: Loader, videos: list[Medium], ahead: bool) -> None:
        model.loader = loader
        model.cache = mrsp.EmbeddingCache()
        rows = [replace(QUESTION, media=(video,)) for video in videos]
        if ahead:
            model.prefetch(rows, self.frames)
        for row in rows:
            model.features(row, self.frames)

    def watch_memory(self, loader: Loader, videos: list[Medium]) -> None:
        import psutil

        this = psutil.Process()
        for n in range(self.decodes + 1):
            with loader.open(videos[n % len(videos)], self.frames) as frames:
                frames[:]
            if n % max(1, self.decodes // 8) == 0:
                here, *children = [p.memory_info().rss >> 20 for p in (this, *this.children())]
                show({"decodes": n, "MiB here": here, "children": children})


# ---------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention(Options):
    """block attention against plain softmax and torch's own kernel, as L grows"""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # of the packed sequence
    dense: int = 4096  # longest sequence for the plain softmax
    group: int = 8  # answers to a prompt
    repeats: int = 3  # of a measurement, for the median

    def run(self) -> None:
        for length in self.lengths:
            plain = length <= self.dense
            show(attention_row(length, self.group, (4, 2, 32), plain, self.repeats))


def pairs(layout) -> float:
    """Query-key pairs that the block attention computes; a square on the diagonal counts half."""
    total = 0.0
    for queries, keys, causal in layout.plan[0]:  # slices of (B, H, L)
        area = (queries[2].stop - queries[2].start) * (keys[2].stop - keys[2].start)
        total += area / 2 if causal else area
    return total


def plain_softmax(q, k, v, mask):
    """q (1, H, L, D), k, v (1, Hkv, L, D), mask (1, 1, L, L)"""
    repeat = q.shape[1] // k.shape[1]
    score = (q * q.shape[-1] ** -0.5) @ k.repeat_interleave(repeat, 1).mT  # (1, H, L, L)
    return score.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 1)


def gradients(attend, qkv: list, upstream) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(), qkv, upstream)


def attention_row(length, group, heads, plain=False, repeats=3, **where) -> dict[str, float]:
    """Forward + backward on a prompt and its answers (an eighth of `length`), in GFLOP/s of the
    pairs that count: block attention; torch's kernel; and, if wanted, the plain softmax. heads: of
    queries, of keys, and their width; where: device, dtype."""
    h, h_kv, d = heads
    if length < 2 * group:
        raise OptionError(f"a sequence of {length} tokens is too short for {group} answers")
    answers = [torch.ones(max(1, length // (8 * group)), dtype=torch.long)] * group
    device = where.get("device", "cpu")
    prompt = text_prompt(length - sum(map(len, answers)), WORDS, device)
    layout = mrsp.pack([prompt], [answers]).layout
    q, k, v = (torch.randn(1, n, length, d, requires_grad=True, **where) for n in (h, h_kv, h_kv))
    upstream = torch.randn(1, h, length, d, **where)
    ways = {
        "block": partial(mrsp.BlockAttention.apply, q, k, v, layout, d**-0.5),
        "torch": partial(torch_kernel, q, k, v, is_causal=True, enable_gqa=True),
    }
    if plain:
        ways["plain"] = partial(plain_softmax, q, k, v, layout.mask)
    bars = {name: partial(timed, gradients, ways[name], (q, k, v), upstream) for name in ways}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "cuda" in device else nullcontext():
        found = measure(bars, repeats)
    row = {"length": length}
    for name in ways:
        row[f"{name}_seconds"] = found[name]["seconds"]
        count = length**2 / 2 if name == "torch" else pairs(layout)
        # two products forward, five backward; 2 D FLOPs a pair and head in each
        row[f"{name}_gflops"] = 14 * count * h * d / found[name]["seconds"] / 1e9
    return row | {"rate_to_torch": row["block_gflops"] / row["torch_gflops"]}


# ---------------------------------------------------------------------------------------- gpu


@dataclass(frozen=True)
class Gpu(Options):
    """12 minutes of one CUDA GPU of 80 GB: what only a GPU can tell, and a table at the end"""

    prompts: tuple[int, ...] = (16384, 65536)  # tokens of the prompts
    group: int = 8  # answers to a prompt
    response_tokens: int = 512  # of each answer
    layers: int = 8  # of a 7B decoder: those of 28 that fit beside their optimizer

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise OptionError("kit.bench gpu needs a CUDA GPU, and torch finds none")
        find_ranks().join(alone=True)
        heads = QWEN_7B["num_attention_heads"], QWEN_7B["num_key_value_heads"], QWEN_7B["head_dim"]
        where = {"device": "cuda", "dtype": torch.bfloat16}
        shape = QWEN_7B | {"num_hidden_layers": self.layers}
        answers = self.group, self.response_tokens
        parts = {}  # in this order: what can be wrong before what is slow
        for n in self.prompts:
            parts[f"attention, {n:,} tokens"] = partial(
                attention_row, n, self.group, heads, **where
            )
        parts["sharded against whole"] = partial(sharded_row, "cuda")
        for n in self.prompts:
            parts[f"packed step, {n:,} tokens"] = partial(packed_row, shape, n, *answers, "cuda")
        parts["tower of a 7B"] = partial(
            tower_row, CONFIGS / "qwen2.5-vl-7b", (64, 360, 640), **where
        )
        for chunk in (512, 2048, 8192):
            parts[f"LM head, {chunk:,} at once"] = partial(head_row, QWEN_7B, chunk, 8192, **where)
        print_table({name: gpu_row(name, part) for name, part in parts.items()})


def gpu_row(name: str, part) -> dict:
    """What a part finds; its time in all and peak memory; or that it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    try:
        row = part()
    except torch.OutOfMemoryError:
        row = {"why": "out of memory"}
    row |= {"all_seconds": time.perf_counter() - begin}
    row |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    show({"part": name} | row)
    return row


def print_table(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        numbers = [
            f"{key} {x:,.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items()
        ]
        print(f"{name:28s} {', '.join(numbers)}")


def decoder(shape: dict, dtype=torch.float32, device="cpu") -> Policy:
    """A Qwen2 of that shape with random weights and gradient checkpointing."""
    config = Qwen2Config(**shape)
    with torch.device(device):
        llm = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="mrsp")
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(llm.model, llm.lm_head).train()


def train_pass(policy, pack, chunk=None) -> None:
    policy(mrsp.shard(pack, mrsp.Mesh()), chunk=chunk)[0].sum().backward()


def sharded_row(device: str) -> dict:
    """A small VILA under FSDP2 in bfloat16, by blocks, checkpointed, against a plain one in
    float32: the largest difference of log-probs, and of a gradient beside its largest value."""
    videos, dense = random_videos(1, 16), mrsp.DENSE_LIMIT
    mrsp.DENSE_LIMIT = 0  # by blocks, as long sequences are
    models = [small_vila(128, 4).to(device) for _ in range(2)]
    models[1].enable_gradient_checkpointing()
    models[1].shard_parameters()
    found = []
    for model in models:
        answers = [torch.arange(9, 9 + n) for n in (40, 30, 20)]
        logp, _ = model(mrsp.pack([embed(model, videos[0])], [answers]))
        logp.sum().backward()
        found.append((logp.detach(), [mrsp.whole(p.grad) for p in model.policy.parameters()]))
    mrsp.DENSE_LIMIT = dense
    (logp, grads), (other, others) = found
    gaps = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(grads, others)]
    return {"logp_gap": (logp - other).abs().max().item(), "gradient_gap": max(gaps)}


def packed_row(shape: dict, length: int, group: int, tokens: int, device: str) -> dict:
    """A step, AdamW's too, on one pack of a prompt and its answers: float32 masters under FSDP2 in
    bfloat16. FLOPs are the useful ones, without what checkpointing computes again; peak_to_plan:
    the most memory, beside what kit/plan.py predicts."""
    policy = decoder(shape, device=device)
    policy.shard(torch.bfloat16)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    d, _, v, q, _ = widths(shape)
    layers = shape["num_hidden_layers"]
    answer = torch.ones(tokens, dtype=torch.long)
    pack = mrsp.pack([text_prompt(length, v, device)], [[answer] * group])

    def step() -> None:
        train_pass(policy, pack)
        optimizer.step()
        optimizer.zero_grad()

    seconds = measure({"": partial(timed, step)}, 1)[""]["seconds"]
    flops = 6 * (pack.ids.numel() * parameters(shape)[0] * layers + group * tokens * v * d)
    flops += 14 * pairs(pack.layout) * q * layers
    row = {"seconds": seconds, "tflops": flops / seconds / 1e12}
    if device == "cuda":
        need = memory(shape, length, group * tokens, sampler=None, reference=False)["total"]
        row["peak_to_plan"] = torch.cuda.max_memory_allocated() / need
    return row


@torch.no_grad()
def tower_row(folder, shape: tuple[int, int, int], device: str, dtype) -> dict:
    """Frames (F, height, width) of a second through the tower of a checkpoint's shape."""
    model = load(folder, dtype, weights=False)
    model.tower._apply(lambda x: torch.randn_like(x, device=device) / 50 if x.is_meta else x)
    model.tower.to(device)
    frames = np.zeros((*shape, 3), np.uint8)
    seconds = measure({"": partial(timed, model.encode, frames)}, 3)[""]["seconds"]
    return {"frames_per_second": shape[0] / seconds}


def head_row(shape: dict, chunk: int, tokens: int, device: str, dtype) -> dict:
    """Forward and backward of one layer and the LM head for so many tokens, `chunk` at a time."""
    policy = decoder(shape | {"num_hidden_layers": 1}, dtype, device)
    answer = torch.ones(tokens, dtype=torch.long)
    pack = mrsp.pack([text_prompt(8, shape["vocab_size"], device)], [[answer]])
    return measure({"": partial(timed, train_pass, policy, pack, chunk)}, 1)[""]


# --------------------------------------------------------------------------------------- main

COMMANDS = Mrsp | Rollout | Step | Decode | Attention | Gpu  # named after their classes


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with reported():
        command = parse(COMMANDS, argv, prog="kit.bench", about=__doc__.split("\n")[0])
        ranks = getattr(command, "ranks", 1)
        if ranks > 1 and "WORLD_SIZE" not in os.environ:  # this command again, under torchrun
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            again = ["--nproc_per_node", str(ranks), "-m", "kit.bench", *argv]
            ended = subprocess.run(torchrun + again, env={"OMP_NUM_THREADS": "1"} | os.environ)
            if ended.returncode:
                raise OptionError("a rank failed; its message is above")
        else:
            command.run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
