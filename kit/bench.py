"""Benchmarks: what the design buys, measured, and what a run needs, predicted.

    python -m kit.bench mrsp        the paper's efficiency figure in miniature, on two CPU cores
    python -m kit.bench rollout     both rollout engines: tokens a second, prefill, weight sync
    python -m kit.bench step        one GRPO step on text: seconds of each phase, as one JSON line
    python -m kit.bench decode      videos decoded ahead of the tower; memory over 2,000 of them
    python -m kit.bench attention   block attention against plain softmax and torch's own kernel
    python -m kit.bench plan --model qwen2.5-vl-7b --frames 3600 --gpus 8 --gpu_memory 80
    python -m kit.bench gpu         a 7B decoder, prompts of 16k to 256k tokens, on a CUDA GPU

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

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import grpo
import mrsp
from data import Example, Medium
from families.vila import VILA
from kit.decode import Loader
from kit.plan import PER_FRAME, SHAPES, memory, parameters, widths
from kit.toy import write_mp4
from model import Media, Policy, Prompt
from rollout import RolloutConfig, RolloutError, Sampling, TorchEngine, VLLMEngine

QUESTION = Example("", "user", (), "", "", (), "video", "")
BARS = {  # encoded once by all ranks? sequence parallel? shared prefix?
    "none": (False, False, False),
    "stage 1": (True, False, False),
    "stage 1+2": (True, True, False),
    "ours": (True, True, True),
    "ours, sp 1": (True, False, True),
}


def peak_memory():
    """Start to watch memory -> peak(), the most bytes held since then, above those held then. It
    returns None, and says so, where the kernel's mark cannot be reset: never a guess."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    # VmRSS: memory now; VmHWM: its high-water mark
    text = Path("/proc/self/status").read_text
    status = lambda name: 1024 * int(text().split(name)[1].split()[0])  # noqa: E731
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 15)  # M_MMAP_THRESHOLD: freed tensors leave the process
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS:")
        return lambda: status("VmHWM:") - before
    except (OSError, AttributeError) as error:
        print(f"peak memory is not measured: {error}", file=sys.stderr)
        return lambda: None


