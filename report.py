"""The report of a run: one HTML file with every question, the frames the model saw, its answers.

    python report.py BEFORE.jsonl AFTER.jsonl --data ROWS.jsonl --num_frames 64 --out report.html

An accuracy does not tell what a model does with a video; its answers beside the frames do. train.py
writes the page at the end of a run, the command above for one or two files that eval.py wrote.

    rows + one or two lists of records (eval.record)     matched by problem_id
      |                                  |
      v  data.Frames, one video at once  v  verdict, change
    a JPEG a video, frames side by side  JSON a question  ----> report.html  <---- table, curves
      as a CSS rule that questions share   (all of the text)        (one file, no network)

    verdict of the last run     right, wrong, failed (the question could not be asked)
    change between two runs     mended, broken, both right, both wrong; failed counts as wrong

Other systems keep answers as JSON lines, or as a table of a hosted dashboard, without the frames.
Here the page opens from disk, years later and on a phone, and a link with its fragment
(report.html#verdict=wrong&category=goal) is a view. What differs from a gallery of all frames:
    - at most 64 frames of a video are shown, evenly chosen, and the page says of how many;
    - the file has a limit (max_mb). Strips are given out evenly over category, verdict and change;
      a question without one says so, and none is left out;
    - all text enters the page as JSON and then as text nodes: an answer cannot become a tag.

Beside it the pictures and the table that end a run: plot_curves, plot_frames, table.

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

# ------------------------------------------------------------------------- what the page is told


def read_answers(path: str) -> list[dict]:
    """The records of a file that eval.py or train.py wrote, or a DataError that names the line."""
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no file of answers, one JSON line each: {error}") from None
    for number, r in enumerate(records, 1):
        if not isinstance(r, dict) or not {"problem_id", "completion", "accuracy"} <= r.keys():
            raise DataError(f"{path}:{number}: no problem_id, completion and accuracy; see eval.py")
    return records


def describe(example, record: dict) -> dict:
    """One answer: verdict, reasoning and answer (or the raw text, if it has another form), and the
    letter it names."""
    text, error = record["completion"], record.get("error", "")
    spans = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    said = spans[0] if len(spans) == 1 else "" if spans else text  # several spans name nothing
    parts = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    form = bool(parts) and len(spans) == 1
    return {
        "verdict": "failed" if error else "right" if record["accuracy"] else "wrong",
        "think": parts[1].strip() if form else "",
        "answer": parts[2].strip() if form else "",
        "raw": "" if form else text,
        "chosen": chosen_letter(said.strip(), example.options) if example.options else None,
        "lenient": bool(record.get("lenient") and not record["accuracy"]),
        "tokens": record.get("tokens"),
        "error": error,
    }


def describe_all(examples: list, runs: dict, media: dict) -> list[dict]:
    """One dict a question that was asked, in the order of the rows. media: Medium -> index."""
    asked = {name: {r["problem_id"]: r for r in records} for name, records in runs.items()}
    for name, own in asked.items():
        for other, theirs in (("the rows", {e.id: e for e in examples}), *asked.items()):
            if lost := [i for i in own if i not in theirs]:
                raise DataError(f"{name}: question {lost[0]!r} is not in {other}: give the others")
    questions = []
    for e in (e for e in examples if all(e.id in own for own in asked.values())):
        answers = [describe(e, own[e.id]) for own in asked.values()]
        was, now = answers[0]["verdict"] == "right", answers[-1]["verdict"] == "right"
        change = (("both wrong", "mended"), ("broken", "both right"))[was][now]
        first, *lines = e.problem.splitlines()
        if e.options:  # they are shown as a list
            lines = [line for line in lines if not re.match(r"\(?[A-Z][.):]\s", line)]
        questions.append({
            "id": e.id, "category": e.category or "(none)", "problem": "\n".join([first, *lines]),
            "options": e.options, "gold": e.answer, "media": [media[m] for m in e.media],
            "verdict": answers[-1]["verdict"], "change": change if len(runs) > 1 else "",
            "answers": answers,
        })  # fmt: skip
    if not questions:
        raise DataError("no answers: the report needs one at least")
    return questions


def count(questions: list[dict]) -> list[list[str]]:
    """Accuracy of each run on all questions and by category, as the rows of a table."""
    rows = []
    for name in ["all", *sorted({q["category"] for q in questions})]:
        own = [q for q in questions if name in ("all", q["category"])]
        right = [sum(a["verdict"] == "right" for a in of) for of in zip(*(q["answers"] for q in own))]
        shares = [f"{100 * n / len(own):.1f} %" for n in right]
        rows.append([name, f"{len(own)}", *shares])
    return rows


def fair(questions: list[dict]) -> list[dict]:
    """The questions in the order in which strips are given out: the first of each category, verdict
    and change, then the second of each ..."""
    seen, turns = Counter(), []
    for q in questions:
        group = q["category"], q["verdict"], q["change"]
        turns.append(seen[group])
        seen[group] += 1
    return [questions[i] for i in np.argsort(turns, kind="stable")]


def strip(medium, num_frames: int, height: int, most: int = 64) -> tuple[dict, str]:
    """What the page shows of a medium, and the JPEG of its frames side by side in base64 ("": none,
    a sound or an error). Large frames shrink to `height` pixels, a single one to 3 x as many."""
    from PIL import Image

    try:
        if medium.kind == "audio":
            return {"seconds": round(len(data.load_audio(medium)) / 16000, 1)}, ""
        frames = data.Frames(medium, num_frames)
        chosen = data.frame_indices(len(frames), most)
        height *= 3 if len(chosen) == 1 else 1
        cells = []
        for i in chosen:  # one by one: 8,192 large frames do not fit in memory
            cell = Image.fromarray(frames[i : i + 1][0])
            cell.thumbnail((65535 // len(chosen), height))  # a JPEG is at most 65,535 pixels wide
            cells.append(np.asarray(cell))
    except DataError as error:
        return {"error": str(error)}, ""
    file, (h, w) = io.BytesIO(), cells[0].shape[:2]
    Image.fromarray(np.concatenate(cells, axis=1)).save(file, "JPEG", quality=80)
    seconds = frames.times[chosen]
    times = [f"{int(t // 60):02d}:{t % 60:04.1f}" for t in (seconds * 10).round() / 10]
    if medium.kind == "image":
        times = [""]
    look = {"times": times, "of": len(frames), "width": w, "height": h, "sound": medium.track}
    return look, base64.b64encode(file.getvalue()).decode()


def write_report(
    path, title: str, examples: list, runs: dict[str, list[dict]], num_frames: int, pictures=(),
    text: str = "", max_mb: float = 30.0, frame_height: int = 96,
) -> None:  # fmt: skip
    """One HTML file. runs: {name: records}, one or two; pictures: {path of a PNG: what it shows};
    text: a table of the run. Media that do not decode are shown as their error; DataError if the
    runs answer different questions, or others than the examples."""
    places = {m: i for i, m in enumerate(dict.fromkeys(m for e in examples for m in e.media))}
    questions = describe_all(examples, runs, places)
    looks = [{"name": Path(m.path).name, "kind": m.kind} for m in places]
    uris = [(base64.b64encode(Path(p).read_bytes()).decode(), alt) for p, alt in dict(pictures).items()]
    page = {
        "title": title, "runs": list(runs), "frames": num_frames, "text": text, "max_mb": max_mb,
        "numbers": count(questions), "pictures": uris, "media": looks, "questions": questions,
    }  # fmt: skip
    # ASCII with every < escaped: neither </script> nor <!-- nor half a character is in the file.
    dump = lambda part: json.dumps(part).replace("<", "\\u003c")  # noqa: E731
    media, rules, done = list(places), [], set()
    room = max_mb * 1e6 - len(dump(page)) - len(PAGE) - len(html.escape(title))
    for i in (i for q in fair(questions) for i in q["media"] if i not in done):
        done.add(i)
        look, jpeg = strip(media[i], num_frames, frame_height)
        rule = f".s{i}{{background-image:url(data:image/jpeg;base64,{jpeg})}}\n" if jpeg else ""
        room -= len(rule) + len(dump(look))
        if room < 0:
            break
        looks[i] |= look
        rules.append(rule)
    parts = {"TITLE": html.escape(title), "RULES": "".join(rules), "DATA": dump(page)}
    Path(path).write_text(re.sub("@([A-Z]+)@", lambda m: parts[m[1]], PAGE), encoding="utf-8")


# ---------------------------------------------------------------------------------------- the page

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --paper: #fff; --card: #f6f8fa;
  --line: #d0d7de; --right: #116329; --wrong: #b42318; --failed: #7d4e00; --mark: #0550ae }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #0d1117;
  --card: #161b22; --line: #3d444d; --right: #56d364; --wrong: #ff8f85; --failed: #e3b341;
  --mark: #79c0ff } }
* { box-sizing: border-box }
body { margin: 0; display: grid; grid-template-columns: 15.5rem minmax(0, 1fr); color: var(--ink);
  background: var(--paper); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
aside { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1rem;
  border-right: 1px solid var(--line); background: var(--card) }
main { padding: 1rem 1.5rem; max-width: 84rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .6rem }
h3 { font-size: .85rem; margin: 0; color: var(--soft) }
.soft, time, kbd { color: var(--soft); font-size: .85rem }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: start }
input { width: 100%; padding: .45rem; font: inherit; margin-bottom: .5rem }
.chips { display: flex; flex-direction: column; gap: 2px; margin: .3rem 0 .9rem }
.chips button { display: flex; justify-content: space-between; gap: .6rem; font: inherit;
  padding: .2rem .5rem; border: 1px solid transparent; border-radius: 6px; color: var(--ink);
  background: none; text-align: left; cursor: pointer }
.chips button:hover { border-color: var(--line) }
.chips [aria-pressed=true] { background: var(--mark); color: var(--paper) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 }
td, th { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left }
pre { font: 12px/1.4 ui-monospace, monospace; overflow-x: auto; margin: .8rem 0; max-width: 100% }
.pictures img { max-width: 100%; max-height: 22rem; background: #fff; border-radius: 6px }
article { border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  padding: .9rem 1rem; margin: 0 0 1rem; scroll-margin-top: .5rem }
article:focus { outline: 3px solid var(--mark) }
.strip { display: flex; gap: 3px; overflow-x: auto; list-style: none; margin: 0 0 .3rem;
  padding: 0 0 .3rem }
.all .strip { flex-wrap: wrap }
.strip i { display: block; max-width: 78vw; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.strip time { display: block; text-align: center; font-size: .68rem }
.problem { white-space: pre-wrap; margin: .6rem 0 .4rem; font-weight: 600 }
.options { margin: 0 0 .7rem; padding-left: 1.6rem }
.tag { border: 1px solid; border-radius: 9px; padding: 0 .45rem; margin-left: .45rem;
  font-size: .75rem; font-weight: 600; white-space: nowrap; color: var(--mark) }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .8rem }
.answers section { border-left: 4px solid var(--line); padding-left: .7rem }
.answers p { white-space: pre-wrap; margin: .1rem 0 .5rem; max-height: 22rem; overflow-y: auto }
.right { --line: var(--right) } .wrong { --line: var(--wrong) } .failed { --line: var(--failed) }
.right .tag.verdict { color: var(--right) } .wrong .tag.verdict { color: var(--wrong) }
.failed .tag.verdict, .error { color: var(--failed) } .tag.gold { color: var(--right) }
@media (max-width: 52rem) { body { display: block } main { padding: .8rem }
  aside { position: static; height: auto; border: 0; border-bottom: 1px solid var(--line) }
  .chips { flex-direction: row; flex-wrap: wrap } .chips button { border-color: var(--line) }
  .keys { display: none } }
@media print { body { display: block } aside { display: none } article { break-inside: avoid }
  .strip { flex-wrap: wrap } .answers p { max-height: none } }
</style><style>
@RULES@</style></head>
<body><aside aria-label="filters"></aside><main></main>
<noscript>This page lists its questions with JavaScript; all of it is in this file.</noscript>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict"
const D = JSON.parse(document.getElementById("data").textContent)
// An element. Text always becomes a text node: nothing in an answer can become a tag.
function h(tag, props, ...kids) {
  const e = document.createElement(tag)
  for (const [name, value] of Object.entries(props)) e.setAttribute(name, value)
  e.append(...kids.flat(2).filter(kid => kid !== "" && kid != null))
  return e
}
const tag = (text, kind = "") => h("span", {class: "tag " + kind}, text)
const MARKS = {right: "✓ right", wrong: "✗ wrong", failed: "! failed"}

function strip(i) {  // the frames of medium i with their times, or why there are none
  const m = D.media[i], named = m.kind + " " + m.name
  if (m.error) return h("p", {class: "error"}, m.error)
  if (m.seconds != null) return h("p", {class: "soft"}, `${named}, ${m.seconds} s of sound`)
  if (!m.times) return h("p", {class: "soft"}, `${named}: no frames here, they would make this ` +
    `file larger than ${D.max_mb} MB (--max_mb)`)
  const n = m.times.length, tall = m.height * Math.max(1, Math.floor(96 / m.height))
  const look = `width:${tall * m.width / m.height}px;aspect-ratio:${m.width}/${m.height};` +
    `background-size:${n * 100}% 100%;image-rendering:${m.height < 96 ? "pixelated" : "auto"}`
  const cells = m.times.map((t, at) => h("li", {}, h("i", {class: "s" + i, role: "img",
    style: `${look};background-position:${n > 1 ? at / (n - 1) * 100 : 0}% 0`,
    "aria-label": t ? "frame at " + t : named}), h("time", {"aria-hidden": true}, t)))
  const many = m.kind === "image" ? "" : n < m.of ? `${n} of ${m.of} frames of ` : `${n} frames of `
  return h("div", {}, h("ol", {class: "strip", tabindex: 0, "aria-label": many + named}, cells),
    h("div", {class: "soft"}, many + named + (m.sound ? ", with its sound" : "")))
}

function answer(a, run) {
  const part = (name, text) => text && [h("h3", {}, name), h("p", {tabindex: 0}, text)]
  return h("section", {class: a.verdict}, h("h2", {}, run, tag(MARKS[a.verdict], "verdict")),
    a.error && h("p", {class: "error"}, a.error),
    a.lenient && h("p", {class: "soft"}, "right, but not in the form that the reward asks for"),
    part("reasoning", a.think), part("answer", a.answer),
    part("answer, not as <think> ... </think> <answer> ... </answer>", a.raw),
    a.tokens ? h("div", {class: "soft"}, `${a.tokens} tokens`) : "")
}

function card(q) {
  const letters = q.options.map((_, i) => String.fromCharCode(65 + i))
  return h("article", {tabindex: -1, "aria-label": "question " + q.id, class: q.verdict},
    h("h2", {}, q.id, tag(q.category), tag(q.change || MARKS[q.verdict], "verdict")),
    q.media.map(strip), h("p", {class: "problem"}, q.problem),
    h("ol", {type: "A", class: "options"}, q.options.map((text, i) => h("li", {}, text,
      letters[i] === q.gold ? tag("gold", "gold") : "",
      q.answers.map((a, run) => a.chosen === letters[i] ? tag("chosen " + D.runs[run]) : "")))),
    q.options.length ? "" : h("p", {}, "gold: " + q.gold),
    h("div", {class: "answers"}, q.answers.map((a, run) => answer(a, D.runs[run]))))
}

// The view is {verdict, change, category, q}; it is kept in the fragment: a link to it.
const hay = new Map(D.questions.map(q => [q, JSON.stringify(Object.values({...q, media:
  q.media.map(i => D.media[i].name)})).replace(/\\n/g, " ").toLowerCase()]))
const hit = (q, view) => ["verdict", "change", "category"].every(k => !view[k] || q[k] === view[k])
  && (view.q || "").toLowerCase().split(/\s+/).every(word => hay.get(q).includes(word))
const groups = {verdict: ["right", "wrong", "failed"], category: D.numbers.slice(1).map(r => r[0])}
if (D.runs.length > 1) groups.change = ["mended", "broken", "both right", "both wrong"]
let view = {}, shown = [], drawn = 0
const list = h("div", {}), end = h("div", {class: "soft"}), chips = []
const status = h("p", {role: "status"})
const search = h("input", {type: "search", id: "q", placeholder: "words, a name, an answer"})
const go = change => { view = {...view, ...change}; draw() }

function draw() {
  history.replaceState(null, "", "#" + new URLSearchParams(
    Object.entries(view).filter(([, value]) => value)))
  shown = D.questions.filter(q => hit(q, view))
  drawn = 0
  list.replaceChildren()
  more()
  if (search.value !== (view.q || "")) search.value = view.q || ""
  status.textContent = `${shown.length} of ${D.questions.length} questions`
  for (const [chip, key, value] of chips) {
    chip.setAttribute("aria-pressed", (view[key] || "") === value)
    chip.lastChild.textContent = D.questions.filter(q => hit(q, {...view, [key]: value})).length
  }
}
function more(n = 10) {  // cards are made as they are needed: 1,000 strips are slow
  list.append(...shown.slice(drawn, drawn += n).map(card))
  end.textContent = drawn < shown.length ? "..." : shown.length ? "" : "no question is like this"
}
function step(by) {  // to the next card below, or the one above, of where the page is scrolled to
  const cards = [...list.children], tops = cards.map(c => c.getBoundingClientRect().top - 8)
  const own = cards.indexOf(document.activeElement)
  const at = own >= 0 && tops[own] > -4 && tops[own] < innerHeight / 2 ? own + by
    : by > 0 ? tops.findIndex(t => t > -4) : tops.findLastIndex(t => t < 4)
  if (at + 3 > drawn) more()
  if (!list.children[at]) return
  list.children[at].focus({preventScroll: true})
  list.children[at].scrollIntoView()
}

document.querySelector("main").append(h("header", {}, h("h1", {}, D.title),
  h("p", {class: "soft"}, `${D.questions.length} questions, ${D.frames} frames a video`),
  h("div", {class: "row"}, h("table", {}, h("tr", {}, ["right answers", "questions", ...D.runs]
    .map(name => h("th", {scope: "col"}, name))),
    D.numbers.map(row => h("tr", {}, row.map(cell => h("td", {}, cell))))),
    D.text && h("pre", {tabindex: 0}, D.text)),
  h("p", {class: "row pictures"}, D.pictures.map(([png, alt]) =>
    h("img", {src: "data:image/png;base64," + png, alt})))), list, end)
document.querySelector("aside").append(...h("div", {}, h("label", {for: "q"}, "search"), search, status,
  Object.entries(groups).map(([key, values]) => [h("h3", {}, key === "verdict" ?
    D.runs.at(-1) : key), h("div", {class: "chips", role: "group", "aria-label": key},
    ["", ...values].map(value => {
      const chip = h("button", {type: "button"}, value || "all", h("span", {}, ""))
      chip.onclick = () => go({[key]: value})
      chips.push([chip, key, value])
      return chip
    }))]), h("p", {class: "soft keys"}, "keys: j k or → ← question, f all frames, / search")).childNodes)
search.oninput = () => go({q: search.value})
onbeforeprint = () => more(shown.length)
onhashchange = () => { view = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); draw() }
onkeydown = e => {
  const typing = e.target === search, by = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1}[e.key]
  if (e.ctrlKey || e.metaKey || e.altKey || (typing && e.key !== "Escape")) return
  if (e.key.startsWith("Arrow") && e.target.tabIndex === 0) return  // it scrolls a strip
  if (by) step(by)
  else if (e.key === "f") document.body.classList.toggle("all")
  else if (e.key === "/") search.focus()
  else if (e.key === "Escape") search.blur()
  else return
  e.preventDefault()
}
new IntersectionObserver(seen => seen[0].isIntersecting && more(), {rootMargin: "1500px"})
  .observe(end)
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
        write_report(
            args.out, args.title, data.load_rows(args.data, args.video_dir), runs,
            args.num_frames, max_mb=args.max_mb, frame_height=args.frame_height,
        )  # fmt: skip
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: open it in a browser")


if __name__ == "__main__":
    main()
