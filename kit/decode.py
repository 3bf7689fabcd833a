"""Decoding in child processes: a file that hangs or crashes its decoder costs itself alone.

decord and libav run C code on whatever a download left on the disk. They can wait for ever or bring
the process down, and decord keeps some memory of each file. So a run opens its media through a
Loader:

    this process                              child processes (python -m kit.decode)
    ahead([v1, v2, v3 ...]) ---- open v1 ---> decodes its first piece and waits
                            ---- open v2 ---> ...              at most `ahead` files beforehand
    with open(v1) as frames:
        frames[0:64]    <------- pixels ----- and decodes 64:128 while the tower looks at 0:64
                                              no reply in time: killed, a DataError for v1, and
                                              v2 goes on; after 200 files: another process

Large systems decode in the workers of a torch DataLoader: one of them that dies, or is late, ends
the run, and a worker holds whole batches of videos. Here a worker holds a piece of one video.

Pixels come through a pipe (pickle, of our own child): no shared memory that a container limits.
Check this file alone:  pytest tests/test_decode.py
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from data import DataError, Frames, Medium, Opener, Rate, named_errors
from kit.sound import load_audio


class Worker:
    """A child process that opens media for this one, a file at a time, and a thread that talks to
    it. limit: seconds for a reply; then it is killed."""

    command = [sys.executable, "-m", "kit.decode"]

    def __init__(self, limit: float):
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, env=env)
        self.thread = ThreadPoolExecutor(1)
        self.limit = limit
        self.late = threading.Event()
        self.uses = 0  # files so far

    def ask(self, *request) -> Future:
        """Of the reply, or DataError, TimeoutError, ChildProcessError; requests queue up."""
        self.last = self.thread.submit(self._ask, request)
        return self.last

    def _ask(self, request: tuple):
        timer = threading.Timer(self.limit, self._kill_late)
        timer.start()
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            good, reply = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.kill()
            code = self.process.wait()
            if self.late.is_set():  # by this request, or one before it
                said = f"the decoder gave nothing within {self.limit:g} s (--decode_seconds)"
                raise TimeoutError(said) from None
            raise ChildProcessError(f"the decoder crashed (exit status {code})") from None
        finally:
            timer.cancel()
        if not good:
            raise DataError(reply)
        return reply

    def _kill_late(self) -> None:
        self.late.set()
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.thread.shutdown()
        self.process.communicate()


class RemoteFrames(Frames):
    """Frames that a worker decodes: the same pixels, times and errors."""

    def __init__(self, medium: Medium, num_frames: int | Rate, name: str, worker: Worker):
        self.medium = medium
        self.name = name
        self.worker = worker
        self.asked = None  # the part that the worker has been asked for
        self.times, self.shape = self._result(worker.ask("open", medium, num_frames, name))

    def ask(self, part: slice) -> None:
        """frames[part] is what will be wanted next: the worker begins with it."""
        self.asked = part
        self.reply = self.worker.ask("read", part)

    def __getitem__(self, part: slice) -> np.ndarray:
        if self.asked != part:  # something else, or nothing, was asked for
            self.ask(part)
        self.asked = None
        return self._result(self.reply)

    def pieces(self, parts: list[slice]):
        """frames[part] of one part after the other; the next one is decoded meanwhile."""
        for part, following in zip(parts, [*parts[1:], None]):
            pixels = self[part]
            if following:
                self.ask(following)
            yield pixels

    def _result(self, reply: Future):
        with named_errors(self.medium, self.medium.kind, self.name):
            return reply.result()


class Loader(Opener):
    """Opens media in child processes, up to `ahead` files beforehand; with ahead=0 in this process.
    limit: seconds for a piece of a file. A worker opens `uses` files: what its decoder keeps of
    memory goes with it. Without ahead(), threads may share it: each file that is open has a
    process."""

    def __init__(self, ahead: int = 0, limit: float = 120.0, uses: int = 200):
        self.slots = ahead
        self.limit = limit
        self.uses = uses
        self.idle: list[Worker] = []
        self.busy: set[Worker] = set()
        self.plan = iter(())  # what will be wanted after what is started
        self.started: dict[tuple, Future] = {}  # (medium, num_frames) -> RemoteFrames, in order
        self.failed: dict[Medium, tuple] = {}  # -> (message, question)
        self.threads = ThreadPoolExecutor(max(ahead, 1))

    def __deepcopy__(self, memo) -> "Loader":
        return self  # the copy of a model reads through the same processes

    @contextmanager
    def open(self, medium: Medium, num_frames: int | Rate, name: str = ""):
        """Frames of a medium, for the time of the block. A file that failed fails again at once,
        whoever asks."""
        if medium not in self.failed:
            try:
                with self._opened(medium, num_frames, name) as frames:
                    yield frames
                return
            except DataError as failed:
                self.failed[medium] = str(failed), failed.question
        said, asked = self.failed[medium]  # of the question it was planned for, or asked first
        raise DataError(said.replace(f"(question {asked})", f"(question {name})"), question=name)

    @contextmanager
    def _opened(self, medium: Medium, num_frames, name: str):
        if not self.slots or medium.kind == "image":  # which does not hang
            yield Frames(medium, num_frames, name)
            return
        wanted = medium, num_frames
        if wanted in self.started:
            while (first := next(iter(self.started))) != wanted:
                self._drop(self.started.pop(first))  # planned before this one, and not wanted
            coming = self.started.pop(wanted)
            self._start()  # the next one is opened while this one is looked at
            frames = coming.result()
        else:
            frames = self._open(medium, num_frames, name)
        try:
            yield frames
        finally:
            self._free(frames.worker)
            self._start()

    def sound(self, medium: Medium, rate: int = 16000, name: str = "") -> np.ndarray:
        """load_audio."""
        if not self.slots:
            return load_audio(medium, rate, name)
        worker = self._worker()
        try:
            with named_errors(medium, "audio", name):
                return worker.ask("sound", medium, rate, name).result()
        finally:
            self._free(worker)

    def ahead(self, plan) -> None:
        """What will be opened next: an iterable of (medium, num_frames, name, first), looked at as
        late as possible; first((F, H, W, 3)) is the part that will be wanted first."""
        self.plan = iter(plan)
        self._start()

    def close(self) -> None:
        """End all workers, whatever they do."""
        self.plan = iter(())
        for worker in list(self.busy):
            worker.process.kill()  # who waits for it gets an error, and frees it
        for future in self.started.values():
            self._drop(future)
        self.started = {}
        for worker in self.idle:
            worker.close()
        self.idle = []

    def _start(self) -> None:
        while len(self.started) < self.slots and (job := next(self.plan, None)):
            medium, num_frames, _, _ = job
            if (medium, num_frames) not in self.started and medium not in self.failed:
                self.started[medium, num_frames] = self.threads.submit(self._open, *job)

    def _open(self, medium: Medium, num_frames, name: str, first=None) -> RemoteFrames:
        worker = self._worker()
        try:
            frames = RemoteFrames(medium, num_frames, name, worker)
            if first:
                frames.ask(first(frames.shape))
            return frames
        except BaseException:
            self._free(worker)
            raise

    def _drop(self, future: Future) -> None:
        future.add_done_callback(self._free_opened)
        future.cancel()

    def _free_opened(self, future: Future) -> None:
        if not future.cancelled() and future.exception() is None:  # else none is held
            self._free(future.result().worker)

    def _worker(self) -> Worker:
        try:
            while (worker := self.idle.pop()).process.poll() is not None:
                worker.close()  # killed from outside, while it had nothing to do
        except IndexError:
            worker = Worker(self.limit)
        self.busy.add(worker)
        return worker

    def _free(self, worker: Worker) -> None:
        self.busy.discard(worker)
        worker.uses += 1
        if not worker.last.done() or worker.process.poll() is not None or worker.uses >= self.uses:
            worker.close()  # busy with what nobody wants any more, dead, or old
        else:
            self.idle.append(worker)


def serve() -> None:
    """The life of a worker: replies to ("open", medium, num_frames, name), ("read", part),
    ("sound", medium, rate, name), until its parent is gone."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            request = pickle.load(sys.stdin.buffer)
            good = True
            try:
                match request:
                    case "open", medium, num_frames, name:
                        frames = Frames(medium, num_frames, name)
                        reply = frames.times, frames.shape
                    case "read", part:
                        reply = frames[part]
                    case "sound", medium, rate, name:
                        reply = load_audio(medium, rate, name)
            except DataError as error:
                good = False
                reply = str(error)
            pickle.dump((good, reply), replies, protocol=5)
            replies.flush()
    os._exit(0)  # there is nobody left to flush to


def end_with(parent: int) -> None:
    """End this process when its parent has: a decoder that hangs would never read the end of the
    requests."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve()