def small_vila(hidden: int, layers: int) -> VILA:
    """Random weights: SigLIP of 48 px, 9 tokens a frame; Qwen2 with 4/2 heads and 512 words, in
    float32. Six tower layers: encoding is then 46 % of "none" at 512 frames (the paper's LongVILA:
    stage 1 takes away 52 %). Answers never end by themselves."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<vila/video>"]
    words = special + [f"word{i}" for i in range(512 - len(special))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, special[0]))
    core.add_special_tokens(special)
    torch.manual_seed(0)
    model = VILA.create(
        config={
            "mm_projector_cfg": {"mm_projector_type": "mlp_downsample_2x2_fix"},
            "mm_vision_select_layer": -1,
            "video_encoder": {"_target_": "BasicVideoEncoder", "end_tokens": None},
        },
        llm=dict(
            vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        tower=dict(
            image_size=48, patch_size=8, hidden_size=128, intermediate_size=256,
            num_hidden_layers=6, num_attention_heads=4, vision_use_head=False,
        ),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[2]),
        preprocess={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )  # fmt: skip
    model.eos = -1  # no token has this id
    model.requires_grad_(False).llm.requires_grad_(True)  # RL trains the decoder
    return model


def text_prompt(tokens: int, vocab: int, device="cpu") -> Prompt:
    ids = torch.randint(8, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens))
    none = torch.zeros(0, dtype=torch.long)
    ids, at, none = (x.to(device) for x in (ids, torch.arange(tokens), none))
    return Prompt(ids, at, None, none, "", tokens)


# ------------------------------------------------------------------------------ one GRPO step


def grpo_step(model, reference, engine, optimizer, videos, bar, meshes, group, tokens):
    """A step of one bar: train.grpo_step without files and rewards. videos: frames of each, or a
    Prompt (text only). -> (seconds by phase, norm of the gradient); equal work for every bar."""
    once, sharded, shared = BARS[bar]
    mesh = model.mesh = meshes[sharded]
    seconds, last = defaultdict(float), [time.perf_counter()]

    def lap(name):
        seconds[name] += time.perf_counter() - last[0]
        last[0] += time.perf_counter() - last[0]

    @torch.no_grad()
    def prompt(i, ranks=None) -> Prompt:
        if isinstance(videos[i], Prompt):
            return videos[i]
        encode = lambda frames: torch.cat([model.encode(f) for f in frames.split(16)])  # noqa: E731
        features = mrsp.encode_parallel(encode, videos[i], ranks)
        return model.build_prompt(QUESTION, [Media("video", features)])

    # 1. Stage 1: embeddings, once for all, or again wherever they are used.
    every, mine = range(len(videos)), list(range(len(videos)))[mesh.dp_rank :: mesh.dp]
    ready = {}
    for i in every if once else []:
        made = prompt(i, dist.group.WORLD if dist.is_initialized() else None)
        ready |= {i: made} if i in mine else {}
    for i in [] if once else mine * (group - 1):  # the last rollout's is below
        prompt(i)
    get = lambda i: ready[i] if once else prompt(i)  # noqa: E731
    prompts = [get(i) for i in mine]
    lap("encode")

    # 2. Rollout, dealt among the ranks of a sequence.
    dealt, sampling = slice(mesh.sp_rank, None, mesh.sp), Sampling(max_tokens=tokens)
    answers = engine.generate(prompts[dealt], group, sampling, mine[dealt])
    answers = mrsp.gather_dealt(answers, len(mine), mesh.sp_group)
    del prompts
    lap("rollout")

    # 3. Reference and policy, one pack after the other: all answers of a prompt, or one copy.
    advantage = torch.rand(len(videos), group, generator=torch.Generator().manual_seed(0))
    advantage, passes = grpo.advantages(advantage), []
    for i, found in zip(mine, answers):
        parts = [list(range(group))] if shared else [[g] for g in range(group)]  # mrsp.copies
        passes += [(i, part, [found[g].ids for g in part]) for part in parts]
    config = grpo.LossConfig(kl_coef=1e-2 if reference else 0.0)
    total, ref = len(videos) * group * tokens, [None] * len(passes)
    for n, (i, _, ids) in enumerate(passes if reference else []):
        reference.mesh, packed = mesh, mrsp.pack([get(i)], [ids])
        lap("encode")
        with torch.no_grad():
            ref[n] = packed.pad(reference(packed)[0])[0]
        lap("reference")
    for n, (i, part, ids) in enumerate(passes):
        packed = mrsp.pack([get(i)], [ids])
        lap("encode")
        logp, mask = packed.pad(model(packed)[0])  # stage 2: shard and attention, inside
        adv = advantage[i, part][None]
        loss, _ = grpo.grpo_loss(logp, adv, mask, config, ref_logp=ref[n], total_tokens=total)
        lap("logprobs")
        loss.backward()
        lap("backward")
    trained = [p for p in model.parameters() if p.requires_grad]
    mrsp.all_reduce_gradients(trained)
    norm = mrsp.clip_gradients(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    lap("optimizer")
    return dict(seconds), norm


def setting(args, ranks: int):
    """Join the ranks -> model, optimizer, and the meshes without and with sequence parallelism."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.hidden % 8:
        raise ValueError(f"--hidden must be a multiple of 8 (4 heads), not {args.hidden}")
    if world != ranks:
        raise ValueError(f"{ranks} ranks are asked for, but torchrun started {world}")
    if world > 1:
        dist.init_process_group("gloo")
    model = small_vila(args.hidden, args.layers)
    optimizer = torch.optim.AdamW(model.llm.parameters(), lr=0.0, weight_decay=0.0)
    return model, optimizer, [mrsp.make_mesh(sp, "auto", 4, 2) for sp in (1, world)]


def chosen(args) -> dict:
    return {k: v for k, v in vars(args).items() if k not in ("run", "command", "output")}


