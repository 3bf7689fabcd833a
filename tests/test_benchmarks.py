"""Published rows of benchmarks become Examples: the right video, letters, category and answer."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import says, write_jsonl

import data
import eval as evaluation
from data import DataError
from kit import benchmarks

# Rows as they are published (fields that are not read are left out).
VIDEOMME = {"video_id": "001", "videoID": "fFjv93ACGo8", "question_id": "001-1", "answer": "C"}
VIDEOMME |= {"duration": "short", "domain": "Knowledge", "question": "When was it?\n"}
VIDEOMME |= {"options": ["A. In 1990.", "B. Today.", "C. Now: \n at ten.", "D. Never."]}
LVB_HUB = {"id": "86CxyhFV9MI_0", "video_path": "86CxyhFV9MI.mp4", "duration_group": 600}
LVB_HUB |= {"question": "Which is next?", "correct_choice": 2, "subtitle_path": "86_en.json"}
LVB = LVB_HUB | {"candidates": ["a", "b", "N/A dog", "d", "e"]}
LVB_HUB |= {"option0": "a", "option1": "b", "option2": "N/A dog"}
LVB_HUB |= {"option3": "N/A", "option4": "N/A"}
PERCEPTION = {"id": 4, "question": "Is it?", "options": ["yes", "no", "B. maybe"], "answer_id": 1}
PERCEPTION |= {"area": "Physics", "reasoning": "descriptive", "tag": ["motion"]}
PERCEPTION_HUB = PERCEPTION | {"video_name": "video_10", "question_id": "4", "answer_id": "1"}
NEXT = {"video": "4010069381", "frame_count": "369", "qid": "6", "type": "TN", "answer": "3"}
NEXT |= {"question": "how do they play", "a0": "roll", "a1": "tap", "a2": "strum", "a3": "hit"}
NEXT |= {"a4": "pat"}
VN = {"video": "/VNBench_new/12_cnt.mp4", "question": "How many?", "options": [4, 3, 5, 1]}
VN |= {"gt": 3, "type": "cnt_edit1", "try": 2, "needle_time": [[1, 2]]}
ANET_Q = {"video_name": "1QIUV7WYKXg", "question": "is it  a dog", "question_id": "v_1QI_3"}
ANET_A = {"answer": "yes", "type": 3, "question_id": "v_1QI_3"}
TABLES = {  # a benchmark's files: their names and rows
    "videomme": {"t.parquet": [VIDEOMME]},
    "longvideobench": {"lvb_val.json": [LVB], "t.parquet": [LVB_HUB]},
    "perceptiontest": {
        "v.json": {"video_9": {"metadata": {}}, "video_10": {"mc_question": [PERCEPTION]}},
        "t.jsonl": [PERCEPTION_HUB],
    },
    "nextqa": {
        "val.csv": [NEXT],
        "t.parquet": [NEXT | {"video": 4010069381, "answer": 3, "qid": 6}],
    },
    "vnbench": {"v.json": [VN]},
    "activitynet-qa": {
        "test_q.json": [ANET_Q],
        "t.parquet": [ANET_Q | ANET_A | {"type": "3"}],
    },
}
EXAMPLES = {  # what becomes of them: video, id, category, answer, question|options
    "videomme": "fFjv93ACGo8.mp4 001-1 short C "
    "When was it?|A. In 1990.|B. Today.|C. Now: at ten.|D. Never.",
    "longvideobench": "86CxyhFV9MI.mp4 86CxyhFV9MI_0 600 C "
    "Which is next?|A. a|B. b|C. N/A dog|D. d|E. e",
    "perceptiontest": "video_10.mp4 video_10-4 Physics B Is it?|A. yes|B. no|C. B. maybe",
    "nextqa": "4010069381.mp4 4010069381-6 temporal D "
    "how do they play|A. roll|B. tap|C. strum|D. hit|E. pat",
    "vnbench": "12_cnt.mp4 12_cnt-cnt_edit1#2 cnt_edit1 B How many?|A. 4|B. 3|C. 5|D. 1",
    "activitynet-qa": "v_1QIUV7WYKXg.mkv v_1QI_3 yes/no yes is it a dog?",
}
FILES = [(name, file) for name, files in TABLES.items() for file in files]
VIDEOS = {text.split()[0] for text in EXAMPLES.values()}


def write(path, rows):
    """Rows in the format that the name of the file says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        path.write_text(json.dumps(rows))
        if path.name == "test_q.json":
            path.with_name("test_a.json").write_text(json.dumps([ANET_A]))
    return str(path)


