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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data import DataError, Example, Rate
from grpo import accuracy_reward, chosen_letter, graded, same_text
from kit import benchmarks
from kit.ask import AskConfig, Job, ask, digest, grade
from kit.chat import Chat, ReplyError
from kit.method import Method
from kit.options import parse
from kit.report import read_answers, write_report
from kit.run import Ranks, find_ranks, from_first, reported
from kit.work import Folder
from rollout import Sampling

ALONE = Ranks()
GRPO = Method()


# ----------------------------------------------------------------------------- lenient grading


def named_letter(text: str, options: tuple[str, ...]) -> str | None:
    """As chosen_letter, but the letter may be lower case and have a reason behind it. None too if
    that names another one; "A man walks" and "I see" name none.

    >>> texts = "(b) red", "B, as it is red", "B, C", "B. blue", "A man walks"
    >>> [named_letter(text, ("blue", "red", "green")) for text in texts]
    ['B', 'B', None, None, None]
    """
    capital = re.sub(r"^\(?[a-z]\b", lambda first: first[0].upper(), text.strip())
    letter = chosen_letter(capital, options)
    letters = [chr(ord("A") + i) for i in range(len(options))]
    behind = r"\s*[).,:;–-]+(?=\s|$)|\s*\n|\s+(?=because\b|is (?:the )?(?:correct|right)\b)"
    reason = re.match(rf"\(?([A-Z])(?:{behind})\s*(.*)", capital)
    if letter or not reason or reason[1] not in letters:
        return letter
    words = re.findall(r"\b([A-Za-z])\b(?!\s+(?!(?:is|or|and)\b)[a-z])", capital)  # no articles
    named = {chosen_letter(word.upper(), options) for word in words}
    named.add(chosen_letter(reason[2].strip(), options))
    return reason[1] if named <= {reason[1], None} else None


def plain(text: str) -> str:
    """Without marks of Markdown and LaTeX; what is boxed stands behind the word "answer"."""
    return re.sub(r"\\text|[*_`$'\"‘’“”{}]", "", text.replace(r"\boxed", " answer "))


def last_answer(completion: str) -> str:
    """Of what follows the thoughts the last <answer> span, or all of it if there is none."""
    said = completion.rpartition("</think>")[2].partition("<think>")[0]
    return said.rpartition("<answer>")[2].partition("</answer>")[0]


def lenient_accuracy(completion: str, gold: str, options: tuple[str, ...] = ()) -> float:
    """For evaluation only: 1.0 also if the gold answer is given in another form than the one asked
    for. (A reward as lenient as this would be earned by naming letters here and there.)

    In the last_answer it reads the first that names a letter: what is boxed or behind "answer", the
    last one first; what is behind "option"; all of it; its last line. Open-ended: behind the last
    "answer", or the last line. Who names two letters has named none. Numbers as words are not
    converted.

    >>> two = ("blue", "red")
    >>> [lenient_accuracy(c, "B", two) for c in ("b", "The answer is **B**.", r"\\boxed{B}", "Red")]
    [1.0, 1.0, 1.0, 1.0]
    >>> [lenient_accuracy(c, "A", two) for c in ("A or B", "A man walks", "<think> so A", "A. red")]
    [0.0, 0.0, 0.0, 0.0]
    >>> [lenient_accuracy("<answer>3</answer> No: <answer>4</answer>", gold) for gold in ("3", "4")]
    [0.0, 1.0]
    """
    if accuracy_reward(completion, gold, options):
        return 1.0
    text = plain(last_answer(completion)).strip()
    last_line = text[text.rfind("\n") + 1 :]
    announced = []
    for word in ("answer", "(?<!not )(?:option|choice)"):
        lead = rf"(?i)\b{word}\b(?:\s|:|is\b|the\b)*"
        ends = [found.end() for found in re.finditer(lead, text)]
        announced += [text[end:] for end in reversed(ends)]
    if options:
        texts = tuple(map(plain, options))
        for part in (*announced, text, last_line):
            if letter := named_letter(part, texts):
                return float(letter == gold)
        return 0.0
    candidates = []
    for part in (*announced[:1], last_line):
        candidates += [part.split("\n")[0], re.split(r"\.\s", part)[0]]
    return float(any(c.strip() and same_text(c, plain(gold)) for c in candidates))


# --------------------------------------------------------------------------- asking and grading


def record(example: Example, answers, method: Method, prefill: str, thinking: bool) -> dict:
    """The graded answer to one question. answers: [Response], or the error why there is none."""
    found = {
        "problem_id": example.id,
        "category": example.category,
        "gold": example.answer,
        "completion": "",
        "accuracy": 0.0,
        "lenient": 0.0,
        "format": 0.0,
        "parts": {},
        "tokens": 0,
        "error": "",
    }
    if isinstance(answers, Exception):
        return found | {"error": str(answers)}
    text = f"{prefill} {answers[0].text}" if prefill else answers[0].text
    seen = graded(text, thinking)
    parts = grade(method, seen, example)
    lenient = lenient_accuracy(seen, example.answer, example.options)
    return found | {
        "completion": text,
        "accuracy": parts["accuracy"],
        "lenient": max(parts["accuracy"], lenient),
        "format": parts.get("format", 0.0),
        "parts": parts,
        "tokens": len(answers[0].ids),
    }


