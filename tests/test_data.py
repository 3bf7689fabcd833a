"""Properties of data.py: which frames, and what becomes of rows, good and bad.

The test video shows the number of each frame as 8 black or white tiles, so that a frame taken in
another one's place is seen. Indices: test_properties.py too. Broken files: test_decode.py.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from media import medium, numbered_frames, numbers_of
from PIL import Image
from pyarrow import parquet

import data
from data import DataError, Example, Medium, frame_indices, load_media, load_rows
from kit.sound import load_audio
from kit.toy import write_mp4


def psnr(a, b):
    """(F,) in dB, one number a frame."""
    error = ((a.astype(float) - b.astype(float)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A good video of 70 numbered frames, 4 a second."""
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    write_mp4(str(path), numbered_frames(70))
    return path


# --------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("n", (1, 2, 7, 64, 70, 100))
def test_a_written_video_gives_back_its_frames_and_times(clip, n):
    frames, times = load_media(medium(clip), n)
    indices = frame_indices(70, n)
    assert frames.shape == (min(n, 70), 32, 32, 3) and frames.dtype == np.uint8
    assert numbers_of(frames).tolist() == indices.tolist()
    assert psnr(frames, numbered_frames(70)[indices]).min() > 30
    assert times.dtype == np.float64 and times.tolist() == (indices / 4).tolist()
    assert [p.name for p in clip.parent.iterdir()] == ["v.mp4"]  # only the finished file


def test_only_the_frames_asked_for_are_decoded(clip):
    """Ranks that share a video each decode a slice; together they have what one would have."""
    frames, asked = data.Frames(medium(clip), 9), []
    read = frames.read
    frames.read = lambda at: asked.append(at.tolist()) or read(at)
    slices = [slice(0, 4), slice(4, 8), slice(8, 12)]
    parts = list(frames.pieces(slices))
    assert asked == [frame_indices(70, 9)[part].tolist() for part in slices]
    assert np.array_equal(np.concatenate(parts), load_media(medium(clip), 9)[0])


def test_colours_and_sides_are_not_swapped(tmp_path):
    frames = np.zeros((8, 32, 64, 3), np.uint8)  # not square: height 32, width 64
    frames[:, :16, :, 0] = 220  # red above; below, blue on the right
    frames[:, 16:, 32:, 2] = 220
    write_mp4(str(tmp_path / "v.mp4"), frames)
    assert psnr(load_media(medium(tmp_path / "v.mp4"), 8)[0], frames).min() > 30


@pytest.mark.parametrize(
    "segment, expected",
    [  # 4 frames a second: frame i is at i / 4 seconds, and the end is exclusive
        ((0, 17.5), [0, 23, 46, 69]),
        ((2.0, 5.0), [8, 11, 15, 19]),
        ((2.0, 3.0), [8, 9, 10, 11]),
        ((2.01, 2.51), [9, 10]),
        ((17.0, 99.0), [68, 69]),
        ((0, 0.1), [0]),
        ((17.5, 20), None),
        ((2.05, 2.2), None),
    ],
)
def test_a_segment_gives_the_frames_within_it_or_an_error(clip, segment, expected):
    if expected is None:
        with pytest.raises(DataError, match=re.escape(str(clip))):
            load_media(medium(clip, segment=segment), 4)
        return
    frames, times = load_media(medium(clip, segment=segment), 4)
    assert numbers_of(frames).tolist() == expected
    assert times.tolist() == [i / 4 for i in expected]


