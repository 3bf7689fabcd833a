"""Evaluation: accuracy on multiple-choice and open questions, by category and by frames.

    Example --features (cached)--> Prompt --greedy--> completion --grade--> record, 0 to 1

    batches   0  1  2  3  4  5 ...      fixed: they do not depend on the ranks
    rank 0    #     #     #   --append--> answers_64.part.0 )  all   answers_64.jsonl,
    rank 1       #     #      --append--> answers_64.part.1 ) -----> result.json

    accuracy = mean over ALL questions. What cannot be asked (a malformed row, a video that does not
    decode) counts as wrong and is listed with its error; none is dropped. Results are keyed by the
    question, not by the video.

The public evaluation calls a stub in place of the model, reuses a video's first answer for its
second question, skips failures, and does not accept "B." for "B"; large harnesses start again when
they are killed. Here evaluate() is the one path of training and of this command, and finished
batches are kept (kit/work.py): a run that was killed goes on, with any number of ranks, and ends
with the same bytes.

Two accuracies, each with its 95 % interval: strict is the method's (grpo.reward: one <answer>
span), lenient counts the answer also where it stands without it. Without --judge no model is asked
whether an open answer means the same (LongVideo-Reason-eval does without, too).

Two controls belong to a result:
    wrong video   each question is asked about another video. Accuracy must fall to chance, or the
                  questions can be answered without looking.
    prefill       the answer's beginning is forced, e.g. into a reasoning style. It tells what RL
                  added to choosing that style.

Command line:  python eval.py --model runs/toy/model          data, frames, prompt: its recipe.json
               torchrun --nproc_per_node 8 eval.py --model M --benchmark videomme --data FILE ...
Check this file alone:  pytest tests/test_eval.py
"""

import functools
import json
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data import DataError, Example, Rate
from grpo import accuracy_reward, graded
from kit import benchmarks
from kit.ask import AskConfig, Job, ask, digest, grade
from kit.chat import Chat, ReplyError
from kit.lenient import last_answer, lenient_accuracy
from kit.method import Method
from kit.options import parse
from kit.ranks import Ranks, reported
from kit.report import read_answers, write_report
from kit.work import ALONE, Folder
from rollout import Sampling

GRPO = Method()


# --------------------------------------------------------------------------- asking and grading


def record(example: Example, answers, method: Method, prefill: str, thinking: bool) -> dict:
    """The graded answer to one question. answers: [Response], or the error why there is none."""
    failed = isinstance(answers, Exception)
    text = "" if failed else answers[0].text
    if prefill and not failed:
        text = f"{prefill} {text}"
    seen = graded(text, thinking)
    parts = {} if failed else grade(method, seen, example)
    lenient = 0.0 if failed else lenient_accuracy(seen, example.answer, example.options)
    return {
        "problem_id": example.id,
        "category": example.category,
        "gold": example.answer,
        "completion": text,
        "accuracy": parts.get("accuracy", 0.0),
        "lenient": max(parts.get("accuracy", 0.0), lenient),
        "format": parts.get("format", 0.0),
        "parts": parts,
        "tokens": 0 if failed else len(answers[0].ids),
        "error": str(answers) if failed else "",
    }


