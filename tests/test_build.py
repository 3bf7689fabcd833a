"""Properties of building, against a stub of both servers on localhost and small real videos.

A test video tells which one it is by its color, and the time of a frame by the grey of its left
half. The stub reads both from the JPEGs that it is sent, so a frame of a wrong clip is seen. Its
replies hang on what is asked alone; `faults` says for which requests they are wrong, and how.
"""

import base64
import collections
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stub import Server, completion

from data import DataError, load_media, load_rows
from kit import build, chat
from kit.build import CATEGORIES
from kit.chat import ReplyError
from kit.toy import COLORS, write_mp4
from kit.work import read_lines

FPS = 4
NAMES = {  # color: (path, seconds); of every kind of ending some
    "red": ("red.mp4", 25),
    "green": ("sub/green.MKV", 30),
    "blue": ("sub/deep/blue.webm", 9),
    "yellow": ("yellow.avi", 19),
    "cyan": ("sub/cyan #1 \u00e9.mov", 31),
    "magenta": ("magenta.m4v", 2),
}
VIDEOS = {path: color for color, (path, _) in NAMES.items()}
CLIPS = {"red": 2, "green": 3, "blue": 1, "yellow": 2, "cyan": 3, "magenta": 1}
UNREADABLE = {"broken.mp4", "empty.webm"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for color, (name, seconds) in NAMES.items():
        n = seconds * FPS
        frames = np.empty((n, 48, 64, 3), np.uint8)
        frames[:] = COLORS[color]
        frames[:, :, :32] = np.linspace(0, 255, n, endpoint=False)[:, None, None, None]
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_mp4(str(root / name), frames, FPS)
    (root / "broken.mp4").write_bytes(b"no video" * 99)
    (root / "empty.webm").write_bytes(b"")
    (root / "notes.txt").write_text("no video either")
    return root


def good_draft(color, category, choice):
    """As the LLM writes it from captions."""
    right = f"right {color} {category}"
    thought = f"The caption of the first clip shows a {color} room, so {category}: {right}"
    draft = {"question": f"What about {color} {category}?", "answer": right, "reasoning": thought}
    wrong = [f"wrong {i} {color} {category}" for i in range(3)]
    return draft | {"options": [*wrong, right]} if choice else draft


def good_rewriting(answer):
    text = "At 0:05 the room is seen, and at 0:15 it is seen again, longer than before, "
    return {"reasoning": f"{text} with nothing else in it at all. The answer is: {answer}."}


class Stub(Server):
    """Both servers. log: (stage, color, part) of each request, part a clip's times or a category.
    faults {(stage, color, part): (to how many requests, text or (status, reply) or seconds to
    sleep)}; before: called with the number of a request."""

    def __init__(self):
        self.log, self.images, self.faults = [], {}, {}
        self.before, self.lock = lambda n: None, threading.Lock()
        super().__init__()

    def answer(self, body):
        what, text = self.read(body["messages"][0]["content"])
        with self.lock:
            self.log.append(what)
            number, nth = len(self.log), self.log.count(what)
        self.before(number)
        times, fault = self.faults.get(what, (0, None))
        if nth > times:
            return 200, completion(text)
        if isinstance(fault, float):
            time.sleep(fault)
        return fault if isinstance(fault, tuple) else (200, completion(fault))

    def read(self, content):
        """(stage, color, part), good reply of what is asked."""
        if isinstance(content, list):
            prompt, pictures = content[-1]["text"], []
            for part in content[:-1]:
                head, data = part["image_url"]["url"].split(",")
                assert (part["type"], head) == ("image_url", "data:image/jpeg;base64")
                picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                assert picture.format == "JPEG"
                pictures.append(np.asarray(picture).astype(float))
            half = pictures[0].shape[1] // 2
            seen = pictures[0][:, half + 2 :].mean((0, 1))
            color = min(COLORS, key=lambda c: np.abs(COLORS[c] - seen).sum())
            times = re.search(r"\d\d:\d\d-\d\d:\d\d", prompt)[0]
            greys = [p[:, : half - 2].mean() / 255 * NAMES[color][1] for p in pictures]
            self.images[color, times] = greys, pictures[0].shape, prompt
            return ("caption", color, times), f"A {color} room,\nfrom {times}."
        if content.startswith("This question"):
            color, category = re.search(r"What about (\w+) (\w+)\?", content).groups()
            answer = re.search(r"Answer: (.*)", content)[1]
            return ("rewrite", color, category), json.dumps(good_rewriting(answer))
        color = re.search(r"A (\w+) room", content)[1]
        category = next(c for c, about in CATEGORIES.items() if about in content)
        draft = good_draft(color, category, '"options"' in content)
        return ("draft", color, category), json.dumps(draft)


def always(fault):
    return sys.maxsize, fault


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.end()


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(chat, "time", SimpleNamespace(sleep=lambda seconds: None))


def command(videos, stub, out, *more):
    """As little parallel as asks two things at a time: each has a decoder, slow to start."""
    where = ["--videos", videos, "--llm", stub.url, "--captioner", stub.url, "--out", out]
    return [str(x) for x in [*where, "--clip_side", 32, "--parallel", 2, *more]]


def lost(out):
    return {line["key"]: line["lost"] for line in read_lines(out / "lost.jsonl")}


def rows_of(out):
    return read_lines(out / "sft.jsonl") + read_lines(out / "rl.jsonl")


def contents(out):
    """What must be the same after any way to the end."""
    return {path.name: path.read_bytes() for path in out.glob("*.jsonl")}


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """(out, stub) of a run without faults."""
    out, server = tmp_path_factory.mktemp("whole") / "out", Stub()
    build.main(command(videos, server, out))
    server.end()
    return out, server


@pytest.fixture
def go_on(whole, videos, stub, tmp_path):
    """go_on(options): the command in a folder, which it returns, where all clips have captions but
    those to forget, (color, number)."""
    out = tmp_path / "out"

    def run(*more, forget=()):
        if not out.exists():
            out.mkdir()
            gone = {f"{NAMES[color][0]}#{i:04}" for color, i in forget}
            for name in ("videos.jsonl", "lost.jsonl", "captions.jsonl"):
                lines = read_lines(whole[0] / name)
                write_jsonl(out / name, [line for line in lines if line.get("clip") not in gone])
        build.main(command(videos, stub, out, *more))
        return out

    return run


# ---------------------------------------------------------------------------- a whole run


def test_rows_are_what_training_reads(whole, videos):
    out, _ = whole
    sft, rl = (load_rows(str(out / name), str(videos)) for name in ("sft.jsonl", "rl.jsonl"))
    assert (len(sft), len(rl)) == (8, 16)
    keys = {(e.media[0].path, e.category) for e in sft + rl}
    assert keys == {(str(videos / path), name) for path in VIDEOS for name in CATEGORIES}
    assert not {e.media for e in sft} & {e.media for e in rl}
    assert len({e.id for e in sft + rl}) == 24
    for e in sft + rl:
        path = str(Path(e.media[0].path).relative_to(videos))
        right = f"right {VIDEOS[path]} {e.category}"
        assert e.problem.startswith(f"What about {VIDEOS[path]} {e.category}?")
        if e.options:
            assert sorted(e.options) == sorted(good_draft(VIDEOS[path], e.category, 1)["options"])
            assert e.options["ABCD".index(e.answer)] == right
        else:
            assert e.answer == right
        thought = good_rewriting(right)["reasoning"].replace("  ", " ")
        assert e.response == f"<think> {thought} </think> <answer> {e.answer} </answer>"
        assert len(load_media(e.media[0], 4)[0]) == 4
    assert 4 <= sum(bool(e.options) for e in sft + rl) <= 20
    for part in (sft, rl):
        assert [e.id for e in part] == sorted(e.id for e in part)


def test_the_captioner_sees_frames_of_its_clip(whole):
    images = whole[1].images
    assert collections.Counter(color for color, _ in images) == CLIPS
    for color, n in CLIPS.items():
        seconds = NAMES[color][1]
        own = sorted((span, rest) for (c, span), rest in images.items() if c == color)
        for i, (span, (greys, shape, prompt)) in enumerate(own):
            start, end = seconds * i / n, seconds * (i + 1) / n
            assert len(greys) == 8 and shape == (24, 32, 3) and np.all(np.diff(greys) > 0)
            # the first frame of the clip is its first, the last its last, but for compression
            assert abs(greys[0] - start) < 0.5 and abs(greys[-1] - (end - 1 / FPS)) < 0.5
            assert span == f"00:{round(start):02}-00:{round(end):02}" and "8 frames" in prompt


def test_the_llm_reads_all_captions_with_their_times_in_order(whole):
    prompts = [body["messages"][0]["content"] for _, body, _ in whole[1].asked]
    drafts = [p for p in prompts if isinstance(p, str) and p.startswith("Here are captions")]
    assert len(drafts) == 24
    for prompt in drafts:
        color = re.search(r"A (\w+) room", prompt)[1]
        n, seconds = CLIPS[color], NAMES[color][1]
        cuts = [f"00:{round(seconds * i / n):02}" for i in range(n + 1)]
        spans = [f"{a}-{b}" for a, b in itertools.pairwise(cuts)]
        assert "\n".join(f"[{s}] A {color} room, from {s}." for s in spans) in prompt
        assert sum(about in prompt for about in CATEGORIES.values()) == 1
        assert (build.CHOICE in prompt) == ('"options"' in prompt) == (build.OPEN not in prompt)
    assert {body["temperature"] for _, body, _ in whole[1].asked} == {0.6}
    near = [re.search(r"seen near (\d\d):(\d\d) plays", p).groups() for p in drafts]
    assert len(set(near)) > 5 and {m for m, _ in near} == {"00"} and max(near)[1] <= "31"
    rewritings = [p for p in prompts if isinstance(p, str) and p not in drafts]
    assert len(rewritings) == 24 and all("Reasoning: The caption of" in p for p in rewritings)
    choices = [p for p in rewritings if "\n- wrong 1" in p]
    assert 0 < len(choices) < 24 and all("\n- right" in p for p in choices)


def test_a_finished_run_asks_nothing_and_writes_the_same(whole, videos, stub, capsys):
    """Also under other settings of those that change no row."""
    out, _ = whole
    before = contents(out)
    more = "--tries 2 --parallel 3 --timeout 9 --max_tokens 99 --llm_model stub".split()
    build.main(command(videos, stub, out, *more))
    assert stub.log == [] and contents(out) == before
    reasons = lost(out)
    assert reasons.keys() == UNREADABLE
    assert "does not decode" in reasons["broken.mp4"] and "is empty" in reasons["empty.webm"]
    said = capsys.readouterr().out
    assert "videos 6 of 8, clips 12 of 12" in said and "rows 24 of 24" in said
    assert "{'goal': 6, 'plot': 6, 'spatial': 6, 'temporal': 6}" in said and "lost 2 (" in said
    assert re.search(r"\n +1 the file is empty", said)
    assert re.search(r"\n +1 does not decode as video", said)


@pytest.mark.parametrize("share", [0, 1])
def test_the_share_of_open_ended_questions(share, go_on):
    rows = rows_of(go_on("--open", share, "--categories", "plot", "goal", "--questions", 2))
    assert len(rows) == 24 and {row["problem_type"] for row in rows} == {"plot", "goal"}
    assert all(("\nA. " in row["problem"]) == (share == 0) for row in rows)


def test_hashed_shares_are_uniform():
    found = [build.share("form", f"v{i}.mp4#goal-0") for i in range(2000)]
    assert abs(np.mean(found) - 0.5) < 0.03 and abs(np.mean(np.array(found) < 0.2) - 0.2) < 0.03


# -------------------------------------------------------------------- replies and their checks

DRAFT = {
    "question": "Which box does the man open last?",
    "options": ["the red box", "the blue box", "the green box", "no box"],
    "answer": "the blue box",
    "reasoning": "In the last clip he opens the blue box.",
}
TEXT = json.dumps(DRAFT)


@pytest.mark.parametrize(
    "reply",
    [
        TEXT,
        f"```json\n{json.dumps(DRAFT, indent=2)}\n```",
        f'<think> Maybe {{\'a\': 1}} or {{"question": "no"}} </think>\n{TEXT}',
        f"It is {{as asked}}:\n{TEXT}\nShall I go on? {{}}",
        f'still thinking {{"question": "no"}} </think> {TEXT}',
        '{"note": [1]} ' + TEXT,
        TEXT.replace("man open", "man\\nopen").replace("\\n", " "),
        TEXT.replace("opens the blue", "opens\nthe blue"),
        TEXT.replace('"the blue box", "rea', '"The Blue box.", "rea'),
        TEXT.replace("the red box", "the  red\\tbox \\ud800"),
    ],
)
def test_replies_are_read_tolerantly(reply):
    found = build.parse_draft(reply, "key", True)
    assert set(found.pop("options")) == set(DRAFT["options"])
    assert found == {k: v for k, v in DRAFT.items() if k != "options"}


def test_the_right_letter_is_uniform_and_hangs_on_the_key_alone():
    places = []
    for i in range(400):
        found = build.parse_draft(TEXT, f"v#{i}", True)
        mixed = DRAFT | {"options": DRAFT["options"][::-1]}
        assert build.parse_draft(json.dumps(mixed), f"v#{i}", True) == found
        places.append(found["options"].index("the blue box"))
    assert min(collections.Counter(places)[i] for i in range(4)) > 75


REFUSED = {  # reason: what an LLM may have put in place of DRAFT's fields
    "question is missing": [{"question": x} for x in (None, "  ", "?!", 7)],
    "several lines": [{"question": "Which?\nA man"}],
    "holds options": [{"question": "Which? A. red B. blue"}],
    "option letters": [{"question": "Which? (A) red (B) blue"}],
    "speaks of its source: transcript": [{"question": "What does the transcript say?"}],
    "speaks of its source: Clip": [{"question": "Who is in the second Clip?"}],
    "holds a tag: <image>": [{"question": "Who is <image> here?"}],
    "number of options": [
        *({"options": x} for x in (None, "the blue box", ["the blue box"])),
        {"options": [*map(str, range(8)), "the blue box"]},
    ],
    "option is missing": [{"options": ["the blue box", *x]} for x in ([2, 3, 4], ["", "a", "b"])],
    "options are the same": [{"options": ["the blue box", "The blue  box.", "a", "b"]}],
    "speaks of its source: caption": [{"options": ["the blue box", "a caption", "a", "b"]}],
    "option letters: A. ": [{"options": ["A. red", "the blue box", "c", "d"]}],
    "none of the options": [{"options": ["a", "b", "c", "d"]}, {"answer": "B"}],
    "answer is missing": [{"answer": None}],
    "reasoning is missing": [{"reasoning": ""}, {"reasoning": ["a"]}],
}
REFUSED_OPEN = {
    "question is missing": [{"question": "?!"}],
    "holds a tag: <answer>": [{"answer": "a <answer> tag"}],
    "speaks of its source: caption": [{"answer": "as the caption says"}],
    "number of options": [{"options": DRAFT["options"]}],
}


@pytest.mark.parametrize("choice, refused", [(True, REFUSED), (False, REFUSED_OPEN)])
def test_drafts_are_refused_by_name(choice, refused):
    for reason, changes in refused.items():
        for change in changes:
            changed = DRAFT | ({} if choice else {"options": []}) | change
            with pytest.raises(ReplyError, match=re.escape(reason)):
                build.parse_draft(json.dumps(changed), "key", choice)
            for field in change if choice else ():  # nor without it
                del changed[field]
                with pytest.raises(ReplyError):
                    build.parse_draft(json.dumps(changed), "key", choice)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        TEXT[:-1],
        "{" * 5000,
        "[" * 9999,
        '{"a":' * 1500,
        f"<think> {TEXT} </think>",
    ],
)
def test_replies_without_the_object_are_refused(text):
    with pytest.raises(ReplyError, match="no JSON object with a question"):
        build.parse_draft(text, "key", True)


