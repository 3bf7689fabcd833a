"""Properties of build.py, against a stub of both servers on localhost and small real videos.

A test video tells which one it is by its color, and the time of a frame by the grey of its left
half. The stub reads both from the JPEGs that it is sent, so a frame of a wrong clip is seen. Its
replies hang on what is asked alone; `faults` says for which requests they are wrong, and how.
"""

import base64
import collections
import http.server
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError, load_media, load_rows
from kit import build, chat
from kit.build import CATEGORIES, Folder
from kit.chat import Chat, ReplyError, ServerError
from kit.toy import COLORS, write_mp4

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


def reasoning(color, category, ending):
    """As the LLM writes it first, from captions."""
    return f"The caption of the first clip shows a {color} room, so {category}: {ending}"


def good_draft(color, category, choice):
    right = f"right {color} {category}"
    options = [f"wrong {i} {color} {category}" for i in range(3)] + [right]
    found = {"question": f"What about {color} {category}?", "answer": right}
    return (
        found
        | {"reasoning": reasoning(color, category, right)}
        | ({"options": options} if choice else {})
    )


def good_rewriting(answer):
    text = "At 0:05 the room is seen, and at 0:15 it is seen again, longer than before, "
    return {"reasoning": f"{text} with nothing else in it at all. The answer is: {answer}."}


