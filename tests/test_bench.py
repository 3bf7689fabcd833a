"""The benchmark measures what it says: equal work in all bars, memory as counted, exact lengths."""

import json
from pathlib import Path

import pytest
import torch

import mrsp
from kit import bench
from rollout import Sampling, TorchEngine


def shape(layers=2, hidden=64, mlp=192, vocab=512, tied=True):
    return dict(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp, vocab_size=vocab,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4,
        tie_word_embeddings=tied,
    )  # fmt: skip


class Keep:
    """In place of an optimizer: keeps a copy of the gradients."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.grads = {n: p.grad.clone() for n, p in self.model.llm.named_parameters()}

    def zero_grad(self):
        self.model.zero_grad()


def test_every_bar_encodes_as_often_as_it_says_and_has_the_same_gradient(monkeypatch):
    model, group, count = bench.small_vila(32, 2), 3, 5
    reference = TorchEngine(model, dtype=torch.float32).policy
    with torch.no_grad():  # a reference that differs, so that its part of the loss counts
        for p in reference.llm.parameters():
            p.mul_(1.1)
    videos, keep = torch.randint(0, 256, (2, count, 48, 48, 3), dtype=torch.uint8), Keep(model)
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda f: encoded.append(len(f)) or encode(f))
    grads, frames = {}, {}
    for bar in bench.BARS:
        encoded.clear()
        seconds, norm = bench.grpo_step(
            model, reference, TorchEngine(model), keep, videos, bar, [mrsp.Mesh()] * 2, group, 4
        )
        assert norm > 0 and set(seconds) == {
            "encode", "rollout", "reference", "logprobs", "backward", "optimizer",
        }  # fmt: skip
        grads[bar], frames[bar] = keep.grads, sum(encoded)
    once = 2 * count
    assert list(frames.values()) == [3 * group * once, once, once, once, once]
    for bar, found in grads.items():
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads["none"][name], rtol=1e-3, atol=1e-6, msg=bar)


def test_answers_have_exactly_the_asked_length():
    engine, prompt = TorchEngine(bench.small_vila(32, 2)), bench.text_prompt(9, 512)
    (answers,) = engine.generate([prompt], 50, Sampling(max_tokens=11))
    assert {len(a.ids) for a in answers} == {11} and not any(a.finished for a in answers)


def test_two_ranks_measure_all_bars(tmp_path):
    command = ["mrsp", "--frames", "2,3", "--repeats", "1"]
    command += ["--group", "2", "--response_tokens", "2", "--hidden", "32", "--layers", "1"]
    with pytest.raises(SystemExit) as end:  # it has run itself again under torchrun
        bench.main([*command, "--output", str(tmp_path)])
    assert end.value.code == 0
    rows = json.loads((tmp_path / "mrsp.json").read_text())
    assert [(r["frames"], r["bar"]) for r in rows] == [
        (n, bar) for n in (2, 3) for bar in bench.BARS
    ]
    assert all(r["seconds"] > 0 and r["encode"] > 0 and "peak_bytes" in r for r in rows)
    assert (tmp_path / "mrsp.png").stat().st_size > 10_000


def test_ratios_compare_with_ours():
    seconds = {"none": 8.0, "stage 1": 6.0, "stage 1+2": 4.0, "ours": 2.0, "ours, sp 1": 2.0}
    rows = [
        {"bar": bar, "frames": 4, "seconds": s, "peak_bytes": 5 if bar == "ours" else 10}
        for bar, s in seconds.items()
    ]
    (found,) = bench.ratios(rows)
    assert found == {
        "frames": 4, "faster_than_none": 4.0, "faster_than_stage 1": 3.0,
        "faster_than_stage 1+2": 2.0, "memory_to_sp_1": 0.5,
    }  # fmt: skip
    for row in rows:
        row["peak_bytes"] = None
    assert "memory_to_sp_1" not in bench.ratios(rows)[0]


def test_peak_memory_sees_what_was_freed_again(monkeypatch, capsys):
    peak = bench.peak_memory()
    for _ in range(3):  # one at a time
        torch.ones(2**26, dtype=torch.uint8)
    if peak() is not None:
        assert 0.95 * 2**26 < peak() < 1.3 * 2**26
        assert bench.peak_memory()() < 2**24

    def refuse(*_):
        raise PermissionError("clear_refs is read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert bench.peak_memory()() is None
    assert "not measured: clear_refs is read-only" in capsys.readouterr().err


# -------------------------------------------------------------------- attention, step, gpu, main


def test_pairs_are_those_of_the_mask():
    branches = [[torch.ones(r, dtype=torch.long) for r in (5, 1, 3)]]
    layout = mrsp.pack([bench.text_prompt(40, 512)], branches).layout
    # a diagonal of n counts n / 2 too few: of the prompt and of each answer
    assert bench.pairs(layout) == layout.mask().sum() - 49 / 2


def test_attention_row_times_the_three_ways():
    row = bench.attention_row(128, 4, (4, 2, 8), repeats=1, dense=128)
    assert all(row[f"{way}_seconds"] > 0 for way in ("block", "torch", "plain"))
    assert "plain_seconds" not in bench.attention_row(128, 4, (4, 2, 8), repeats=1)


def test_step_prints_one_json_line(capsys):
    command = "step --prompt_tokens 20 --group 3 --response_tokens 5 --hidden 32 --layers 1"
    bench.main([*command.split(), "--repeats", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    line = json.loads(line)
    assert line["prompt_tokens"] == 20 and line["tokens"] == 35
    parts = [line[name] for name in ("rollout", "logprobs", "backward", "optimizer")]
    assert min(parts) > 0 and line["total"] >= max(parts)


def test_gpu_rows_run_on_the_cpu_in_small():
    rows = list(bench.gpu_rows(shape(), [60], 3, 4, "cpu", torch.float32, side=64))
    assert [r["way"] for r in rows] == ["shared prefix", "G copies"]
    assert all(r["seconds"] > 0 and r["tflops"] > 0 for r in rows)


def test_tiled_mlps_change_nothing():
    pack = mrsp.pack([bench.text_prompt(50, 512)], [[torch.ones(5, dtype=torch.long)] * 2])
    found = []
    for tile in (1000, 3):
        torch.manual_seed(0)
        policy = bench.decoder(shape())
        bench.tile_mlps(policy.llm, tile)
        policy(mrsp.shard(pack, mrsp.Mesh()))[0].sum().backward()
        found.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_impossible_options_are_errors(monkeypatch, capsys):
    for argv in (["plan", "--fames", "3"], ["plan", "--frames", "0"], ["mrsp", "--frames", "8,x"]):
        with pytest.raises(SystemExit) as error:
            bench.main(argv)
        assert error.value.code == 2
    assert "'x' is not a number of at least 1" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, message in (
        (["gpu"], "needs a CUDA GPU"),
        (["plan", "--model", "gpt"], "--model must be one of qwen2.5-vl-7b, longvila-7b"),
        (["plan", "--sp", "3"], "--sp 3 does not divide --gpus 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            bench.main(argv)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="2 ranks are asked for, but torchrun started 3"):
        bench.main(["mrsp"])