LONG = "At 0:05 the man opens the red box, at 0:15 the green one, at 0:25 he carries the blue one."
END = "The answer is: the blue box."
PLACE = {"draft": "v.mp4#goal-0", "video": "v.mp4", "category": "goal"}
KEPT = PLACE | build.parse_draft(TEXT, "v.mp4#goal-0", True)


def rewritten(text, draft=KEPT):
    return build.parse_rewritten(json.dumps({"reasoning": text}), draft)


def test_a_rewriting_becomes_a_row():
    row = rewritten(f'{LONG}\n"The answer is: The blue box."')
    letter = "ABCD"[KEPT["options"].index("the blue box")]
    assert row["answer"] == f"<answer>{letter}</answer>" and row["videos"] == "v.mp4"
    listed = [f"{letter}. {option}" for letter, option in zip("ABCD", KEPT["options"])]
    assert row["problem"].splitlines() == [DRAFT["question"], *listed]
    row = rewritten(f"{LONG} The answer is: 3.5 km.", KEPT | {"options": [], "answer": "3.5 km"})
    assert row["answer"] == "<answer>3.5 km</answer>" and row["problem"] == DRAFT["question"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"{LONG} The answer is: the red box.", "does not end with the answer"),
        (f"{LONG} The answer is: not the blue box.", "does not end with the answer"),
        (f"{END} {LONG}", "does not end with the answer"),
        (f"He opens it. {END}", "fewer than 20 words"),
        (f"In the caption, {LONG} {END}", "speaks of its source: caption"),
        (f"Captioned. {LONG} {END}", "speaks of its source: Captioned"),
        (f"By the description, {LONG} {END}", "speaks of its source: description"),
        (f"{LONG} Not option A. {END}", "option letters: option A"),
        (f"{LONG} So (B) it is. {END}", "option letters:  .B."),
        (f"{LONG} </think> {END}", "no JSON"),
        (f"{LONG} <answer> {END}", "holds a tag: <answer>"),
        ("", "reasoning is missing"),
        (None, "reasoning is missing"),
    ],
)
def test_rewritings_are_refused_by_name(text, reason):
    with pytest.raises(ReplyError, match=reason):
        rewritten(text)


