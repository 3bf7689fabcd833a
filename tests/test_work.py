"""The one kill-and-resume suite: a folder of work ends with the same bytes, whatever happened.

Ranks are threads here that meet at a barrier, so that many histories of a folder are tried in a
second; one slow test has real processes, a real process group and SIGKILL.
"""

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import ProcessExitedException

from data import DataError
from kit import work
from kit.chat import ReplyError
from kit.ranks import Ranks
from kit.work import Folder

KEYS = [f"k\u00e9 {i}" for i in range(11)]
BAD = (KEYS[4], KEYS[9])  # whose work always fails


class Killed(BaseException):
    """The process ends here."""


class Worker:
    """work(batch): notes what it is asked, fails for some keys, is killed at one call."""

    def __init__(self, bad=(), killed_at=None):
        self.asked = []
        self.bad = bad
        self.killed_at = killed_at

    def __call__(self, batch):
        if len(self.asked) == self.killed_at:
            raise Killed
        self.asked.append(batch)
        if any(key in self.bad for key in batch):
            raise ReplyError(f"no reply for {batch}")
        return [{"with": batch, "third": len(key) / 3} for key in batch]


def together(world, function):
    """[function(Ranks) of each rank, or what it raised]. One that is killed ends all."""
    barrier = threading.Barrier(world, timeout=20)
    found = [None] * world
    box = [None] * world
    me = threading.local()

    def gather(everyone, mine):
        box[me.rank] = mine
        barrier.wait()
        everyone[:] = box
        barrier.wait()

    def first(value, world):
        everyone = [value] * world
        gather(everyone, value)
        return everyone[0]

    def enter(rank):
        me.rank = rank
        try:
            found[rank] = function(Ranks(rank, world))
        except BaseException as error:
            found[rank] = error
            if isinstance(error, Killed):
                barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "from_first", first)
        patch.setattr(work.dist, "all_gather_object", gather)
        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def kept(folder):
    """First keys of the batches that are whole in some part."""
    found = set()
    for text in b"\n".join(part.read_bytes() for part in folder.glob("*.part.*")).split(b"\n"):
        try:
            found.add(json.loads(text)[0]["key"])
        except ValueError:
            continue
    return found


def run(folder, size, *workers, **how):
    """A stage by ranks that have a worker each: what together() gives."""

    def one(ranks):
        stage = Folder(folder, {"size": size}, ranks).stage
        return stage("lines", KEYS, workers[ranks.rank], size=size, tries=1, **how)

    return together(len(workers), one)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """{size: files} of runs that nothing disturbs; the batches of two keys are lost."""
    folders = {size: tmp_path_factory.mktemp("clean") for size in (1, 2, 3)}
    for size, folder in folders.items():
        run(folder, size, Worker(BAD))
    return {size: contents(folder) for size, folder in folders.items()}


# ----------------------------------------------------------------------------------- a stage


@pytest.mark.parametrize("threads", [1, 4])
def test_lines_are_kept_in_the_order_of_keys(threads, tmp_path):
    """Batches are slices of the keys; a finished stage asks nothing, and gives the same."""
    worker = Worker()
    lines = Folder(tmp_path, {}).stage("lines", KEYS, worker, size=4, threads=threads, bar="work")
    assert sorted(worker.asked) == sorted([KEYS[:4], KEYS[4:8], KEYS[8:]]) and list(lines) == KEYS
    assert lines[KEYS[5]] == {"key": KEYS[5], "with": KEYS[4:8], "third": len(KEYS[5]) / 3}
    assert work.read_lines(tmp_path / "lines.jsonl", "key") == list(lines.values())
    before = contents(tmp_path)
    assert before.keys() == {"settings.json", "lines.jsonl"}
    assert Folder(tmp_path, {}).stage("lines", KEYS, None, size=4) == lines
    assert contents(tmp_path) == before


def test_a_folder_without_a_path_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder(None, {})
    lines = folder.stage("lines", KEYS, Worker(BAD), size=2, tries=1, threads=2)
    assert list(lines) == [key for key in KEYS if key not in folder.lost]
    folder.write("x", "text")
    assert not list(tmp_path.iterdir())


def test_lines_are_what_a_run_that_goes_on_reads(tmp_path):
    """Also at the first time: JSON has no tuples. The field of their key may have another name."""
    for _ in range(2):
        lines = Folder(tmp_path, {}).stage("s", ["a"], lambda b: [{"x": (1, 2)}], field="id")
        assert lines == {"a": {"id": "a", "x": [1, 2]}}