def test_num_frames_of_a_row_wins(clip):
    assert numbers_of(load_media(medium(clip, num_frames=3), 64)[0]).tolist() == [0, 34, 69]


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "P"))
def test_an_image_is_one_frame_at_time_zero(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "i.png")
    frames, times = load_media(medium(tmp_path / "i.png", "image"), 64)
    assert frames.dtype == np.uint8 and times.tolist() == [0.0]
    assert np.array_equal(frames, np.array(image.convert("RGB"))[None])
    content = (tmp_path / "i.png").read_bytes()
    for broken in (content[: len(content) // 2], b"<html>404 not found</html>" * 50):
        (tmp_path / "i.png").write_bytes(broken)
        with pytest.raises(DataError, match="i.png: does not decode as image .question q7.: "):
            load_media(medium(tmp_path / "i.png", "image"), 64, "q7")


@pytest.mark.parametrize("kind", ("video", "image", "audio"))
@pytest.mark.parametrize("question, where", (("", ""), ("q7", " (question q7)")))
def test_a_missing_or_empty_file_or_a_directory_is_refused_by_name(tmp_path, kind, question, where):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("no", "no such file{}; check the video directory"),
        ("folder", "no such file{}; check the video directory"),
        ("empty", "the file is empty{}; download it again"),
    ):
        m = medium(tmp_path / name, kind)
        with pytest.raises(DataError) as error:
            load_audio(m, name=question) if kind == "audio" else load_media(m, 8, question)
        assert str(error.value) == f"{m.path}: {words.format(where)}"
        assert error.value.question == question


# ----------------------------------------------------------------------------------------- rows

ROW = {
    "problem_id": "q7",
    "problem": "Which?\nA. red\n(B) dark blue \nC: 7",
    "data_type": "video",
    "problem_type": "plot",
    "reasoning": "seen blue",
    "videos": "videos/v.mp4",
    "answer": "<answer>B</answer>",
}
OTHER = ROW | {"problem_id": "8"}
VIDEO = Medium("video", "/media/v.mp4")
IMAGE = Medium("image", "/media/i.png")
AUDIO = Medium("audio", "/media/a.wav")


def write_rows(folder, *rows):
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def load_one(folder, change=(), video_dir=None) -> Example:
    (one,) = load_rows(write_rows(folder, ROW | dict(change)), video_dir)
    return one


def refused(path, *words, video_dir=None):
    """Loading must raise one line that begins with the path and has the words."""
    with pytest.raises(DataError) as error:
        load_rows(str(path), video_dir)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_row_becomes_an_example(tmp_path):
    assert load_one(tmp_path) == Example(
        id="q7",
        problem=ROW["problem"],
        options=("red", "dark blue", "7"),
        answer="B",
        category="plot",
        media=(Medium("video", str(tmp_path / "videos" / "v.mp4")),),
        data_type="video",
        response="<think> seen blue </think> <answer> B </answer>",
    )


@pytest.mark.parametrize(
    "change, name, expected",
    [
        ({"response": "red blue", "answer": ""}, "response", "red blue"),  # verbatim
        ({"response": "x", "answer": ""}, "answer", ""),
        ({"response": "x"}, "answer", "B"),  # still has its letter
        ({"reasoning": "<think>a</think>"}, "response", "<think>a</think> <answer> B </answer>"),
        ({"reasoning": None}, "response", ""),  # nothing to learn from
        ({"problem_id": 0}, "id", "0"),  # as published
        ({"problem": "Why, A or B?", "answer": " <answer> 1,000 </answer>\n"}, "answer", "1,000"),
        ({"problem": "Why, A or B?", "answer": "<answer>x</answer>"}, "options", ()),
        ({"problem": "Q: Which?\nA. red\nB. blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\nC. c\nA. a\nB. b"}, "options", ("a", "b", "c")),  # as published
        ({"problem": "Q?\nA. a\nB. "}, "options", ("a", "")),  # as published
        ({"problem": "Q?\nA.red\nB.blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\n(A)red\n(B)blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\n- A. red\n- B. blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\n**A.** red\n**B.** blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\n[A] red\n[B] blue"}, "options", ("red", "blue")),
        ({"problem": "Q?\nI. x\nII. y\nA. I only\nB. II"}, "options", ("I only", "II")),
        ({"problem": "A: Hi\nB: Ho\nQ?\nA. hi\nB. ho"}, "options", ("hi", "ho")),
        (
            {"problem": "Q?\nA. one\n two\nB. three\n four"},
            "options",
            ("one\n two", "three\n four"),
        ),
        ({"problem": "Q?\nA. one\nB. two\nBe brief."}, "options", ("one", "two")),
        (
            {"problem": "Why, A or B?\nA. Smith asks.", "answer": "<answer>x</answer>"},
            "options",
            (),
        ),
        # Options may be indented and hold any character.
        ({"problem": "Q\n  A. x\u2028B. y\r\n\t(B) z\x0bz"}, "options", ("x\u2028B. y", "z\x0bz")),
        ({"data_type": "image"}, "data_type", "image"),
    ],
)
def test_a_field_becomes_what_it_says(tmp_path, change, name, expected):
    assert getattr(load_one(tmp_path, change), name) == expected


WAYS = ("./v.mp4", "a/../v.mp4", "..v/../v.mp4", "/media/v.mp4", "/media/a/../v.mp4")  # to write it
LETTERS = {"v": VIDEO, "w": VIDEO._replace(path="/media/w.mp4"), "i": IMAGE, "a": AUDIO}


@pytest.mark.parametrize(
    "change, media",
    [
        ({"videos": ["v.mp4"]}, "v"),
        ({"videos": ["v.mp4", "w.mp4"]}, "vw"),
        ({"videos": "i.png", "data_type": "image"}, "i"),
        ({"videos": ["i.png"] * 3, "data_type": "image"}, "iii"),
        ({"videos": "a.wav", "data_type": "audio"}, "a"),
        ({"audios": ["a.wav", AUDIO.path], "images": ["i.png"]}, "viaa"),
        ({"videos": "a.wav", "data_type": "audio", "images": ["i.png"]}, "ai"),
        ({"videos": "i.png", "data_type": "image", "images": [IMAGE.path]}, "ii"),
        ({"images": None, "audios": None, "num_frames": None, "audio_track": False}, "v"),
        ({"images": [], "audios": []}, "v"),
        ({"videos": "", "data_type": "text"}, ""),
        *[({"videos": path}, "v") for path in WAYS],
    ],
)
def test_a_row_holds_media_of_several_kinds_in_the_order_of_the_prompt(tmp_path, change, media):
    one = load_one(tmp_path, {"videos": "v.mp4"} | change, "/media")
    assert one.media == tuple(LETTERS[m] for m in media) and len({one.media: 1}) == 1


def test_what_is_taken_of_media_is_said_of_each_of_the_videos_alone(tmp_path):
    change = {"num_frames": 4, "segment": [0, 9], "audio_track": True, "images": ["i.png"]}
    one = load_one(tmp_path, change | {"videos": ["v.mp4"] * 2}, "/media")
    assert one.media == (*[Medium("video", VIDEO.path, 4, (0, 9), True)] * 2, IMAGE)
    change = {"data_type": "audio", "segment": [1.5, 2], "videos": "a.wav"}
    assert load_one(tmp_path, change, "/media").media == (AUDIO._replace(segment=(1.5, 2)),)


def test_media_paths_are_relative_to_the_file_or_to_a_given_folder(tmp_path, monkeypatch):
    assert load_one(tmp_path, video_dir="/media").media[0].path == "/media/videos/v.mp4"
    assert load_one(tmp_path, {"videos": "..v.mp4"}).media[0].path == str(tmp_path / "..v.mp4")
    monkeypatch.chdir(tmp_path)
    assert load_rows("rows.jsonl")[0].media[0].path == str(tmp_path / "..v.mp4")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "disk")  # links may lead out of it
    monkeypatch.chdir(tmp_path / "rows")
    for folder in (None, ".", "../rows", str(tmp_path / "rows")):
        one = load_one(tmp_path / "rows", {"videos": "link/v.mp4"}, folder)
        assert Path(one.media[0].path).resolve() == tmp_path / "disk" / "v.mp4"