def test_a_row_that_data_py_refuses_is_no_row():
    with pytest.raises(DataError, match="field 'videos'"):
        rewritten(f"{LONG} {END}", KEPT | {"video": ""})


@pytest.mark.parametrize("text", ["an eclipse", "clipped, clipboard", "Option: Alaska", "(Alice)"])
def test_words_that_only_look_like_forbidden_ones_pass(text):
    assert build.one_line(text, "answer") == text


# ------------------------------------------------------------------- what goes wrong on the way

FAULTS = {  # reason: stage, and what the server answers
    "no JSON object": ("draft", "Here you are."),
    "the reply is empty": ("draft", " \n"),
    "the reply is cut off": ("draft", (200, completion(TEXT, "length"))),
    "the server answers 400": ("draft", (400, b"too long")),
    "no reply within": ("draft", 1.0),
    "the answer is none": ("draft", json.dumps(good_draft("red", "plot", 1) | {"answer": "?1"})),
    "two options are": ("draft", json.dumps(good_draft("red", "plot", 1) | {"options": [*"aaa"]})),
    "the reasoning speaks": ("rewrite", json.dumps({"reasoning": f"As the caption says, {LONG}"})),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_reply_is_asked_again_then_lost(reason, stub, go_on, capsys):
    stage, fault = FAULTS[reason]
    stub.faults = {(stage, "red", "plot"): always(fault), (stage, "cyan", "plot"): (1, fault)}
    out = go_on("--timeout", 0.4, "--categories", "plot", "--open", 0)
    asked = collections.Counter(stub.log)
    assert asked[stage, "red", "plot"] == 3 and asked[stage, "cyan", "plot"] == 2
    if stage == "rewrite":  # of the same draft
        assert asked["draft", "red", "plot"] == asked["draft", "cyan", "plot"] == 1
    assert lost(out).keys() == UNREADABLE | {"red.mp4#plot-0"}
    assert lost(out)["red.mp4#plot-0"].startswith(reason)
    assert {VIDEOS[row["videos"]] for row in rows_of(out)} == set(NAMES) - {"red"}
    assert reason in capsys.readouterr().out


def test_a_video_is_lost_with_more_than_half_of_its_clips(stub, go_on):
    """And stays lost, without another question."""
    no, empty = always("I'm sorry, but I cannot describe people."), always("")
    stub.faults = {
        ("caption", "red", "00:00-00:12"): no,  # 1 of 2
        ("caption", "green", "00:10-00:20"): empty,  # 1 of 3
        ("caption", "blue", "00:00-00:09"): no,  # 1 of 1
        ("caption", "cyan", "00:00-00:10"): empty,
        ("caption", "cyan", "00:21-00:31"): empty,  # 2 of 3
    }
    clips = [("red", 0), ("green", 1), ("blue", 0), ("cyan", 0), ("cyan", 2)]
    out = go_on(forget=clips)
    found = lost(out)
    cyan, blue = NAMES["cyan"][0], NAMES["blue"][0]
    keys = {f"{NAMES[color][0]}#000{i}" for color, i in clips}
    assert found.keys() == UNREADABLE | {cyan, blue} | keys
    assert "more than half" in found[cyan] and found["red.mp4#0000"].startswith("the captioner ref")
    assert found[f"{cyan}#0000"] == "the reply is empty"
    asked = collections.Counter(stub.log)
    assert asked["caption", "red", "00:00-00:12"] == 3
    assert {color for stage, color, _ in asked if stage == "draft"} == set(NAMES) - {"cyan", "blue"}
    prompts = [body["messages"][0]["content"] for _, body, _ in stub.asked]
    green = [p for p in prompts if "A green room" in p and p.startswith("Here")]
    assert green and all("[00:20-00:30]" in p and "[00:10-00:20]" not in p for p in green)
    before, n = contents(out), len(stub.log)
    go_on()
    assert contents(out) == before and len(stub.log) == n


def test_a_run_without_rows_is_an_error(stub, go_on):
    stub.faults = {("draft", color, "goal"): always("no") for color in NAMES}
    with pytest.raises(SystemExit, match="error: not one row was made; .*lost.jsonl says why"):
        go_on("--categories", "goal")


def test_every_clip_has_a_frame_and_one_frame_is_no_video(stub, tmp_path):
    for name, n in (("four.mp4", 4), ("one.mp4", 1)):
        frames = np.full((n, 48, 64, 3), COLORS["magenta"], np.uint8)
        write_mp4(str(tmp_path / name), frames, FPS)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / os.fsdecode(b"not utf-8 \xff.mp4")).write_bytes(b"x")
    out = tmp_path / "out"
    build.main(command(tmp_path, stub, out, "--clip_seconds", 0.01, "--parallel", 1))
    reasons = lost(out)
    assert reasons.pop("one.mp4") == "a video of one frame"
    assert list(reasons) == [os.fsdecode(b"not utf-8 \xff.mp4")]
    keys = [line["clip"] for line in read_lines(out / "captions.jsonl")]
    assert keys == [f"four.mp4#000{i}" for i in range(4)]


