"""Decoding: which frames, their times, and files that mean harm; each costs itself alone."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
import zoo
from conftest import run_ranks, write_video_with_audio, write_wav
from PIL import Image
from test_data import medium, numbered_frames, numbers_of

import data
import mrsp
import sft
import train
from data import DataError, Rate
from families.vila import VILA
from kit import decode
from kit.sound import load_audio
from kit.toy import write_mp4

PRESENT = "no question"


def write_video(path, frames, codec="mpeg4", fps=10, pts=None, turn=0, **options):
    """frames (F, H, W, 3) as a video; pts: when each is shown, in milliseconds; turn: degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture
def loader():
    made = decode.Loader(ahead=1, limit=20)
    yield made
    made.close()


def seen(loader, m, how=4):
    with loader.open(m, how, PRESENT) as frames:
        return frames[:], frames.times


# -------------------------------------------------------------------------- which frames, and when


@pytest.mark.parametrize(
    "rate, expected",
    (
        (Rate(1), [0, 22, 45, 68, 91, 114, 137]),  # 70 frames at 10 a second: 7 of them
        (Rate(0.5), None),
        (Rate(0.01), [0]),
        (Rate(1000), list(range(70))),
        (Rate(10), list(range(70))),
        (Rate(5, most=3), [0, 34, 69]),
    ),
)
def test_a_rate_gives_frames_a_second(tmp_path, rate, expected):
    path = write_video(tmp_path / "v.mp4", numbered_frames(70))
    frames, times = data.load_media(medium(path), rate)
    n = min(max(round(7 * rate.fps), 1), 70, rate.most)
    assert len(frames) == len(times) == n
    if rate == Rate(1):
        expected = np.linspace(0, 69, 7, dtype=int).tolist()
    if expected is not None:
        assert numbers_of(frames).tolist() == expected
        assert times == pytest.approx(np.array(expected) / 10)