def bench_mrsp(args) -> None:
    """seconds and peak memory of a GRPO step: none, stage 1, stage 1+2, ours"""
    model, optimizer, meshes = setting(args, args.ranks)
    model.enable_gradient_checkpointing()
    engine, chief = TorchEngine(model), meshes[0].rank == 0
    reference = TorchEngine(model, dtype=torch.float32).policy  # a frozen copy of the decoder
    random = torch.Generator().manual_seed(0)
    shape = (args.ranks, max(args.frames), 48, 48, 3)
    videos = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    found, norms = defaultdict(list), {}
    for repeat in range(-1, args.repeats):  # the first round warms up, on the shortest videos
        for count in args.frames if repeat >= 0 else [min(args.frames)]:
            for bar in BARS:
                peak = peak_memory()
                mrsp.all_max(0)  # the ranks start together
                seconds, norm = grpo_step(
                    model, reference, engine, optimizer, videos[:, :count], bar, meshes,
                    args.group, args.response_tokens,
                )  # fmt: skip
                if abs(norm / norms.setdefault(count, norm) - 1) > 1e-3:
                    raise RuntimeError(f"{bar}: gradient norm {norm}, others {norms[count]}")
                values = [*seconds.values(), sum(seconds.values()), peak() or -1]
                values = torch.tensor(values, dtype=torch.float64)
                if args.ranks > 1:  # the slowest, the fullest rank
                    dist.all_reduce(values, dist.ReduceOp.MAX)
                if repeat >= 0:
                    found[count, bar].append(values)
                    chief and print(f"{count:5d} frames  {bar:10s} {values[-2]:8.2f} s", flush=True)
    rows, names = [], [*seconds, "seconds", "peak_bytes"]
    for (count, bar), values in found.items():
        row = dict(zip(names, torch.stack(values).quantile(0.5, 0).tolist()))
        row["peak_bytes"] = int(row["peak_bytes"]) if row["peak_bytes"] > 0 else None
        rows.append({"bar": bar, "frames": count} | row)
    if chief:
        settings = chosen(args) | {
            f"{name}_parameters": sum(p.numel() for p in part.parameters())
            for name, part in (("decoder", model.llm), ("tower", model.tower))
        }
        out = args.output
        os.makedirs(out, exist_ok=True)
        Path(out, "mrsp.json").write_text(json.dumps(rows, indent=2) + "\n")
        plot_mrsp(rows, ratios(rows), f"{out}/mrsp.png")
        print(settings, *ratios(rows), f"written: {out}/mrsp.json, {out}/mrsp.png", sep="\n")


def ratios(rows: list) -> list[dict]:
    """How many times faster ours is, and its memory with sharding against that without."""
    at, out = {(r["frames"], r["bar"]): r for r in rows}, []
    for n in dict.fromkeys(r["frames"] for r in rows):
        ours, alone = at[n, "ours"], at[n, "ours, sp 1"]
        found = {f"faster_than_{b}": at[n, b]["seconds"] / ours["seconds"] for b in list(BARS)[:3]}
        if ours["peak_bytes"]:
            found["memory_to_sp_1"] = ours["peak_bytes"] / alone["peak_bytes"]
        out.append({"frames": n} | {k: round(v, 3) for k, v in found.items()})
    return out