def test_lost_things_are_asked_for_only_with_retry_lost(stub, whole, go_on):
    stub.faults = {("draft", "red", "goal"): always("no"), ("rewrite", "cyan", "plot"): always("")}
    stub.faults |= {("caption", "blue", "00:00-00:09"): always("")}
    out = go_on(forget=[("blue", 0)])
    assert len(lost(out)) == 2 + 4
    stub.faults, stub.log[:] = {}, []
    go_on()
    assert stub.log == [] and len(lost(out)) == 6
    go_on("--retry_lost")
    blue = [(stage, "blue", c) for stage in ("draft", "rewrite") for c in CATEGORIES]
    assert sorted(stub.log) == sorted(
        [("draft", "red", "goal"), ("rewrite", "red", "goal"), ("rewrite", "cyan", "plot")]
        + [("caption", "blue", "00:00-00:09"), *blue]
    )
    assert contents(out) == contents(whole[0])


def test_a_server_that_refuses_us_ends_the_run_and_the_next_goes_on(stub, whole, go_on, tmp_path):
    stub.faults = {("draft", "red", "goal"): always((401, b"wrong key"))}
    with pytest.raises(SystemExit, match="^error: .*wrong key; the same command goes on where it"):
        go_on("--parallel", "1")
    before = [key for key in stub.log if key != ("draft", "red", "goal")]
    assert before and not (tmp_path / "out/sft.jsonl").exists()
    assert lost(tmp_path / "out").keys() == UNREADABLE
    stub.faults = {}
    out = go_on()
    assert all(stub.log.count(key) == 1 for key in before)
    assert contents(out) == contents(whole[0])