REQUIRED = [field for field, (types, _) in data.FIELDS.items() if type(None) not in types]
WRONG = {
    "videos": [[], "", [""], ["v.mp4", 5], [["v.mp4"]], {"path": "v.mp4"}],
    "images": ["i.png", ["i.png", ""], [None]],
    "audios": ["a.wav", {}, [""]],
    "num_frames": ["8", 0, -3, 2.5, True, [8]],
    "segment": [5, 0, [], "ab", [1], [1, 2, 3], ["0", "1"], [3, 1], [2, 2], [-1, 2]]
    + [[float("nan"), 2]],
    "audio_track": [1, "true"],
    "response": [5, ["red"], "  "],
    "data_type": ["sound", ""],
    "answer": ["", "B", "<answer>B", "so <answer>B</answer>", "<answer></answer>"]
    + ["<answer> </answer>", "<answer>A</answer><answer>B</answer>"]
    + [f"<answer>{x}</answer>" for x in ("D", "b", "B.", "red")],
    "problem": [f"Which?\n{x}" for x in ("B. red\nC. blue", "A. red\nC. blue", "A. red\nA. blue")]
    + ["Which?\nB. red\nD. blue\nA. green", "Which? A. red B. blue"],
}
WRONG = [(field, value, {}) for field, values in WRONG.items() for value in values]
WRONG += [(field, x, {}) for field in data.FIELDS for x in (2.5, {"x": 1})]
WRONG += [(field, None, {}) for field in REQUIRED] + [("problem_id", True, {})]
WRONG += [("answer", "<answer>x</answer> <answer>y</answer>", {"problem": "Why?"})]
TEXT = {"data_type": "text", "videos": ""}
for kind in ({"data_type": "image"}, {"data_type": "audio"}, TEXT):
    WRONG += [("audio_track", True, kind), ("num_frames", 4, kind)]
