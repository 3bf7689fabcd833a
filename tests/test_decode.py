"""Decoding: which frames, their times, and files that mean harm; each costs itself alone."""

import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zoo
from conftest import read_jsonl, row, run_ranks, write_jsonl, write_video_with_audio, write_wav
from media import copied, medium, numbered_frames, numbers_of, packet_starts, write_video
from PIL import Image

import data
import mrsp
import sft
import train
from data import DataError, Example, Rate
from kit import decode
from kit.plan import make_plan
from kit.presets import read_settings
from kit.sound import load_audio
from kit.toy import write_mp4


@pytest.fixture
def loader():
    made = decode.Loader(ahead=1, limit=60)
    yield made
    made.close()


def seen(loader, m, how=4, name="q7"):
    with loader.open(m, how, name) as frames:
        return frames[:], frames.times


def first_two(shape) -> slice:
    return slice(0, 2)


def question(m, name="q7") -> Example:
    return Example(name, "", (), "", "", (m,), m.kind, "")


def write_rows(folder, names) -> str:
    """A question about each file, under its name."""
    rows = [row(0, problem_id=name, data_type="video", videos=name) for name in names]
    return str(write_jsonl(folder / "rows.jsonl", rows))


def arguments_of(model, rows, videos, more) -> list[str]:
    """A command line of train.py on one process; more: options as one text."""
    options = "--preset qwen2.5-vl-7b --sp 1 --fsdp false --dtype float32 --rollout torch "
    options += "--recipe.num_frames 4 --recipe.max_tokens 4 --decode_seconds 4 "
    paths = {"--model": model, "--data": rows, "--video_dir": videos}
    paths["--cache_dir"] = Path(rows).with_name("cache")
    return [*(options + more).split(), *(str(x) for pair in paths.items() for x in pair)]


# -------------------------------------------------------------------------- which frames, and when


@pytest.mark.parametrize(
    "rate, segment, expected",
    [
        (Rate(1), None, [0, 11, 23, 34, 46, 57, 69]),  # 70 frames at 10 a second: 7 of them
        (Rate(0.5), None, [0, 23, 46, 69]),  # 3.5: 4
        (Rate(0.01), None, [0]),
        (Rate(1000), None, list(range(70))),
        (Rate(10), None, list(range(70))),
        (Rate(5, most=3), None, [0, 34, 69]),
        (Rate(2), (2.0, 4.0), [20, 26, 32, 39]),
    ],
)
def test_a_rate_gives_frames_a_second(tmp_path, rate, segment, expected):
    path = write_video(tmp_path / "v.mp4", numbered_frames(70))
    frames, times = data.load_media(medium(path, segment=segment), rate)
    assert numbers_of(frames).tolist() == expected
    assert times == pytest.approx(np.array(expected) / 10)


@pytest.mark.parametrize("ending", ("mp4", "mkv"))
def test_times_of_a_variable_frame_rate_are_those_of_the_file(tmp_path, ending):
    """30 frames in 1.2 s, then 30 in 6 s: a rate takes them evenly by time, a number by index."""
    pts = np.cumsum([0] + [40] * 30 + [200] * 29)
    path = write_video(tmp_path / f"v.{ending}", numbered_frames(60), fps=30, pts=pts)
    frames, times = data.load_media(medium(path), 60)
    assert np.abs(times - pts / 1000).max() < 2e-3
    frames, times = data.load_media(medium(path), Rate(1))
    wanted = np.linspace(0, pts[-1], len(frames))
    shown = [np.searchsorted(pts, t + 1, "right") - 1 for t in wanted]
    assert numbers_of(frames).tolist() == shown and len(frames) == 7
    assert np.abs(times - pts[shown] / 1000).max() < 2e-3
    inside, times = data.load_media(medium(path, segment=(1.2, 2.2)), 99)
    assert numbers_of(inside).tolist() == [30, 31, 32, 33, 34]
    by_number = data.load_media(medium(path), 3)[0]
    assert numbers_of(by_number).tolist() == [0, 29, 59]


