"""Published video benchmarks as Examples: the paper's tables are about seven of them.

    published file --read_table--> rows --one small function each--> our fields --data.parse_row-->
    .json .jsonl .csv .parquet                                                          Example

Each benchmark has its own names for a video's id, a question, its options, the right one, and the
group that its accuracy is reported by. One function maps ONE of its rows; from there on nothing is
special: checks, prompt (the recipe's, not the benchmark's own sentence), grading and table. Large
harnesses have a class, a prompt and a parser of answers for each: numbers differ in more than that.

    name              rows                                       reported by
    longvideo-reason  data.py's own format                       problem_type
    videomme          lmms-lab/Video-MME (parquet)               duration: short, medium, long
    longvideobench    lvb_val.json, or the hub's parquet         duration_group: 15, 60, 600, 3600 s
    perceptiontest    mc_question_valid.json, or lmms-lab's      area
    nextqa            val.csv, test.csv, or lmms-lab's MC        causal, temporal, descriptive
    vnbench           VNBench-main-4try.json                     type of needle
    activitynet-qa    test_q.json beside test_a.json, or lmms's  type of question; open: a judge

A video's file is the one in --video_dir, or below, whose name without ending is the row's id of it.
Two different files of one name are an error.

VideoMME is reported with and without subtitles: with_subtitles() puts the lines that are spoken at
the times of the FRAMES that the model sees in front of the question.

VNBench asks each question several times (mostly 4) with its options shuffled: it counts only if all
answers are right, so unit() names what counts as one.

Check this file alone:  pytest tests/test_benchmarks.py
"""

import csv
import filecmp
import json
import os
import re
import string
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
from data import DataError, Example

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
LETTERS = string.ascii_uppercase


def ours(id, video, category, question, answer, options=()) -> dict:
    """A row of data.py from what all benchmarks have. options: with their letters, or ()."""
    lines = [" ".join(str(text).split()) for text in (question, *options)]
    return {
        "problem_id": str(id),
        "problem": "\n".join(lines),
        "problem_type": category,
        "videos": str(video),
        "answer": f"<answer>{answer}</answer>",
        "data_type": "video",
        "reasoning": "",
    }


def lettered(options: list) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]


# ------------------------------------------------------------------------------- one row of each


def videomme(row: dict) -> dict:
    """huggingface.co/datasets/lmms-lab/Video-MME: a file is named by videoID, its YouTube id; the
    options come with their letters ("A. Apples.")."""
    return ours(
        id=row["question_id"],
        video=row["videoID"],
        category=row["duration"],
        question=row["question"],
        answer=row["answer"],
        options=row["options"],
    )


def longvideobench(row: dict) -> dict:
    """huggingface.co/datasets/longvideobench/LongVideoBench: a list `candidates` in lvb_val.json,
    in the parquet file option0 to option4 of which unused ones are "N/A". correct_choice counts
    from 0; videos are parts of longer ones, and named by video_path."""
    options = row.get("candidates") or [row[f"option{i}"] for i in range(5)]
    return ours(
        id=row["id"],
        video=Path(row["video_path"]).stem,
        category=str(row["duration_group"]),
        question=row["question"],
        answer=LETTERS[row["correct_choice"]],
        options=lettered([option for option in options if option != "N/A"]),
    )


def perceptiontest(row: dict) -> dict:
    """github.com/google-deepmind/perception_test, "Multiple-choice video question-answers" (see
    read_table), and huggingface.co/datasets/lmms-lab/PerceptionTest_Val. Question ids count anew in
    each video."""
    return ours(
        id=f"{row['video_name']}-{row['question_id']}",
        video=row["video_name"],
        category=row["area"],
        question=row["question"],
        answer=LETTERS[int(row["answer_id"])],
        options=lettered(row["options"]),
    )


def nextqa(row: dict) -> dict:
    """github.com/doc-doc/NExT-QA, dataset/nextqa/val.csv, and huggingface.co/datasets/lmms-lab/
    NExTQA (MC). qid counts anew in each video; types are CW, CH (why, how), TN, TC, TP (next,
    current, previous), DL, DC, DO, DB. (map_vid_vidorID.json adds a video's folder: not needed.)"""
    kinds = {"C": "causal", "T": "temporal", "D": "descriptive"}
    return ours(
        id=f"{row['video']}-{row['qid']}",
        video=row["video"],
        category=kinds.get(row["type"][:1]),
        question=row["question"],
        answer=LETTERS[int(row["answer"])],
        options=lettered([row[f"a{i}"] for i in range(5)]),
    )


def vnbench(row: dict) -> dict:
    """github.com/joez17/VideoNIAH and huggingface.co/datasets/videoniah/VNBench: gt is the text (or
    number) of the right option, `try` the number of the shuffle."""
    options = [str(option) for option in row["options"]]
    video = Path(row["video"]).stem
    return ours(
        id=f"{video}-{row['type']}#{row['try']}",
        video=video,
        category=row["type"],
        question=row["question"],
        answer=LETTERS[options.index(str(row["gt"]))],
        options=lettered(options),
    )


def activitynet_qa(row: dict) -> dict:
    """github.com/MILVLG/activitynet-qa, dataset/README.md (questions and answers in two files, see
    load), and huggingface.co/datasets/lmms-lab/ActivityNetQA. Questions have no question mark."""
    kinds = "motion spatial temporal yes/no color object location number other".split()
    return ours(
        id=row["question_id"],
        video=row["video_name"],
        category=kinds[int(row["type"])],
        question=f"{row['question']}?",
        answer=row["answer"],
    )


