"""The report of a run: one HTML file with every question, the frames the model saw, its answers.

    python -m kit.report BEFORE.jsonl AFTER.jsonl --data ROWS.jsonl --num_frames 64

An accuracy does not say what a model does with a video; its answers beside the frames do. train.py
writes the page at the end of a run, the command above for one or two files that eval.py wrote.

    rows + one or two lists of records (eval.record)       matched by problem_id
      |                                  |
      v data.Frames, one video at a time v verdict, change
    a JPEG a video, frames side by side  JSON a question  ---> report.html <--- table, curves
      (a CSS rule that questions share)    (all of the text)    one file, no network

    verdict of the last run     right, wrong, failed (the question could not be asked)
    change between two runs     mended, broken, both right, both wrong; failed counts as not right

Other systems keep answers as JSON lines or in a hosted dashboard, without the frames. This page
opens from disk, on a phone too, and its address is a view: report.html#verdict=wrong&category=goal.
    - Of a video at most 64 frames are shown, evenly chosen; the page says of how many.
    - The file has a limit (max_mb). Strips are dealt out evenly over category, verdict and change;
      a question without one says so, and none is left out.
    - All text enters the page as JSON, then as text nodes: an answer cannot become a tag.

Check this file alone:  pytest tests/test_report.py   (drives a browser if there is one)
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import data
from data import DataError
from grpo import chosen_letter
from kit.decode import Loader


def read_answers(path: str) -> list[dict]:
    """The records of a file that eval.py or train.py wrote, or a DataError that names the line."""
    records, needed = [], ("problem_id", "completion", "accuracy")
    try:
        with open(path, encoding="utf-8") as file:
            for r in map(json.loads, file):
                records.append(r | {name: r[name] for name in needed})
    except (OSError, ValueError, KeyError, TypeError) as error:
        here = f"{path}:{len(records) + 1}"
        raise DataError(f"{here}: not an answer that eval.py wrote ({error!r})") from None
    return records


def describe(example, record: dict) -> dict:
    """An answer: its verdict, its parts (or the raw text, if it has another form), its letter."""
    text, error = record["completion"], record.get("error", "")
    spans = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    said = spans[0] if len(spans) == 1 else "" if spans else text  # several spans choose nothing
    form = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    parts = re.fullmatch(form, text, re.DOTALL) if len(spans) == 1 else None
    return {
        "verdict": "failed" if error else "right" if record["accuracy"] else "wrong",
        "think": parts[1].strip() if parts else "", "answer": parts[2].strip() if parts else "",
        "raw": "" if parts else text, "error": error, "tokens": record.get("tokens", 0),
        "lenient": bool(record.get("lenient") and not record["accuracy"]),
        "chosen": chosen_letter(said.strip(), example.options) if example.options else None,
    }  # fmt: skip


def describe_all(examples: list, runs: dict, places: dict) -> list[dict]:
    """A dict for each question that was asked, in the order of the rows. places: {Medium: index}.
    turn: how many of the same category, verdict and change come before. DataError if a run has an
    answer for which another one, or the rows, have no counterpart."""
    asked = {name: {r["problem_id"]: r for r in records} for name, records in runs.items()}
    rows = {e.id: e for e in examples}
    for name, own in asked.items():
        if len(own) < len(runs[name]):
            raise DataError(f"{name}: a question is answered twice; give one evaluation's answers")
        for other, theirs in {"the rows": rows, **asked}.items():
            if lost := [i for i in own if i not in theirs]:
                raise DataError(f"question {lost[0]!r} is in {name}, but not in {other}")
    if not any(asked.values()):
        raise DataError("there are no answers to report")
    questions, turns = [], Counter()
    for e in (e for e in examples if all(e.id in own for own in asked.values())):
        answers = [describe(e, own[e.id]) for own in asked.values()]
        was, now = (answers[i]["verdict"] == "right" for i in (0, -1))
        change = (("both wrong", "mended"), ("broken", "both right"))[was][now]
        group = {"category": e.category or "(none)", "verdict": answers[-1]["verdict"]}
        group |= {"change": change if len(runs) > 1 else ""}
        option = r"\n\(?[A-Z][.):]\s.*" if e.options else "(?!)"  # options are shown as a list
        questions.append(group | {
            "id": e.id, "problem": re.sub(option, "", e.problem), "options": e.options,
            "gold": e.answer, "media": [places[m] for m in e.media], "answers": answers,
            "turn": turns[*group.values()],
        })  # fmt: skip
        turns[*group.values()] += 1
    return questions


def strip(loader, medium, num_frames, height: int, most: int = 64) -> tuple[dict, str]:
    """What the page tells of a medium, and the JPEG of its frames side by side in base64 ("" for
    sound and errors). Large frames shrink to `height` pixels, a single one to 3 times as many."""
    from PIL import Image

    try:
        if medium.kind == "audio":
            return {"seconds": round(len(loader.sound(medium)) / 16000, 1)}, ""
        with loader.open(medium, num_frames) as frames:
            chosen, cells = data.frame_indices(len(frames), most), []
            # A few at once: large ones do not fit in memory.
            step = 8 if len(chosen) == len(frames) else 1
            parts = [slice(i, i + step) for i in chosen[::step].tolist()]
            for cell in (Image.fromarray(x) for some in frames.pieces(parts) for x in some):
                widest = 65535 // len(chosen)  # a JPEG has at most 65,535 pixels a side
                cell.thumbnail((widest, height if len(chosen) > 1 else 3 * height))
                cells.append(np.asarray(cell))
    except DataError as error:
        return {"error": str(error)}, ""
    tenths = (frames.times[chosen] * 10).round().astype(int).tolist()
    times = [f"{t // 600:02d}:{t // 10 % 60:02d}.{t % 10}" for t in tenths]
    times = times if medium.kind == "video" else [""]
    file, (h, w) = io.BytesIO(), cells[0].shape[:2]
    Image.fromarray(np.concatenate(cells, axis=1)).save(file, "JPEG", quality=80, subsampling=0)
    look = {"times": times, "of": len(frames), "width": w, "height": h, "sound": medium.track}
    return look, base64.b64encode(file.getvalue()).decode()


def write_report(
    path, title: str, examples: list, runs: dict[str, list[dict]], num_frames, pictures=(),
    text: str = "", max_mb: float = 30.0, frame_height: int = 96, loader: Loader | None = None,
) -> None:  # fmt: skip
    """The page. runs: {name: records}, one or two; pictures: {PNG file: what it shows}; text: a
    table of the run; loader: opens the media, and is closed. A medium that does not decode is shown
    as its error. DataError: describe_all."""
    media = list(dict.fromkeys(m for e in examples for m in e.media))
    how_many = f"{num_frames} frames a video"
    if isinstance(num_frames, data.Rate):
        how_many = f"{num_frames.fps:g} frames a second, {num_frames.most} at most"
    questions = describe_all(examples, runs, {m: i for i, m in enumerate(media)})
    looks = [{"name": Path(m.path).name, "kind": m.kind} for m in media]
    encode = lambda file: base64.b64encode(Path(file).read_bytes()).decode()  # noqa: E731
    page = {
        "runs": list(runs), "frames": how_many, "text": text, "max_mb": max_mb, "title": title,
        "pictures": [[encode(file), alt] for file, alt in dict(pictures).items()],
        "media": looks, "questions": questions,
    }  # fmt: skip
    # ASCII, and no "<": neither </script> nor <!-- nor half a character is in the file.
    dump = lambda part: json.dumps(part).replace("<", "\\u003c")  # noqa: E731
    head = html.escape(title).encode("ascii", "xmlcharrefreplace").decode()
    loader = loader or Loader(1)
    room, rules = max_mb * 1e6 - len(PAGE.encode()) - len(head) - len(dump(page)), []
    dealt = sorted(questions, key=lambda q: q["turn"])
    for i in dict.fromkeys(i for q in dealt for i in q["media"]):
        look, jpeg = strip(loader, media[i], num_frames, frame_height)
        rule = f".s{i}{{background-image:url(data:image/jpeg;base64,{jpeg})}}\n" if jpeg else ""
        room -= len(rule) + len(dump(look))
        if room < 0:
            break
        looks[i] |= look
        rules.append(rule)
    loader.close()
    parts = {"TITLE": head, "RULES": "".join(rules), "DATA": dump(page)}
    Path(path).write_text(re.sub("@([A-Z]+)@", lambda m: parts[m[1]], PAGE), encoding="utf-8")


PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --ink: light-dark(#1c2128, #e6edf3);
  --paper: light-dark(#fff, #0d1117); --card: light-dark(#f6f8fa, #161b22);
  --line: light-dark(#d0d7de, #3d444d); --soft: light-dark(#57606a, #9aa5b1);
  --mark: light-dark(#0550ae, #79c0ff); --right: light-dark(#116329, #56d364);
  --wrong: light-dark(#b42318, #ff8f85); --failed: light-dark(#7d4e00, #e3b341) }
* { box-sizing: border-box }
body { display: grid; grid-template-columns: 15rem minmax(0, 1fr); margin: 0; color: var(--ink);
  background: var(--paper); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: break-word }
aside { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1rem;
  background: var(--card); border: solid var(--line); border-width: 0 1px 0 0 }
main { padding: 1rem 1.5rem 80vh; max-width: 90rem }
header, .answers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: start }
h1, header > small, details { width: 100%; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .5rem }
h3 { font-size: .85rem; margin: .7rem 0 .2rem } h3, small { color: var(--soft); font-weight: 400 }
[type=search] { width: 100%; padding: .4rem; font: inherit }
[role=group] { display: flex; flex-direction: column; gap: 2px }
button { display: flex; justify-content: space-between; gap: .6rem; padding: .15rem .5rem;
  font: inherit; color: inherit; background: none; border: 1px solid var(--card);
  border-radius: 6px; cursor: pointer }
button[aria-pressed=true] { background: var(--mark); color: var(--paper) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
td, th { padding: .15rem .5rem; border-bottom: 1px solid var(--line); text-align: right }
:is(td, th):first-child { text-align: left }
pre { font: 12px/1.4 ui-monospace, monospace; flex: 1 1 22rem }
img { max-width: 100%; max-height: 24rem; border-radius: 6px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; margin: 1rem 0; scroll-margin-top: 8px }
article:focus { outline: 3px solid var(--mark) }
.strip { display: flex; gap: 3px; overflow-x: auto; list-style: none; margin: 0; padding: 0 0 4px }
body:has(#whole:checked) .strip { flex-wrap: wrap }
i { display: block; max-width: 78vw; print-color-adjust: exact }
time { display: block; text-align: center; font-size: .7rem; color: var(--soft) }
pre, .problem, section p { white-space: pre-wrap; margin: 0 }
.problem { margin: .5rem 0; font-weight: 600 }
[type=A] { margin: 0 0 .7rem; padding-left: 1.6rem }
b { border: 1px solid; border-radius: 9px; padding: 0 .4rem; margin-left: .1rem; font-size: .75rem;
  color: var(--mark) }
section { flex: 1 1 17rem; min-width: 0; border-left: 4px solid var(--tone); padding-left: .7rem }
section p { max-height: 22rem; overflow-y: auto }
.right { --tone: var(--right) } .wrong { --tone: var(--wrong) } .failed { --tone: var(--failed) }
.verdict, .error { color: var(--tone) }
@media (max-width: 50rem) { body { display: block } main { padding: .8rem } pre { font-size: 10px }
  aside { position: static; height: auto } .keys { display: none } table { white-space: normal }
  [role=group] { flex-flow: wrap } button { border-color: var(--line) } }
@media print { body { display: block } aside { display: none } article { break-inside: avoid }
  main { padding: 0 } .strip { flex-wrap: wrap } i { max-width: 16mm }
  section p { max-height: none } :root { color-scheme: light } }
</style><style>@RULES@</style></head><body><aside aria-label="filters">
<label>search <input type="search" id="search"></label><p id="count" role="status"></p>
<label><input type="checkbox" id="whole"> all frames at once</label><div id="filters"></div>
<p class="keys"><small>keys: j k or → ← question, f all frames, / search</small></p></aside>
<main><header></header><div id="list"></div><div id="end"></div></main>
<noscript>The questions are listed by JavaScript; all of it is in this file.</noscript>
<script type="application/json" id="data">@DATA@</script><script>
"use strict"
const [data, search, count, whole, filters, list, end] = ["data", "search", "count", "whole",
  "filters", "list", "end"].map(id => document.getElementById(id))
const D = JSON.parse(data.textContent), all = D.questions
// An element. Text always becomes a text node: nothing in an answer can become a tag.
function h(tag, attributes, ...kids) {
  const e = document.createElement(tag)
  for (const name in attributes) e.setAttribute(name, attributes[name])
  e.append(...kids.flat(2).filter(kid => kid))
  return e
}
const MARKS = {right: "✓ right", wrong: "✗ wrong", failed: "! failed"}
const badge = (text, kind = "") => [" ", h("b", {class: kind}, text)]

function strip(m, i) {  // the frames of a medium with their times, or why there are none
  let name = `${m.kind} ${m.name}`
  if (m.error) return h("p", {class: "failed error"}, m.error)
  if (m.seconds != null) return h("p", {}, `${name}, ${m.seconds} s of sound`)
  if (!m.times) return h("p", {}, `${name}: left out, this file may have ${D.max_mb} MB (max_mb)`)
  const n = m.times.length, scale = Math.max(1, Math.floor(96 / m.height))
  const look = at => `width:${m.width * scale}px;aspect-ratio:${m.width}/${m.height};` +
    `background-size:${n * 100}% 100%;background-position:${n > 1 && at / (n - 1) * 100}% 0;` +
    `image-rendering:${scale > 1 ? "pixelated" : "auto"}`
  const cells = m.times.map((t, at) => h("li", {}, h("i", {class: "s" + i, style: look(at),
    role: "img", "aria-label": t ? "frame at " + t : name}), h("time", {"aria-hidden": true}, t)))
  if (m.kind === "video") name = `${n < m.of ? n + " of " : ""}${m.of} frames of ${name}`
  if (m.sound) name += ", with its sound"
  return [h("ol", {class: "strip", tabindex: 0, "aria-label": name}, cells), h("small", {}, name)]
}
function answer(a, run) {
  const part = (name, text) => text && [h("h3", {}, name), h("p", {}, text)]
  return h("section", {class: a.verdict}, h("h2", {}, run, badge(MARKS[a.verdict], "verdict")),
    a.error && h("p", {class: "error"}, a.error),
    a.lenient && h("small", {}, "right, but not in the form that is rewarded"),
    part("reasoning", a.think), part("answer", a.answer),
    part("all of it, not of the form <think> </think> <answer> </answer>", a.raw),
    a.tokens && h("small", {}, `${a.tokens} tokens`))
}
function card(q) {
  const gold = badge("gold", "right verdict")
  const option = (text, letter) => h("li", {}, text, letter === q.gold && gold,
    q.answers.map((a, run) => a.chosen === letter && badge("chosen " + D.runs[run])))
  return h("article", {tabindex: -1, "aria-label": "question " + q.id, class: q.verdict},
    h("h2", {}, q.id, badge(q.category), badge(q.change || MARKS[q.verdict], "verdict")),
    q.media.map(i => strip(D.media[i], i)), h("p", {class: "problem"}, q.problem),
    !q.options.length ? h("p", {}, q.gold, gold) : h("ol", {type: "A"},
      q.options.map((text, i) => option(text, String.fromCharCode(65 + i)))),
    h("div", {class: "answers"}, q.answers.map((a, run) => answer(a, D.runs[run]))))
}
const categories = [...new Set(all.map(q => q.category))].sort(), chips = []
const changes = D.runs[1] && {change: ["mended", "broken", "both right", "both wrong"]}
const groups = {verdict: Object.keys(MARKS), ...changes, category: categories}
for (const q of all) q.hay = [q.id, q.category, q.problem, q.gold, ...q.options,
  ...q.answers.flatMap(a => [a.think, a.answer, a.raw, a.error]),
  ...q.media.map(i => D.media[i].name)].join("\n").toLowerCase()
let view = {}, shown = []  // view: {verdict, change, category, words}, kept in the address
const find = view => all.filter(q => Object.keys(groups).every(k => !view[k] || q[k] === view[k]) &&
  (view.words || "").toLowerCase().split(/\s+/).every(word => q.hay.includes(word)))

function go(next) {
  view = next
  history.replaceState(null, "", "#" + new URLSearchParams(Object.entries(view).filter(e => e[1])))
  shown = find(view)
  list.replaceChildren()
  more()
  if (search.value !== view.words) search.value = view.words || ""
  curves.open = !Object.values(view).some(value => value)  // else the questions are what to see
  if (scrollY > list.offsetTop) list.scrollIntoView()
  count.textContent = `${shown.length} of ${all.length} questions`
  for (const [chip, key, value] of chips) {
    chip.setAttribute("aria-pressed", (view[key] || "") === value)
    chip.lastChild.textContent = find({...view, [key]: value}).length
  }
}
function more(n = 10) {  // cards are made as they are needed: 1,000 strips are slow
  list.append(...shown.slice(list.children.length).slice(0, n).map(card))
}
function step(by) {  // to the first card below the top of the window, or the last one above
  const tops = [...list.children].map(card => card.getBoundingClientRect().top)
  const to = list.children[by > 0 ? tops.findIndex(t => t > 10) : tops.findLastIndex(t => t < 6)]
  to?.focus({preventScroll: true})
  to?.scrollIntoView()
}
const curves = h("details", {}, h("summary", {}, "curves"),
  D.pictures.map(([png, alt]) => h("img", {src: "data:image/png;base64," + png, alt})))
curves.hidden = !D.pictures.length
const right = (some, run) => some.filter(q => q.answers[run].verdict === "right").length
const line = (name, some) => h("tr", {}, [name, some.length, ...D.runs.map((_, run) =>
  (100 * right(some, run) / some.length).toFixed(1) + "\u00a0%")].map(text => h("td", {}, text)))
document.querySelector("header").append(h("h1", {}, D.title),
  h("small", {}, `${all.length} questions, ${D.frames}`),
  h("table", {}, h("tr", {}, ["right answers", "questions", ...D.runs].map(s => h("th", {}, s))),
    line("all", all), categories.map(name => line(name, all.filter(q => q.category === name)))),
  h("pre", {}, D.text), curves)
for (const key in groups) filters.append(h("h3", {}, key === "verdict" ? D.runs.at(-1) : key),
  h("div", {role: "group", "aria-label": key}, ["", ...groups[key]].map(value => {
    const chip = h("button", {}, value || "all", h("span", {}))
    chip.onclick = () => go({...view, [key]: value})
    chips.push([chip, key, value])
    return chip
  })))
search.oninput = () => go({...view, words: search.value})
search.onchange = () => search.blur()  // Enter: the keys work again
onbeforeprint = () => more(shown.length)
onhashchange = () => go(Object.fromEntries(new URLSearchParams(location.hash.slice(1))))
const on = () => step(1), back = () => step(-1), keys = {j: on, ArrowRight: on, k: back,
  ArrowLeft: back, f: () => whole.click(), "/": () => search.focus()}
onkeydown = e => {  // in a strip the arrows scroll
  const own = e.target === search || (e.target.matches(".strip") && e.key[1])
  if (!keys[e.key] || own || e.ctrlKey || e.metaKey || e.altKey) return
  e.preventDefault()
  keys[e.key]()
}
const near = new IntersectionObserver(([e]) => e.isIntersecting && more(), {rootMargin: "1500px"})
near.observe(end)
onhashchange()
</script></body></html>
"""


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
    trained_on = summary.get("trained_on", 0)
    kind = f"questions, {trained_on} of them TRAINED ON" if trained_on else "held-out questions"
    lines = [f"accuracy on {summary['questions']} {kind}, seed {summary['seed']}"]
    lines += [f"  {name:46s} {100 * value:5.1f} %" for name, value in rows.items()]
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}"])