def test_a_rate_counts_in_a_segment(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered_frames(70))
    frames, times = data.load_media(medium(path, segment=(2.0, 4.0)), Rate(2))
    assert numbers_of(frames).tolist() == [20, 26, 32, 39] and times[0] == 2.0


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
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for i in range(5):
            frame = np.full((*size, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = data.load_media(medium(tmp_path / "v.mkv"), 5)[0]
    assert frames.shape == (5, *size, 3)
    assert all((frame == 40 * i).all() for i, frame in enumerate(frames))


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
    huge = np.zeros((1, 8200, 8200, 3), np.uint8)
    write_video(folder / "huge.mkv", huge, "ffv1")
    write_video(folder / "variable.mkv", frames[:9], pts=np.arange(9) ** 2 * 50)
    write_video(folder / "turned.mp4", frames[:9], turn=90)
    (folder / "folder.mp4").mkdir()
    for name in ("hangs.mp4", "late.mp4", "crashes.mp4"):
        rest = b"\0\0\0\x10free" + name[:8].encode()  # files alike would share their embeddings
        (folder / name).write_bytes(whole + rest)
    return {
        "good.mp4": 4, "zero.mp4": "file is empty.*download it again", "good.webm": 4,
        "text.mp4": "Invalid data found", "noise.mp4": "does not decode as video",
        "cut.mp4": "does not decode as video", "cut.webm": "cut off, .* s of .* s",
        "garbage.mp4": "does not decode as video", "one.mp4": 1,
        "sound.mp4": "no video stream", "huge.mkv": "8200 x 8200 pixels: more than",
        "hangs.mp4": "gave nothing within 4 s", "variable.mkv": 4,
        "late.mp4": "gave nothing within 4 s", "crashes.mp4": "crashed .exit status -6.$",
        "turned.mp4": 4, "folder.mp4": "no such file", "absent.mp4": "no such file",
    }  # fmt: skip


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


def test_each_hostile_file_has_its_outcome_and_costs_itself_alone(directory, hostile):
    folder, expected = directory
    loader = decode.Loader(ahead=2, limit=4)
    files = [medium(folder / name) for name in expected]
    loader.ahead((m, 4, "q", lambda shape: slice(0, 2)) for m in files)
    for m, (name, outcome) in zip(files, expected.items()):
        if isinstance(outcome, int):
            frames, times = seen(loader, m)
            assert len(frames) == len(times) == outcome, name
        else:
            with pytest.raises(DataError, match=outcome) as error:
                seen(loader, m)
            assert error.value.question and str(error.value).count("(question q)") <= 1
    loader.close()


def test_training_and_evaluation_go_on_without_the_hostile_files(
    directory, hostile, toy, tmp_path, capsys
):
    """The list names each lost row once, with its error; nothing takes their place."""
    folder, expected = directory
    rows = []
    for name in expected:
        rows.append(
            {"problem_id": name, "problem": "Which?\nA. red\nB. blue", "data_type": "video"}
            | {"problem_type": "x", "reasoning": "seen", "answer": "<answer>A</answer>"}
            | {"videos": name}
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lost = sorted(name for name, outcome in expected.items() if isinstance(outcome, str))
    own, questions = str(toy / "init"), str(tmp_path / "rows.jsonl")
    arguments = [
        "--preset", "qwen2.5-vl-7b", "--model", own, "--cache_dir", str(tmp_path / "cache"),
        "--data", questions, "--sft_data", questions, "--test_data", questions, "--video_dir",
        str(folder), "--sp", "1", "--fsdp", "false", "--dtype", "float32", "--rollout", "torch",
        "--decode_seconds", "4", "--recipe_num_frames", "4", "--recipe_max_tokens", "4",
        "--sft_steps", "3", "--sft_groups", "8", "--grpo_steps", "3", "--grpo_prompts", "8",
        "--grpo_update_prompts", "8", "--grpo_group", "2",
    ]  # fmt: skip
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="2 of 18 media files are missing"):
        train.main([*arguments, "--output_dir", str(out)])
    summary = train.main([*arguments, "--output_dir", str(out), "--on_bad_video", "skip"])
    listed = [json.loads(line) for line in (out / "lost.jsonl").open()]
    assert [row["row"] for row in listed] == lost and summary["lost"] == len(lost)
    assert all(row["row"] in row["error"] for row in listed)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [m["stage"] for m in metrics] == ["sft"] * 3 + ["grpo"] * 3
    batches = sft.batches(list(expected), 8, 3, 0)
    assert (
        sum(m["lost_rows"] for m in metrics[3:]) == sum(n in lost for b in batches for n in b) > 0
    )
    assert summary["questions"] == len(rows)


def test_the_first_bad_video_ends_a_run_that_does_not_skip(directory, hostile, toy, model):
    folder, expected = directory
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    rows = [replace(row, id=n, media=(medium(folder / n),)) for n in ("good.mp4", "cut.mp4")]
    see = lambda examples: [model.prompt(e, 4) for e in examples]  # noqa: E731
    with pytest.raises(DataError, match=r"cut.mp4: does not decode.*\(question cut.mp4\)"):
        model.usable(rows, see, None)
    lost = {}
    left, prompts = model.usable(rows, see, lost)
    assert left == rows[:1] and len(prompts) == 1 and list(lost) == rows[1:]
    assert model.usable(rows[1:], see, lost) == ([], [])  # it is not opened again


def test_a_hanging_child_is_killed_and_another_one_goes_on(directory, hostile):
    folder, _ = directory
    loader = decode.Loader(ahead=1, limit=4)
    assert len(seen(loader, medium(folder / "good.mp4"))[0]) == 4
    first = loader.idle[0].process
    with pytest.raises(DataError, match="gave nothing within 4 s"):
        seen(loader, medium(folder / "hangs.mp4"))
    assert first.poll() == -9 and not loader.idle
    with pytest.raises(DataError, match="question another.*within 4 s") as error:  # at once
        with loader.open(medium(folder / "hangs.mp4"), 8, "another"):
            pass
    assert error.value.question == "another" and not loader.idle
    assert len(seen(loader, medium(folder / "good.mp4"))[0]) == 4
    assert loader.idle[0].process.pid != first.pid
    loader.close()


def test_closing_ends_a_child_that_hangs(directory, hostile):
    """Or the exit of a run that failed would wait for it."""
    loader = decode.Loader(ahead=1, limit=600)
    loader.ahead([(medium(directory[0] / "hangs.mp4"), 4, "q", lambda shape: slice(0, 2))])
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
    plan = [
        (medium(directory[0] / name), 4, "planned", lambda shape: slice(0, 2))
        for name in ("cut.mp4", "good.mp4")
    ]
    loader.ahead(plan)
    with pytest.raises(DataError, match="question asks") as error:
        with loader.open(plan[0][0], 4, "asks"):
            pass
    assert error.value.question == "asks" and "planned" not in str(error.value)
    loader.ahead(plan)
    assert [m for m, _ in loader.started] == [plan[1][0]]


def test_a_child_that_was_late_is_so_for_each_request(directory, hostile):
    loader = decode.Loader(ahead=1, limit=4)
    with pytest.raises(DataError, match="gave nothing within 4 s"):
        with loader.open(medium(directory[0] / "late.mp4"), 4) as frames:
            frames.ask(slice(0, 2))
            frames[0:3]
    loader.close()


def test_rows_of_one_id_in_two_files_are_not_taken_for_each_other(directory, toy, model):
    row, lost = data.load_rows(str(toy / "rl.jsonl"))[0], {}
    bad, good = (replace(row, media=(medium(directory[0] / n),)) for n in ("cut.mp4", "good.mp4"))
    see = lambda examples: [model.prompt(e, 4) for e in examples]  # noqa: E731
    assert model.usable([bad], see, lost) == ([], [])
    assert model.usable([good], see, lost)[0] == [good] and list(lost) == [bad]


def test_a_disk_that_fails_costs_the_row(directory, toy, model, monkeypatch):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    monkeypatch.setattr(mrsp, "file_hash", lambda path: open("/proc/self/mem").read(1))
    model.loader = decode.Loader(1)
    model.ahead([row])
    with pytest.raises(DataError, match=f"{row.media[0].path}.*{row.id}.*Input/output") as error:
        model.features(row, 4)
    assert error.value.question == row.id


def test_media_that_a_family_cannot_take_cost_the_row(tmp_path):
    write_wav(tmp_path / "short.wav", 0.01)
    Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save(tmp_path / "line.png")
    model = zoo.build("omni")
    for name, kind, said in (
        ("short.wav", "audio", "too short to be heard"), ("line.png", "image", "than 200 times")
    ):  # fmt: skip
        bad = data.Example("q7", "", (), "", "", (medium(tmp_path / name, kind),), kind, "")
        with pytest.raises(DataError, match=f"{name}.*question q7.*{said}") as error:
            model.features(bad, 4)
        assert error.value.question == "q7"


@pytest.mark.parametrize("name, said", (("crashes", "exit status -6"), ("cut", "decode as")))
def test_a_first_row_that_does_not_decode_refuses_no_run_that_skips(
    directory, hostile, toy, tmp_path, name, said
):
    row = json.loads((toy / "rl.jsonl").read_text().splitlines()[0]) | {"videos": f"{name}.mp4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for how in ("error", "skip"):
        preset = train.parse_options(
            ["--preset", "qwen2.5-vl-7b", "--model", str(toy / "init"), "--sp", "1", "--data"]
            + [str(tmp_path / "rows.jsonl"), "--video_dir", str(directory[0]), "--on_bad_video"]
            + [how, "--decode_seconds", "4", "--recipe_max_tokens", "4", "--recipe_num_frames", "4"]
        )
        lines, lacks = train.prepare(preset, 1)
        assert [said in "\n".join(part) for part in (lines, lacks)] == [
            how == "skip",
            how != "skip",
        ]


def test_files_are_opened_ahead_a_few_at_a_time(tmp_path):
    """While one is looked at, `ahead` others wait with their first piece; the plan is looked at as
    late as possible; what was planned and is not wanted is dropped."""
    names = "abcdef"
    for name in names:
        write_video(tmp_path / f"{name}.mp4", numbered_frames(8))
    loader, asked = decode.Loader(ahead=2, limit=20), []

    def plan():
        for name in names:
            asked.append(name)
            yield medium(tmp_path / f"{name}.mp4"), 4, name, lambda shape: slice(0, shape[0] // 2)

    loader.ahead(plan())
    assert asked == ["a", "b"]
    with loader.open(medium(tmp_path / "a.mp4"), 4) as frames:
        assert frames.asked == slice(0, 2) and frames[0:2].shape[0] == 2
        assert asked == ["a", "b", "c"]  # while this one is looked at
    assert asked == ["a", "b", "c"]
    with loader.open(medium(tmp_path / "e.mp4"), 4) as frames:  # not planned for now
        assert len(frames[:]) == 4
    with loader.open(medium(tmp_path / "c.mp4"), 4) as frames:  # without b
        waiting = {os.path.basename(m.path) for m, _ in loader.started}
        assert waiting == {"d.mp4", "e.mp4"} and len(frames[0:2]) == 2
    assert "b.mp4" not in {os.path.basename(m.path) for m, _ in loader.started}
    pids = [f.result().worker.process for f in loader.started.values()]
    pids += [w.process for w in loader.idle]
    loader.close()
    assert all(p.poll() is not None for p in pids)


def test_a_child_is_replaced_after_so_many_files(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(8))
    loader = decode.Loader(ahead=1, limit=20, uses=3)
    pids = []
    for _ in range(7):
        with loader.open(medium(tmp_path / "v.mp4"), 2) as frames:
            pids.append(frames.worker.process.pid)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    loader.close()


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


def both_ranks_fail_alike(rank, folder, checkpoint):
    """One rank of a sequence cannot open a file, or decode its share: both raise the same error,
    and the next video is encoded together."""
    import torch.distributed as dist

    model, group = VILA.from_pretrained(checkpoint), dist.group.WORLD
    good = data.Example("good", "", (), "", "", (medium(f"{folder}/good.mp4"),), "video", "")
    whole = model.features(good, 6)[0].features
    model.timed = True
    if rank == 0:
        model.features(good, 7)  # alone, as in an evaluation: it knows the times now
    model.cache.memory.clear()
    assert len(model.features(good, 7, group)[0].times) == 7
    for fails in (0, 1):
        for where in ("open_video", "get"):
            model.cache.memory.clear()  # the files are alike
            bad = replace(good, id="bad", media=(medium(f"{folder}/bad{fails}{where}.mp4"),))
            with pytest.MonkeyPatch.context() as patch:
                if rank == fails and where == "open_video":
                    patch.setattr(data, "open_video", lambda *a: 1 / 0)
                if rank == fails and where == "get":
                    patch.setattr(
                        data.Frames, "pieces", lambda *a: data.Frames(medium("gone"), 1)[:]
                    )
                with pytest.raises(DataError) as error:
                    model.features(bad, 6, group)
            said = [None, None]
            dist.all_gather_object(said, str(error.value))
            assert said[0] == said[1]
            model.cache.memory.clear()
            assert (model.features(good, 6, group)[0].features - whole).abs().max() < 1e-6


def shares_fail_alike(rank, folder):
    """Where the size of a share of the frames is not that of all of them (Qwen3-VL), and where the
    first look at a file fails on one rank."""
    import torch.distributed as dist

    model, group = zoo.build("qwen3-vl"), dist.group.WORLD
    fail = lambda *a: data.Frames(medium("gone"), 1)[:]  # noqa: E731
    for kind, name in (("video", "good.mp4"), ("image", "i.png")):
        example = data.Example("q", "", (), "", "", (medium(f"{folder}/{name}", kind),), kind, "")
        for where, failing in (("pieces", fail), ("shape", property(fail))):
            with pytest.MonkeyPatch.context() as patch:
                if rank == 0:
                    patch.setattr(data.Frames, where, failing)
                with pytest.raises(DataError, match="gone"):
                    model.features(example, 12, group)
            model.loader.failed.clear()
        assert model.features(example, 12, group)


def test_shares_of_a_sequence_fail_together(tmp_path):
    write_mp4(str(tmp_path / "good.mp4"), numbered_frames(30))
    Image.fromarray(numbered_frames(3)[2]).save(tmp_path / "i.png")
    run_ranks(shares_fail_alike, 2, str(tmp_path))


def test_ranks_of_a_sequence_fail_together(toy, tmp_path):
    for name in ("good", *(f"bad{i}{w}" for i in (0, 1) for w in ("open_video", "get"))):
        write_mp4(str(tmp_path / f"{name}.mp4"), numbered_frames(12)[:, :32, :32])
    run_ranks(both_ranks_fail_alike, 2, str(tmp_path), str(toy / "init"))


def test_a_run_whose_rows_are_all_left_out_is_an_error(directory, toy, tmp_path, model):
    folder, _ = directory
    row = {"problem_id": "x", "problem": "Which?\nA. red\nB. blue", "data_type": "video",
           "problem_type": "x", "reasoning": "seen", "answer": "<answer>A</answer>"}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"videos": "cut.mp4"}) + "\n")
    rows = str(tmp_path / "rows.jsonl")
    arguments = [
        "--preset", "qwen2.5-vl-7b", "--model", str(toy / "init"), "--data", rows, "--video_dir",
        str(folder), "--sp", "1", "--fsdp", "false", "--dtype", "float32", "--rollout", "torch",
        "--on_bad_video", "skip", "--grpo_steps", "2", "--grpo_prompts", "2", "--recipe_num_frames",
        "4", "--grpo_update_prompts", "2", "--output_dir", str(tmp_path / "run"), "--cache_dir",
        str(tmp_path / "cache"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="GRPO had no row to learn from"):
        train.main(arguments)
    gone, rows = (medium(folder / "cut.mp4"),), data.load_rows(str(toy / "sft.jsonl"))
    rows = [replace(r, media=gone) for r in rows]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sft.train(model, rows, sft.SFTConfig(steps=2, groups=1, train="llm", weight_decay=0.1), lost={})
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
