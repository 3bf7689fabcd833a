"""The report of a run: one HTML file with every question, the frames the model saw, its answers.

    python -m kit.report BEFORE.jsonl AFTER.jsonl --data ROWS.jsonl --num_frames 64

An accuracy does not say what a model does with a video; its answers beside the frames do. train.py
writes the page at the end of a run, the command above for one or two files that eval.py wrote.

    rows + one or two lists of records (eval.record)       matched by problem_id
      |                                  |
      v data.Frames, one video at a time v verdict, change, parts of the reward
    a JPEG a video, frames side by side  JSON a question  ---> report.html <--- table, curves
      (a CSS rule that questions share)    (all of the text)    one file, no network

    accuracy  verdict       change from one run to the next
    1         right         mended (0 to 1), broken (1 to 0)
    between   partly 0.43   better, worse; equal, if neither
    0         wrong         both right, both wrong
    0         failed        the question could not be asked; counts as wrong

Other systems keep answers as JSON lines or in a hosted dashboard, without the frames. This page
opens from disk, on a phone too, and its address is a view: report.html#verdict=wrong&category=goal.
    - Of a video at most 64 frames are shown, evenly chosen; the page says of how many.
    - The file has a limit (max_mb). Strips are dealt out evenly over category, verdict and change;
      a question without one says so, and none is left out.
    - All text enters the page as JSON, then as text nodes: an answer cannot become a tag.
    - kit/report.html is the page without its data: looks, filters, keys.

Check this file alone:  pytest tests/test_report.py   (drives a browser if there is one)
"""

import base64
import html
import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

import data
from data import DataError
from grpo import chosen_letter
from kit.decode import Loader
from kit.options import parse
from kit.ranks import reported

PAGE = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
MOST_FRAMES = 64  # of a video, in the page
FRAME_HEIGHT = 96  # pixels that larger frames shrink to; a single one to 3 times as many
JPEG_SIDE = 65535  # pixels that a JPEG may have at most


# ------------------------------------------------------------------------------------- answers