def plot_curves(metrics: str, path: str) -> None:
    """The GRPO stage of metrics.jsonl as curves.png: thin = each step, thick = running mean."""
    from matplotlib.figure import Figure

    with open(metrics) as file:
        rows = [r for r in map(json.loads, file) if r["stage"] == "grpo"]
    panels = {
        "reward": "mean reward", "accuracy": "accuracy of sampled answers",
        "length": "tokens an answer", "clip_fraction": "clip fraction",
        "mismatch_mean": "|log-prob sampler - trainer|", "entropy": "entropy (nats a token)",
    }  # fmt: skip
    figure = Figure((11, 5.5), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, panels.items()):
        x, y = [r["step"] for r in rows], [r[name] for r in rows]
        window = max(1, len(y) // 10)
        mean = [sum(y[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(y))]
        axis.plot(x, y, color="#9ecae1", linewidth=0.8)
        axis.plot(x, mean, color="#08519c", linewidth=1.8)
        axis.set(title=title, xlabel="GRPO step")
        if name == "mismatch_mean":
            top = [r["mismatch_max"] for r in rows]
            axis.plot(x, top, color="#cb181d", linewidth=0.8, label="max")
            axis.set_yscale("symlog", linthresh=1e-7)
            # Whole decades from 0: else the axis may end between two labels and have none.
            axis.set_ylim(0, 10 ** np.ceil(np.log10(max(1e-6, *top))))
            axis.legend()
        if name == "clip_fraction" and not any(y):
            axis.set(title="clip fraction (0: on-policy)", ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_frames(summary: dict, path: str) -> None:
    """Accuracy over the number of frames, with the controls as lines, as frames.png."""
    from matplotlib.figure import Figure

    grpo = summary["grpo"]
    frames = [int(n) for n in grpo["by_frames"]]
    figure = Figure((6.5, 5), layout="constrained")
    axis = figure.subplots()
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


def finish(run, summary: dict) -> None:
    """The end of a training run (kit.run.Run), on one rank: summary.json, curves, table, report."""
    out, s = run.out, run.settings
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(out / "metrics.jsonl", out / "curves.png")
    pictures = {out / "curves.png": "curves over the steps of GRPO"}
    if "by_frames" in summary.get("grpo", {}):
        plot_frames(summary, out / "frames.png")
        pictures[out / "frames.png"] = "accuracy over the number of frames"
    rows = "" if s.recipe.data else f" --data {s.run.test_data or 'ROWS.jsonl'}"
    rows += f" --video_dir {s.run.video_dir}" if rows and s.run.video_dir else ""
    if summary["questions"]:
        print(f"\n{table(summary)}\n", flush=True)
    print(f"Look at the pictures and samples.jsonl in {out}/, ask again with")
    print(
        f"    python eval.py --model {out}/model{rows}\nthen read grpo.py and sft.py.", flush=True
    )
    if summary["questions"]:
        files = {"before GRPO": "answers_before.jsonl", "after GRPO": "answers_after.jsonl"}
        write_report(
            out / "report.html",
            f"{out.name}: before and after GRPO",
            data.load_rows(s.run.test_data, s.run.video_dir, []),
            {name: read_answers(out / file) for name, file in files.items()},
            s.recipe.frames,
            pictures,
            table(summary),
            loader=run.loader,
        )
        print(f"Every question with its frames and answers: {out}/report.html", flush=True)


# --------------------------------------------------------------------------------- command line


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Answers beside the frames, as one HTML file.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("answers", nargs="+", help="one or two files that eval.py --output wrote: before, after")
    add("--data", required=True, help="the rows that were asked")
    add("--video_dir", help="folder that the rows' paths are relative to; default: the rows' own")
    add("--num_frames", type=int, required=True, help="frames a video, as the model saw them")
    add("--title", default="Answers", help="heading of the page")
    add("--max_mb", type=float, default=30.0, help="limit of the file's size: strips are left out")
    add("--frame_height", type=int, default=96, help="most pixels of a frame's height")
    add("--out", default="report.html", help="the page")
    args = parser.parse_args(argv)
    names = [Path(name).stem for name in args.answers]
    names = names if len(set(names)) == len(names) else args.answers
    try:
        if len(args.answers) > 2:
            raise DataError("give one or two files of answers")
        runs = {name: read_answers(path) for name, path in zip(names, args.answers)}
        rows = data.load_rows(args.data, args.video_dir, bad := [])
        rows += [data.stand_in(where) for where, _ in bad]  # they are among the answers, too
        write_report(
            args.out, args.title, rows, runs, args.num_frames, max_mb=args.max_mb,
            frame_height=args.frame_height,
        )  # fmt: skip
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: open it in a browser")


if __name__ == "__main__":
    main()