def plot_mrsp(rows: list, found: list, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    colors = ("#bdbdbd", "#9ecae1", "#4292c6", "#d94801", "#fdae6b")
    for b, (bar, color) in enumerate(zip(BARS, colors)):
        for axis, name, unit in zip(axes, ("seconds", "peak_bytes"), (1, 2**20)):
            values = [(r[name] or 0) / unit for r in rows if r["bar"] == bar]
            places = [i + 0.17 * (b - 2) for i in range(len(found))]
            drawn = axis.bar(places, values, 0.16, color=color, label=bar)
            if (bar, name) == ("ours", "seconds"):
                axis.bar_label(drawn, [f"{r['faster_than_none']:.1f}x" for r in found], padding=2)
    for axis, title in zip(axes, ("seconds a step (above ours: faster than none)", "peak MiB")):
        axis.set_xticks(range(len(found)), [r["frames"] for r in found])
        axis.set(xlabel="frames a video", title=title)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bench_step(args) -> None:
    """one GRPO step on a text prompt: seconds of each phase, as one JSON line"""
    model, optimizer, meshes = setting(args, args.sp)
    prompts, runs = [text_prompt(args.prompt_tokens, 512)], []
    for _ in range(args.repeats + 1):  # the first one warms up
        mrsp.all_max(0)
        work = model, None, TorchEngine(model), optimizer, prompts, "ours", meshes
        runs.append(grpo_step(*work, args.group, args.response_tokens)[0])
    names = ("rollout", "logprobs", "backward", "optimizer")
    line = chosen(args) | {name: median(run[name] for run in runs[1:]) for name in names}
    line["total"] = median(sum(run[name] for name in names) for run in runs[1:])
    line["tokens"] = args.prompt_tokens + args.group * args.response_tokens
    if meshes[0].rank == 0:
        print(json.dumps(line))


# ------------------------------------------------------------------------------------ rollout


def bench_rollout(args) -> None:
    """both rollout engines: tokens a second, prompt tokens computed, seconds of a weight sync"""
    torch.set_num_threads(1)  # as each rank of a training run on CPUs
    model = small_vila(args.hidden, args.layers)
    longest = 9 * max(args.frames) + 64 + args.response_tokens
    engines = {"torch": TorchEngine(model, dtype=torch.float32)}  # a copy: its sync copies
    try:
        engines["vllm"] = VLLMEngine(model, RolloutConfig(max_len=longest))
    except RolloutError as error:
        print(f"vllm is left out: {error}", file=sys.stderr)
    random, found = torch.Generator().manual_seed(0), defaultdict(list)
    sampling = Sampling(max_tokens=args.response_tokens)
    for count in args.frames:
        videos = torch.randint(0, 256, (args.prompts, count, 48, 48, 3), generator=random)
        with torch.no_grad():
            features = [model.encode(video.to(torch.uint8), at_once=16) for video in videos]
        prompts = [model.build_prompt(QUESTION, [Media("video", f)]) for f in features]
        for repeat in range(-1, args.repeats):  # the first round warms up
            for name, engine in engines.items():
                begin = time.perf_counter()
                engine.sync(model)  # and forgets the K/V of the last round
                synced, before = time.perf_counter(), engine.prefilled
                seeds = [1000 * (repeat + 1) + i for i in range(args.prompts)]
                engine.generate(prompts, args.group, sampling, seeds)
                values = time.perf_counter() - synced, synced - begin, engine.prefilled - before
                if repeat >= 0:
                    found[count, name].append(values)
        for name in engines:
            seconds, sync, prefilled = map(median, zip(*found[count, name]))
            tokens = args.prompts * args.group * args.response_tokens
            asked = args.group * sum(len(p.ids) for p in prompts)
            row = {"engine": name, "frames": count, "prompt_tokens": asked, "prefilled": prefilled}
            row |= {"seconds": seconds, "tokens_per_second": tokens / seconds, "sync": sync}
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(chosen(args) | shown), flush=True)
    for engine in engines.values():
        engine.close()


# ---------------------------------------------------------------------------------- attention