# ------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--videos": "/no/where"}, "error: --videos /no/where: no such folder"),
        ({"--llm": "http://127.0.0.1:9/v1"}, "error: http://127.0.0.1:9/v1/models: .*refused"),
        ({"--captioner": "localhost"}, "error: localhost/models: .*unknown url type"),
        ({"--captioner": "{url}/v2"}, "error: .*404"),
        ({"--videos": "{empty}"}, "error: --videos .*: no file ends in .mp4, .mkv"),
        ({"--question": "1"}, "^error: Unrecognized options: --question.*meant --questions"),
        ({"--questions": "0"}, "^error: .*questions must be above 0, not 0"),
        ({"--clip_seconds": "nan"}, "^error: .*clip_seconds must be above 0, not nan"),
        ({"--tries": "-1"}, "^error: .*tries must be above 0, not -1"),
        ({"--open": "1.5"}, "^error: .*open must be a share from 0 to 1, not 1.5"),
        ({"--open": "nan"}, "^error: .*open must be a share from 0 to 1, not nan"),
        ({"--categories": "history"}, "^error: .*categories must be of temporal, .*not 'history'"),
        (dict.fromkeys(["--videos", "--llm", "--captioner"]), "Missing .*videos.*llm.*captioner"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(change, message, videos, stub, tmp_path):
    (tmp_path / "empty").mkdir()
    given = {"--videos": videos, "--llm": stub.url, "--captioner": stub.url}
    given |= {"--out": tmp_path / "out"} | change
    argv = [str(x) for name, x in given.items() if x is not None for x in (name, x)]
    with pytest.raises(SystemExit, match=message) as said:
        build.main([x.format(url=stub.url, empty=tmp_path / "empty") for x in argv])
    assert "\n" not in str(said.value)
    assert stub.log == [] and not (tmp_path / "out").exists()


OTHER = """clip_seconds=5 clip_frames=4 clip_side=64 categories=goal questions=2 open=0.4
llm_model=other captioner_model=other videos=COPY prompts"""


@pytest.mark.parametrize("other", OTHER.split())
def test_other_settings_in_a_folder_are_refused(other, whole, videos, stub, tmp_path, monkeypatch):
    out, _ = whole
    before = contents(out)
    (tmp_path / "v.mp4").write_bytes(b"")
    more = [f"--{other}".replace("COPY", str(tmp_path))]
    if other == "prompts":
        monkeypatch.setattr(build, "OPEN", "Another form.")
        more = []
    name = other.partition("=")[0]
    with pytest.raises(SystemExit, match=rf"other settings \({name} was .*, now .*another --out"):
        build.main(command(videos, stub, out, *more))
    assert stub.log == [] and contents(out) == before


# -------------------------------------------------------------------------- killed and resumed


def start(argv):
    """The command in a process of its own."""
    root = Path(build.__file__).parents[1]
    run = [sys.executable, "-m", "kit.build", *argv]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    how["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    # Who runs the tests in the background has Ctrl-C ignored, for all children too.
    how["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(run, cwd=root, **how)


@pytest.mark.slow
def test_a_run_that_is_often_killed_ends_like_another(videos, whole, stub, tmp_path):
    """In the middle of captions, drafts and rewritings; what was being asked is asked again."""
    for at in (8, 24, 48):
        run = start(command(videos, stub, tmp_path, "--parallel", 3))
        stub.before = lambda n, at=at, run=run: n == at and run.kill()
        assert run.wait(200) == -signal.SIGKILL, run.stderr.read()
    stub.before = lambda n: None
    build.main(command(videos, stub, tmp_path))
    asked = collections.Counter(stub.log)
    assert len(asked) == 12 + 24 + 24 and asked.total() <= len(asked) + 3 * 3
    assert contents(tmp_path) == contents(whole[0])


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(videos, stub, tmp_path):
    run = start(command(videos, stub, tmp_path))
    stub.before = lambda n: run.send_signal(signal.SIGINT) if n == 5 else None
    stub.faults = {("caption", "red", "00:00-00:12"): always(300.0)}  # nobody waits for this one
    said = run.communicate(timeout=200)[1]
    assert run.returncode == 130
    assert said.endswith("\nerror: interrupted; the same command goes on where it stopped\n")
    assert "Traceback" not in said


# ---------------------------------------------------------------------------------- the split


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.randoms())
def test_the_split_is_as_near_as_whole_videos_in_hash_order_allow(counts, random):
    rows = [{"videos": f"{i}.mp4"} for i, n in enumerate(counts) for _ in range(n)]
    random.shuffle(rows)
    chosen = build.sft_videos(rows)
    order = sorted({row["videos"] for row in rows}, key=build.digest)
    assert chosen == set(order[: len(chosen)])
    sizes = [sum(r["videos"] in order[:n] for r in rows) for n in range(len(order) + 1)]
    assert abs(sizes[len(chosen)] - len(rows) / 3) == min(abs(s - len(rows) / 3) for s in sizes)