def test_new_keys_are_done_and_old_ones_stay(tmp_path):
    folder = Folder(tmp_path, {})
    worker = Worker()
    for keys in (["b", "c"], ["a", "c"], ["b", "c"]):
        assert list(folder.stage("s", keys, worker, size=2)) == keys
    assert worker.asked == [["b", "c"], ["a", "c"]]  # batches are never cut
    assert [line["key"] for line in work.read_lines(tmp_path / "s.jsonl")] == ["a", "c", "b"]


# ---------------------------------------------------------------------- killed and gone on with

RUNS = st.lists(
    st.tuples(
        st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)]),  # ranks, and those of an engine
        st.sampled_from([1, 3]),  # threads
        st.integers(0, 4),  # the call of work that kills
        st.integers(0, 3),  # the rank
        st.integers(0, 200),  # bytes that its part lacks
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.sampled_from([1, 2, 3]), st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]))
def test_any_history_ends_with_the_same_bytes(clean, tmp_path_factory, runs, size, last):
    """Nothing that is kept is asked for again; neighbours of an engine do the same batches."""
    folder = tmp_path_factory.mktemp("killed")
    for (world, tp), threads, at, victim, torn in [*runs, (last, 1, None, 0, 0)]:
        victim %= world
        before = kept(folder)
        parts = {path.suffix for path in folder.glob("*.part.*")}
        workers = [Worker(BAD, at if rank == victim else None) for rank in range(world)]
        found = run(folder, size, *workers, tp=tp, threads=threads)
        assert not before & {batch[0] for w in workers for batch in w.asked}
        if isinstance(found[victim], Killed):
            new = {path.suffix for path in folder.glob("*.part.*")} - parts
            assert all(int(suffix[1:]) % tp == 0 for suffix in new)  # one of each engine writes
            for part in folder.glob(f"*.part.{victim}"):
                part.write_bytes(part.read_bytes()[: -torn or None])
        else:
            assert all(lines == found[0] for lines in found) and contents(folder) == clean[size]
            if threads == 1:
                assert all(w.asked == workers[r - r % tp].asked for r, w in enumerate(workers))


@pytest.mark.parametrize("tail", [b"", b'{"a": 1}', b"\0\0", b"\xe9", b"7", b"[7]", b"[{}]"])
def test_a_batch_is_kept_up_to_its_last_byte(tail, clean, tmp_path):
    """A part is cut at each of its bytes, and has behind it what a failing disk may put there."""
    run(tmp_path, 2, Worker(killed_at=2))
    whole = (tmp_path / "lines.part.0").read_bytes()
    first = whole.rindex(b"\n")
    for cut in {*range(0, len(whole), 19 if tail else 1), first, len(whole)}:
        done = (cut >= first) + (cut == len(whole))  # batches
        joint = b"\n" if cut in (first, len(whole)) else b""
        (tmp_path / "lines.part.0").write_bytes(whole[:cut] + joint + tail)
        worker = Worker(BAD)
        run(tmp_path, 2, worker)
        assert worker.asked == [KEYS[i : i + 2] for i in range(2 * done, 11, 2)]
        assert contents(tmp_path) == clean[2]
        (tmp_path / "lines.jsonl").unlink()
        (tmp_path / "lost.jsonl").unlink()


@pytest.mark.parametrize("where, name", [(work.os, "replace"), (Path, "unlink")])
def test_killed_while_the_parts_become_one_file(where, name, clean, tmp_path, monkeypatch):
    def fail(*args):
        raise Killed

    worker = Worker(BAD)
    Folder(tmp_path, {"size": 1})
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        run(tmp_path, 1, worker)
    assert (tmp_path / "lines.part.0").exists()
    run(tmp_path, 1, worker)
    assert len(worker.asked) == len(KEYS) and contents(tmp_path) == clean[1]


def real_rank(rank, world, path, killed_at):
    worker = Worker(BAD)

    def each(batch):
        if rank == 1 and len(worker.asked) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)  # or the other rank is done before
        return worker(batch)

    lines = Folder(path, {"size": 1}, Ranks(rank, world)).stage("lines", KEYS, each, tries=1)
    assert list(lines) == [key for key in KEYS if key not in BAD]
    with pytest.raises(DataError, match="size was 1, now 2"):  # on every rank
        Folder(path, {"size": 2}, Ranks(rank, world))


