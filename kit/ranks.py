"""The ranks of a run, and errors as one line: what every command needs before it loads anything.

    torchrun starts N processes      Ranks      this one among them; its device; process groups
    error: what, where, what to do   reported   the last line of a command, of whatever rank

Check this file alone:  pytest tests/test_run.py
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

import mrsp
from data import DataError

# What a person can mend: shown as one line. Anything else is a fault of ours, with its traceback.
# By name: to import those who raise them takes seconds, of each command's --help too.
KNOWN = ("DataError", "ModelError", "RolloutError", "ServerError", "OptionError", "OSError")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on its machine

    @property
    def device(self) -> str:
        return f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"

    def join(self, alone: bool = False) -> None:
        """Meet the other ranks. alone: make a process group also for a single one, which FSDP and
        vLLM want. DataError if there are more ranks than GPUs."""
        cuda = torch.cuda.is_available()
        if cuda and self.local >= torch.cuda.device_count():
            raise DataError(
                f"more ranks than the {torch.cuda.device_count()} GPU(s) of this machine: "
                "start with a smaller torchrun --nproc_per_node"
            )
        if cuda:
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if self.world > 1:
            dist.init_process_group(backend, timeout=mrsp.PATIENCE)
        elif alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def leave(self) -> None:
        """The end: the process group goes."""
        if dist.is_initialized():
            dist.destroy_process_group()


def find_ranks() -> Ranks:
    """As torchrun says in the environment; without it one rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0))))


def from_first(value, world: int):
    """Rank 0's value, on all ranks."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def reported():
    """A known error within ends the process with status 1 and one line, "error: ...".

    Ranks mostly fail alike. Rank 0 says so at once; another one waits for it to end the run (then
    torchrun ends this rank as well), and speaks only if it does not: it is alone with its error.
    torchrun puts 90 lines of its own behind; the line is repeated in them, at the end.
    """
    try:
        yield
    except Exception as error:
        if not any(kind.__name__ in KNOWN for kind in type(error).__mro__):
            raise
        line = f"error: {error}"
        rank = find_ranks().rank
        if rank > 0:
            time.sleep(float(os.environ.get("SECONDS_FOR_RANK_0", 10)))
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file:  # what torchrun shows of a failed rank
            about = {"extraInfo": {"timestamp": str(int(time.time())), "py_callstack": line}}
            with open(file, "w") as out:
                json.dump({"message": {"message": line, **about}}, out)
        sys.exit(line)