WRONG += [("segment", [0, 1], {"data_type": "image"}), ("segment", [0, 1], TEXT)]
WRONG += [("videos", x, {"data_type": "text"}) for x in ("v.mp4", ["v.mp4"])]
WRONG += [("images", ["i.png"], TEXT), ("audios", ["a.wav"], TEXT)]


@pytest.mark.parametrize("field, value, other", WRONG)
def test_a_wrong_field_is_refused_by_row_and_field(tmp_path, field, value, other):
    known = () if field == "problem_id" else ("q7",)
    path = write_rows(tmp_path, OTHER, ROW | other | {field: value})
    refused(path, f"{path}:2 (problem_id ", field, *known)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"problem_type": None}, "field 'problem_type' is missing: a category"),
        ({"num_frames": 0}, "field 'num_frames' is 0, not a number of frames"),
        ({"segment": [3, 1]}, "field 'segment' is [3, 1], not [start, end] in seconds"),
        ({"audio_track": 1}, "field 'audio_track' is 1, not true or false"),
        ({"data_type": "sound"}, "'sound', not one of video, image, audio, text"),
        ({"videos": ["v.mp4", 5]}, "is ['v.mp4', 5], not paths of media files"),
        ({"images": ["i.png"]} | TEXT, "field 'images' must be empty for data_type text"),
        ({"num_frames": 4, "data_type": "audio"}, "'num_frames' does not go with data_type audio"),
        ({"answer": "B"}, "field 'answer' is 'B', not <answer>...</answer>"),
        ({"answer": "<answer>D</answer>"}, "answer 'D' is no letter of its 3 options"),
        ({"problem": "Why?\nB. x\nC. y"}, "option letters ['B', 'C'] are not A, B, C ..."),
        (
            {"problem": "Which? A. red B. blue"},
            "answer 'B' is a letter, but field 'problem' has no",
        ),
        ({"problem": r"Which?\nA. red\nB. blue"}, "has no options that can be read"),
        ({"reasoning": "so</think>"}, "field 'reasoning' has ['<think>', '</think>', '</think>']"),
        ({"reasoning": "not <answer>A</answer>"}, "one <think> ... </think>, or no such tags"),
        ({"reasoning": "<think>so"}, "field 'reasoning' has ['<think>']"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_is_wanted(tmp_path, change, said):
    refused(write_rows(tmp_path, ROW | change), ":1 (problem_id 'q7'): ", said)


@pytest.mark.parametrize(
    "path", ("../v.mp4", "..", "a/../../v.mp4", "/etc/passwd", "/media2/v.mp4", "./../v.mp4", "/")
)
@pytest.mark.parametrize("field", ("videos", "images", "audios"))
def test_a_path_that_leaves_the_video_directory_is_refused(tmp_path, field, path):
    row = ROW | {field: path if field == "videos" else ["good.png", path]}
    rows = write_rows(tmp_path, OTHER, row)
    words = (f"{rows}:2 ", "q7", repr(field), repr(path), "not within the video directory")
    refused(rows, *words, "/media", video_dir="/media")
    refused(rows, *words, str(tmp_path))


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", ":2: not JSON"),
        ('{"problem_id": ', ":2: not JSON"),
        ("[1, 2]", ":2: not a JSON object"),
        ("null", ":2: not a JSON object"),
        ("9" * 5000, ":2: not JSON"),  # too much for the parser
        ("[" * 100_000, ":2: not JSON"),
        ("\n{", ":3: not JSON"),  # blank lines are counted
        (json.dumps(OTHER), ":2: problem_id '8' occurs twice"),
        (json.dumps(OTHER | {"problem_id": 8}), ":2: problem_id '8' occurs twice"),
        (json.dumps(ROW | {"problem": "half \ud800"}), ":2: not UTF-8 text"),
        (b"\xff\xfe", ":2: not UTF-8 text"),
    ],
)
def test_a_wrong_line_is_refused_by_number(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(OTHER).encode() + b"\n" + line + b"\n")
    refused(path, f"{path}{words}")