def evaluate(
    model,
    engine,
    examples: list[Example],
    method: Method = GRPO,
    num_frames: int | Rate | None = None,
    prefill: str = "",
    batch: int = 64,
    ranks: Ranks = ALONE,
    bar: str = "",
    rewrite=None,
    chat: Chat | None = None,
    folder: Folder | None = None,
    name: str = "answers",
) -> dict:
    """Greedy answers to all examples. Returns, on every rank, summarise() of the records, and the
    records: one dict a question, in order.

    num_frames: default: the recipe's. batch: questions that are asked together; batches are dealt
    to the ranks. bar: title of a progress bar. rewrite: see ask. chat: judges, see judge. folder:
    keeps finished batches, and the records as NAME.jsonl; without one nothing is kept.
    """
    recipe = model.recipe
    frames = num_frames or recipe.frames
    sampling = Sampling(temperature=0.0, max_tokens=recipe.max_tokens, stop=recipe.stop)
    place = {example.id: i for i, example in enumerate(examples)}
    turn = batch * (ranks.world // engine.tp)  # so far behind a rank's batch is its next one

    def work(ids: list[str]) -> list[dict]:
        rows = [examples[place[i]] for i in ids]
        soon = place[ids[0]] + turn
        model.prefetch(rows + examples[soon : soon + batch], frames)
        found = ask(model, engine, rows, frames, sampling, prefill=prefill, rewrite=rewrite)
        records = [record(e, a, method, prefill, recipe.thinking) for e, a in zip(rows, found)]
        if chat is None:
            return records
        with ThreadPoolExecutor(16) as threads:
            word = functools.partial(judge, chat, thinking=recipe.thinking)
            return list(threads.map(word, rows, records))

    folder = folder or Folder(None, {}, ranks)
    how = {"size": batch, "tp": engine.tp, "field": "problem_id", "bar": bar}
    records = list(folder.stage(name, list(place), work, **how).values())
    return summarise(records) | {"records": records}


def swap_media(examples: list[Example]) -> list[Example]:
    """The wrong-media control: every question about the media that stand half the set away among
    those of the same kinds, with their segments; each medium's num_frames stay. Text questions
    have none, and stay. DataError if all media of some kinds are in the same files."""
    own = [tuple(m._replace(num_frames=None) for m in e.media) for e in examples]
    alike = defaultdict(lambda: defaultdict(dict))  # kinds -> files -> different media of these
    for media in own:
        kinds = tuple((m.kind, m.track) for m in media)
        files = tuple(m.path for m in media)
        alike[kinds][files][media] = None
    swap = {}
    for kinds, by_files in alike.items():
        if kinds and len(by_files) == 1:
            kind = "+".join(kind for kind, _ in kinds)
            raise DataError(f"the wrong-{kind} control needs questions about at least two of them")
        # Other segments of a file stand beside it, or half the set away may be one of them.
        ordered = [media for same in by_files.values() for media in same]
        half = len(ordered) // 2
        swap |= zip(ordered, ordered[half:] + ordered[:half])
    swapped = []
    for example, media in zip(examples, own):
        pairs = zip(swap[media], example.media)
        wrong = tuple(new._replace(num_frames=old.num_frames) for new, old in pairs)
        swapped.append(replace(example, media=wrong))
    return swapped


JUDGE = """\
Question: {}
Reference answer: {}
Given answer: {}
Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""


def says_yes(chat: Chat, example: Example, said: str) -> bool:
    """Does a model take what was said for the answer? ReplyError if it says neither yes nor no."""
    question = JUDGE.format(example.problem, example.answer, said)
    reply = chat.ask([{"role": "user", "content": question}])
    word = re.match(r"\W*(yes|no)\b", reply.rpartition("</think>")[2], flags=re.IGNORECASE)
    if word is None:
        raise ReplyError(f"neither yes nor no: {reply[:80]!r}")
    return word[1].lower() == "yes"


def judge(chat: Chat, example: Example, found: dict, thinking: bool) -> dict:
    """A record with a model's word on an open answer that earned nothing. It is shown last_answer;
    its yes is the lenient accuracy, and with exactly one <answer> span the strict one. Without its
    word the answer is wrong, and the record's error says so."""
    seen = graded(found["completion"], thinking)
    said = last_answer(seen).strip()
    if not said or example.options or found["error"] or found["lenient"]:
        return found
    try:
        right = float(says_yes(chat, example, said))
    except ReplyError as error:
        return found | {"error": f"judge: {error}"}
    return found | {"accuracy": right * accuracy_reward(seen, said), "lenient": right}


# --------------------------------------------------------------------------------------- numbers


def wilson(right: float, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a share: all p from which right / n is at most z standard errors away
    (E. B. Wilson, Journal of the American Statistical Association 22, 1927). It stays in [0, 1] and
    holds for few questions. It takes them as independent, which those on one video are not quite;
    for answers that are right in part it is too wide, never too narrow.

    >>> [round(p, 4) for p in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    p = right / n
    middle = (right + z**2 / 2) / (n + z**2)
    half = (p * (1 - p) * n + z**2 / 4) ** 0.5 * z / (n + z**2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def score(records: list[dict]) -> dict:
    """questions, and accuracy and lenient, each with its interval."""
    n = len(records)
    found = {"questions": n}
    for name in ("accuracy", "lenient"):
        right = sum(r[name] for r in records)
        found |= {name: right / n, f"{name}_95": wilson(right, n)}
    return found


def summarise(records: list[dict], benchmark: str | None = None) -> dict:
    """score() of all records and by category, accuracy by category, parts (means of the other parts
    of the reward), format (one of them, 0 without), tokens (mean) and errors [(id, message)].
    Records that the benchmark counts as one question (VNBench) are as right as the worst."""
    units = defaultdict(list)
    for r in records:
        units[benchmarks.unit(benchmark, r["problem_id"])].append(r)
    by_category = defaultdict(list)
    for same in units.values():
        worst = {name: min(r[name] for r in same) for name in ("accuracy", "lenient")}
        by_category[same[0]["category"]].append(worst)
    categories = {name: score(by_category[name]) for name in sorted(by_category)}
    n = len(records)
    names = dict.fromkeys(name for r in records for name in r["parts"])
    others = [name for name in names if name not in ("reward", "accuracy")]
    return score([r for group in by_category.values() for r in group]) | {
        "format": sum(r["format"] for r in records) / n,
        "parts": {name: sum(r["parts"].get(name, 0.0) for r in records) / n for name in others},
        "tokens": sum(r["tokens"] for r in records) / n,
        "by_category": {name: found["accuracy"] for name, found in categories.items()},
        "categories": categories,
        "errors": [(r["problem_id"], r["error"]) for r in records if r["error"]],
    }


def show(results: dict, title: str) -> str:
    """{frames, or a rate: summary} as the text that ends an evaluation."""
    lines = []
    for frames, r in results.items():
        parts = "".join(f"{name} {mean:.4f}, " for name, mean in r["parts"].items())
        lines += [
            f"{r['questions']} questions of {title}, {frames} frames, greedy: accuracy "
            f"{r['accuracy']:.4f}, {parts}{r['tokens']:.1f} tokens an answer, "
            f"{len(r['errors'])} failed",
            f"{'':26s}questions   strict %     95 %   lenient %     95 %",
        ]
        for name, found in {"all": r, **r["categories"]}.items():
            strict = (found["accuracy"], *found["accuracy_95"])
            lenient = (found["lenient"], *found["lenient_95"])
            shares = [100 * share for share in strict + lenient]
            row = "  {:24.24s}{:9d}{:11.1f}{:6.1f} -{:5.1f}{:10.1f}{:6.1f} -{:5.1f}"
            lines.append(row.format(name, found["questions"], *shares))
        lines += [f"  counted as wrong: {name}: {message}" for name, message in r["errors"][:20]]
        if len(r["errors"]) > 20:
            lines.append("  ... the others are in result.json")
    if len(results) > 1:
        lines.append("strict % by frames" + " " * 8 + "".join(f"{n!s:>8}" for n in results))
        for name in ("all", *r["by_category"]):
            shares = [{"all": x["accuracy"], **x["by_category"]}[name] for x in results.values()]
            lines.append(f"  {name:24.24s}" + "".join(f"{100 * x:8.1f}" for x in shares))
    return "\n".join(lines)


# --------------------------------------------------------------------------------- command line


@dataclass(frozen=True, kw_only=True)
class EvalConfig(AskConfig):
    """Accuracy of a saved model."""

    benchmark: Literal[tuple(benchmarks.BENCHMARKS)] | None = None  # whose published file data is
    subtitles: str | None = None  # folder of .srt files, a video each: asked with its frames' lines
    instruction: str = ""  # a line that ends each question
    prefill: str = ""  # forced beginning of every answer
    wrong_video: bool = False  # control: ask about another video
    judge: str | None = None  # URL (up to /v1) of a server that judges open answers
    judge_model: str | None = None  # its name there; default: the first
    before: Path | None = None  # folder of another evaluation, beside this one in the report
    report_mb: float = 30.0  # limit of report.html in MB; 0: no report
    output: Path | None = None  # folder; default: runs/eval/DATA-HASH, a hash of the settings

    FREE = f"{AskConfig.FREE} judge before report_mb output"

    def __post_init__(self):
        super().__post_init__()
        if self.benchmark in benchmarks.OPEN and not self.judge:
            raise ValueError(
                f"answers to {self.benchmark} are free text, and a model has to judge them: start "
                "one (vllm serve MODEL --port 8000), and give --judge http://localhost:8000/v1"
            )


def answer(job: Job, chat: Chat | None, folder: Folder, label) -> list[dict]:
    """The records of one number of frames, as job.frames names it."""
    name = f"answers_{label}"
    done = folder.finished(name, "problem_id")
    if done:  # the model is not loaded for them
        return list(done.values())
    model, engine = job.asked
    config = job.config
    found = evaluate(
        model,
        engine,
        job.examples,
        job.method,
        num_frames=job.frames[label],
        prefill=config.prefill,
        batch=config.batch,
        ranks=job.ranks,
        bar=f"{label} frames",
        rewrite=job.rewrite,
        chat=chat,
        folder=folder,
        name=name,
    )
    return found["records"]


def run(config: EvalConfig) -> dict:
    """Answers of each number of frames, result.json, and the report of the last one."""
    # 1. What is asked, and who judges it.
    chat = Chat(config.judge, config.judge_model) if config.judge else None
    if chat:  # the verdicts depend on the model, not on where it is served
        config = replace(config, judge_model=chat.model)
    job = Job(config, config.benchmark, config.subtitles)
    if config.wrong_video:
        job.examples = swap_media(job.examples)
    if config.instruction:
        line = f"\n{config.instruction}"
        job.examples = [replace(e, problem=e.problem + line) for e in job.examples]
    last = [*job.frames][-1]  # the number of frames that is reported
    runs = {}
    if config.before:
        path = config.before / f"answers_{last}.jsonl"
        runs["before"] = read_answers(path)
        if {r["problem_id"] for r in runs["before"]} != {e.id for e in job.examples}:
            raise DataError(f"--before: {path} has the answers to other questions")

    # 2. Answers and their numbers, in a folder that the same command goes on with.
    name = config.benchmark or Path(job.source).stem
    folder = job.begin(config.output or Path(f"runs/eval/{name}-{digest(job.settings())[:8]}"))
    records = {label: answer(job, chat, folder, label) for label in job.frames}
    job.close()
    results = {label: summarise(rs, config.benchmark) for label, rs in records.items()}
    facts = {"questions_in_all": job.total}
    title = name if config.limit is None else f"{name} (a quick look: of {job.total})"
    if config.subtitles:
        videos = {e.media[0].path: e for e in job.examples if e.media}
        files = [benchmarks.srt_of(e, config.subtitles) for e in videos.values()]
        bare = sum(not file.is_file() for file in files)
        facts["videos_without_subtitles"] = bare
        title += f", with subtitles ({bare} of {len(videos)} videos have none)"
    folder.write("result.json", json.dumps(facts | {"frames": results}, indent=2) + "\n")

    # 3. The table, and the report, on the first rank.
    text = show(results, title)
    if job.ranks.rank == 0:
        print(f"{text}\nanswers and result.json are in {folder.path}/", flush=True)
    if job.ranks.rank == 0 and config.report_mb > 0:
        runs["after" if runs else "answers"] = records[last]
        page = folder.path / "report.html"
        look = {"text": text, "max_mb": config.report_mb, "loader": job.loader}
        write_report(page, title, job.examples, runs, job.frames[last], **look)
        print(f"every question with its frames: {page}")
    strict = {label: result["accuracy"] for label, result in results.items()}
    return results[last] | {"records": records[last], "by_frames": strict}


def main(argv: list[str] | None = None) -> dict:
    """python eval.py"""
    about = "Accuracy of a saved model. Started again, it goes on where it stopped."
    with reported():
        return run(parse(EvalConfig, argv, prog="eval.py", about=about))


if __name__ == "__main__":
    if not torch.cuda.is_available() and "WORLD_SIZE" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    main()
