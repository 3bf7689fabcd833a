"""The benchmark measures what it says: equal work in all bars, memory as counted, exact lengths."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from conftest import run_ranks
from test_plan import shape

import mrsp
from kit import bench
from rollout import Sampling, TorchEngine

TINY = "--hidden 32 --layers 1 --response_tokens 2 --repeats 1".split()


@pytest.mark.parametrize(
    "bars", [("none", "ours"), pytest.param(tuple(bench.BARS), marks=pytest.mark.slow)]
)
def test_bars_encode_as_often_as_they_say_and_have_the_same_gradient(bars, monkeypatch):
    options = bench.Mrsp(hidden=32, layers=1, group=3, response_tokens=4, ranks=1)
    trainer = bench.Trainer(options, kl=True)
    with torch.no_grad():  # a reference that differs, so that its part of the loss counts
        for p in trainer.reference.policy.parameters():
            p.mul_(1.1)
    videos = torch.randint(0, 256, (2, 5, 48, 48, 3), dtype=torch.uint8)
    encoded, encode = [], trainer.model.encode
    monkeypatch.setattr(
        trainer.model, "encode", lambda f, **how: encoded.append(len(f)) or encode(f, **how)
    )
    frames, grads = {}, {}

    def keep(*_):
        grads[bar] = {n: p.grad.clone() for n, p in trainer.model.policy.named_parameters()}

    trainer.optimizer.register_step_pre_hook(keep)
    for bar in bars:
        encoded.clear()
        numbers = trainer.step(videos, bar)
        phases = "encode rollout reference logprobs backward optimizer".split()
        assert set(numbers) == {*phases, "seconds", "grad_norm", "peak_bytes"}
        assert numbers["grad_norm"] > 0 and numbers["seconds"] > numbers["backward"] > 0
        frames[bar] = sum(encoded)
    assert frames == {bar: 3 * 3 * 10 if bar == "none" else 10 for bar in bars}
    for bar, found in grads.items():
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads["none"][name], rtol=1e-3, atol=1e-6, msg=bar)


def test_answers_have_exactly_the_asked_length():
    engine, prompt = TorchEngine(bench.small_vila(32, 2)), bench.text_prompt(9, 512)
    (answers,) = engine.generate([prompt], 50, Sampling(max_tokens=11))
    assert {len(a.ids) for a in answers} == {11} and not any(a.finished for a in answers)


@pytest.mark.slow
def test_two_ranks_measure_all_bars(tmp_path):
    command = ["mrsp", "--frames", "2", "3", "--group", "2", "--output", str(tmp_path), *TINY]
    bench.main(command)  # it runs itself again under torchrun
    rows = json.loads((tmp_path / "mrsp.json").read_text())
    assert [(r["frames"], r["bar"]) for r in rows] == [(n, b) for n in (2, 3) for b in bench.BARS]
    assert rows[3]["faster_than_none"] == round(rows[0]["seconds"] / rows[3]["seconds"], 3)
    assert all(r["seconds"] > 0 and r["encode"] > 0 and "peak_bytes" in r for r in rows)
    assert (tmp_path / "mrsp.png").stat().st_size > 10_000


def test_bars_of_unequal_work_are_refused(tmp_path, monkeypatch):
    norms = iter(range(1, 100))

    def step(*_):
        return {"seconds": 1.0, "grad_norm": next(norms), "peak_bytes": 1}

    monkeypatch.setattr(bench.Trainer, "step", step)
    with pytest.raises(RuntimeError, match="2 frames: the bars' gradients differ in norm"):
        bench.main(["mrsp", "--frames", "2", "--ranks", "1", "--output", str(tmp_path), *TINY])


def test_medians_are_of_the_rounds_behind_the_warm_up_and_bars_take_turns():
    order, values = [], iter([9, 9, 1, 10, 3, 30, 2, 20])
    bars = {name: lambda name=name: order.append(name) or {"x": next(values)} for name in "ab"}
    assert bench.measure(bars, 3) == {"a": {"x": 2}, "b": {"x": 20}} and order == list("abababab")


def test_ratios_compare_with_ours():
    seconds = {"none": 8.0, "stage 1": 6.0, "stage 1+2": 4.0, "ours": 2.0, "ours, sp 1": 2.0}
    found = {bar: {"seconds": s, "peak_bytes": 10} for bar, s in seconds.items()}
    found["ours"]["peak_bytes"] = 5
    faster = {"faster_than_none": 4.0, "faster_than_stage 1": 3.0, "faster_than_stage 1+2": 2.0}
    assert bench.ratios(found) == faster | {"memory_to_sp_1": 0.5}
    found["ours"]["peak_bytes"] = None
    assert bench.ratios(found) == faster


def test_peak_memory_sees_what_was_freed_again(monkeypatch, capsys):
    peak = bench.PeakMemory()
    for _ in range(3):  # one at a time
        torch.ones(2**26, dtype=torch.uint8)
    if peak.read() is not None:
        assert 0.95 * 2**26 < peak.read() < 1.3 * 2**26
        assert bench.PeakMemory().read() < 2**24

    def refuse(*_):
        raise PermissionError("clear_refs is read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert bench.PeakMemory().read() is None
    assert "not measured: clear_refs is read-only" in capsys.readouterr().err


def test_pairs_are_those_of_the_mask():
    branches = [[torch.ones(r, dtype=torch.long) for r in (5, 1, 3)]]
    layout = mrsp.pack([bench.text_prompt(40, 512)], branches).layout
    # a diagonal of n counts n / 2 too few: of the prompt and of each answer
    assert bench.pairs(layout) == layout.mask.sum() - 49 / 2


def test_attention_is_timed_in_three_ways_and_they_agree(monkeypatch):
    found = []
    real = bench.gradients
    monkeypatch.setattr(bench, "gradients", lambda f, *rest: found.append(f()) or real(f, *rest))
    row = bench.attention_row(128, 4, (4, 2, 8), plain=True, repeats=1)
    assert all(row[f"{way}_seconds"] > 0 for way in ("block", "torch", "plain"))
    torch.testing.assert_close(found[0], found[2])
    assert "plain_seconds" not in bench.attention_row(128, 4, (4, 2, 8), repeats=1)


@pytest.mark.parametrize(
    "command, names",
    [
        ("step --prompt_tokens 20 --group 3", "rollout logprobs backward optimizer seconds"),
        ("rollout --frames 2 --prompts 2 --group 3", "seconds sync tokens_per_second"),
        pytest.param("decode --videos 2 --frames 3 --decodes 2", "", marks=pytest.mark.slow),
    ],
)
def test_commands_print_json_lines(command, names, tmp_path, capsys):
    tiny = TINY if "decode" not in command else ["--repeats", "1", "--output", str(tmp_path)]
    bench.main([*command.split(), *tiny])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(lines[0][name] > 0 for name in names.split())
    if "step" in command:
        assert lines[0]["prompt_tokens"] == 20 and lines[0]["tokens"] == 26
    if "rollout" in command:  # one prefill for three answers
        assert lines[0]["prompt_tokens"] == 3 * lines[0]["prefilled"]
    if "decode" in command:
        assert {"seconds a video, child, ahead", "seconds a video, here"} < set(lines[0])
        assert [line["decodes"] for line in lines[1:]] == [0, 1, 2]


def _gpu_parts(rank, folder):
    found = bench.sharded_row("cpu")
    assert 0 < found["logp_gap"] < 0.1 and 0 < found["gradient_gap"] < 0.3  # bfloat16
    row = bench.packed_row(shape(), 60, 3, 4, "cpu")
    assert row["seconds"] > 0 and row["tflops"] > 0
    assert bench.tower_row(folder, (4, 56, 84), "cpu", torch.float32)["frames_per_second"] > 0
    assert bench.head_row(shape(), 16, 50, "cpu", torch.float32)["seconds"] > 0


@pytest.mark.slow
def test_the_parts_of_gpu_run_on_the_cpu_in_small(tmp_path, capsys):
    zoo.build("qwen2.5-vl").save_pretrained(tmp_path)
    run_ranks(_gpu_parts, 1, tmp_path)
    bench.print_table({"a": {"seconds": 1234.5, "why": "out of memory"}})
    assert capsys.readouterr().out == f"{'a':28s} seconds 1,234, why out of memory\n"


@pytest.mark.parametrize(
    "command, message",
    [
        ("mrsp --fames 3", "--fames.*perhaps you meant --frames"),
        ("mrsp --frames 0", "--frames must be at least 1"),
        ("mrsp --frames 8 x", "--frames: .*'x'"),
        ("mrsp --frames", "--frames must be at least 1"),
        ("mrsp --hidden 36", "--hidden must be a multiple of 8"),
        ("gpu", "needs a CUDA GPU"),
        ("attention --lengths 8", "8 tokens is too short for 8 answers"),
        ("mrsp", "2 ranks are asked for, but torchrun started 3"),
    ],
)
def test_impossible_options_are_errors(command, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        bench.main(command.split())
