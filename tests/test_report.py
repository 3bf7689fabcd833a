"""The report: all questions with their frames in one file, whatever their text and media."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import row, write_jsonl, write_video_with_audio, write_wav
from PIL import Image

import data
from data import Example, Medium
from kit import report

EVIL = "</script><img src=x onerror=\"document.title='hit'\"> <!-- 'q' & \0 \ud800 😀 @DATA@"


class Page(html.parser.HTMLParser):
    """The elements of a page, its embedded JSON, and its strips as arrays {medium: (h, w, 3)}."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [(None, None)], {}
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads("".join(self.texts["script", "data"]))
        self.questions = {q["id"]: q for q in self.data["questions"]}
        css = re.findall(r"\.s(\d+)\{.*?base64,(.*?)\)", "".join(self.texts["style", None]))
        files = {int(i): io.BytesIO(base64.b64decode(jpeg)) for i, jpeg in css}
        self.strips = {i: np.asarray(Image.open(file)) for i, file in files.items()}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes).get("id")))

    def handle_data(self, text):
        self.texts.setdefault(self.tags[-1], []).append(text)

    def look(self, question, place=0):
        return self.data["media"][self.questions[question]["media"][place]]


def question(name, media=(), options=("red", "blue"), gold="A", category="goal", problem="Which?"):
    problem = "\n".join([problem, *(f"{chr(65 + i)}. {text}" for i, text in enumerate(options))])
    return Example(name, problem, options, gold, category, tuple(media), "", "")


def answer(name, text="<think> x </think> <answer> A </answer>", right=1.0, error="", **more):
    return {"problem_id": name, "completion": text, "accuracy": right, "error": error} | more