class Stub(http.server.ThreadingHTTPServer):
    """Both servers. log: (stage, color, part) of each request, part a clip's times or a category.
    faults {(stage, color, part): function(number of the request, good text) -> text, or
    (status, text), or seconds to sleep}; before: called with the number of a request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.bodies, self.images, self.keys = [], [], {}, set()
        self.faults, self.before, self.after = {}, lambda n: None, lambda n: None
        self.lock, self.problems, self.models = threading.Lock(), [], ["stub", "other"]
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            self.problems.append(repr(sys.exc_info()[1]))

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
        choice = '"options"' in content
        return ("draft", color, category), json.dumps(good_draft(color, category, choice))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        listed = {"data": [{"id": name} for name in self.server.models]}
        self.send(200, json.dumps(listed).encode())

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        stub, length = self.server, int(self.headers["Content-Length"])
        if len(body := self.rfile.read(length)) < length:
            return  # the client was killed as it asked
        body = json.loads(body)
        what, text = stub.read(body["messages"][0]["content"])
        with stub.lock:
            stub.log.append(what)
            stub.bodies.append(body)
            stub.keys.add(self.headers["Authorization"])
            number, nth = len(stub.log), stub.log.count(what)
        stub.before(number)
        fault = stub.faults.get(what, lambda n, text: text)(nth, text)
        status, end = 200, "stop"
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, tuple):
            status, text = fault
        else:
            text = fault
        if status == "length":
            status, end = 200, "length"
        reply = {"choices": [{"message": {"content": text}, "finish_reason": end}]}
        self.send(status, json.dumps(reply).encode() if status == 200 else text.encode())
        stub.after(number)


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()
    assert not server.problems


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    slept = []
    monkeypatch.setattr(chat, "time", SimpleNamespace(sleep=slept.append))
    return slept


def options(videos, stub, out, *more):
    where = ["--videos", videos, "--llm", stub.url, "--captioner", stub.url, "--out", out]
    return [str(x) for x in [*where, *more]]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def lost(out):
    return {line["lost"]: line["reason"] for line in lines(out / "lost.jsonl")}


def files(out):
    """What must be the same after any way to the end: bytes of the rows, the set of the lost."""
    return [(out / name).read_bytes() for name in ("sft.jsonl", "rl.jsonl")], lost(out)


# ---------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """(out, stub) of a run without faults."""
    out, server = tmp_path_factory.mktemp("whole") / "out", Stub()
    build.main(options(videos, server, out, "--clip_side", 32))
    server.shutdown()
    assert not server.problems
    return out, server


def test_rows_are_what_training_reads(whole, videos):
    out, _ = whole
    sft, rl = (load_rows(str(out / name), str(videos)) for name in ("sft.jsonl", "rl.jsonl"))
    assert (len(sft), len(rl)) == (8, 16)
    keys = [(e.media[0].path, e.category) for e in sft + rl]
    assert sorted(keys) == sorted(
        (str(videos / path), category) for path in VIDEOS for category in CATEGORIES
    )
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
    for name in ("sft.jsonl", "rl.jsonl"):
        ids = [row["problem_id"] for row in lines(out / name)]
        assert ids == sorted(ids)


def test_videos_that_do_not_decode_are_lost_with_their_reason(whole):
    reasons = lost(whole[0])
    assert set(reasons) == {"broken.mp4", "empty.webm"}
    assert "does not decode" in reasons["broken.mp4"] and "is empty" in reasons["empty.webm"]


def test_the_captioner_sees_frames_of_its_clip(whole):
    images = whole[1].images
    assert collections.Counter(color for color, _ in images) == CLIPS
    for color, n in CLIPS.items():
        seconds, starts = NAMES[color][1], []
        own = sorted((span, rest) for (c, span), rest in images.items() if c == color)
        for i, (span, (greys, shape, prompt)) in enumerate(own):
            start, end = seconds * i / n, seconds * (i + 1) / n
            assert len(greys) == 8 and shape == (24, 32, 3)
            assert np.all(np.diff(greys) > 0)
            # the first frame of the clip is its first, the last its last, but for compression
            assert abs(greys[0] - start) < 0.5 and abs(greys[-1] - (end - 1 / FPS)) < 0.5
            assert span == f"00:{round(start):02}-00:{round(end):02}" and "8 frames" in prompt
            starts.append(start)


def test_the_llm_reads_all_captions_with_their_times_in_order(whole):
    prompts = [b["messages"][0]["content"] for b in whole[1].bodies]
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
    assert {b["temperature"] for b in whole[1].bodies} == {0.6}
    near = [re.search(r"seen near (\d\d):(\d\d) plays", p).groups() for p in drafts]
    assert len(set(near)) > 5 and {m for m, _ in near} == {"00"} and max(near)[1] <= "31"
    rewritings = [p for p in prompts if isinstance(p, str) and p not in drafts]
    assert len(rewritings) == 24 and all("Reasoning: The caption of" in p for p in rewritings)
    choices = [p for p in rewritings if "\n- wrong 1" in p]
    assert 0 < len(choices) < 24 and all("\n- right" in p for p in choices)


def test_a_finished_run_asks_nothing_and_writes_the_same(whole, videos, stub, capsys):
    out, _ = whole
    before = files(out)
    build.main(options(videos, stub, out, "--clip_side", 32))
    assert stub.log == [] and files(out) == before
    said = capsys.readouterr().out
    assert "videos 6 of 8, clips 12 of 12" in said and "rows 24 of 24" in said
    assert "{'goal': 6, 'plot': 6, 'spatial': 6, 'temporal': 6}" in said and "lost 2 (" in said
    assert re.search(r"\n +1 the file is empty", said)
    assert re.search(r"\n +1 does not decode as video", said)


@pytest.mark.parametrize("share", [0, 1])
def test_the_share_of_open_ended_questions(share, videos, stub, tmp_path):
    more = ("--open", share, "--categories", "plot", "goal", "--questions", 2)
    build.main(options(videos, stub, tmp_path, *more))
    rows = lines(tmp_path / "sft.jsonl") + lines(tmp_path / "rl.jsonl")
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


@pytest.mark.parametrize(
    "change, choice, reason",
    [
        ({"question": None}, True, "question is missing"),
        ({"question": "  "}, True, "question is missing"),
        ({"question": "?!"}, False, "question is missing"),
        ({"question": 7}, False, "question is missing"),
        ({"question": "Which?\nA man"}, True, "several lines"),
        ({"question": "Which? A. red B. blue"}, True, "holds options"),
        ({"question": "Which? (A) red (B) blue"}, True, "option letters"),
        ({"question": "What does the transcript say?"}, True, "speaks of its source: transcript"),
        ({"question": "Who is in the second Clip?"}, True, "speaks of its source: Clip"),
        ({"question": "Who is <image> here?"}, True, "holds a tag: <image>"),
        ({"options": None}, True, "number of options"),
        ({"options": "the blue box"}, True, "number of options"),
        ({"options": ["the blue box"]}, True, "number of options"),
        ({"options": [*map(str, range(8)), "the blue box"]}, True, "number of options"),
        ({"options": ["the blue box", 2, 3, 4]}, True, "option is missing"),
        ({"options": ["the blue box", "", "a", "b"]}, True, "option is missing"),
        ({"options": ["the blue box", "The blue  box.", "a", "b"]}, True, "options are the same"),
        ({"options": ["the blue box", "a caption", "a", "b"]}, True, "speaks of its source"),
        ({"options": ["A. red", "the blue box", "c", "d"]}, True, "option letters"),
        ({"options": ["a", "b", "c", "d"]}, True, "none of the options"),
        ({"answer": None}, True, "answer is missing"),
        ({"answer": "B"}, True, "none of the options"),
        ({"answer": "a <answer> tag"}, False, "holds a tag"),
        ({"answer": "as the caption says"}, False, "speaks of its source"),
        ({}, False, "number of options"),
        ({"reasoning": ""}, True, "reasoning is missing"),
        ({"reasoning": ["a"]}, True, "reasoning is missing"),
    ],
)
def test_drafts_are_refused_by_name(change, choice, reason):
    changed = DRAFT | ({} if choice or not change else {"options": []}) | change
    with pytest.raises(ReplyError, match=re.escape(reason)):
        build.parse_draft(json.dumps(changed), "key", choice)
    for field in change:
        if field != "options" or choice:
            fewer = {k: v for k, v in changed.items() if k != field}
            with pytest.raises(ReplyError):
                build.parse_draft(json.dumps(fewer), "key", choice)


@pytest.mark.parametrize("reply", ["", "I cannot.", "{}", "[1]", TEXT[:-1], "{" * 5000, "[" * 9999,
                                   '{"a":' * 5000, f"<think> {TEXT} </think>"])  # fmt: skip
def test_replies_without_the_object_are_refused(reply):
    with pytest.raises(ReplyError, match="no JSON object with a question"):
        build.parse_draft(reply, "key", True)


LONG = "At 0:05 the man opens the red box, at 0:15 the green one, at 0:25 he carries the blue one."
KEPT = build.parse_draft(TEXT, "v.mp4#goal-0", True) | {
    "draft": "v.mp4#goal-0", "video": "v.mp4", "category": "goal",
}  # fmt: skip


def test_a_rewriting_becomes_a_row():
    reply = {"reasoning": f"{LONG}\n**The answer is: The blue box.**"}
    reply["reasoning"] = reply["reasoning"].replace("**", '"')
    row = build.parse_rewritten(json.dumps(reply), KEPT)
    letter = "ABCD"[KEPT["options"].index("the blue box")]
    assert row["answer"] == f"<answer>{letter}</answer>" and row["videos"] == "v.mp4"
    assert row["problem"].splitlines()[1:] == [
        f"{a}. {text}" for a, text in zip("ABCD", KEPT["options"])
    ]
    open_ended = KEPT | {"options": [], "answer": "3.5 km"}
    row = build.parse_rewritten(
        json.dumps({"reasoning": f"{LONG} The answer is: 3.5 km."}), open_ended
    )
    assert row["answer"] == "<answer>3.5 km</answer>" and row["problem"] == DRAFT["question"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"{LONG} The answer is: the red box.", "does not end with the answer"),
        (f"{LONG} The answer is: not the blue box.", "does not end with the answer"),
        (f"The answer is: the blue box. {LONG}", "does not end with the answer"),
        ("He opens it. The answer is: the blue box.", "fewer than 20 words"),
        (f"In the caption, {LONG} The answer is: the blue box.", "speaks of its source: caption"),
        (f"Captioned. {LONG} The answer is: the blue box.", "speaks of its source"),
        (f"By the description, {LONG} The answer is: the blue box.", "speaks of its source"),
        (f"{LONG} Not option A. The answer is: the blue box.", "option letters: option A"),
        (f"{LONG} So (B) it is. The answer is: the blue box.", "option letters"),
        (f"{LONG} </think> The answer is: the blue box.", "holds a tag|no JSON"),
        (f"{LONG} <answer> The answer is: the blue box.", "holds a tag: <answer>"),
        ("", "reasoning is missing"),
        (None, "reasoning is missing"),
    ],
)
def test_rewritings_are_refused_by_name(text, reason):
    with pytest.raises(ReplyError, match=reason):
        build.parse_rewritten(json.dumps({"reasoning": text}), KEPT)


def test_a_row_that_data_py_refuses_is_no_row():
    broken = KEPT | {"video": ""}
    with pytest.raises(DataError, match="field 'videos'"):
        build.parse_rewritten(
            json.dumps({"reasoning": f"{LONG} The answer is: the blue box."}), broken
        )


@pytest.mark.parametrize("text", ["an eclipse", "clipped, clipboard", "Option: Alaska", "(Alice)"])
def test_words_that_only_look_like_forbidden_ones_pass(text):
    assert build.one_line(text, "answer") == text


# ------------------------------------------------------------------- what goes wrong on the way


def once(fault):
    return lambda n, text: fault if n == 1 else text


def always(fault):
    return lambda n, text: fault


FAULTS = {
    "no JSON object": "Here you are.",
    "the reply is empty": " \n",
    "the reply is cut off": ("length", TEXT),
    "the server answers 400": (400, "too long"),
    "no reply within": 1.5,
    "the answer is none": json.dumps(good_draft("red", "plot", True) | {"answer": "?1"}),
    "two options are": json.dumps(good_draft("red", "plot", True) | {"options": ["a"] * 4}),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_reply_is_asked_again_then_lost(reason, videos, stub, tmp_path, capsys):
    stub.faults = {
        ("draft", "red", "plot"): always(FAULTS[reason]),
        ("draft", "cyan", "plot"): once(FAULTS[reason]),
    }
    more = ("--categories", "plot", "--open", 0, "--timeout", 0.6, "--clip_seconds", 60)
    build.main(options(videos, stub, tmp_path, *more))
    asked = collections.Counter(stub.log)
    assert asked["draft", "red", "plot"] == 3 and asked["draft", "cyan", "plot"] == 2
    assert lost(tmp_path).keys() == {"broken.mp4", "empty.webm", "red.mp4#plot-0"}
    assert lost(tmp_path)["red.mp4#plot-0"].startswith(reason)
    rows = lines(tmp_path / "sft.jsonl") + lines(tmp_path / "rl.jsonl")
    assert {VIDEOS[row["videos"]] for row in rows} == set(NAMES) - {"red"}
    assert reason in capsys.readouterr().out


def test_a_server_that_stumbles_is_asked_again_by_the_client(videos, stub, tmp_path, no_sleep):
    stub.faults = {("rewrite", "red", "goal"): once((500, "busy"))}
    build.main(options(videos, stub, tmp_path, "--categories", "goal", "--tries", 1))
    assert lost(tmp_path).keys() == {"broken.mp4", "empty.webm"}
    assert stub.log.count(("rewrite", "red", "goal")) == 2 and max(no_sleep) == 1


def test_a_bad_rewriting_keeps_the_draft(videos, stub, tmp_path):
    bad = json.dumps({"reasoning": "The caption says so. " + LONG})
    stub.faults = {("rewrite", "red", "goal"): always(bad), ("rewrite", "blue", "goal"): once(bad)}
    build.main(options(videos, stub, tmp_path, "--categories", "goal"))
    asked = collections.Counter(stub.log)
    assert asked["rewrite", "red", "goal"] == 3 and asked["rewrite", "blue", "goal"] == 2
    assert asked["draft", "red", "goal"] == asked["draft", "blue", "goal"] == 1
    assert "speaks of its source" in lost(tmp_path)["red.mp4#goal-0"]


def test_a_video_is_lost_with_more_than_half_of_its_clips(videos, stub, tmp_path):
    no = always("I'm sorry, but I cannot describe people.")
    empty, half = always(""), "00:00-00:12"
    stub.faults = {("caption", "red", half): no}  # 1 of 2
    stub.faults |= {
        ("caption", "green", "00:10-00:20"): empty,
        ("caption", "blue", "00:00-00:09"): no,
    }
    stub.faults |= {("caption", "cyan", s): empty for s in ("00:00-00:10", "00:21-00:31")}
    build.main(options(videos, stub, tmp_path))
    found = lost(tmp_path)
    cyan, blue = NAMES["cyan"][0], NAMES["blue"][0]
    clips = {"red.mp4#0000", "sub/green.MKV#0001", f"{blue}#0000", f"{cyan}#0000", f"{cyan}#0002"}
    assert found.keys() == {"broken.mp4", "empty.webm", cyan, blue} | clips
    assert "more than half" in found[cyan] and found["red.mp4#0000"].startswith("the captioner ref")
    assert found[f"{cyan}#0000"] == "the reply is empty"
    asked = collections.Counter(stub.log)
    assert asked["caption", "red", half] == 3
    assert {color for stage, color, _ in asked if stage == "draft"} == set(NAMES) - {"cyan", "blue"}
    prompts = [b["messages"][0]["content"] for b in stub.bodies]
    green = [p for p in prompts if "A green room" in p and p.startswith("Here")]
    assert green and all("[00:20-00:30]" in p and "[00:10-00:20]" not in p for p in green)


def test_a_run_without_rows_is_an_error(videos, stub, tmp_path):
    stub.faults = {("draft", color, "goal"): always("no") for color in NAMES}
    with pytest.raises(SystemExit, match="error: not one row was made; .*lost.jsonl says why"):
        build.main(options(videos, stub, tmp_path, "--categories", "goal"))


def test_a_video_without_most_of_its_clips_stays_lost(videos, stub, tmp_path):
    stub.faults = {("caption", "cyan", s): always("") for s in ("00:00-00:10", "00:21-00:31")}
    build.main(options(videos, stub, tmp_path, "--categories", "goal"))
    before, asked = (tmp_path / "lost.jsonl").read_bytes(), len(stub.log)
    build.main(options(videos, stub, tmp_path, "--categories", "goal"))
    assert (tmp_path / "lost.jsonl").read_bytes() == before and len(stub.log) == asked


def test_every_clip_has_a_frame_and_one_frame_is_no_video(stub, tmp_path):
    for name, n in (("four.mp4", 4), ("one.mp4", 1)):
        frames = np.full((n, 48, 64, 3), COLORS["magenta"], np.uint8)
        write_mp4(str(tmp_path / name), frames, FPS)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / os.fsdecode(b"not utf-8 \xff.mp4")).write_bytes(b"x")
    build.main(options(tmp_path, stub, tmp_path / "out", "--clip_seconds", 0.01))
    reasons = lost(tmp_path / "out")
    assert reasons.pop("one.mp4") == "a video of one frame"
    assert list(reasons) == [os.fsdecode(b"not utf-8 \xff.mp4")]
    keys = [line["clip"] for line in lines(tmp_path / "out" / "captions.jsonl")]
    assert sorted(keys) == [f"four.mp4#000{i}" for i in range(4)]


def test_lost_things_are_asked_for_only_with_retry_lost(videos, stub, tmp_path):
    clean = Stub()
    build.main(options(videos, clean, tmp_path / "clean"))
    clean.shutdown()
    stub.faults = {("draft", "red", "goal"): always("no"), ("rewrite", "cyan", "plot"): always("")}
    stub.faults |= {("caption", "blue", "00:00-00:09"): always("")}
    command = options(videos, stub, tmp_path / "out")
    build.main(command)
    assert len(lost(tmp_path / "out")) == 2 + 4
    stub.faults, stub.log[:] = {}, []
    build.main(command)
    assert stub.log == [] and len(lost(tmp_path / "out")) == 6
    build.main([*command, "--retry_lost"])
    blue = [(s, "blue", c) for s in ("draft", "rewrite") for c in CATEGORIES]
    assert sorted(stub.log) == sorted(
        [("draft", "red", "goal"), ("rewrite", "red", "goal"), ("rewrite", "cyan", "plot")]
        + [("caption", "blue", "00:00-00:09"), *blue]
    )
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_a_server_that_refuses_us_ends_the_run_and_the_next_goes_on(videos, stub, whole, tmp_path):
    stub.faults = {("draft", "red", "goal"): always((401, "wrong key"))}
    command = options(videos, stub, tmp_path, "--clip_side", 32)
    with pytest.raises(
        SystemExit, match="^error: .*wrong key; the same command goes on where it stopped$"
    ):
        build.main([*command, "--parallel", "1"])
    before = [key for key in stub.log if key != ("draft", "red", "goal")]
    assert before and not (tmp_path / "sft.jsonl").exists()
    assert lost(tmp_path).keys() == {"broken.mp4", "empty.webm"}
    stub.faults = {}
    build.main(command)
    assert all(stub.log.count(key) == 1 for key in before)
    assert files(tmp_path) == files(whole[0])


def test_a_server_that_goes_away_ends_the_run(videos, tmp_path):
    gone = Stub()

    def leave(n):
        if n == 3:
            gone.shutdown()
            gone.server_close()

    gone.after = lambda n: threading.Thread(target=leave, args=(n,)).start()
    with pytest.raises(SystemExit, match="^error: http.*refused.*the same command goes on"):
        build.main(options(videos, gone, tmp_path, "--parallel", 1))


# ------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--videos": "/no/where"}, "error: --videos /no/where: no such folder"),
        ({"--llm": "http://127.0.0.1:9/v1"}, "error: http://127.0.0.1:9/v1/models: .*refused"),
        ({"--captioner": "localhost"}, "error: localhost/models: .*unknown url type"),
        ({"--captioner": "{url}/v2"}, "error: .*404"),
        ({"--videos": "{empty}"}, "error: --videos .*: no file ends in .mp4, .mkv"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_asked(change, message, videos, stub, tmp_path):
    (tmp_path / "empty").mkdir()
    Handler.do_GET_, Handler.do_GET = (
        Handler.do_GET,
        lambda self: Handler.do_GET_(self) if self.path == "/v1/models" else self.send(404, b"404"),
    )
    try:
        fill = {"url": stub.url, "empty": tmp_path / "empty"}
        given = {"--videos": videos, "--llm": stub.url, "--captioner": stub.url}
        given |= {k: v.format(**fill) for k, v in change.items()} | {"--out": tmp_path / "out"}
        with pytest.raises(SystemExit, match=message):
            build.main([str(x) for pair in given.items() for x in pair])
    finally:
        Handler.do_GET = Handler.do_GET_
    assert stub.log == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (["--question", "1"], "unrecognized arguments: --question"),
        (["--questions", "0"], "--questions 0 is out of range"),
        (["--clip_seconds", "nan"], "--clip_seconds nan is out of range"),
        (["--tries", "-1"], "--tries -1 is out of range"),
        (["--open", "1.5"], "--open 1.5 is out of range"),
        (["--open", "nan"], "--open nan is out of range"),
        (["--categories", "history"], "invalid choice: 'history'"),
    ],
)
def test_impossible_options_are_refused(more, message, videos, stub, tmp_path, capsys):
    with pytest.raises(SystemExit):
        build.main(options(videos, stub, tmp_path / "out", *more))
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["--videos", "--llm", "--captioner"])
def test_what_is_needed_is_required(name, videos, stub, tmp_path, capsys):
    given = options(videos, stub, tmp_path / "out")
    at = given.index(name)
    with pytest.raises(SystemExit):
        build.main(given[:at] + given[at + 2 :])
    assert f"required: {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, name",
    [
        (["--clip_seconds", "5"], "clip_seconds"),
        (["--clip_frames", "4"], "clip_frames"),
        (["--clip_side", "64"], "clip_side"),
        (["--categories", "goal"], "categories"),
        (["--questions", "2"], "questions"),
        (["--open", "0.4"], "open"),
        (["--llm_model", "other"], "llm_model was 'stub', now 'other'"),
        (["--captioner_model", "other"], "captioner_model"),
        (["--videos", "{copy}"], "videos"),
        (["prompts"], "prompts"),
    ],
)
def test_other_settings_in_a_folder_are_refused(
    more, name, whole, videos, stub, tmp_path, monkeypatch
):
    out, _ = whole
    before = files(out)
    (tmp_path / "v.mp4").write_bytes(b"")
    if more == ["prompts"]:
        monkeypatch.setattr(build, "OPEN", "Another form.")
        more = []
    command = options(videos, stub, out, "--clip_side", 32, *more)
    with pytest.raises(SystemExit, match=f"settings.json: {name}.*another --out"):
        build.main([x.format(copy=tmp_path) for x in command])
    assert stub.log == [] and files(out) == before


def test_settings_that_change_no_row_may_change(whole, videos, stub):
    more = (
        "--tries",
        2,
        "--parallel",
        2,
        "--timeout",
        9,
        "--max_tokens",
        99,
        "--llm_model",
        "stub",
    )
    build.main(options(videos, stub, whole[0], "--clip_side", 32, *more))
    assert stub.log == []


# -------------------------------------------------------------------------- killed and resumed

RUN = (
    "import types; from kit import build, chat; "
    "chat.time = types.SimpleNamespace(sleep=lambda s: 0); build.main()"
)


def start(command):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        cwd=Path(build.__file__).parents[1], text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(videos, tmp_path):
    faults = {
        ("draft", "red", "goal"): always("no"),
        ("rewrite", "green", "plot"): always((400, "no")),
        ("caption", "green", "00:10-00:20"): always(""),
        ("draft", "blue", "spatial"): once("no"),
        ("rewrite", "cyan", "temporal"): once((500, "no")),
    }
    quiet, stub = Stub(), Stub()
    quiet.faults = stub.faults = faults
    build.main(options(videos, quiet, tmp_path / "quiet"))
    out, finished, state = tmp_path / "out", set(), {}

    def kill(n):  # in the middle of a request, or right after the reply to one
        if n == state["at"]:
            state["run"].kill()

    # numbers of requests: 14 for captions, 26 for drafts, 25 for rewritings
    for moment, at in (("before", 5), ("after", 6), ("before", 13), ("after", 11), ("before", 16)):
        state["at"] = len(stub.log) + at
        stub.before = kill if moment == "before" else lambda n: None
        stub.after = kill if moment == "after" else lambda n: None
        asked = len(stub.log)
        state["run"] = start(options(videos, stub, out, "--parallel", 3))
        assert state["run"].wait(60) == -signal.SIGKILL, state["run"].stderr.read()
        assert not finished & set(stub.log[asked:])
        found = {name: Folder.read(SimpleNamespace(path=out), name) for name in STAGES}
        finished = {done(key, line) for name in STAGES[1:] for key, line in found[name].items()}
    asked, stub.before, stub.after = len(stub.log), lambda n: None, lambda n: None
    build.main(options(videos, stub, out))
    assert not finished & set(stub.log[asked:]) and len(finished) > 10
    assert files(out) == files(tmp_path / "quiet") and len(lost(out)) == 2 + 3
    for server in (quiet, stub):
        server.shutdown()
        assert not server.problems


STAGES = ("videos", "captions", "drafts", "rows")


def done(key, line):
    """The stub's name of the request that a finished line stands for."""
    color = VIDEOS[key.rpartition("#")[0]]
    if "caption" in line:
        return "caption", color, line["caption"][1:12]
    stage = "draft" if "draft" in line else "rewrite"
    return stage, color, line["category" if stage == "draft" else "problem_type"]