def read_answers(path: str) -> list[dict]:
    """The records of a file that eval.py or train.py wrote, or a DataError that names the line."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for record in map(json.loads, file):
                needed = {name: record[name] for name in ("problem_id", "completion", "accuracy")}
                if not 0 <= needed["accuracy"] <= 1:
                    raise ValueError(f"accuracy {needed['accuracy']} is not within 0 and 1")
                records.append(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        here = f"{path}:{len(records) + 1}"
        raise DataError(f"{here}: not an answer that eval.py wrote ({error!r})") from None
    return records


def verdict(record: dict) -> str:
    if record.get("error"):
        return "failed"
    return {0: "wrong", 1: "right"}.get(record["accuracy"], "partly")


def change(was: float, now: float) -> str:
    """What became of a question, by the accuracies of its two answers.

    >>> [change(*pair) for pair in ((0, 1), (1, 0), (1, 1), (0, 0), (0, 0.4), (1, 0.4), (0.4, 0.4))]
    ['mended', 'broken', 'both right', 'both wrong', 'better', 'worse', 'equal']
    """
    whole = {(0, 1): "mended", (1, 0): "broken", (1, 1): "both right", (0, 0): "both wrong"}
    if now == was:
        return whole.get((was, now), "equal")
    return whole.get((was, now), "better" if now > was else "worse")


def describe(example, record: dict) -> dict:
    """An answer: its verdict, its parts (or the raw text, if it has another form), its letter."""
    text = record["completion"]
    accuracy = 0.0 if record.get("error") else record["accuracy"]
    spans = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL) or [text]
    said = spans[0] if len(spans) == 1 else ""  # several spans choose nothing
    form = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    found = re.fullmatch(form, text, re.DOTALL) if len(spans) == 1 else None
    return {
        "verdict": verdict(record),
        "accuracy": accuracy,
        "think": found[1].strip() if found else "",
        "answer": found[2].strip() if found else "",
        "raw": "" if found else text,
        "error": record.get("error", ""),
        "tokens": record.get("tokens", 0),
        "parts": [f"{name} {value:.3g}" for name, value in record.get("parts", {}).items()],
        "lenient": record.get("lenient", 0) > accuracy,
        "chosen": chosen_letter(said.strip(), example.options) if example.options else None,
    }


def match(examples: list, runs: dict) -> list[tuple]:
    """(example, its record of each run) of the questions that were asked, in the order of the rows.
    DataError if a run has an answer for which another one, or the rows, have no counterpart."""
    asked = {name: {r["problem_id"]: r for r in records} for name, records in runs.items()}
    rows = {e.id: e for e in examples}
    for name, own in asked.items():
        if len(own) < len(runs[name]):
            raise DataError(f"{name}: a question is answered twice; give one evaluation's answers")
        for other, theirs in {"the rows": rows, **asked}.items():
            lost = [i for i in own if i not in theirs]
            if lost:
                raise DataError(f"question {lost[0]!r} is in {name}, but not in {other}")
    first, *_ = asked.values()
    if not first:
        raise DataError("there are no answers to report")
    return [(e, [own[e.id] for own in asked.values()]) for e in examples if e.id in first]


def describe_all(examples: list, runs: dict, places: dict) -> list[dict]:
    """A dict for each question that was asked, in the order of the rows. places: {Medium: index}.
    turn: how many of the same category, verdict and change come before. DataError: match."""
    questions = []
    turns = Counter()
    for e, records in match(examples, runs):
        answers = [describe(e, record) for record in records]
        changed = change(*[a["accuracy"] for a in answers]) if len(runs) > 1 else ""
        group = e.category or "(none)", answers[-1]["verdict"], changed
        problem = e.problem
        if e.options:  # which are shown as a list
            problem = re.sub(r"\n\(?[A-Z][.):]\s.*", "", problem)
        question = {"id": e.id, "problem": problem, "options": e.options, "gold": e.answer}
        question |= dict(zip(("category", "verdict", "change"), group))
        question |= {"media": [places[m] for m in e.media], "answers": answers}
        questions.append(question | {"turn": turns[group]})
        turns[group] += 1
    return questions


# ------------------------------------------------------------------------------------ the page


def clock(seconds: float) -> str:
    """Minutes, seconds, tenths.

    >>> [clock(t) for t in (0.0, 59.94, 59.96, 600.25, 7503.2)]
    ['00:00.0', '00:59.9', '01:00.0', '10:00.2', '125:03.2']
    """
    tenths = round(float(seconds) * 10)
    return f"{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def strip(loader, medium, num_frames) -> tuple[dict, str]:
    """What the page tells of a medium, and the JPEG of its frames side by side in base64 ("" for
    sound and errors)."""
    from PIL import Image

    try:
        if medium.kind == "audio":
            return {"seconds": round(len(loader.sound(medium)) / 16000, 1)}, ""
        with loader.open(medium, num_frames) as frames:
            chosen = data.frame_indices(len(frames), MOST_FRAMES)
            tallest = FRAME_HEIGHT if len(chosen) > 1 else 3 * FRAME_HEIGHT
            cells = []
            for (frame,) in frames.pieces([slice(i, i + 1) for i in chosen.tolist()]):
                cell = Image.fromarray(frame)
                cell.thumbnail((JPEG_SIDE // len(chosen), tallest))
                cells.append(np.asarray(cell))
    except DataError as error:
        return {"error": str(error)}, ""
    times = [clock(t) for t in frames.times[chosen]] if medium.kind == "video" else [""]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(cells, axis=1)).save(file, "JPEG", quality=80, subsampling=0)
    h, w, _ = cells[0].shape
    look = {"times": times, "of": len(frames), "width": w, "height": h, "sound": medium.track}
    return look, in_base64(file.getvalue())


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_json(value) -> str:
    """ASCII, and no "<": neither </script> nor <!-- nor half a character is in the file."""
    return json.dumps(value).replace("<", "\\u003c")


def write_report(
    path,
    title: str,
    examples: list,
    runs: dict[str, list[dict]],
    num_frames,
    pictures=(),
    text: str = "",
    max_mb: float = 30.0,
    loader: Loader | None = None,
) -> None:
    """The page. runs: {name: records}, one or two; pictures: {PNG file: what it shows}; text: a
    table of the run; loader: opens the media, and is closed. A medium that does not decode is shown
    as its error. DataError: match."""
    media = list(dict.fromkeys(m for e in examples for m in e.media))
    questions = describe_all(examples, runs, {m: i for i, m in enumerate(media)})
    looks = [{"name": Path(m.path).name, "kind": m.kind} for m in media]
    frames = f"{num_frames} frames a video"
    if isinstance(num_frames, data.Rate):
        frames = f"{num_frames.fps:g} frames a second, {num_frames.most} at most"
    shown = [[in_base64(Path(file).read_bytes()), what] for file, what in dict(pictures).items()]
    page = {"runs": list(runs), "frames": frames, "text": text, "max_mb": max_mb, "title": title}
    page |= {"media": looks, "questions": questions, "pictures": shown}
    head = html.escape(title).encode("ascii", "xmlcharrefreplace").decode()
    room = max_mb * 1e6 - len(PAGE.encode()) - len(head) - len(as_json(page))
    loader = loader or Loader(1)
    rules = []
    dealt = sorted(questions, key=lambda q: q["turn"])
    for i in dict.fromkeys(i for q in dealt for i in q["media"]):
        look, jpeg = strip(loader, media[i], num_frames)
        rule = f".s{i}{{background-image:url(data:image/jpeg;base64,{jpeg})}}\n" if jpeg else ""
        room -= len(rule) + len(as_json(look))
        if room < 0:
            break
        looks[i] |= look
        rules.append(rule)
    loader.close()
    parts = {"TITLE": head, "RULES": "".join(rules), "DATA": as_json(page)}
    Path(path).write_text(re.sub("@([A-Z]+)@", lambda m: parts[m[1]], PAGE), encoding="utf-8")


# ---------------------------------------------------------------------------- table and pictures


def table(summary: dict) -> str:
    """summary.json of a run as the table that ends it."""
    after = summary.get("grpo", {})
    rows = {
        "guessing": summary.get("chance"),
        "before GRPO": summary.get("sft", {}).get("accuracy"),
        "  control: SFT forced into the careful style": summary.get("control", {}).get("accuracy"),
        "after GRPO": after.get("accuracy"),
    }
    rows |= {f"  {name}": value for name, value in after.get("by_category", {}).items()}
    rows |= {f"  {n} frames": value for n, value in after.get("by_frames", {}).items()}
    rows["  other environment"] = after.get("other_environment")
    rows["  control: wrong video"] = after.get("wrong_video")
    trained_on = summary.get("trained_on", 0)
    kind = f"questions, {trained_on} of them TRAINED ON" if trained_on else "held-out questions"
    lines = [f"accuracy on {summary['questions']} {kind}, seed {summary['seed']}"]
    measured = {name: value for name, value in rows.items() if value is not None}
    lines += [f"  {name:46s} {100 * value:5.1f} %" for name, value in measured.items()]
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}"])


PANELS = {  # of curves.png
    "reward": "mean reward",
    "accuracy": "accuracy of sampled answers",
    "length": "tokens an answer",
    "clip_fraction": "clip fraction",
    "mismatch_mean": "|log-prob sampler - trainer|",
    "entropy": "entropy (nats a token)",
}


def plot_curves(metrics: str, path: str) -> None:
    """The GRPO stage of metrics.jsonl as curves.png: thin = each step, thick = running mean."""
    from matplotlib.figure import Figure

    with open(metrics) as file:
        rows = [r for r in map(json.loads, file) if r["stage"] == "grpo"]
    x = [r["step"] for r in rows]
    window = max(1, len(rows) // 10)
    figure = Figure((11, 5.5), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        y = [r[name] for r in rows]
        mean = [np.mean(y[max(0, i - window) : i]) for i in range(1, len(y) + 1)]
        axis.plot(x, y, color="#9ecae1", linewidth=0.8)
        axis.plot(x, mean, color="#08519c", linewidth=1.8)
        axis.set(title=title, xlabel="GRPO step")
        if name == "mismatch_mean":
            highest = [r["mismatch_max"] for r in rows]
            axis.plot(x, highest, color="#cb181d", linewidth=0.8, label="max")
            axis.set_yscale("symlog", linthresh=1e-7)
            # Whole decades from 0: else the axis may end between two labels and have none.
            axis.set_ylim(0, 10 ** math.ceil(math.log10(max(1e-6, *highest))))
            axis.legend()
        if name == "clip_fraction" and not any(y):
            axis.set(title="clip fraction (0: on-policy)", ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_frames(summary: dict, path: str) -> None:
    """Accuracy over the number of frames, with what else was measured as lines, as frames.png."""
    from matplotlib.figure import Figure

    after = summary["grpo"]
    frames = [int(n) for n in after["by_frames"]]
    figure = Figure((6.5, 5), layout="constrained")
    axis = figure.subplots()
    values = [100 * v for v in after["by_frames"].values()]
    axis.plot(frames, values, "o-", color="#08519c", label="after GRPO")
    control = summary.get("control", {}).get("accuracy")
    lines = [
        (f"SFT, {max(frames)} frames", summary["sft"]["accuracy"], "#e6550d", "--"),
        ("SFT forced into the careful style", control, "#fd8d3c", ":"),
        ("GRPO, wrong video", after.get("wrong_video"), "#636363", "--"),
        ("guessing", summary.get("chance"), "#bdbdbd", "-"),
    ]
    for label, value, color, style in lines:
        if value is not None:
            axis.axhline(100 * value, color=color, linestyle=style, linewidth=1.2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(frames, [str(n) for n in frames])
    axis.set(xlabel="frames a video", ylabel="accuracy (%)", ylim=(0, 100))
    axis.set_title(f"{summary['questions']} held-out questions, seed {summary['seed']}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def finish(run, summary: dict) -> None:
    """The end of a training run (kit.run.Run), on one rank: summary.json, curves, table, report."""
    out = run.out
    s = run.settings
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(out / "metrics.jsonl", out / "curves.png")
    pictures = {out / "curves.png": "curves over the steps of GRPO"}
    if "by_frames" in summary.get("grpo", {}):
        plot_frames(summary, out / "frames.png")
        pictures[out / "frames.png"] = "accuracy over the number of frames"
    again = f"python eval.py --model {out}/model"
    if not s.recipe.data:
        again += f" --data {s.run.test_data or 'ROWS.jsonl'}"
        again += f" --video_dir {s.run.video_dir}" if s.run.video_dir else ""
    text = table(summary) if summary["questions"] else ""
    if text:
        print(f"\n{text}\n")
    print(f"Look at the pictures and samples.jsonl in {out}/, ask again with\n    {again}")
    print("then read grpo.py and sft.py.", flush=True)
    if text:
        title = f"{out.name}: before and after GRPO"
        rows = data.load_rows(s.run.test_data, s.run.video_dir, [])
        runs = {f"{n} GRPO": read_answers(out / f"answers_{n}.jsonl") for n in ("before", "after")}
        how = {"pictures": pictures, "text": text, "loader": run.loader}
        write_report(out / "report.html", title, rows, runs, s.recipe.frames, **how)
        print(f"Every question with its frames and answers: {out}/report.html", flush=True)


# --------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ReportConfig:
    """Answers beside the frames, as one HTML file."""

    answers: Positional[tuple[str, ...]]  # one or two files that eval.py wrote: before, after
    data: str  # the rows that were asked
    num_frames: int  # frames a video, as the model saw them
    video_dir: str | None = None  # folder that the rows' paths are relative to; None: the rows' own
    title: str = "Answers"  # heading of the page
    max_mb: float = 30.0  # limit of the file's size: strips are left out
    out: str = "report.html"  # the page

    def __post_init__(self):
        if len(self.answers) not in (1, 2):
            raise ValueError("give one or two files of answers")


def main(argv: list[str] | None = None) -> None:
    with reported():
        config = parse(ReportConfig, argv, prog="kit.report")
        names = [Path(name).stem for name in config.answers]
        if len(set(names)) < len(names):
            names = config.answers
        runs = {name: read_answers(path) for name, path in zip(names, config.answers)}
        bad = []
        rows = data.load_rows(config.data, config.video_dir, bad)
        rows += [data.stand_in(where) for where, _ in bad]  # they are among the answers, too
        size = {"max_mb": config.max_mb}
        try:
            write_report(config.out, config.title, rows, runs, config.num_frames, **size)
        except OSError as error:
            raise DataError(f"--out {config.out}: {error}") from None
    print(f"{config.out}: open it in a browser")


if __name__ == "__main__":
    main()