@pytest.fixture
def videos(tmp_path):
    """A folder of folders of (empty) videos, with files that are none."""
    for i, name in enumerate(sorted(VIDEOS)):
        file = tmp_path / "videos" / f"part {i % 3}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
        file.with_suffix(".srt").write_text("")
    return tmp_path / "videos"


@pytest.mark.parametrize("name, file", FILES)
def test_a_published_row_becomes_an_example(name, file, videos, tmp_path):
    video, identity, category, answer, problem = EXAMPLES[name].split(" ", 4)
    if (name, file) == ("longvideobench", "t.parquet"):
        problem = problem.removesuffix("|D. d|E. e")
    bad = []
    (e,) = benchmarks.load(name, write(tmp_path / file, TABLES[name][file]), str(videos), bad)
    found = e.id, e.category, e.answer, e.problem.replace("\n", "|")
    assert found == (identity, category, answer, problem)
    assert not bad and len(e.options) == problem.count("|")
    (medium,) = e.media
    assert medium.kind == "video" and medium.path == str(next(videos.rglob(video)))


def test_longvideo_reason_is_the_own_format(toy):
    path, bad = str(toy / "test.jsonl"), []
    assert benchmarks.load("longvideo-reason", path, None, bad) == data.load_rows(path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("longvideobench", {"video_path"}, "not as longvideobench has it: field 'video_path' is m"),
        ("videomme", {"duration": None}, "field 'problem_type' is missing: a category"),
        ("videomme", {"answer": "E"}, "answer 'E' is no letter of its 4 options"),
        ("videomme", {"options": ["A. x", "C. y"]}, r"option letters \['A', 'C'\]"),
        ("longvideobench", {"correct_choice": 5}, "answer 'F' is no letter of its 5 options"),
        ("longvideobench", {"correct_choice": -1}, "answer 'Z' is no letter"),
        ("longvideobench", {"correct_choice": None}, "not as longvideobench has it"),
        ("nextqa", {"type": "XX"}, "field 'problem_type' is missing"),
        ("nextqa", {"answer": "two"}, "row 2 is not as nextqa has it: .*'two'"),
        ("nextqa", {}, "the id '4010069381-6' occurs twice"),
        ("vnbench", {"gt": 9}, "row 2 is not as vnbench has it: '9' is not in list"),
        ("vnbench", {"options": None}, "row 2 is not as vnbench has it"),
        ("activitynet-qa", {"question_id": "v_9"}, "field 'type' is missing"),
    ],
)
def test_a_row_that_is_not_as_published_is_listed_and_the_others_stay(
    name, change, message, videos, tmp_path
):
    """change: fields with other values, or the names of fields that are missing."""
    file, (row, *_) = next(iter(TABLES[name].items()))
    other = row | change if isinstance(change, dict) else {k: row[k] for k in row.keys() - change}
    bad = []
    path = write(tmp_path / file, [row, other])
    (example,) = benchmarks.load(name, path, str(videos), bad)
    assert example.id == EXAMPLES[name].split()[1]
    ((where, said),) = bad
    assert where == f"{path}: row 2" and said.startswith(where)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "name, file, table, message",
    [
        ("videomme", "gone.json", "", "gone.json: cannot be read as a table"),
        ("videomme", "t.json", "[{", "t.json: cannot be read as a table"),
        ("videomme", "t.parquet", "no parquet", "t.parquet: cannot be read as a table"),
        ("videomme", "t.json", [LVB], "no row .*videomme.*field 'question_id' is missing"),
        ("videomme", "t.json", [], "no row of videomme is good: empty"),
        ("videomme", "t.json", [[1]], "no row"),
        ("videomme", "t.json", {"data": [VIDEOMME]}, "t.json is no table as videomme has it"),
        ("videomme", "t.json", None, "t.json is no table as videomme has it"),
        ("perceptiontest", "t.json", {"v": {"mc_question": [{}]}}, "no table as perceptiontest "),
        ("activitynet-qa", "test_q.json", [{"question": "?"}], "no table as activitynet-qa has it"),
    ],
)
def test_a_file_that_is_no_table_of_the_benchmark_is_one_error(
    name, file, table, message, videos, tmp_path
):
    path = tmp_path / file
    if table and isinstance(table, str):
        path.write_text(table)
    elif table != "":
        write(path, table)
    with pytest.raises(DataError, match=message):
        benchmarks.load(name, str(path), str(videos), [])