def evaluate(
    model, engine, examples: list[Example], method: Method = GRPO,
    num_frames: int | Rate | None = None, prefill: str = "", batch: int = 64,
    ranks: Ranks = ALONE, bar: str = "", rewrite=None, folder: Folder | None = None,
    name: str = "answers",
) -> dict:  # fmt: skip
    """Greedy answers to all examples. Returns, on every rank, summarise() of the records, and the
    records: one dict a question, in order.

    num_frames: default: the recipe's. batch: questions that are asked together; batches are dealt
    to the ranks. bar: title of a progress bar. rewrite: see ask. folder: keeps finished batches,
    and the records as NAME.jsonl; without one nothing is kept.
    """
    recipe = model.recipe
    frames = num_frames or recipe.frames
    sampling = Sampling(temperature=0.0, max_tokens=recipe.max_tokens, stop=recipe.stop)
    place = {example.id: i for i, example in enumerate(examples)}
    turn = batch * (ranks.world // engine.tp)  # as many behind a rank's batch is its next one

    def work(ids: list[str]) -> list[dict]:
        rows = [examples[place[i]] for i in ids]
        soon = place[ids[0]] + turn
        model.ahead(rows + examples[soon : soon + batch], frames)
        found = ask(
            model, engine, rows, frames, sampling, prefill=prefill, rewrite=rewrite
        )
        return [record(e, a, method, prefill, recipe.thinking) for e, a in zip(rows, found)]

    folder = folder or Folder(None, {}, ranks)
    lines = folder.stage(
        name, list(place), work, size=batch, tp=engine.tp, field="problem_id", bar=bar
    )
    records = list(lines.values())
    return summarise(records) | {"records": records}


def swap_media(examples: list[Example]) -> list[Example]:
    """The wrong-media control: every question about the media that stand half the set away among
    those of the same kinds, with their segments; each medium's num_frames stay. Text questions
    have none, and stay. DataError if all media of some kinds are in the same files."""

    def bare(example):
        return tuple(medium._replace(num_frames=None) for medium in example.media)

    def files(media):
        return tuple(medium.path for medium in media)

    alike = defaultdict(dict)  # kinds -> the different media of such questions, in order
    for example in examples:
        kinds = tuple((medium.kind, medium.track) for medium in example.media)
        alike[kinds][bare(example)] = None
    swap = {}
    for kinds, sets in alike.items():
        order = {}  # files -> when they came first
        for media in sets:
            order.setdefault(files(media), len(order))
        if kinds and len(order) == 1:
            kind = "+".join(kind for kind, _ in kinds)
            raise DataError(f"the wrong-{kind} control needs questions about at least two of them")
        # By file, or half the set away may be another segment of the same one.
        ordered = sorted(sets, key=lambda media: order[files(media)])
        half = len(ordered) // 2
        swap |= zip(ordered, ordered[half:] + ordered[:half])
    swapped = []
    for example in examples:
        pairs = zip(swap[bare(example)], example.media)
        media = tuple(new._replace(num_frames=old.num_frames) for new, old in pairs)
        swapped.append(replace(example, media=media))
    return swapped


JUDGE = """\
Question: {}
Reference answer: {}
Given answer: {}
Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""


def verdict(chat: Chat, example: Example, found: dict, thinking: bool) -> dict:
    """A record with a model's word on an open answer that earned nothing. It is shown last_answer;
    its yes is the lenient accuracy, and with exactly one <answer> span the strict one. No yes or
    no: wrong, and the record's error says so."""
    seen = graded(found["completion"], thinking)
    said = last_answer(seen).strip()
    if not said or example.options or found["error"] or found["lenient"]:
        return found
    question = JUDGE.format(example.problem, example.answer, said)
    try:
        reply = chat.ask([{"role": "user", "content": question}])
    except ReplyError as error:
        return found | {"error": f"judge: {error}"}
    word = re.match(r"\W*(yes|no)\b", reply.rpartition("</think>")[2], flags=re.IGNORECASE)
    if word is None:
        return found | {"error": f"judge: neither yes nor no: {reply[:80]!r}"}
    right = float(word[1].lower() == "yes")
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

    FREE = (*AskConfig.FREE, "judge", "before", "report_mb", "output")


def find_judge(config: EvalConfig) -> Chat | None:
    """The server that judges, if there is to be one. DataError if there has to be."""
    if config.judge:
        return Chat(config.judge, config.judge_model)
    if config.benchmark in benchmarks.OPEN:
        raise DataError(
            f"answers to {config.benchmark} are free text, and a model has to judge them: start "
            "one (vllm serve MODEL --port 8000), and give --judge http://localhost:8000/v1"
        )
    return None


def read_before(folder: Path, job: Job) -> list[dict]:
    """The answers of another evaluation to the same questions, of the last number of frames."""
    path = folder / f"answers_{[*job.frames][-1]}.jsonl"
    records = read_answers(path)
    if {r["problem_id"] for r in records} != {e.id for e in job.examples}:
        raise DataError(f"--before: {path} has the answers to other questions")
    return records


def srt_files(folder: str) -> dict[str, int]:
    """{name: bytes} of the subtitles in a folder, or a DataError."""
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.srt"))}
    if not files:
        raise DataError(f"--subtitles {folder}: no .srt files are there")
    return files


def with_subtitles(job: Job, folder: str, example: Example, num_frames: int | Rate) -> Example:
    """The question with what is said at the frames that are seen, if its video has subtitles."""
    asked = job.rewrite(example, num_frames)
    if not example.media or not benchmarks.srt_of(example, folder).is_file():
        return asked
    times = job.model.frame_times(example.media[0], num_frames, example.id)
    return benchmarks.with_subtitles(asked, folder, times)


def finished(folder: Folder, name: str) -> list[dict] | None:
    """The records of a stage that an earlier run finished, on all ranks: no model is needed."""
    path = folder.path / f"{name}.jsonl"
    records = None
    if folder.ranks.rank == 0 and path.exists():
        records = read_answers(path)
    return from_first(records, folder.ranks.world)


def answer_all(job: Job, folder: Folder, label, chat: Chat | None) -> list[dict]:
    """The records of one number of frames: answers_LABEL.jsonl. With a judge they are those of
    unjudged_LABEL.jsonl and its verdicts."""
    config = job.config
    name = f"answers_{label}"
    records = finished(folder, name)
    if records:
        return records
    asked = f"unjudged_{label}" if chat else name
    rewrite = job.rewrite
    if config.subtitles:
        rewrite = functools.partial(with_subtitles, job, config.subtitles)
    records = finished(folder, asked)
    if not records:
        found = evaluate(
            job.model, job.engine, job.examples, job.method, job.frames[label], config.prefill,
            config.batch, job.ranks, f"{label} frames", rewrite, folder, asked,
        )  # fmt: skip
        records = found["records"]
    if not chat:
        return records
    pairs = {e.id: (e, r) for e, r in zip(job.examples, records)}

    def work(ids: list[str]) -> list[dict]:
        return [verdict(chat, *pairs[i], job.recipe.thinking) for i in ids]

    judged = folder.stage(name, list(pairs), work, threads=16, field="problem_id", bar="judge")
    return list(judged.values())


def run(config: EvalConfig) -> dict:
    """Answers of each number of frames, result.json, and the report of the last one."""
    # 1. What is asked, and who judges it.
    chat = find_judge(config)
    if chat:  # the verdicts depend on the model, not on where it is served
        config = replace(config, judge_model=chat.model)
    job = Job(config, find_ranks(), config.benchmark)
    if config.wrong_video:
        job.examples = swap_media(job.examples)
    if config.instruction:
        asked = [replace(e, problem=f"{e.problem}\n{config.instruction}") for e in job.examples]
        job.examples = asked
    runs = {"before": read_before(config.before, job)} if config.before else {}
    settings = job.settings()
    name = config.benchmark or Path(job.source).stem
    title = name if config.limit is None else f"{name} (a quick look: of {job.total})"
    facts = {"questions_in_all": job.total}
    if config.subtitles:
        settings["srt"] = digest(srt_files(config.subtitles))
        videos = {e.media[0].path: e for e in job.examples if e.media}
        files = [benchmarks.srt_of(e, config.subtitles) for e in videos.values()]
        bare = sum(not file.is_file() for file in files)
        facts["videos_without_subtitles"] = bare
        title += f", with subtitles ({bare} of {len(videos)} videos have none)"

    # 2. Answers, in a folder that the same command goes on with.
    job.ranks.join()
    own = Path("runs/eval", f"{name}-{digest(settings)[:8]}")
    folder = Folder(config.output or own, settings, job.ranks)
    records = {label: answer_all(job, folder, label, chat) for label in job.frames}
    results = {label: summarise(rs, config.benchmark) for label, rs in records.items()}
    job.close()

    # 3. Numbers and the report, on the first rank.
    text = show(results, title)
    folder.write("result.json", json.dumps(facts | {"frames": results}, indent=2) + "\n")
    last = list(results)[-1]
    if job.ranks.rank == 0:
        print(f"{text}\nanswers and result.json are in {folder.path}/", flush=True)
    if job.ranks.rank == 0 and config.report_mb > 0:
        runs["after" if runs else "answers"] = records[last]
        page = folder.path / "report.html"
        write_report(
            page, title, job.examples, runs, job.frames[last],
            text=text, max_mb=config.report_mb, loader=job.loader,
        )  # fmt: skip
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