def test_a_file_without_rows_or_no_file_is_refused_by_name(tmp_path, monkeypatch):
    refused(write_rows(tmp_path), "no rows")
    refused(write_rows(tmp_path, "", " "), "no rows")
    for path in ("none.jsonl", "none.parquet", "", "me@home/none.jsonl", "data@none.parquet"):
        refused(tmp_path / path, f"{tmp_path / path}: no such file")
    path = write_rows(tmp_path, "", ROW, "  ")
    assert len(load_rows(path)) == 1  # blank lines are skipped
    failing = lambda *_: (_ for _ in ()).throw(OSError("I/O\nerror"))  # noqa: E731
    monkeypatch.setattr(data, "open", failing, raising=False)
    refused(path, f"{path}: cannot be read (I/O)")


# What the published columns hold: ids are numbers, and another file may have columns of its own.
EMPTY = {"images": None, "num_frames": None, "segment": None, "score": 0.5}
PUBLISHED = [ROW | EMPTY | {"problem_id": i} for i in range(3)]
PUBLISHED[1]["segment"] = [1.0, 2.5]


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set in the hub's layout; what the package keeps goes to the test's folder as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "long@video"
    folder.mkdir()
    for split, rows in (("train", PUBLISHED), ("test", PUBLISHED[:1])):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def test_every_kind_of_file_gives_the_same_rows(tmp_path, hub_folder):
    lines = load_rows(write_rows(tmp_path, *PUBLISHED), "/media")
    assert [e.id for e in lines] == ["0", "1", "2"]
    assert lines[1].media == (Medium("video", "/media/videos/v.mp4", None, (1.0, 2.5)),)
    file = hub_folder / "data" / "train-00000-of-00001.parquet"
    assert load_rows(str(file), "/media") == lines
    assert load_rows(f"{hub_folder}@train", "/media") == lines
    assert load_rows(f"{hub_folder}@test", "/media") == lines[:1]
    assert load_rows(str(file))[0].media[0].path == str(file.parent / "videos" / "v.mp4")
    assert load_rows(f"{hub_folder}@test")[0].media[0].path == str(hub_folder / "videos" / "v.mp4")