def test_ids_of_videos_need_a_folder(tmp_path):
    with pytest.raises(DataError, match="--video_dir"):
        benchmarks.load("videomme", write(tmp_path / "t.json", [VIDEOMME]), None, [])


def test_two_files_of_one_name_must_be_the_same(videos, tmp_path):
    path = write(tmp_path / "t.json", [VIDEOMME])
    one = next(videos.rglob("fFjv93ACGo8.mp4"))
    two = videos / "more/fFjv93ACGo8.MKV"
    two.parent.mkdir()
    shutil.copy(one, two)
    assert benchmarks.load("videomme", path, str(videos), [])
    two.write_bytes(one.read_bytes()[::-1])
    for file in (one, two):  # nor do size and time tell
        os.utime(file, (1, 1))
    message = "fFjv93ACGo8.* and .*fFjv93ACGo8.* differ: which one is video fFjv"
    with pytest.raises(DataError, match=message):
        benchmarks.load("videomme", path, str(videos), [])


def test_a_link_to_a_folder_of_videos_does_not_make_them_read(videos, monkeypatch):
    (videos / "all").symlink_to(videos / "part 1")
    (videos / "86CxyhFV9MI.mp4").symlink_to(videos / "gone")
    monkeypatch.setattr(benchmarks.filecmp, "cmp", None)
    found = benchmarks.find_videos(str(videos))
    assert {path.name for path in found.values()} == VIDEOS


def test_a_video_that_is_not_there_is_left_to_the_caller(tmp_path):
    (e,) = benchmarks.load("videomme", write(tmp_path / "t.json", [VIDEOMME]), str(tmp_path), [])
    assert e.media[0].path == str(tmp_path / "fFjv93ACGo8.mp4")


# ----------------------------------------------------------------------------------- subtitles

SRT = """\ufeff1
00:00:00,000 --> 00:00:00,500
<font color="white" size=".72c">{\\an8}first</font>

2
00:00:00,500 --> 00:00:01,000 X1:40
two <i>lines</i>
of text

3
00:00:01,000 --> 00:00:02,999

4
00:00:01,000 --> 00:00:02,999
never

5
00:01:02,000 --> 01:00:00,000
late < 5
"""