def test_ctrl_c_ends_in_one_line(videos, stub, tmp_path):
    run = start(options(videos, stub, tmp_path))
    stub.before = lambda n: run.send_signal(signal.SIGINT) if n == 5 else None
    stub.faults = {("caption", "red", "00:00-00:12"): always(30.0)}  # nobody waits for this one
    said = run.communicate(timeout=20)[1]
    assert run.returncode == 130
    assert said.endswith("\nerror: interrupted; the same command goes on where it stopped\n")
    assert "Traceback" not in said


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "sft.jsonl").write_text("old")
    monkeypatch.setattr(build.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Folder.write(SimpleNamespace(path=tmp_path), "sft.jsonl", "new")
    assert (tmp_path / "sft.jsonl").read_text() == "old"


@pytest.mark.parametrize("tail", ['{"draft": "to', "{", '{"a": 1}', "\x00\x00", "\xe9"])
def test_a_torn_last_line_is_cut_off(tail, whole, videos, stub, tmp_path):
    for name in ("settings.json", "lost.jsonl", *(f"{name}.jsonl" for name in STAGES)):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    rows = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(rows[:-1]) + tail.encode("latin-1"))
    (tmp_path / "sft.jsonl.part").write_text("half a fi")
    build.main(options(videos, stub, tmp_path, "--clip_side", 32))
    assert len(stub.log) == 1 and files(tmp_path) == files(whole[0])
    assert sorted((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)) == sorted(rows)