def test_rows_of_the_hub_are_asked_for_by_name_and_split(tmp_path, monkeypatch):
    """Their media are relative to the current folder; a path with @ that is a file is a file."""
    import datasets

    asked, table = [], datasets.Dataset.from_list(PUBLISHED[:1])
    ask = lambda name, split: asked.append((name, split)) or table  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", ask)
    monkeypatch.chdir(tmp_path)
    (one,) = load_rows("LongVideo-Reason/longvideo-reason@test")
    assert asked == [("LongVideo-Reason/longvideo-reason", "test")]
    assert one.media[0].path == str(tmp_path / "videos" / "v.mp4")
    (tmp_path / "me@home").mkdir()
    assert load_one(tmp_path / "me@home") and len(asked) == 1


@pytest.mark.parametrize("package, path", (("pyarrow.parquet", "x.parquet"), ("datasets", "a/b@c")))
def test_a_missing_package_is_told_how_to_install(tmp_path, monkeypatch, package, path):
    (tmp_path / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    refused(path, package, "pip install datasets")


def test_a_wrong_source_is_refused_by_name(tmp_path, hub_folder):
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "empty.parquet").touch()
    whole = (hub_folder / "data" / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-99])
    write_parquet(tmp_path / "bare.parquet", [{"score": 1}])
    write_parquet(tmp_path / "none.parquet", [])
    write_parquet(tmp_path / "row.parquet", [PUBLISHED[0], PUBLISHED[1] | {"answer": "B"}])
    for path, *words in (
        (tmp_path / "text.parquet", "cannot be read"),
        (tmp_path / "empty.parquet", "cannot be read"),
        (tmp_path / "cut.parquet", "download it again"),
        (tmp_path / "bare.parquet", "row 1 (problem_id '?'): field 'problem_id' is missing"),
        (tmp_path / "none.parquet", "no rows"),
        (tmp_path / "row.parquet", "row 2 (problem_id 1): field 'answer'"),
        (f"{hub_folder}@tset", "tset", "'train', 'test'"),  # names the splits that there are
        (f"{hub_folder}@", "Split name"),
        (f"{tmp_path}/none@train", "give FOLDER@SPLIT"),
        ("LongVideo-Reason/longvideo-reason@test", "give FOLDER@SPLIT"),
    ):
        refused(path, f"{path}: ", *words)


def test_bad_rows_are_left_out_and_listed_where_a_list_is_given(tmp_path):
    wrong = [ROW | {"answer": "B"}, "not json", OTHER, "\n[]"]
    path, bad = write_rows(tmp_path, OTHER, *wrong, ROW), []
    assert [e.id for e in load_rows(path, bad=bad)] == ["8", "q7"]
    assert [where for where, _ in bad] == [f"{path}:{n}" for n in (2, 3, 4, 6)]
    words = ("field 'answer'", "not JSON", "occurs twice", "not a JSON object")
    for word, (where, message) in zip(words, bad, strict=True):
        assert message.startswith(where) and word in message
    same = load_rows(write_rows(tmp_path, ROW), bad=bad)
    assert [e.id for e in same] == ["q7"] and len(bad) == 4


def test_a_source_without_a_good_row_is_refused_even_where_a_list_is_given(tmp_path):
    bad = []
    for rows, words in (([ROW | {"answer": "B"}], "no row is good, the first: "), ([], "no rows")):
        path = write_rows(tmp_path, *rows)
        with pytest.raises(DataError, match=re.escape(path) + ".*" + words):
            load_rows(path, bad=bad)
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.jsonl"), bad=bad)
    assert bad == []