def test_subtitles_are_read_without_tags(tmp_path):
    for name, text in (("a", SRT), ("b", SRT.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(text.encode() + b"\n\n6\n00:00:01.5 -> x\nbroken \xff")
        found = [(0.0, 0.5, "first"), (0.5, 1.0, "two lines of text"), (1.0, 2.999, "never")]
        found.append((62.0, 3600.0, "late < 5"))
        assert benchmarks.read_srt(str(tmp_path / name)) == found


def test_subtitles_are_those_at_the_times_of_the_frames(tmp_path):
    (tmp_path / "v.srt").write_text(SRT)
    video = data.Medium("video", "v.mp4")
    example = data.Example("q", "Which?\nA. x\nB. y", ("x", "y"), "B", "t", (video,), "video", "")
    for times, said in (
        ([0.0, 0.1, 0.2], ["first"]),
        ([0.5], ["two lines of text"]),  # a subtitle ends before its last instant
        ([70.0, 0.6, 0.1], ["first", "two lines of text", "late < 5"]),
        ([3.0, 5.0, 4000.0], []),
    ):
        new = benchmarks.with_subtitles(example, str(tmp_path), np.array(times))
        head = ["Subtitles of the video at these frames:", *said] if said else []
        assert new.problem.splitlines() == [*head, "Which?", "A. x", "B. y"]
        assert replace(new, problem=example.problem) == example


@pytest.fixture
def command(toy, saved, tmp_path):
    """The command on rows of a benchmark about the toy's videos, without the report."""

    def run(benchmark, rows, *more):
        argv = ["--benchmark", benchmark, "--data", write(tmp_path / "t.json", rows), *more]
        argv += ["--model", saved, "--video_dir", toy, "--decode_ahead", 0, "--report_mb", 0]
        return evaluation.main(list(map(str, argv)))

    return run


def test_the_command_asks_a_benchmark_with_subtitles(command, toy, oracle, tmp_path, capsys):
    made = oracle(says)
    stems = sorted(p.stem for p in (toy / "videos").iterdir())[:3]
    rows = []
    for stem, duration in zip(stems, ("long", "short", "long")):
        rows.append(VIDEOMME | {"videoID": stem, "question_id": stem, "duration": duration})
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / f"{stems[0]}.srt").write_text(SRT)
    argv = ["videomme", rows, "--frames", 2, 3, "--output", tmp_path / "out", "--subtitles"]
    result = command(*argv, tmp_path / "srt")
    assert [r["category"] for r in result["records"]] == ["long", "short", "long"]
    longer = [len(p.ids) > len(made[0].prompts[1].ids) for p in made[0].prompts[:3]]
    assert longer == [True, False, False] and not result["errors"]
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["videos_without_subtitles"] == 2 and list(found["frames"]) == ["2", "3"]
    assert "videomme, with subtitles (2 of 3 videos have none), 3 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings .*srt was"):
        (tmp_path / "srt" / f"{stems[1]}.srt").write_text(SRT)
        command(*argv, tmp_path / "srt")
    for folder in ("none", "out"):
        with pytest.raises(SystemExit, match=f"error: .*{folder}: no .srt files"):
            command(*argv, tmp_path / folder)


def test_subtitles_need_no_second_look_at_a_video(toy, model, monkeypatch):
    rows = data.load_rows(str(toy / "test.jsonl"))[:5]  # about one video
    opened = []
    real = data.Opener.open
    monkeypatch.setattr(data.Opener, "open", lambda *how: opened.append(1) or real(*how))
    for e in rows:
        assert len(model.features(e, 3)[0].times) == 3
        model.prompt(e, 3)
    assert len({e.media for e in rows}) == len(opened) == 1


def test_a_vnbench_question_counts_only_if_all_its_shuffles_are_right(command, oracle, tmp_path):
    rows = []
    for i, (kind, gold) in enumerate([("cnt", 3), ("cnt", 3), ("ret", 3), ("ret", 4)]):
        rows.append(VN | {"video": "x/test_0.mp4", "type": kind, "gt": gold, "try": i % 2})
    oracle(lambda text: says("B"))  # B is 3, A is 4
    result = command("vnbench", rows, "--output", tmp_path / "o")
    assert result["questions"] == 2 and result["accuracy"] == 0.5 and len(result["records"]) == 4
    assert result["by_category"] == {"cnt": 1.0, "ret": 0.0}
    short = command("vnbench", rows, "--output", tmp_path / "o1", "--limit", 1)
    assert len(short["records"]) == 2 and short["questions"] == 1
