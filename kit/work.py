"""Work: a folder that long work fills, that can be killed at any moment and gone on with.

    keys      k0 k1 k2 | k3 k4 k5 | k6 k7 k8 | k9 k10     batches: fixed slices of `size` keys
    rank 0       #                     #       --append-->  answers.part.0 )       answers.jsonl,
    rank 1                  #               #  --append-->  answers.part.1 ) --->  in the order
    failed                           lost      --append-->  lost.part.0    )       of the keys

    folder = Folder(Path("runs/x"), settings)                 the same settings, or an error
    lines = folder.stage("answers", keys, work, size=3)       {key: {"key": key, ...}}, all ranks

A stage asks work(keys of a batch) for a line, a dict, of each key. A finished batch is appended to
a part in one write. Whoever goes on, with any number of ranks and threads, reads the parts, drops
torn lines, and deals what is missing; at the end all lines go into one file. Nothing that was
written is done twice, and the bytes are those of a run that was never killed. So batches must not
depend on ranks or on what is done: a model's floats hang on what it is asked together with.

Files:
    settings.json     what the lines depend on: a folder is gone on with under the same ones only
    NAME.jsonl        a finished stage, a line a key; written beside, then renamed
    NAME.part.RANK    finished batches of a stage that is not: JSON lists, a batch a line
    lost.jsonl        {"key": key, "lost": reason}: work failed `tries` times. Lost keys are not
                      asked for again, and absent from all stages; retry=True forgets them.

Large systems keep such work in a database or a queue, or start again when they are killed. Here it
is text that a person can read, count and delete. Only one run at a time writes to a folder.

Check this file alone:  pytest tests/test_work.py
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import DataError
from kit.chat import ReplyError
from kit.ranks import Ranks, from_first

ALONE = Ranks()
ADVICE = "give the old ones, or name another folder"
Work = Callable[[list[str]], Iterable[dict]]  # keys of a batch -> the line of each


def read_lines(path: Path, *fields: str) -> list[dict]:
    """The lines of a .jsonl file. DataError if one is no object with these fields."""
    lines = []
    for i, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            if not line.keys() >= set(fields):
                raise ValueError
        except (ValueError, AttributeError):
            raise DataError(f"{path}: remove the line that is broken, number {i}") from None
        lines.append(line)
    return lines


class Folder:
    """A folder of work. All ranks make it, and call stage(), together. lost: {key: reason}; what a
    caller adds is lost from the next stage on."""

    def __init__(
        self, path: Path | None, settings: dict, ranks=ALONE, what_else=ADVICE, retry=False
    ):
        """path: made if it is not there; None keeps nothing. retry: forget what was lost. DataError
        on all ranks, with `what_else` to do, if the folder was begun with other settings."""
        self.path = path
        self.ranks = ranks
        now = json.loads(json.dumps(settings))
        self.lost: dict[str, str] = self._first(self._open, now, what_else, retry) or {}

    def stage(
        self, name, keys: list, work: Work, size=1, threads=1, tries=0, tp=1, field="key", bar=""
    ) -> dict[str, dict]:
        """{key: line} of all keys that are not lost, in their order, on every rank. size: keys of a
        batch. threads: batches at a time on a rank; an error cancels what has not begun. tries:
        after so many ReplyErrors and DataErrors a batch is lost; with 0 the first one is raised.
        tp: neighbouring ranks that do the same batches together. field: of a line, where its key
        is. bar: title of rank 0's progress bar."""
        done, is_whole = self._first(self._read, name, field) or ({}, False)
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        missing = [b for b in batches if any(k not in done and k not in self.lost for k in b)]
        attempt = partial(self._attempt, name=name, work=work, tries=tries, tp=tp, field=field)
        for where, lines in self._deal(attempt, missing, threads, tp, bar):
            if where == name:
                done |= {line[field]: line for line in lines}
            else:
                self.lost |= {line["key"]: line["lost"] for line in lines}
        if self.lost:
            self._finish("lost", [{"key": k, "lost": self.lost[k]} for k in sorted(self.lost)])
        if missing or not is_whole:  # lines of keys that are not asked for today stay, at the end
            self._finish(name, ({key: done[key] for key in keys if key in done} | done).values())
        return {key: done[key] for key in keys if key in done and key not in self.lost}

    def finished(self, name: str, field="key") -> dict[str, dict]:
        """{key: line} of a stage that an earlier run finished, on every rank, or {}: what its work
        needs can then be left unloaded."""
        return self._first(self._whole, name, field)

    def write(self, name: str, text: str) -> None:
        """A whole file of the folder, or none; by rank 0."""
        if self.ranks.rank == 0 and self.path is not None:
            beside = self.path / f"{name}.new"
            beside.write_text(text)
            os.replace(beside, self.path / name)

    def write_lines(self, name: str, lines: Iterable[dict]) -> None:
        self.write(name, "".join(json.dumps(line) + "\n" for line in lines))

    def _first(self, function, *args):
        """function(*args) of rank 0, on all ranks; so is what it raises, as a DataError."""
        value = fault = None
        if self.ranks.rank == 0 and self.path is not None:
            try:
                value = function(*args)
            except (DataError, OSError) as error:
                fault = str(error)
        value, fault = from_first((value, fault), self.ranks.world)
        if fault is not None:
            raise DataError(fault)
        return value

    def _open(self, settings: dict, what_else: str, retry: bool) -> dict[str, str]:
        """Make the folder, or compare its settings. Returns what was lost in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "settings.json"
        if not file.exists():
            self.write(file.name, json.dumps(settings, indent=2) + "\n")
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise DataError(f"{file}: {error}") from None
        names = [name for name in old | settings if old.get(name) != settings.get(name)]
        differ = [f"{n} was {old.get(n)!r}, now {settings.get(n)!r}" for n in names]
        if differ:
            said = f"{self.path} was begun with other settings ({'; '.join(differ)})"
            raise DataError(f"{said}: {what_else}")
        if retry:
            self._finish("lost", [])
        return {key: line["lost"] for key, line in self._read("lost", "key")[0].items()}

    def _whole(self, name: str, field: str) -> dict[str, dict]:
        path = self.path / f"{name}.jsonl"
        return {line[field]: line for line in read_lines(path, field)} if path.exists() else {}

    def _read(self, name: str, field: str) -> tuple[dict[str, dict], bool]:
        """{key: line} of a stage: of its file, and of the parts that a killed run has left. And
        whether it is that file alone."""
        done = self._whole(name, field)
        parts = sorted(self.path.glob(f"{name}.part.*"))
        for part in parts:
            for text in part.read_bytes().split(b"\n"):
                try:
                    done |= {line[field]: line for line in json.loads(text)}
                except (ValueError, TypeError, KeyError):
                    continue  # empty or torn: a list without its end is no JSON
        return done, (self.path / f"{name}.jsonl").exists() and not parts

    def _deal(self, attempt, missing: list[list], threads: int, tp: int, bar: str) -> list[tuple]:
        """What attempt() gives for batches that ranks share among them; of all ranks, on each."""
        mine = missing[self.ranks.rank // tp :: self.ranks.world // tp]
        results = in_threads(attempt, mine, threads) if threads > 1 else map(attempt, mine)
        shown = bar and mine and self.ranks.rank == 0
        own = list(tqdm(results, bar, len(mine), disable=not shown))
        everyone = [own] * self.ranks.world
        if self.ranks.world > 1:
            dist.all_gather_object(everyone, own)
        return sum(everyone, [])

    def _attempt(self, batch: list, name, work: Work, tries, tp, field) -> tuple[str, list]:
        """(name, lines) of a batch, or ("lost", reasons); appended to this rank's part."""
        for _ in range(max(tries, 1)):
            try:
                where = name
                lines = [{field: k} | line for k, line in zip(batch, work(batch), strict=True)]
                break
            except (ReplyError, DataError) as error:
                if not tries:
                    raise
                where = "lost"
                lines = [{"key": key, "lost": str(error)} for key in batch]
        text = json.dumps(lines)
        if self.path is not None and self.ranks.rank % tp == 0:
            with open(self.path / f"{where}.part.{self.ranks.rank}", "ab", buffering=0) as part:
                part.write(f"\n{text}".encode())  # one write, on a new line: the last may be torn
        return where, json.loads(text)  # as a run that goes on reads them

    def _finish(self, name: str, lines: Iterable[dict]) -> None:
        """One file takes the place of a stage's parts."""
        self.write_lines(f"{name}.jsonl", lines)
        if self.ranks.rank == 0 and self.path is not None:
            for part in self.path.glob(f"{name}.part.*"):
                part.unlink()


def in_threads(function, items: list, threads: int) -> Iterator:
    """The results, as they come. After an error none is begun, and nobody waits for those that run:
    a reply may take minutes."""
    pool = ThreadPoolExecutor(threads)
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