def bench_decode(args) -> None:
    """Seconds to decode and encode a video, and memory after so many, here and in children."""
    import psutil

    torch.manual_seed(0)
    model, folder = small_vila(128, 2), Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    videos = [Medium("video", str(folder / f"{i}.mp4")) for i in range(args.videos)]
    for i, m in enumerate(videos):  # smooth noise that moves: mpeg4 is to have work
        picture = np.random.default_rng(i).integers(0, 255, (45, 240), np.uint8).repeat(8, 0)
        picture = picture.repeat(8, 1)[..., None].repeat(3, 2)
        write_mp4(m.path, np.stack([picture[:, 4 * t : 4 * t + 640] for t in range(300)]), 30)
    bars = {"here": Loader(), "child": Loader(1), "child, ahead": Loader(1)}
    seconds = defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, model.loader in bars.items():
            model.cache, begin = mrsp.EmbeddingCache(), time.perf_counter()
            rows = [replace(QUESTION, media=(m,)) for m in videos]
            if "ahead" in name:
                model.ahead(rows, args.frames)
            for row in rows:
                model.features(row, args.frames)
            if repeat:  # the first one is for warming up
                seconds[name].append((time.perf_counter() - begin) / len(videos))
    times = {f"seconds a video, {name}": round(median(v), 3) for name, v in seconds.items()}
    print(json.dumps({"frames": args.frames} | times), flush=True)
    this, loader = psutil.Process(), bars["child"]
    for n in range(args.decodes + 1):
        with loader.open(videos[n % len(videos)], args.frames) as frames:
            frames[:]
        if n % (args.decodes // 8) == 0:
            sizes = [p.memory_info().rss >> 20 for p in (this, *this.children())]
            print(
                json.dumps({"decodes": n, "MiB here": sizes[0], "children": sizes[1:]}), flush=True
            )
    for loader in bars.values():
        loader.close()


def clock(work, repeats: int, device) -> float:
    """Median seconds of work(), after one call to warm up."""
    sync, seconds = torch.cuda.synchronize if "cuda" in str(device) else lambda: None, []
    for _ in range(repeats + 1):
        sync()
        begin = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def pairs(layout) -> float:
    """Query-key pairs that the block attention computes; a square on the diagonal counts half."""
    size = lambda at: at[2].stop - at[2].start  # noqa: E731
    return sum(size(q) * size(k) / (2 if causal else 1) for q, k, causal in layout.blocks(0))


def attention_row(length, group, heads, device="cpu", dtype=torch.float32, repeats=3, dense=0):
    """Forward + backward on a prompt and its answers (an eighth of `length`), in GFLOP/s of the
    pairs that count: block attention; torch's kernel, causal over the same length; and, up to
    length `dense`, softmax under the (L, L) mask. heads: of queries, of keys, and their width."""
    h, h_kv, d = heads
    if length < 2 * group:
        raise ValueError(f"a sequence of {length} tokens is too short for {group} answers")
    answers = [torch.ones(max(1, length // (8 * group)), dtype=torch.long)] * group
    prompt = text_prompt(length - sum(map(len, answers)), 512, device)
    layout = mrsp.pack([prompt], [answers]).layout
    make = lambda n: torch.randn(1, n, length, d, device=device, dtype=dtype)  # noqa: E731
    q, k, v = (make(n).requires_grad_() for n in (h, h_kv, h_kv))
    up, row = make(h), {"length": length}

    def plain():
        score = (q * d**-0.5) @ k.repeat_interleave(h // h_kv, 1).mT  # (1, H, L, L)
        score = score.masked_fill(~layout.mask(), float("-inf"))
        return score.softmax(-1) @ v.repeat_interleave(h // h_kv, 1)

    causal = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    block = lambda: mrsp.BlockAttention.apply(q, k, v, layout, d**-0.5)  # noqa: E731
    ways = {"block": (block, pairs(layout)), "torch": (causal, length**2 / 2)}
    ways |= {"plain": (plain, pairs(layout))} if length <= dense else {}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "cuda" in str(device) else nullcontext():
        for name, (attend, count) in ways.items():
            work = lambda: torch.autograd.grad(attend(), (q, k, v), up)  # noqa: B023, E731
            row[f"{name}_seconds"] = clock(work, repeats, device)
            # two products forward, five backward; 2 D FLOPs a pair and head in each
            row[f"{name}_gflops"] = 14 * count * h * d / row[f"{name}_seconds"] / 1e9
    return row | {"rate_to_torch": row["block_gflops"] / row["torch_gflops"]}


def bench_attention(args) -> None:
    """block attention against plain softmax and torch's own kernel, as L grows"""
    for length in args.lengths:
        row = attention_row(length, args.group, (4, 2, 32), repeats=args.repeats, dense=args.dense)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


# --------------------------------------------------------------------------------------- plan


def bench_plan(args) -> None:
    """memory of each GPU by part, predicted; whether it fits, and what to change"""
    if args.model not in SHAPES:
        raise ValueError(f"--model must be one of {', '.join(SHAPES)}, not {args.model!r}")
    each, gib = args.tokens_per_frame or PER_FRAME[args.model], 2**30
    now = {n: getattr(args, n) for n in ("frames", "gpus", "sp", "chunk", "prefill")}
    now["sp"] = now["sp"] or args.gpus
    if args.gpus % now["sp"]:
        raise ValueError(f"--sp {now['sp']} does not divide --gpus {args.gpus}")
    answers = args.group * args.response_tokens

    def need(frames, **settings):  # 200: the question
        return memory(SHAPES[args.model], frames * each + 200, answers, **settings)

    fits = lambda: need(**now)["total"] <= 0.92 * args.gpu_memory * gib  # noqa: E731
    verdict = lambda: "fits" if fits() else "does NOT fit"  # noqa: E731
    print(f"{now['frames']} frames x {each} = {now['frames'] * each:,} tokens, + {answers:,}")
    for name, value in need(**now).items():
        print(f"{name:12s} {value / gib:8.2f} GiB a GPU")
    print(f"{verdict()} into 92 % of {args.gpu_memory} GiB (the rest: CUDA, fragmentation)")
    for name, value in (("sp", args.gpus), ("prefill", 16384), ("chunk", 1024)):
        if not fits() and now[name] != value:
            now[name] = value
            print(f"with --{name} {value}: {need(**now)['total'] / gib:.2f} GiB, {verdict()}")
    while not fits() and now["frames"] > 1:
        now["frames"] = now["frames"] * 19 // 20
    print(f"{now['frames']} frames: {need(**now)['total'] / gib:.2f} GiB, {verdict()}")


# ---------------------------------------------------------------------------------------- gpu


def decoder(shape: dict, dtype=torch.float32, device="cpu") -> Policy:
    """A Qwen2 of that shape with random weights and gradient checkpointing."""
    config = Qwen2Config(**shape)
    with torch.device(device):
        llm = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="mrsp")
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(llm).train()


def tile_mlps(llm, tile: int) -> None:
    """Run MLPs of long sequences tile by tile, each checkpointed by itself: in a 7B their
    activations are 220 KiB a token. It costs a third run of the MLP, so: above 10 tiles only."""
    for layer in llm.model.layers:

        def tiled(x, mlp=layer.mlp.forward):
            if x.shape[1] <= 10 * tile:
                return mlp(x)
            return torch.cat([checkpoint(mlp, y, use_reentrant=False) for y in x.split(tile, 1)], 1)

        layer.mlp.forward = tiled


def gpu_rows(shape, prompts, group, tokens, device, dtype, side=8192, tile=16384):
    """Yield, for each prompt length, forward + backward of one pack of prompt and answers, and of
    the G copies: one copy is timed, times G, since they are alike. FLOPs are the useful ones,
    without what checkpointing computes again; peak_bytes includes the weights."""
    square = torch.randn(side, side, device=device, dtype=dtype)
    rate = 2 * side**3 / clock(lambda: square @ square, 10, device)
    policy = decoder(shape, dtype, device)
    tile_mlps(policy.llm, tile)
    held = sum(p.nbytes for p in policy.parameters())
    (d, _, v, q, _), n_layers, answer = widths(shape), shape["num_hidden_layers"], [1] * tokens
    for length in prompts:
        for way, n, times in (("shared prefix", group, 1), ("G copies", 1, group)):
            pack = mrsp.pack([text_prompt(length, v, device)], [[torch.tensor(answer)] * n])
            flops = 6 * (pack.ids.numel() * parameters(shape)[0] * n_layers + n * tokens * v * d)
            flops += 14 * pairs(pack.layout) * q * n_layers
            row, peak = {"prompt": length, "way": way, "seconds": None}, peak_memory()
            pack = mrsp.shard(pack, mrsp.Mesh())
            work = lambda: policy(pack, chunk=2048)[0].sum().backward()  # noqa: B023, E731
            try:
                seconds = clock(work, 1, device)
                row |= {"seconds": times * seconds, "tflops": flops / seconds / 1e12}
                row |= {"share_of_matmul": flops / seconds / rate, "matmul_tflops": rate / 1e12}
                row["peak_bytes"] = held + (peak() or 0)
            except torch.OutOfMemoryError:
                row["why"] = "out of memory"
            policy.zero_grad()
            torch.cuda.empty_cache()
            yield row


def bench_gpu(args) -> None:
    """a 7B decoder in bfloat16 on one CUDA GPU, and its attention beside torch's flash kernel"""
    if not torch.cuda.is_available():
        raise ValueError("kit.bench gpu needs a CUDA GPU, and torch finds none")
    shape, cuda, bf16 = SHAPES["qwen2.5-vl-7b"], "cuda", torch.bfloat16
    heads = [shape[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    for length in args.prompts:
        print(json.dumps(attention_row(length, args.group, heads, cuda, bf16)), flush=True)
    for row in gpu_rows(shape, args.prompts, args.group, args.response_tokens, cuda, bf16):
        print(json.dumps(row), flush=True)


# --------------------------------------------------------------------------------------- main

SAME = {"group": (8, "answers to a prompt"), "repeats": (3, "of a measurement, for the median")}
SMALL = SAME | {"layers": (4, "of the decoder"), "response_tokens": (32, "of each answer")}
COMMANDS = {  # option: default, help
    "mrsp": (bench_mrsp, SMALL | {
        "frames": ([8, 32, 128, 512], "frames a video, by commas"), "hidden": (128, "its width"),
        "ranks": (2, "processes, and prompts"), "output": ("runs/bench", "folder of the results"),
    }),
    "rollout": (bench_rollout, SMALL | {
        "frames": ([8, 32, 128, 512], "frames a video, by commas"), "hidden": (128, "its width"),
        "prompts": (4, "in a batch"),
    }),
    "decode": (bench_decode, {
        "frames": (64, "of a video of 300"), "videos": (8, "of 640 x 360 pixels"),
        "decodes": (2000, "files opened for the memory"), "repeats": (3, "for the median"),
        "output": ("runs/bench", "folder of the videos"),
    }),
    "step": (bench_step, SMALL | {
        "prompt_tokens": (1024, "of the prompt"), "hidden": (256, "width of the decoder"),
        "sp": (1, "ranks that share the sequence"),
    }),
    "attention": (bench_attention, SAME | {
        "lengths": ([1024, 2048, 4096, 8192, 16384], "of the packed sequence, by commas"),
        "dense": (4096, "longest sequence for the plain softmax"),
    }),
    "plan": (bench_plan, {
        "model": ("qwen2.5-vl-7b", " or ".join(SHAPES)), "frames": (3600, "of a video"),
        "tokens_per_frame": (None, "default: the model's"), "gpus": (8, "of all nodes"),
        "gpu_memory": (80, "GiB of each"), "sp": (None, "ranks a sequence; default: all"),
        "group": (8, "answers to a prompt"), "response_tokens": (2048, "of each answer"),
        "chunk": (8192, "tokens in the LM head at once"),
        "prefill": (None, "prompt tokens the sampler takes at once; default: all"),
    }),
    "gpu": (bench_gpu, {
        "prompts": ([16384, 65536, 131072, 262144], "tokens of the prompts, by commas"),
        "group": (8, "answers to a prompt"), "response_tokens": (512, "of each answer"),
    }),
}  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, options) in COMMANDS.items():
        about = {"help": run.__doc__, "description": run.__doc__}
        command = commands.add_parser(name, **about, allow_abbrev=False)
        command.set_defaults(run=run)
        for option, (default, text) in options.items():
            kind = str if isinstance(default, str) else positive
            if isinstance(default, list):
                kind = lambda value: [positive(n) for n in value.split(",")]  # noqa: E731
            text = f"{text} ({default})"
            command.add_argument(f"--{option}", type=kind, default=default, help=text)
    args = parser.parse_args(argv)
    ranks = vars(args).get({"mrsp": "ranks", "step": "sp"}.get(args.command), 1)
    if ranks > 1 and "WORLD_SIZE" not in os.environ:  # this command again, under torchrun
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node", str(ranks), "-m", "kit.bench", *argv]
        code = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ).returncode
        sys.exit(code and f"error: a rank failed with status {code}; its message is above")
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