BENCHMARKS = {
    "longvideo-reason": None,  # its rows are our own
    "videomme": videomme,
    "longvideobench": longvideobench,
    "perceptiontest": perceptiontest,
    "nextqa": nextqa,
    "vnbench": vnbench,
    "activitynet-qa": activitynet_qa,
}
OPEN = ("activitynet-qa",)  # whose answers a model has to judge


def unit(benchmark: str | None, problem_id: str) -> str:
    """What a question counts as one with: on VNBench all its shuffles."""
    return problem_id.partition("#")[0] if benchmark == "vnbench" else problem_id


# --------------------------------------------------------------------------------------- files


def read_table(path: str) -> list[dict]:
    """The rows of a .json, .jsonl, .csv or .parquet file, as they are."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith(".csv"):
                return list(csv.DictReader(file))
            if path.endswith(".jsonl"):
                return [json.loads(line) for line in file if line.strip()]
            rows = json.load(file)
    except (OSError, ValueError, ImportError) as error:  # pyarrow's and json's are ValueErrors
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    if not isinstance(rows, dict):
        return rows
    found = []  # Perception Test: {video: {"mc_question": [{"id": 0, ...}]}}
    for video, entry in rows.items():
        for question in entry.get("mc_question", ()):
            found.append(question | {"video_name": video, "question_id": question["id"]})
    return found


def find_videos(video_dir: str) -> dict[str, Path]:
    """{name without ending: file} of a folder and those below; DataError if two files differ."""
    found = {}
    for folder, _, names in os.walk(video_dir, followlinks=True):
        for path in sorted(Path(folder, name) for name in names):
            if path.suffix.lower() in ENDINGS and path.is_file():  # links may lead nowhere
                one = found.setdefault(path.stem, path)
                if not (one.samefile(path) or filecmp.cmp(one, path, shallow=False)):
                    raise DataError(f"{one} and {path} differ: which one is video {path.stem}?")
    return found


def load(benchmark: str, path: str, video_dir: str | None, bad: list) -> list[Example]:
    """The questions of a benchmark's published file. A row that is not as published is appended to
    bad as (where, message). A video that is not there becomes video_dir/ID.mp4: the caller looks.

    Raises DataError for a file that is no table, or in which no row is good."""
    if BENCHMARKS[benchmark] is None:
        return data.load_rows(path, video_dir, bad)
    if video_dir is None:
        raise DataError(f"{benchmark} names videos by their ids: give their folder as --video_dir")
    videos = find_videos(video_dir)
    examples = {}
    for number, row in enumerate(published_rows(benchmark, path), 1):
        where = f"{path}: row {number}"
        try:
            example = to_example(benchmark, row, videos, video_dir, where)
            if example.id in examples:
                raise DataError(f"{where}: the id {example.id!r} occurs twice")
            examples[example.id] = example
        except DataError as error:
            bad.append((where, str(error)))
    if not examples:
        raise DataError(f"{path}: no row of {benchmark} is good: {bad[0][1] if bad else 'empty'}")
    return list(examples.values())


def published_rows(benchmark: str, path: str) -> list:
    """read_table; the answers of test_a.json are put to the questions of test_q.json."""
    try:
        rows = list(read_table(path))
        if benchmark == "activitynet-qa" and path.endswith("_q.json"):
            answers = read_table(path.removesuffix("q.json") + "a.json")
            answer_of = {answer["question_id"]: answer for answer in answers}
            rows = [row | answer_of.get(row["question_id"], {}) for row in rows]
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no table as {benchmark} has it: {error!r}") from None
    return rows


def to_example(benchmark: str, row: dict, videos: dict, video_dir: str, where: str) -> Example:
    """One published row. videos: find_videos. DataError if it is not as published."""
    try:
        own = BENCHMARKS[benchmark](row)
        name = own["videos"]  # ActivityNet puts v_ before those of the files
        file = videos.get(name) or videos.get(f"v_{name}") or Path(video_dir, f"{name}.mp4")
        own["videos"] = str(file.relative_to(video_dir))
        return data.parse_row(own, video_dir, where)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{where} is not as {benchmark} has it: {what}") from None


# ----------------------------------------------------------------------------------- subtitles


CLOCK = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)")  # hours, minutes, seconds, milliseconds


def read_srt(path: str) -> list[tuple[float, float, str]]:
    """(start, end, text) of each subtitle: seconds, and text in one line without its tags."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    found = []
    for block in re.split(r"\n\s*\n", text):
        head = re.search(rf"{CLOCK.pattern} *--> *{CLOCK.pattern}.*", block)
        if head is None:
            continue
        shown = re.sub(r"<[^<>]*>|\{\\[^{}]*\}", "", block[head.end() :])
        words = " ".join(shown.split())
        times = []
        for clock in CLOCK.findall(head[0])[:2]:
            h, m, s, ms = map(int, clock)
            times.append(3600 * h + 60 * m + s + ms / 1000)
        if words:
            found.append((*times, words))
    return found


def srt_of(example: Example, folder: str) -> Path:
    """Where the subtitles of a question's video would be."""
    return Path(folder, Path(example.media[0].path).stem + ".srt")


def with_subtitles(example: Example, folder: str, times: np.ndarray) -> Example:
    """The question behind the subtitles that are shown at one of the times (F,), in seconds, of its
    video's frames, each once and in order."""
    lines = []
    for start, end, words in read_srt(srt_of(example, folder)):
        if ((start <= times) & (times < end)).any():
            lines.append(words)
    if lines:
        lines = ["Subtitles of the video at these frames:", *lines]
    return replace(example, problem="\n".join([*lines, example.problem]))