@pytest.mark.parametrize("line", ["{", "[]", "{}", "7", ""])
def test_a_broken_line_in_the_middle_is_named(line, whole, videos, stub, tmp_path):
    (tmp_path / "settings.json").write_bytes((whole[0] / "settings.json").read_bytes())
    (tmp_path / "lost.jsonl").write_text(f'{line}\n{{"lost": "a", "reason": "b"}}\n')
    with pytest.raises(SystemExit, match="error: .*lost.jsonl: remove the line that is broken"):
        build.main(options(videos, stub, tmp_path, "--clip_side", 32))


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


# --------------------------------------------------------------------------------- the client


def test_the_client_names_model_and_key(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    stub.faults = {("rewrite", "red", "goal"): always("yes")}
    message = [{"role": "user", "content": "This question: What about red goal?\nAnswer: a"}]
    assert Chat(stub.url + "/").ask(message, 0.5, 7) == "yes"
    assert Chat(stub.url, "mine").ask(message) == "yes"
    first, second = stub.bodies
    assert first == {"model": "stub", "messages": message, "temperature": 0.5, "max_tokens": 7}
    assert (second["model"], second["temperature"]) == ("mine", 0.0)
    assert stub.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    "fault, kind, times",
    [
        (always((503, "busy")), ReplyError, 4),
        (always((429, "slow down")), ReplyError, 4),
        (always((400, "too long")), ReplyError, 1),
        (always((404, "no such model")), ServerError, 1),
        (always((403, "no")), ServerError, 1),
        (always(0.8), ReplyError, 1),
        (always(None), ReplyError, 1),
        (always(["a"]), ReplyError, 1),
        (always(("length", "a")), ReplyError, 1),
    ],
)
def test_what_is_asked_again_and_what_is_not(fault, kind, times, stub, no_sleep):
    stub.faults = {("rewrite", "red", "goal"): fault}
    message = [{"role": "user", "content": "This question: What about red goal?\nAnswer: a"}]
    chat = Chat(stub.url, timeout=0.3)
    with pytest.raises(kind):
        chat.ask(message)
    assert len(stub.log) == times
    assert [s for s in no_sleep if s] == [1, 2, 4][: times - 1]


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [[]]}']
)
def test_replies_that_are_no_completion_are_refused(body, stub, monkeypatch):
    chat = Chat(stub.url)
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.send(200, body))
    with pytest.raises(ReplyError):
        chat.ask([])
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send(200, body))
    with pytest.raises(ServerError, match="no list of models"):
        Chat(stub.url)


def test_a_reply_that_breaks_off_is_asked_again(stub, monkeypatch):
    def half(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    chat, asked = Chat(stub.url), []
    monkeypatch.setattr(Handler, "do_POST", lambda self: (asked.append(1), half(self)))
    with pytest.raises(ServerError, match="IncompleteRead"):
        chat.ask([])
    assert len(asked) == 4