@pytest.mark.parametrize("ending", ("mp4", "mkv"))
def test_a_file_that_starts_late_is_whole(tmp_path, ending):
    """A recording that was joined in: Matroska tells when it ends, not how long it is."""
    pts = 5000 + np.arange(30) * 100
    path = write_video(tmp_path / f"v.{ending}", numbered_frames(30), pts=pts)
    frames, times = data.load_media(medium(path), 30)
    assert numbers_of(frames).tolist() == list(range(30))
    assert times == pytest.approx(np.arange(30) / 10)


@pytest.mark.parametrize("turn", (90, 180, 270))
@pytest.mark.parametrize("size", ((48, 64), (50, 34)))
def test_a_turned_video_is_shown_upright(tmp_path, turn, size):
    """Telephones store frames as the sensor gives them, with the angle to show them at."""
    frames = np.zeros((6, *size, 3), np.uint8)
    frames[:, : size[0] // 3, : size[1] // 2] = (250, 30, 30)
    frames += (np.arange(6, dtype=np.uint8) * 20)[:, None, None, None] // 5
    path = write_video(tmp_path / "v.mp4", frames, turn=turn)
    upright = np.rot90(frames, turn // 90, axes=(1, 2)).astype(int)
    got, times = data.load_media(medium(path), 6)
    assert got.shape == upright.shape and times.tolist() == [i / 10 for i in range(6)]
    assert np.abs(got - upright).mean() < 12
    lazy = data.Frames(medium(path), 3)
    assert lazy.shape == (3, *upright.shape[1:])
    for part in (slice(2, 3), slice(0, 2), slice(1, 3)):  # forth and back
        assert np.array_equal(lazy[part], got[lazy.indices[part]])


@pytest.mark.parametrize("size", ((33, 17), (1, 99), (48, 127)))
def test_odd_sizes_are_kept(tmp_path, size):
    grey = np.full((5, *size, 3), 40, np.uint8) * np.arange(5, dtype=np.uint8)[:, None, None, None]
    path = write_video(tmp_path / "v.mkv", grey, "ffv1", pixels="bgr0")
    assert np.array_equal(data.load_media(medium(path), 5)[0], grey)


# ------------------------------------------------------------------------------ in a child process


def test_a_child_gives_the_same_frames_and_sound(tmp_path, loader):
    video = medium(tmp_path / "v.mp4", segment=(0.5, 2.5))
    write_video_with_audio(tmp_path / "v.mp4", numbered_frames(30), 10, 3.0, 440)
    write_wav(tmp_path / "s.wav", 1.0)
    Image.fromarray(numbered_frames(3)[2]).save(tmp_path / "i.png")
    for m, how in ((video, 7), (video, Rate(3)), (medium(tmp_path / "i.png", "image"), 5)):
        for one, other in zip(seen(loader, m, how), data.load_media(m, how)):
            assert np.array_equal(one, other)
    with loader.open(video, 20, "q") as frames:
        whole = data.load_media(video, 20)[0]
        assert frames.shape == whole.shape and len(frames) == 20
        parts = [slice(0, 3), slice(3, 4), slice(4, 20)]
        assert np.array_equal(np.concatenate(list(frames.pieces(parts))), whole)
        frames.ask(slice(5, 9))
        assert np.array_equal(frames[2:4], whole[2:4])  # another part than it was asked for
    for m in (video._replace(segment=None), medium(tmp_path / "s.wav", "audio")):
        assert np.array_equal(loader.sound(m), load_audio(m))
    assert len(loader.idle) == 1  # one process did it all


def broken(folder):
    """A directory of what one meets: name -> words of the error, or the number of frames."""
    frames = numbered_frames(64)
    write_video(folder / "good.mp4", frames)
    write_video(folder / "good.webm", frames[:20], "libvpx")
    whole, webm = (folder / "good.mp4").read_bytes(), (folder / "good.webm").read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html>404 Not Found</html>\n" * 99)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.webm").write_bytes(webm[: len(webm) // 2])
    third = len(whole) // 3
    (folder / "garbage.mp4").write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
    write_video(folder / "one.mp4", frames[:1])
    write_wav(folder / "sound.wav", 1.0)
    (folder / "sound.wav").rename(folder / "sound.mp4")
    write_video(folder / "huge.mkv", np.zeros((1, 300, 300, 3), np.uint8), "ffv1")
    huge = (folder / "huge.mkv").read_bytes()
    for element in (b"\xb0\x82", b"\xba\x82"):  # width and height: 300 becomes 8200
        huge = huge.replace(element + b"\x01\x2c", element + b"\x20\x08")
    (folder / "huge.mkv").write_bytes(huge)
    write_video(folder / "variable.mkv", frames[:9], pts=np.arange(9) ** 2 * 50)
    write_video(folder / "turned.mp4", frames[:9], turn=90)
    (folder / "folder.mp4").mkdir()
    for name in ("hangs.mp4", "late.mp4", "crashes.mp4"):
        rest = b"\0\0\0\x10free" + name[:8].encode()  # files alike would share their embeddings
        (folder / name).write_bytes(whole + rest)
    return {
        "good.mp4": 4,
        "zero.mp4": "file is empty.*download it again",
        "good.webm": 4,
        "text.mp4": "Invalid data found",
        "noise.mp4": "does not decode as video",
        "cut.mp4": "does not decode as video",
        "cut.webm": "cut off, .* s of .* s",
        "garbage.mp4": "does not decode as video",
        "one.mp4": 1,
        "sound.mp4": "no video stream",
        "huge.mkv": "8200 x 8200 pixels: more than",
        "hangs.mp4": "gave nothing within 4 s",
        "variable.mkv": 4,
        "late.mp4": "gave nothing within 4 s",
        "crashes.mp4": "crashed .exit status -6.$",
        "turned.mp4": 4,
        "folder.mp4": "no such file",
        "absent.mp4": "no such file",
    }


def truncated(folder):
    """Yields downloads that broke off: an index (moov) behind the packets, as ffmpeg writes it, or
    in front of them, as on the web."""
    write_mp4(str(folder / "behind.mp4"), numbered_frames(70))
    copied(folder / "behind.mp4", folder / "front.mp4", movflags="+faststart")
    behind, front = ((folder / f"{name}.mp4").read_bytes() for name in ("behind", "front"))
    assert behind.find(b"moov") > behind.find(b"mdat") and front.find(b"moov") < front.find(b"mdat")
    starts = packet_starts(folder / "front.mp4")
    assert len(data.load_media(medium(folder / "front.mp4"), 70)[0]) == len(starts) == 70
    for share in (0.1, 0.5, 0.9):  # the last 5 % are a tag that may go
        yield "mp4", behind[: int(share * len(behind))]
    yield "mp4", front[: len(front) // 10]
    for packets in (35, 67):  # 2 % are allowed: some files declare too many
        yield "mp4", front[: starts[packets]]
    for packets in (35, 67, 69):
        yield "mp4", front[: starts[packets] - 3]
    yield "mp4", front[: starts[20]] + bytes(starts[50] - starts[20]) + front[starts[50] :]
    whole = Path(write_video(folder / "v.mkv", numbered_frames(70))).read_bytes()
    yield "mkv", whole[: len(whole) // 2]


# A worker that sleeps or aborts on certain names, as a decoder does on certain bytes.
HOSTILE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import data
from kit import decode
opened = data.open_video
def open_video(path, *rest):
    name = os.path.basename(path)
    if name.startswith("hangs"): time.sleep(600)
    if name.startswith("crashes"): os.abort()
    read, *more = opened(path, *rest)
    late = lambda at: time.sleep(600 if len(at) > 1 else 0) or read(at)  # the first frame comes
    return (late if name.startswith("late") else read, *more)
data.open_video = open_video
decode.serve()
"""


@pytest.fixture
def hostile(monkeypatch):
    command = [sys.executable, "-c", HOSTILE, os.path.dirname(data.__file__)]
    monkeypatch.setattr(decode.Worker, "command", command)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder, broken(folder)


@pytest.mark.parametrize("limit", (60, pytest.param(4, marks=pytest.mark.slow)))
def test_each_hostile_file_has_its_outcome_and_costs_itself_alone(directory, hostile, limit):
    folder, expected = directory
    loader = decode.Loader(ahead=2, limit=limit)
    named = {name: x for name, x in expected.items() if limit == 4 or "within" not in str(x)}
    files = [medium(folder / name) for name in named]
    loader.ahead((m, 4, "q", first_two) for m in files)
    for m, (name, outcome) in zip(files, named.items()):
        if isinstance(outcome, int):
            frames, times = seen(loader, m)
            assert len(frames) == len(times) == outcome, name
        else:
            with pytest.raises(DataError, match=outcome) as error:
                seen(loader, m)
            message = str(error.value)
            assert error.value.question == "q7" and message.startswith(f"{m.path}: ")
            assert message.count("(question q7)") == 1 and "\n" not in message
    loader.close()


def test_a_download_that_broke_off_is_refused_by_name(tmp_path, loader):
    for i, (ending, content) in enumerate(truncated(tmp_path)):
        path = tmp_path / f"{i}.{ending}"
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            seen(loader, medium(path))
        message = str(error.value)
        assert message.startswith(f"{path}: does not decode as video (question q7): ")
        assert "\n" not in message


@pytest.mark.slow
def test_a_run_goes_on_without_the_hostile_files(directory, hostile, toy, tmp_path):
    """The list names each lost row once, with its error; nothing takes their place."""
    folder, expected = directory
    lost = sorted(name for name, outcome in expected.items() if isinstance(outcome, str))
    rows, out = write_rows(tmp_path, expected), tmp_path / "run"
    more = f"--sft_data {rows} --test_data {rows} --output_dir {out} --sft.steps 3 --sft.groups 8 "
    more += "--grpo.steps 3 --grpo.prompts 8 --grpo.update_prompts 8 --grpo.group 2"
    arguments = arguments_of(toy / "init", rows, folder, more)
    with pytest.raises(SystemExit, match="2 of 18 media files are missing"):
        train.main(arguments)
    summary = train.main([*arguments, "--on_bad_video", "skip"])
    listed = read_jsonl(out / "lost.jsonl")
    assert [row["row"] for row in listed] == lost and summary["lost"] == len(lost)
    assert all(row["row"] in row["error"] for row in listed)
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["stage"] for m in metrics] == ["sft"] * 3 + ["grpo"] * 3
    batches = sft.batches(list(expected), 8, 3, 0)
    left_out = sum(name in lost for batch in batches for name in batch)
    assert sum(m["lost_rows"] for m in metrics[3:]) == left_out > 0
    assert summary["questions"] == len(expected)


def test_a_bad_video_ends_a_run_or_costs_its_row_alone(directory, toy, model):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    good, bad = (
        replace(row, id=name, media=(medium(directory[0] / name),))
        for name in ("good.mp4", "cut.mp4")
    )

    def see(examples):
        return [model.prompt(e, 4) for e in examples]

    with pytest.raises(DataError, match=r"cut.mp4: does not decode.*\(question cut.mp4\)"):
        model.usable([good, bad], see, None)
    lost = {}
    left, prompts = model.usable([good, bad], see, lost)
    assert left == [good] and len(prompts) == 1 and list(lost) == [bad]
    assert model.usable([bad], see, lost) == ([], [])  # it is not opened again
    other = replace(good, id=bad.id)  # rows of two files may have the same id
    assert model.usable([other], see, lost)[0] == [other] and list(lost) == [bad]


def test_a_hanging_child_is_killed_and_another_one_goes_on(directory, hostile, loader):
    folder, _ = directory
    assert len(seen(loader, medium(folder / "good.mp4"))[0]) == 4
    (first,) = loader.idle
    first.limit = 0.5
    with pytest.raises(DataError, match="gave nothing within 0.5 s"):
        seen(loader, medium(folder / "hangs.mp4"))
    assert first.process.poll() == -9 and not loader.idle
    with pytest.raises(DataError, match="question another.*within 0.5 s") as error:  # at once
        seen(loader, medium(folder / "hangs.mp4"), 8, "another")
    assert error.value.question == "another" and not loader.idle
    assert len(seen(loader, medium(folder / "good.mp4"))[0]) == 4
    assert loader.idle[0].process.pid != first.process.pid


def test_closing_ends_a_child_that_hangs(directory, hostile):
    """Or the exit of a run that failed would wait for it."""
    loader = decode.Loader(ahead=1, limit=600)
    loader.ahead([(medium(directory[0] / "hangs.mp4"), 4, "q", first_two)])
    (future,) = loader.started.values()
    while not loader.busy:
        time.sleep(0.01)
    loader.close()
    assert isinstance(future.exception(timeout=60), DataError) and not loader.busy


def test_a_child_that_died_idle_is_not_blamed_on_the_next_file(directory, loader):
    good = [medium(directory[0] / "good.mp4", segment=(0, end)) for end in (1.0, 2.0)]
    seen(loader, good[0])
    loader.idle[0].process.kill()
    loader.idle[0].process.wait()
    assert len(seen(loader, good[1])[0]) == 4


def test_who_asks_for_a_planned_file_is_named_and_it_is_not_planned_again(directory, loader):
    files = [medium(directory[0] / name) for name in ("cut.mp4", "good.mp4")]
    plan = [(m, 4, "planned", first_two) for m in files]
    loader.ahead(plan)
    with pytest.raises(DataError, match="question asks") as error:
        seen(loader, files[0], 4, "asks")
    assert error.value.question == "asks" and "planned" not in str(error.value)
    loader.ahead(plan)
    assert [m for m, _ in loader.started] == files[1:]


def test_a_child_that_was_late_is_so_for_each_request(directory, hostile, loader):
    with pytest.raises(DataError, match="gave nothing within 0.5 s"):
        with loader.open(medium(directory[0] / "late.mp4"), 4) as frames:
            frames.worker.limit = 0.5
            frames.ask(slice(0, 2))
            frames[0:3]


def test_a_disk_that_fails_costs_the_row(directory, toy, model, monkeypatch):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    monkeypatch.setattr(mrsp, "file_hash", lambda path: open("/proc/self/mem").read(1))
    model.loader = decode.Loader(1)
    model.prefetch([row])
    with pytest.raises(DataError, match=f"{row.media[0].path}.*{row.id}.*Input/output") as error:
        model.features(row, 4)
    assert error.value.question == row.id


def test_media_that_a_family_cannot_take_cost_the_row(tmp_path):
    write_wav(tmp_path / "short.wav", 0.01)
    Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save(tmp_path / "line.png")
    model = zoo.build("omni")
    ratio = "ratio must be smaller than 200"
    for file, said in (("short.wav", "too short to be heard"), ("line.png", ratio)):
        m = medium(tmp_path / file, "audio" if file == "short.wav" else "image")
        with pytest.raises(DataError, match=f"{file}.*question q7.*{said}") as error:
            model.features(question(m), 4)
        assert error.value.question == "q7"


@pytest.mark.slow
@pytest.mark.parametrize("name, said", (("crashes", "exit status -6"), ("cut", "decode as")))
def test_a_first_row_that_does_not_decode_refuses_no_run_that_skips(
    directory, hostile, toy, tmp_path, name, said
):
    rows = write_rows(tmp_path, [f"{name}.mp4"])
    for how in ("error", "skip"):
        more = f"--on_bad_video {how}"
        settings, _, _ = read_settings(arguments_of(toy / "init", rows, directory[0], more))
        found = make_plan(settings, 1, "torch")
        assert (said in "\n".join(found.lines)) == (how == "skip")
        assert (said in "\n".join(found.wrong)) == (how != "skip")


def test_files_are_opened_ahead_a_few_at_a_time(tmp_path):
    """While one is looked at, `ahead` others wait with their first piece; the plan is looked at as
    late as possible; what was planned and is not wanted is dropped."""
    files = {name: medium(tmp_path / f"{name}.mp4") for name in "abcdef"}
    loader, asked = decode.Loader(ahead=2, limit=20), []

    def plan():
        for name, m in files.items():
            write_video(m.path, numbered_frames(8))
            asked.append(name)
            yield m, 4, name, first_two

    write_video(files["e"].path, numbered_frames(8))
    loader.ahead(plan())
    assert asked == ["a", "b"]
    with loader.open(files["a"], 4) as frames:
        assert frames.asked == slice(0, 2) and frames[0:2].shape[0] == 2
        assert asked == ["a", "b", "c"]  # while this one is looked at
    assert asked == ["a", "b", "c"]
    with loader.open(files["e"], 4) as frames:  # not planned for now
        assert len(frames[:]) == 4
    with loader.open(files["c"], 4) as frames:  # without b
        assert [m for m, _ in loader.started] == [files["d"], files["e"]]
        assert len(frames[0:2]) == 2
    assert files["b"] not in {m for m, _ in loader.started}
    pids = [f.result().worker.process for f in loader.started.values()]
    pids += [w.process for w in loader.idle]
    loader.close()
    assert all(p.poll() is not None for p in pids)


@pytest.mark.slow
def test_a_child_is_replaced_after_so_many_files(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(8))
    loader = decode.Loader(ahead=1, limit=20, uses=3)
    pids = []
    for _ in range(7):
        with loader.open(medium(tmp_path / "v.mp4"), 2) as frames:
            pids.append(frames.worker.process.pid)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    loader.close()


@pytest.mark.slow
def test_children_end_with_their_parent(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(8))
    code = (
        "import data, time\nfrom kit import decode\n"
        f"with decode.Loader(1).open(data.Medium('video', {str(tmp_path / 'v.mp4')!r}), 2) as f:\n"
        "    print(f.worker.process.pid, flush=True)\n    time.sleep(99)"
    )
    cwd = os.path.dirname(data.__file__)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=cwd)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=20)


# ---------------------------------------------------------------------------------------- ranks


def gone(*_):
    """In place of what a decoder does on one rank."""
    return data.Frames(medium("gone"), 1)[:]


def both_ranks_fail_alike(rank, folder, family):
    """One rank of a sequence cannot open a file, look at it first, or decode its share: both raise
    the same error, and then they encode it together."""
    import torch.distributed as dist

    model, group = zoo.build(family), dist.group.WORLD
    video, image = medium(f"{folder}/v.mp4"), medium(f"{folder}/i.png", "image")
    assert len(model.features(question(video), 7, group)[0].times) == 7
    whole = {m: model.features(question(m), 12)[0].features for m in (video, image)}
    places = [(video, data, "open_video")]
    places += [(m, data.Frames, name) for m in (video, image) for name in ("shape", "pieces")]
    for fails, (m, owner, name) in itertools.product((0, 1), places):
        model.cache.memory.clear()
        with pytest.MonkeyPatch.context() as patch:
            if rank == fails:
                patch.setattr(owner, name, property(gone) if name == "shape" else gone)
            with pytest.raises(DataError, match="gone: no such file") as error:
                model.features(question(m), 12, group)
        said = [None, None]
        dist.all_gather_object(said, str(error.value))
        assert said[0] == said[1]
        model.loader.failed.clear()
        found = model.features(question(m), 12, group)[0].features
        torch.testing.assert_close(found, whole[m], rtol=0, atol=1e-5)


# Qwen3-VL: the size of a share of the frames is not that of all of them.
@pytest.mark.slow
@pytest.mark.parametrize("family", ("vila", "qwen3-vl"))
def test_ranks_of_a_sequence_fail_together(tmp_path, family):
    write_mp4(str(tmp_path / "v.mp4"), numbered_frames(30))
    Image.fromarray(numbered_frames(3)[2]).save(tmp_path / "i.png")
    run_ranks(both_ranks_fail_alike, 2, str(tmp_path), family)


@pytest.mark.slow
def test_a_run_whose_rows_are_all_left_out_is_an_error(directory, toy, tmp_path, model):
    folder, _ = directory
    rows = write_rows(tmp_path, ["cut.mp4"])
    more = "--on_bad_video skip --grpo.steps 2 --grpo.prompts 2 --grpo.update_prompts 2 "
    more += f"--output_dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit, match="GRPO had no row to learn from"):
        train.main(arguments_of(toy / "init", rows, folder, more))
    gone, rows = (medium(folder / "cut.mp4"),), data.load_rows(str(toy / "sft.jsonl"))
    rows = [replace(r, media=gone) for r in rows]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = sft.SFTConfig(steps=2, groups=1, train="llm", weight_decay=0.1)
    with pytest.raises(DataError, match="SFT had no row to learn from"):
        sft.train(model, rows, config, lost={})
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
