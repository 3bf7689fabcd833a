"""The filter keeps what a model answers rightly at times; its rates are asked for once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_jsonl, says, write_jsonl

import data
from kit import ask, filter

ROOT = Path(__file__).resolve().parents[1]


def test_filter_keeps_what_is_right_at_times(saved, toy, tmp_path, oracle, monkeypatch, capsys):
    rows = read_jsonl(toy / "rl.jsonl")[:6]
    rows[4]["videos"] = "videos/gone.mp4"
    rows[2]["note"] = "kept as it is"
    write_jsonl(tmp_path / "rows.jsonl", rows, end="{\n{}\n")
    said = []
    for row, right in zip(rows, [4, 1, 3, 0, None, 4]):  # right answers, of 4
        if right is not None:
            said += [row["answer"]] * right + ["<answer> Z </answer>"] * (4 - right)
    turns = iter(said)
    made = oracle(lambda text: next(turns))
    argv = ["--model", saved, "--data", tmp_path / "rows.jsonl", "--video_dir", toy, "--answers", 4]
    argv += ["--out", tmp_path / "hard.jsonl", "--on_missing", "wrong", "--decode_ahead", 0]
    argv = list(map(str, argv))
    assert filter.main(argv) == {"too easy": 2, "kept": 2, "too hard": 1, "failed": 3}
    assert made[0].seeds == [[0, 1, 2, 3, 5]]
    kept = read_jsonl(tmp_path / "hard.jsonl")
    assert kept == [rows[1] | {"pass_rate": 0.25}, rows[2] | {"pass_rate": 0.75}]
    rates = read_jsonl(tmp_path / "hard_rates/rates.jsonl")
    assert [r["pass_rate"] for r in rates] == [1.0, 0.25, 0.75, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert "gone.mp4" in rates[4]["error"] and "JSON" in rates[6]["error"]
    text = capsys.readouterr().out
    assert text.count("failed: ") == 3 and f"failed: {rows[4]['problem_id']}: " in text
    # other limits: nothing is asked again
    monkeypatch.setattr(ask, "make_engine", None)
    assert filter.main([*argv, "--low", "0.5"])["kept"] == 1
    assert read_jsonl(tmp_path / "hard.jsonl") == kept[1:]
    assert len(data.load_rows(str(tmp_path / "hard.jsonl"), str(toy))) == 1


@pytest.mark.parametrize(
    "more, message",
    [
        ("--out {tmp}/videos/../rows.jsonl", "rows.jsonl: give .* a new file"),
        ("--out {tmp}", "give the name of a new file"),
        ("--out {tmp}/o.jsonl --low 0.5 --high 0.5", "--low 0.5 --high 0.5: no row"),
        ("--out {tmp}/o.jsonl --answers 0", "answers must be above 0, not 0"),
        ("--out {tmp}/o.jsonl --temperature 0", "temperature 0 is greedy: give --answers 1"),
        ("--out {tmp}/o.jsonl --temperature -1", "temperature must be at least 0, not -1"),
        ("--out {tmp}/o.jsonl --top_p 1.5", "top_p must be at most 1, not 1.5"),
        ("--out {tmp}/o.jsonl --frames 4 5", "a pass rate is for one number of frames"),
    ],
)
def test_filter_does_not_begin_with_what_cannot_end_well(more, message, saved, toy, tmp_path):
    rows = shutil.copy(toy / "rl.jsonl", tmp_path / "rows.jsonl")
    argv = f"--model {saved} --data {rows} --video_dir {toy} {more.format(tmp=tmp_path)}"
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        filter.main(argv.split())
    assert rows.read_bytes() == (toy / "rl.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_pass_rate_is_the_mean_of_fractions(saved, tmp_path, oracle):
    file = tmp_path / "half.py"
    file.write_text("def reward(*given): return {'reward': 7, 'accuracy': 'B' in given[0] and 0.5}")
    turns = iter("ABBBBBAA" * 2)
    oracle(lambda text: says(next(turns)))
    argv = f"--model {saved} --limit 4 --answers 4 --method {file} --out {tmp_path}/o.jsonl"
    assert filter.main([*argv.split(), "--decode_ahead", "0"]) == {"kept": 4}
    rates = [row["pass_rate"] for row in read_jsonl(tmp_path / "o.jsonl")]
    assert rates == [0.375, 0.25, 0.375, 0.25]


@pytest.mark.slow
def test_pass_rates_depend_on_neither_batches_nor_ranks(saved, tmp_path):
    """The real engine at temperature 2, on one rank and on two."""
    argv = "--answers 6 --temperature 2 --thinking false --max_tokens 1 --model".split()
    found = filter.main([*argv, str(saved), "--out", str(tmp_path / "one")])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [*argv, str(saved), "--out", str(tmp_path / "two"), "--batch", "3"]
    subprocess.run([*start, "-m", "kit.filter", *two], cwd=ROOT, check=True, timeout=100)
    assert found["kept"] and found["too hard"]
    for name in ("{}", "{}_rates/rates.jsonl"):
        one, two = (tmp_path / name.format(n) for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
