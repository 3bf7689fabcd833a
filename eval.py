"""Evaluation: accuracy on multiple-choice and open questions, by category and by frames.

    Example --features (cached)--> Prompt --greedy rollout--> completion --grade--> 0 or 1

    accuracy = mean over ALL questions. A question whose video does not decode counts as wrong and
    is listed with its error; none is dropped. Results are keyed by the question, not by the video.

The public evaluation calls a stub in place of the model, reuses a video's first answer for its
second question, skips failures, and does not accept "B." for "B"; here the rules of grpo.py grade
(one set of rules for training and evaluation). As LongVideo-Reason-eval does, no LLM judges.

Two controls belong to a result:
    wrong video   each question is asked about another video. Accuracy must fall to chance, or the
                  questions can be answered without looking.
    prefill       the answer's beginning is forced, e.g. into a reasoning style. It tells what RL
                  added to choosing that style.

Command line:  python eval.py --model runs/toy/model
The folder's recipe.json gives the data, frames and prompt it was trained with; options override.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace

import torch
import torch.distributed as dist

from data import DataError, load_rows
from grpo import accuracy_reward, format_reward, graded
from model import ModelError, load
from mrsp import EmbeddingCache
from rollout import RolloutConfig, RolloutError, Sampling, make_engine


def swap_media(examples: list) -> list:
    """The wrong-media control: every question about the media that stand half the set away among
    those of the same kinds, with their segments; each medium's num_frames stay. Text questions
    have none, and stay."""
    sets, swap, swapped = {}, {}, []
    keys = [tuple(m._replace(num_frames=None) for m in e.media) for e in examples]
    for media in dict.fromkeys(keys):
        sets.setdefault(tuple((m.kind, m.track) for m in media), []).append(media)
    for kinds, media in sets.items():
        if kinds and len({tuple(m.path for m in own) for own in media}) == 1:
            kind = "+".join(kind for kind, _ in kinds)
            raise DataError(f"the wrong-{kind} control needs questions about at least two of them")
        swap |= {m: media[(i + len(media) // 2) % len(media)] for i, m in enumerate(media)}
    for e, key in zip(examples, keys):
        media = [new._replace(num_frames=m.num_frames) for new, m in zip(swap[key], e.media)]
        swapped.append(replace(e, media=tuple(media)))
    return swapped


def evaluate(
    model,
    engine,
    examples: list,
    num_frames: int | None = None,
    prefill: str = "",
    batch: int = 64,
    rank: int = 0,
    world: int = 1,
    bar=iter,
) -> dict:
    """Greedy answers to all examples, dealt to the ranks in batches that do not depend on the
    number of ranks. Returns, on every rank: accuracy, format (fractions), by_category {name:
    accuracy}, questions, errors [(id, message)] and records (one dict a question, in order)."""
    recipe, tp = model.recipe, engine.tp  # the tp ranks of one engine ask the same
    sampling = Sampling(temperature=0.0, max_tokens=recipe.max_tokens, stop=recipe.stop)
    starts, records = range(0, len(examples), batch), {}
    for start in bar(starts[rank // tp :: world // tp]):
        rows, prompts = [], []
        for index in range(start, min(start + batch, len(examples))):
            try:
                prompts.append(model.prompt(examples[index], num_frames, prefill))
                rows.append(index)
            except (DataError, ModelError) as error:
                records[index] = record(examples[index], "", error=str(error))
        for index, answers in zip(rows, engine.generate(prompts, 1, sampling) if rows else []):
            text = f"{prefill} {answers[0].text}" if prefill else answers[0].text
            how = {"tokens": len(answers[0].ids), "thinking": recipe.thinking}
            records[index] = record(examples[index], text, **how)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, records)
        records = {index: r for part in parts for index, r in part.items()}
    records = [records[i] for i in range(len(examples))]
    return summarise(records) | {"records": records}


def record(example, text: str, tokens: int = 0, error: str = "", thinking: bool = True) -> dict:
    """The graded answer to one question."""
    seen = graded(text, thinking)
    return {
        "problem_id": example.id,
        "category": example.category,
        "gold": example.answer,
        "completion": text,
        "accuracy": 0.0 if error else accuracy_reward(seen, example.answer, example.options),
        "format": 0.0 if error else format_reward(seen),
        "tokens": tokens,
        "error": error,
    }


def summarise(records: list[dict]) -> dict:
    """Mean accuracy and format of records, and accuracy by category."""
    by_category = defaultdict(list)
    for r in records:
        by_category[r["category"]].append(r["accuracy"])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "accuracy": mean([r["accuracy"] for r in records]),
        "format": mean([r["format"] for r in records]),
        "by_category": {name: mean(values) for name, values in sorted(by_category.items())},
        "questions": len(records),
        "errors": [(r["problem_id"], r["error"]) for r in records if r["error"]],
    }


# ---------------------------------------------------------------------------- table and pictures


def table(summary: dict) -> str:
    """summary.json of a run as the table that ends it."""
    names = {"control": "  control: SFT forced into the careful style", "grpo": "after GRPO"}
    names |= {"chance": "guessing", "sft": "before GRPO"}
    names |= {"other_environment": "  other environment", "wrong_video": "  control: wrong video"}
    rows = {}
    for stage in ("chance", "sft", "control", "grpo"):
        if stage in summary:
            found = summary[stage]
            rows[names[stage]] = found["accuracy"] if isinstance(found, dict) else found
    g = summary.get("grpo", {})
    rows |= {f"  {name}": value for name, value in g.get("by_category", {}).items()}
    rows |= {f"  {n} frames": value for n, value in g.get("by_frames", {}).items()}
    rows |= {names[k]: g[k] for k in ("other_environment", "wrong_video") if k in g}
    lines = [f"accuracy on {summary['questions']} held-out questions, seed {summary['seed']}"]
    lines += [f"  {name:46s} {100 * value:5.1f} %" for name, value in rows.items()]
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}"])


def plot_curves(metrics: str, path: str) -> None:
    """The GRPO stage of metrics.jsonl as curves.png: thin = each step, thick = running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(metrics) as file:
        rows = [r for r in map(json.loads, file) if r["stage"] == "grpo"]
    panels = {
        "reward": "mean reward",
        "accuracy": "accuracy of sampled answers",
        "length": "tokens an answer",
        "clip_fraction": "clip fraction",
        "mismatch_mean": "|log-prob sampler - trainer|",
        "entropy": "entropy (nats a token)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, panels.items()):
        x, y = [r["step"] for r in rows], [r[name] for r in rows]
        window = max(1, len(y) // 10)
        mean = [sum(y[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(y))]
        axis.plot(x, y, color="#9ecae1", linewidth=0.8)
        axis.plot(x, mean, color="#08519c", linewidth=1.8)
        axis.set(title=title, xlabel="GRPO step")
        if name == "mismatch_mean":
            axis.plot(
                x, [r["mismatch_max"] for r in rows], color="#cb181d", linewidth=0.8, label="max"
            )
            axis.set_yscale("symlog", linthresh=1e-7)
            axis.legend()
        if name == "clip_fraction" and not any(y):
            axis.set(title="clip fraction (0: on-policy)", ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_frames(summary: dict, path: str) -> None:
    """Accuracy over the number of frames, with the controls as lines, as frames.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grpo = summary["grpo"]
    frames = [int(n) for n in grpo["by_frames"]]
    figure, axis = plt.subplots(figsize=(6.5, 5), constrained_layout=True)
    values = [100 * v for v in grpo["by_frames"].values()]
    axis.plot(frames, values, "o-", color="#08519c", label="after GRPO")
    lines = {
        f"SFT, {max(frames)} frames": (summary["sft"]["accuracy"], "#e6550d", "--"),
        "SFT forced into the careful style": (summary["control"]["accuracy"], "#fd8d3c", ":"),
        "GRPO, wrong video": (grpo["wrong_video"], "#636363", "--"),
        "guessing": (summary["chance"], "#bdbdbd", "-"),
    }
    for label, (value, color, style) in lines.items():
        axis.axhline(100 * value, color=color, linestyle=style, linewidth=1.2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(frames, [str(n) for n in frames])
    axis.set(xlabel="frames a video", ylabel="accuracy (%)", ylim=(0, 100))
    axis.set_title(f"{summary['questions']} held-out questions, seed {summary['seed']}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------- command line


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description="Accuracy of a saved model.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--data", help="rows (.jsonl); default: the test rows that recipe.json names")
    add("--video_dir", help="folder that the rows' paths are relative to; default: the rows' own")
    add("--num_frames", type=int, help="frames a video; default: from recipe.json")
    add("--max_tokens", type=int, help="longest answer; default: from recipe.json")
    add("--rollout", choices=("vllm", "torch"), help="default: vllm with a GPU, if installed")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of model and sampler")
    add("--rollout_max_len", type=int, help="vLLM: longest prompt and answer; default: model's")
    add("--rollout_memory", type=float, default=0.5, help="fraction of a GPU for vLLM")
    add("--prefill", default="", help="forced beginning of every answer")
    add("--wrong_video", action="store_true", help="control: ask about another video")
    add("--cache_dir", help="folder of embeddings kept across runs; default: none are kept")
    add("--output", help="write one JSON line a question to this file")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, RolloutError) as error:  # DataError, ModelError, an impossible option
        sys.exit(f"error: {error}")


def run(args) -> dict:
    from tqdm import tqdm

    dtype = getattr(torch, args.dtype)
    model = load(args.model, dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.cache = EmbeddingCache(args.cache_dir)
    chosen = {k: getattr(args, k) for k in ("num_frames", "max_tokens")}
    model.recipe = replace(model.recipe, **{k: v for k, v in chosen.items() if v is not None})
    source = args.data or model.recipe.data and os.path.join(args.model, model.recipe.data)
    if not source:
        raise DataError(f"{args.model}/recipe.json names no data; give --data FILE.jsonl")
    examples = load_rows(source, args.video_dir)
    for e in examples:
        for m in e.media:
            model.check_taken(m, e.id)
    if args.wrong_video:
        examples = swap_media(examples)
    config = RolloutConfig(max_len=args.rollout_max_len, memory=args.rollout_memory)
    engine = make_engine(args.rollout, model, config, dtype)
    engine.sync(model)
    result = evaluate(
        model, engine, examples, prefill=args.prefill,
        bar=lambda batches: tqdm(batches, desc="eval"),
    )  # fmt: skip
    engine.close()
    frames = model.recipe.num_frames
    print(f"{result['questions']} questions of {source}, {frames} frames, greedy")
    print(f"accuracy {result['accuracy']:.4f}  format {result['format']:.4f}")
    for name, value in result["by_category"].items():
        print(f"  {name:12s} {value:.4f}")
    for name, message in result["errors"]:
        print(f"counted as wrong: {name}: {message}")
    if args.output:
        with open(args.output, "w") as file:
            file.writelines(json.dumps(r) + "\n" for r in result["records"])
    return result


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    main()
