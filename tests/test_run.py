"""kit/run.py, kit/ranks.py: numbers of all ranks, and errors as one line, under torchrun too."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_ranks

import mrsp
from data import DataError
from kit.chat import ServerError
from kit.options import OptionError
from kit.ranks import find_ranks, from_first, reported
from kit.run import METRICS, Meter, check_mismatch
from model import ModelError
from rollout import RolloutError

ROOT = Path(__file__).resolve().parents[1]


def _meter(rank, world, sp, out):
    """Each dp group has its own numbers, which its sp ranks share; `own` differs by rank."""
    mesh = mrsp.make_mesh(sp, "gather", 4, 2)
    meter, group = Meter(mesh), mesh.dp_rank
    meter.mean("kl", torch.tensor([1.0, 5.0, 9.0]) + group, torch.tensor([1.0, 1.0, 0.0]))
    if group == 0:
        meter.mean("only_here", 3.0)
    meter.total("tokens", 10 * (group + 1))
    meter.own("computed", rank + 1)
    meter.largest("most", torch.tensor([0.5, float(rank)]))
    torch.save(meter.read(), f"{out}/{rank}.pt")


@pytest.mark.parametrize(
    "world, sp",
    [
        (1, 1),
        (2, 2),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_numbers_of_all_ranks_come_together(world, sp, tmp_path):
    run_ranks(_meter, world, world, sp, str(tmp_path))
    groups = range(world // sp)
    expected = {
        "kl": 3.0 + sum(groups) / len(groups),
        "only_here": 3.0,
        "tokens": sum(10.0 * (g + 1) for g in groups),
        "computed": sum(range(1, world + 1)),
        "most": max(0.5, world - 1.0),
    }
    for rank in range(world):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected)


def test_what_was_not_measured_is_zero_and_nan_is_not_passed_over():
    meter = Meter(mrsp.Mesh())
    meter.mean("kl", torch.zeros(2), torch.zeros(2))
    meter.largest("most", math.nan)
    meter.largest("most", 3.0)
    found = meter.read()
    assert found["kl"] == 0 and math.isnan(found["most"])


def test_seconds_are_those_of_the_block():
    meter = Meter(mrsp.Mesh())
    with meter.clock("seconds_train"):
        pass
    assert 0 <= meter.read()["seconds_train"] < 5 and "seconds_train" in METRICS


@pytest.mark.parametrize("name, value", [("mean", 0.2), ("mean", math.nan), ("max", 30.0)])
def test_a_mismatch_of_sampler_and_trainer_is_an_error(name, value):
    from grpo import Config

    fine = {"mismatch_mean": 0.01, "mismatch_max": 1.0}
    check_mismatch(fine, Config())
    with pytest.raises(ModelError, match="sampler and trainer.*--grpo.mean_mismatch 0.1"):
        check_mismatch(fine | {f"mismatch_{name}": value}, Config())


KINDS = (DataError, ModelError, RolloutError, ServerError, OptionError, FileNotFoundError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_error_ends_the_process_with_one_line(kind):
    with pytest.raises(SystemExit, match="^error: rows.jsonl:3: no answer$"), reported():
        raise kind("rows.jsonl:3: no answer")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_ranks_are_those_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (find_ranks().rank, find_ranks().world) == (0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (find_ranks().rank, find_ranks().world, find_ranks().local) == (5, 8, 0)
    assert from_first("x", 1) == "x"


FAILING = """
import os, sys, time
sys.path.insert(0, {root!r})
from data import DataError
from kit.ranks import reported
with reported():
    if os.environ["RANK"] in {ranks!r}:
        raise DataError("rows.jsonl:3: rank " + os.environ["RANK"] + " has no answer")
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks, first, patience", [(["0", "1"], 0, "60"), (["1"], 1, "1")])
def test_torchrun_repeats_the_line_at_its_end(ranks, first, patience, tmp_path):
    """All ranks fail alike: rank 0 says it, whoever was faster. One fails alone: it speaks."""
    script = tmp_path / "fails.py"
    script.write_text(FAILING.format(root=str(ROOT), ranks=ranks))
    env = os.environ | {"OMP_NUM_THREADS": "1", "SECONDS_FOR_RANK_0": patience}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    line = f"error: rows.jsonl:3: rank {first} has no answer"
    assert done.returncode == 1 and done.stderr.count(line) == 2, done.stderr[-3000:]
    assert line in done.stderr.strip().splitlines()[-2]
    assert f"rank {1 - first} has no answer" not in done.stderr
