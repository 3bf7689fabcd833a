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