def save(path, records):
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(lines.replace("\\u2028", "\u2028"), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Media with what is known of them: frames that grow brighter by 2, and files that fail."""
    root = tmp_path_factory.mktemp("media")
    frames = np.arange(0, 200, 2, dtype="u1")[:, None, None, None].repeat(120, 1).repeat(240, 2)
    write_video_with_audio(root / "long.mp4", frames.repeat(3, 3), 4, 25, 440)
    small = frames[:9, :32, :64].repeat(3, 3)
    write_video_with_audio(root / "small.mp4", small, 4, 2, 440)
    Image.new("RGB", (900, 600), (200, 30, 30)).save(root / "red.png")
    write_wav(root / "tone.wav", 2.5)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


def write(path, examples, runs, frames=64, **how):
    report.write_report(path, "A run", examples, runs, frames, **how)
    return Page(path)


@pytest.mark.slow
def test_strips_are_the_frames_that_the_model_saw(media, tmp_path):
    """At most 64 of them, evenly chosen, with their times, and at most 96 pixels high; one strip
    for all questions about the same frames."""
    long, small = (Medium("video", str(media / f"{n}.mp4")) for n in ("long", "small"))
    part = long._replace(segment=(20.0, 22.0), num_frames=5)
    asked = [question(str(i), [m]) for i, m in enumerate([long, long, small, part])]
    page = write(tmp_path / "r.html", asked, {"a": [answer(e.id) for e in asked]}, 90)
    assert len(page.strips) == 3 and page.questions["0"]["media"] == page.questions["1"]["media"]
    for name, frames in (("0", 90), ("2", 90), ("3", 5)):
        look, strip = page.look(name), page.strips[page.questions[name]["media"][0]]
        seen, times = data.load_media(asked[int(name)].media[0], frames)
        chosen = data.frame_indices(len(seen), 64)
        assert len(look["times"]) == len(chosen) and look["of"] == len(seen)
        (h, w), n = (96, 192) if name != "2" else (32, 64), len(chosen)
        assert strip.shape == (h, n * w, 3) and (look["height"], look["width"]) == (h, w)
        cells = strip.reshape(h, n, w, 3).mean((0, 2, 3))
        np.testing.assert_allclose(cells, seen[chosen].mean((1, 2, 3)), atol=1.5)
        minutes = [60 * int(t[:2]) + float(t[3:]) for t in look["times"]]
        np.testing.assert_allclose(minutes, times[chosen], atol=0.051)
    assert page.look("3")["times"][0] == "00:20.0" and page.look("0")["of"] == 90


def test_every_kind_of_media_is_shown_or_says_why_not(media, tmp_path):
    kinds = {"tone.wav": "audio", "red.png": "image", "broken.mp4": "video", "gone.png": "image"}
    sets = {name: [Medium(kind, str(media / name))] for name, kind in kinds.items()}
    sets["all"] = [Medium("video", str(media / "small.mp4"), track=True)]
    sets["all"] += [sets["red.png"][0], sets["tone.wav"][0]]
    sets["text"] = []
    asked = [question(name, media) for name, media in sets.items()]
    asked.append(question("open", options=(), problem="How?\nA. is no option here"))
    page = write(tmp_path / "r.html", asked, {"a": [answer(e.id) for e in asked]})
    assert page.look("tone.wav") == {"name": "tone.wav", "kind": "audio", "seconds": 2.5}
    red = page.look("red.png")
    assert (red["height"], red["width"], red["times"], red["of"]) == (288, 432, [""], 1)
    (strip,) = (page.strips[i] for i in page.questions["red.png"]["media"])
    assert abs(strip.astype(int) - [200, 30, 30]).max() < 6
    for name, error in (("broken.mp4", "does not decode as video"), ("gone.png", "no such file")):
        assert name in page.look(name)["error"] and error in page.look(name)["error"]
        assert "times" not in page.look(name)
    assert page.questions["text"]["media"] == [] and len(page.strips) == 2
    text = page.questions["text"]  # its options are listed once
    assert (text["problem"], text["options"], text["gold"]) == ("Which?", ["red", "blue"], "A")
    assert page.questions["open"]["problem"] == "How?\nA. is no option here"
    assert [page.look("all", i)["kind"] for i in range(3)] == ["video", "image", "audio"]
    assert page.look("all")["sound"] and not red["sound"]


def test_verdict_and_change_of_every_pair_of_answers(tmp_path):
    """right, wrong, failed (not asked), and partly right: two values of it, one above the other."""
    kinds = {"right": 1.0, "wrong": 0.0, "failed": 0.0, "partly": 0.43, "partly more": 0.5}
    names = [f"{a}, {b}" for a in kinds for b in kinds]
    runs = {"old": [], "new": []}
    for name in names:
        for kind, records in zip(name.split(", "), runs.values()):
            error = "gone" if kind == "failed" else ""
            records.append(answer(name, right=kinds[kind], error=error))
    page = write(tmp_path / "r.html", [question(n) for n in names], runs)
    for name, q in page.questions.items():
        pair = name.split(", ")
        for kind, found in zip(pair, q["answers"], strict=True):
            assert found["verdict"] == kind.split()[0] and found["accuracy"] == kinds[kind]
            assert bool(found["error"]) == (kind == "failed")
        assert q["verdict"] == pair[1].split()[0]
        assert q["change"] == report.change(*[kinds[kind] for kind in pair])
    alone = write(tmp_path / "s.html", [question(n) for n in names], {"new": runs["new"]})
    assert {q["change"] for q in alone.questions.values()} == {""}


def test_an_answer_is_shown_in_its_parts_or_as_it_is():
    def shown(text, options=("red", "blue"), **more):
        return report.describe(question("q", options=options), answer("q", text, **more))

    found = shown("<think> I see\n it </think>\n <answer> (B) </answer>")
    parts = found["think"], found["answer"], found["raw"], found["chosen"]
    assert parts == ("I see\n it", "(B)", "", "B")
    two = "<think>x</think> <answer>A</answer> <answer>B"
    chosen = {"B": "B", "blue": "B", "maybe": None, "": None, "so <answer>A</answer>": "A"}
    for text, letter in (chosen | {two: "A", f"{two}</answer>": None}).items():
        found = shown(text)
        assert found["raw"] == text and found["think"] == found["answer"] == ""
        assert found["chosen"] == letter, text
    assert shown("7", options=())["chosen"] is None
    for right, lenient, told in ((0.0, 1.0, True), (0.4, 1.0, True), (1.0, 1.0, False)):
        assert shown("B", right=right, lenient=lenient)["lenient"] is told
    parts = {"reward": 0.43210987, "accuracy": 1.0, "tIoU": 0.25}
    assert shown("B", parts=parts)["parts"] == ["reward 0.432", "accuracy 1", "tIoU 0.25"]
    assert shown("B")["parts"] == [] and shown("B")["lenient"] is False


def test_no_text_becomes_a_part_of_the_page(media, tmp_path):
    """Whatever it holds: the page has the same elements as one of plain text, and gives the text
    back as it was."""
    pages = []
    for text in ("plain", EVIL):
        asked = [question(text, [Medium("image", f"/{text}.png")], (text, "b"), "A", text, text)]
        answers = [answer(text, f"<think>{text}</think> <answer>{text}</answer>", 0.0, text)]
        shown = {"pictures": {media / "red.png": text}, "text": text}
        report.write_report(tmp_path / "r.html", text, asked, {text: answers}, 8, **shown)
        pages.append(Page(tmp_path / "r.html"))
    assert pages[0].tags == pages[1].tags
    assert "".join(pages[1].texts["title", None]).strip() == EVIL.replace("\ud800", "\ufffd")
    page, q = pages[1].data, pages[1].questions[EVIL]
    assert page["title"] == page["text"] == page["runs"][0] == page["pictures"][0][1] == EVIL
    assert q["problem"] == q["category"] == q["options"][0] == EVIL
    assert q["answers"][0]["think"] == q["answers"][0]["answer"] == EVIL.strip()
    assert q["answers"][0]["error"] == EVIL and "no such file" in page["media"][0]["error"]


def test_the_page_needs_nothing_from_outside(media, tmp_path):
    asked = [question("1", [Medium("video", str(media / "small.mp4"))])]
    write(tmp_path / "r.html", asked, {"a": [answer("1")]}, pictures={media / "red.png": "red"})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|<link|fetch\(|XMLHttp|import ", text)
    assert set(re.findall(r"(?:url\(|src: \"|href=)(.{5})", text)) == {"data:"}
    shown = base64.b64decode(Page(tmp_path / "r.html").data["pictures"][0][0])
    assert shown == (media / "red.png").read_bytes()


def test_the_file_stays_within_its_limit_and_keeps_every_question(tmp_path, monkeypatch):
    """Strips are dealt out evenly over category, verdict and change; nothing more is decoded."""
    asked = []
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype="u1")
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        medium = Medium("image", str(tmp_path / f"{i}.png"))
        asked.append(question(str(i), [medium], category="rare" if i > 37 else "common"))
    answers = [answer(str(i), right=float(i % 10 > 0)) for i in range(40)]
    sizes, have, decoded, strip = {}, {}, [], report.strip
    monkeypatch.setattr(report, "strip", lambda *a: decoded.append(a) or strip(*a))
    for max_mb in (0.001, 0.12, 30):
        path = tmp_path / "r.html"
        page = write(path, asked, {"a": answers}, max_mb=max_mb)
        sizes[max_mb] = path.stat().st_size
        assert len(page.questions) == 40 and page.data["max_mb"] == max_mb
        have[max_mb] = [q for q in page.questions.values() if "times" in page.look(q["id"])]
        assert len(have[max_mb]) == len(page.strips) and len(decoded) <= len(page.strips) + 1
        decoded.clear()
    assert len(have[0.001]) == 0 and len(have[30]) == 40
    assert 0.08e6 < sizes[0.12] < 0.12e6 < sizes[30] and 4 <= len(have[0.12]) < 20
    groups = [(q["category"], q["verdict"]) for q in have[0.12]]
    assert set(groups) == {("rare", "right"), ("common", "right"), ("common", "wrong")}
    assert min(groups.count(group) for group in groups) >= 2


def test_answers_that_do_not_belong_together_are_refused(tmp_path):
    one, two = answer("1"), answer("2")
    for runs, message in (
        ({"a": [one], "b": [one, two]}, "question '2' is in b, but not in a"),
        ({"a": [one, two], "b": [one]}, "question '2' is in a, but not in b"),
        ({"a": [answer("3")]}, "question '3' is in a, but not in the rows"),
        ({"a": [one, one]}, "a: a question is answered twice"),
        ({"a": []}, "no answers"),
    ):
        with pytest.raises(data.DataError, match=message):
            write(tmp_path / "r.html", [question("1"), question("2")], runs)
    assert not (tmp_path / "r.html").exists()
    page = write(tmp_path / "r.html", [question("1"), question("2")], {"a": [two]})
    assert list(page.questions) == ["2"]  # rows that nobody was asked are not questions


@pytest.mark.slow
def test_the_command_line_writes_the_page_of_one_or_two_files(toy, tmp_path, capsys):
    rows = data.load_rows(str(toy / "test.jsonl"))
    said = [answer(e.id, "\u2028é") for e in rows]
    files = [save(tmp_path / name, said) for name in ("a.jsonl", "b.jsonl", "more/b.jsonl")]
    rest = ["--data", str(toy / "test.jsonl"), "--num_frames", "5"]
    rest += ["--out", str(tmp_path / "r.html"), "--title", "T"]
    for chosen, runs in ((files[:1], ["a"]), (files[:2], ["a", "b"]), (files[1:], files[1:])):
        report.main([*chosen, *rest])
        page = Page(tmp_path / "r.html")
        assert page.data["runs"] == runs and page.data["title"] == "T"
        assert str(tmp_path / "r.html") in capsys.readouterr().out
        assert list(page.questions) == [e.id for e in rows]
        assert page.data["frames"] == "5 frames a video"
        assert {s.shape for s in page.strips.values()} == {(32, 160, 3)}
        assert page.questions[rows[0].id]["answers"][0]["raw"] == "\u2028é"


@pytest.fixture
def rows(tmp_path):
    """A file of a good row, of the question "1", and a malformed one."""
    return str(write_jsonl(tmp_path / "rows.jsonl", [row(1)], end="{\n"))


def test_a_malformed_row_that_counted_as_wrong_is_a_question_of_the_page(rows, tmp_path):
    said = [answer("1"), answer(f"{rows}:2", "", 0.0, "not JSON")]
    argv = [save(tmp_path / "a.jsonl", said), "--data", rows, "--video_dir", str(tmp_path)]
    report.main([*argv, "--num_frames", "2", "--out", str(tmp_path / "r.html")])
    verdicts = {i: q["verdict"] for i, q in Page(tmp_path / "r.html").questions.items()}
    assert verdicts == {"1": "right", f"{rows}:2": "failed"}


def test_command_line_errors_are_one_line(rows, tmp_path):
    good = save(tmp_path / "good.jsonl", [answer("1")])
    strange = save(tmp_path / "strange.jsonl", [answer("x")])
    cases = [
        ([good] * 3, "give one or two files"),
        ([str(tmp_path / "no.jsonl")], "no.jsonl.*No such file"),
        ([strange], "question 'x' is in strange, but not in the rows"),
        ([good, "--out", str(tmp_path / "no/r.html")], "--out .*No such file"),
        ([good, "--max_mb", "x"], "--max_mb"),
    ]
    broken = ["{", "3", '{"problem_id": "x"}', "", json.dumps(answer("y", right=1.5))]
    for i, line in enumerate(broken):
        file = tmp_path / f"bad{i}.jsonl"
        file.write_text(f"{json.dumps(answer('x'))}\n{line}\n")
        cases.append(([str(file)], f"bad{i}.jsonl:2: not an answer that eval"))
    for argv, message in cases:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            report.main([*argv, "--data", rows, "--num_frames", "5"])


def test_text_is_legible_in_both_color_schemes():
    """Contrast of at least 4.5 (WCAG AA) on the page and on its cards."""

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(d * 2 for d in color[1:])
        rgb = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05

    colors = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", report.PAGE)
    assert len(colors) == 10
    for scheme in (1, 2):
        light = {color[0]: luminance(color[scheme]) for color in colors}
        for ground in ("paper", "card"):
            for name in light.keys() - {"paper", "card", "line"}:
                low, high = sorted((light[name], light[ground]))
                assert high / low >= 4.5, (name, ground)


# ------------------------------------------------------------------------------------ in a browser

DRIVE = r"""<script>addEventListener("load", () => {
  const out = {}, buttons = document.querySelectorAll("button"), name = e => e.ariaLabel.slice(9)
  const cards = () => [[...list.children].map(name).join(" "), location.hash, count.textContent]
  const chips = () => [...buttons].map(b => b.textContent + (b.ariaPressed === "true" ? "*" : ""))
  const press = (key, more, at = document.body) =>
    at.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true, ...more}))
  const say = text => { search.value = text; search.dispatchEvent(new Event("input")) }
  out.linked = [...cards(), ...chips()]
  const card = list.children[0], seen = selector => [...card.querySelectorAll(selector)]
  out.text = [card.textContent, document.title, document.images.length]
  out.options = seen("[type=A] li").map(li => li.textContent)
  out.runs = seen("section").map(s => [s.className, s.textContent])
  out.strips = seen(".strip").map(s => [s.ariaLabel, ...[0, 8].map(i => s.children[i].firstChild)
    .map(i => [i.clientWidth, i.clientHeight, getComputedStyle(i).imageRendering,
      getComputedStyle(i).backgroundImage.slice(0, 15), i.style.backgroundPosition, i.ariaLabel])])
  buttons[0].click(); buttons[5].click()
  out.all = cards()
  out.keys = ["j", "ArrowRight", "j", "k", "ArrowLeft"].map(key =>
    (press(key), name(document.activeElement)))
  press("j", {}, search); press("j", {ctrlKey: true})
  press("ArrowRight", {}, list.querySelector(".strip"))
  out.ignored = name(document.activeElement)
  const wraps = () => getComputedStyle(document.querySelector(".strip")).flexWrap
  out.whole = [wraps(), press("f"), wraps(), press("f"), wraps()]
  press("/")
  out.search = document.activeElement === search
  say("SQUARE  q1"); out.words = cards()
  say("verdict"); out.none = cards()
  say(""); buttons[6].click(); out.mended = [...cards(), ...chips()]
  history.replaceState(null, "", "#category=goal&verdict=right&words=q5"); onhashchange()
  out.back = [...cards(), search.value]
  go({words: "q12"}); out.partly = list.textContent
  out.table = [...document.querySelectorAll("tr")].map(row => row.textContent)
  go({}); out.first = list.children.length
  dispatchEvent(new Event("beforeprint")); out.printed = list.children.length
  const bytes = new TextEncoder().encode(JSON.stringify(out))
  document.documentElement.textContent = "OUT" + btoa(String.fromCharCode(...bytes)) + "OUT"
})</script>"""


@pytest.mark.slow
def test_filters_keys_search_and_strips_work_in_a_browser(media, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium here")
    small, long = (Medium("video", str(media / f"{name}.mp4")) for name in ("small", "long"))
    asked = [question(f"q{i}", [small], category=("plot", "goal")[i % 2]) for i in range(14)]
    asked[2] = question("q2", [small, long], ("red", EVIL), "B", "plot", EVIL)
    asked[11] = question("q11", category="goal", problem="Which square?")
    before = [answer(f"q{i}", right=float(i < 4)) for i in range(14)]
    after = [answer(f"q{i}", right=float(i in (0, 1, 4, 5))) for i in range(14)]
    before[2] = answer("q2", f"<think>{EVIL}</think> <answer>B</answer>", 1.0, tokens=7)
    after[2] = answer("q2", f"{EVIL} <answer>A</answer>", 0.0, lenient=1.0)
    after[13]["error"] = "gone"
    after[12] = answer("q12", right=0.43, tokens=9, parts={"reward": 0.5, "tIoU": 0.25})
    path, pictures = tmp_path / "r.html", {media / "red.png": EVIL}
    write(path, asked, {"old": before, "new": after}, 100, pictures=pictures, text=EVIL)
    path.write_text(path.read_text(encoding="utf-8") + DRIVE, encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-quic --disable-sync "
    options += "--disable-background-networking --disable-component-update --window-size=1280,900 "
    command = [browser, *options.split(), f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    command.append(f"{path.as_uri()}#verdict=wrong&change=broken")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    out = json.loads(base64.b64decode(done.stdout.split("OUT")[1]))

    # An address is a view; the number beside each filter is what choosing it would leave.
    numbers = "all2 right0 partly0 wrong2* failed0 "
    numbers += "all8 mended0 broken2* better0 both right0 both wrong6"
    chips = re.findall(r"[a-z ]+\d+\*?", f"{numbers} all2* goal1 plot1")
    assert out["linked"][:3] == ["q2 q3", "#verdict=wrong&change=broken", "2 of 14 questions"]
    assert out["linked"][3:] == [c.strip() for c in chips]
    # Text is text, however much it looks like something else.
    assert out["text"][0].count(EVIL) == 4 and out["text"][1:] == ["A run", 1]
    assert out["options"] == ["red chosen new", f"{EVIL} gold chosen old"]
    (old, first), (new, second) = out["runs"]
    assert old == "right" and first.startswith("old ✓ rightreasoning")
    assert first.endswith("7 tokens") and out["partly"].endswith(
        "9 tokens · reward 0.5 · tIoU 0.25"
    )
    assert "new ~ partly 0.43" in out["partly"] and out["table"][1] == "all1428.6\xa0%31.6\xa0%"
    assert new == "wrong" and second.startswith("new ✗ wrongright, but") and EVIL in second
    # 9 frames of 64 x 32 pixels are enlarged 3 times, 64 of 192 x 96 are not.
    (label, *cells), (many, *larger) = out["strips"]
    assert label == "9 frames of video small.mp4" and many == "64 of 100 frames of video long.mp4"
    assert cells[0] == [192, 96, "pixelated", 'url("data:image', "0% 0px", "frame at 00:00.0"]
    assert cells[1][4:] == ["100% 0px", "frame at 00:02.0"]
    assert larger[0][:3] == [192, 96, "auto"]
    # Filters, keys and words.
    ten = " ".join(f"q{i}" for i in range(10))
    assert out["all"] == [ten, "", "14 of 14 questions"]
    assert out["keys"] == ["q0", "q1", "q2", "q1", "q0"] and out["ignored"] == "q0"
    assert out["whole"] == ["nowrap", False, "wrap", False, "nowrap"] and out["search"]
    assert out["words"] == ["q11", "#words=SQUARE++q1", "1 of 14 questions"]
    assert out["none"][0] == "" and out["none"][2] == "0 of 14 questions"
    assert out["mended"][:3] == ["q4 q5", "#change=mended", "2 of 14 questions"]
    assert "all14" in out["mended"] and "mended2*" in out["mended"] and "goal1" in out["mended"]
    assert out["back"][0] == "q5" and out["back"][3] == "q5"
    assert out["first"] == 10 and out["printed"] == 14


# ------------------------------------------------------------------------------ table and pictures


def test_the_table_has_what_was_measured_and_says_what_was_trained_on():
    summary = {"questions": 4, "seed": 0, "seconds": {"total": 2.0}, "sft": {"accuracy": 0.5}}
    after = {"accuracy": 0.75, "by_category": {"goal": 0.75}, "by_frames": {"8": 0.25}}
    assert "guessing" not in report.table(summary)
    summary |= {"trained_on": 2, "grpo": after | {"wrong_video": 0.1}, "chance": 0.25}
    lines = [" ".join(line.split()) for line in report.table(summary).splitlines()]
    assert lines[0].startswith("accuracy on 4 questions, 2 of them TRAINED ON")
    rows = ["guessing 25.0 %", "before GRPO 50.0 %", "after GRPO 75.0 %", "goal 75.0 %"]
    rows += ["8 frames 25.0 %", "control: wrong video 10.0 %", "seconds: total 2"]
    assert lines[1:] == rows


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **how: seen.append(figure))
    return seen


def test_frames_are_plotted_with_the_controls_that_were_measured(figures):
    summary = {"questions": 4, "seed": 0, "sft": {"accuracy": 0.5}}
    summary["grpo"] = {"by_frames": {"8": 0.25, "16": 0.5}}
    for more, lines in (({}, 2), ({"chance": 0.25, "control": {"accuracy": 0.5}}, 4)):
        report.plot_frames(summary | more, "f.png")
        assert len(figures.pop().axes[0].lines) == lines


def test_the_mismatch_axis_has_labels_whatever_the_values(tmp_path, figures):
    names = [*report.PANELS, "mismatch_max"]
    for low, high in ((0.0, 0.0), (2e-7, 6e-7), (0.01, 4.0)):
        rows = [dict.fromkeys(names, low) | {"stage": "grpo", "step": i} for i in range(3)]
        rows[1]["mismatch_max"] = high
        report.plot_curves(save(tmp_path / "m.jsonl", rows), "c.png")
        axis = figures.pop().axes[4]
        bottom, top = axis.get_ylim()
        ticks = [t for t in axis.get_yticks() if bottom <= t <= top * (1 + 1e-9)]
        assert bottom == 0 and high <= top <= max(1e-6, 10 * high) and len(ticks) >= 3
        assert ticks[0] == 0 and np.isclose(ticks[-1], top)
        assert all(label.get_text() for label in axis.get_yticklabels())