@pytest.mark.slow
def test_real_ranks_that_are_killed_end_with_the_same_bytes(clean, tmp_path):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(real_rank, 2, 2, tmp_path, 3)
    assert len(kept(tmp_path)) >= 3 and not (tmp_path / "lines.jsonl").exists()
    run_ranks(real_rank, 3, 3, tmp_path, None)
    assert contents(tmp_path) == clean[1]


# ------------------------------------------------------------------------- errors, and the lost


def test_an_error_cancels_what_has_not_begun(tmp_path):
    """What is done by then is kept."""
    numbers, done = itertools.count(), set()

    def fail(batch):
        if next(numbers) == 4:
            raise Killed
        time.sleep(0.01)
        done.add(batch[0])
        return [{}]

    with pytest.raises(Killed):
        Folder(tmp_path, {}).stage("s", [str(i) for i in range(999)], fail, threads=2)
    time.sleep(0.2)
    assert len(done) < 9 and kept(tmp_path) == done


@pytest.mark.parametrize("tries, asked", [(0, 1), (1, 2), (3, 5)])
def test_work_is_tried_so_often_then_lost(tries, asked, tmp_path):
    calls = []

    def fail(batch):
        calls.append(batch)
        if "bad" in batch or len(calls) == 1:
            raise (ReplyError, DataError)[len(calls) % 2]("no good")
        return [{}] * len(batch)

    folder = Folder(tmp_path, {})
    if tries == 0:
        with pytest.raises(DataError, match="no good"):
            folder.stage("s", ["a", "b"], fail, size=2)
    else:
        lines = folder.stage("s", ["a", "b", "bad", "c"], fail, size=2, tries=tries)
        assert list(lines) == (["a", "b"] if tries > 1 else [])
        assert folder.lost == dict.fromkeys({"a", "b", "bad", "c"} - lines.keys(), "no good")
    assert len(calls) == asked


def test_work_without_a_line_for_each_key_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        Folder(tmp_path, {}).stage("s", ["a", "b"], lambda batch: [{}], size=2, tries=3)


def test_lost_keys_are_asked_for_again_only_with_retry(clean, tmp_path):
    """Also those of a run that was killed. They are absent from all stages, of any rank."""
    run(tmp_path, 1, Worker(KEYS, killed_at=3))
    for name in ("lines", "other"):  # from the part, then from lost.jsonl
        folder = Folder(tmp_path, {"size": 1})
        assert folder.lost.keys() == set(KEYS[:3]) and not folder.stage(name, KEYS[:3], None)
    folder.stage("other", ["mine"], Worker())
    folder.lost["mine"] = "too short"
    assert not folder.stage("other", ["mine"], None)
    assert Folder(tmp_path, {"size": 1}).lost["mine"] == "too short"
    found = together(2, lambda ranks: Folder(tmp_path, {"size": 1}, ranks, retry=True).lost)
    assert found == [{}, {}]
    run(tmp_path, 1, Worker(BAD))
    (tmp_path / "other.jsonl").unlink()
    assert contents(tmp_path) == clean[1]


# --------------------------------------------------------------------- what all ranks refuse


def refused(world, *args):
    """What making a Folder says on all ranks."""
    found = together(world, lambda ranks: Folder(args[0], args[1], ranks, *args[2:]))
    assert all(isinstance(error, DataError) for error in found) and len({*map(str, found)}) == 1
    return str(found[0])


def test_other_settings_are_refused_by_naming_them(tmp_path):
    old = {"frames": (4, 8), "model": "m", "gone": None}
    for _ in range(2):
        Folder(tmp_path, old)
    before = contents(tmp_path)
    said = refused(3, tmp_path, {"frames": [4], "model": "m", "seed": 3}, "take a walk")
    differ = "frames was [4, 8], now [4]; seed was None, now 3"
    assert said == f"{tmp_path} was begun with other settings ({differ}): take a walk"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("line", ["{", "[]", "{}", "7", "", "\udcff"])
def test_a_broken_line_is_named(line, tmp_path):
    text = f'{{"key": "a", "lost": "b"}}\n{line}\n{{"key": "c", "lost": "d"}}\n'
    (tmp_path / "lost.jsonl").write_text(text, errors="surrogateescape")
    assert refused(2, tmp_path, {}).endswith("lost.jsonl: remove the line that is broken, number 2")


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    assert "settings.json: Expecting" in refused(2, tmp_path, {})
    assert "File exists" in refused(2, tmp_path / "settings.json", {})
