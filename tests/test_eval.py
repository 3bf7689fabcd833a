"""Evaluation: every question counts, by its own id; the command prints what training printed."""

import json
from dataclasses import replace

import pytest

import data
import eval as evaluation
from rollout import Response, TorchEngine


class Oracle:
    """An engine that answers as its function says."""

    tp = 1  # ranks that share it

    def __init__(self, model, answer):
        self.model, self.answer, self.prompts = model, answer, []

    def generate(self, prompts, n, sampling, seeds=None):
        import torch

        self.prompts += prompts
        return [
            [Response(torch.tensor([1]), torch.zeros(1), self.answer(p), True)] for p in prompts
        ]


def test_accuracy_is_counted_by_question_and_category(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))
    engine = Oracle(model, lambda p: "<think> x </think> <answer> B </answer>")
    result = evaluation.evaluate(model, engine, rows, 4, batch=3)
    gold = [r.answer for r in rows]
    assert result["accuracy"] == pytest.approx(gold.count("B") / len(rows))
    assert [r["problem_id"] for r in result["records"]] == [r.id for r in rows]
    for name, value in result["by_category"].items():
        mine = [r.answer == "B" for r in rows if r.category == name]
        assert value == pytest.approx(sum(mine) / len(mine))
    assert result["format"] == 1.0 and result["questions"] == len(rows) == len(engine.prompts)


def test_a_broken_video_counts_as_wrong_and_is_listed(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:4]
    rows[2] = replace(rows[2], media=(data.Medium("video", str(toy / "videos" / "gone.mp4")),))
    right = iter([r.answer for i, r in enumerate(rows) if i != 2])
    engine = Oracle(model, lambda p: f"<think> x </think> <answer> {next(right)} </answer>")
    result = evaluation.evaluate(model, engine, rows, 4)
    assert result["accuracy"] == 0.75
    ((name, message),) = result["errors"]
    assert name == rows[2].id and "gone.mp4" in message


def test_the_wrong_video_is_never_the_right_one(toy):
    rows = data.load_rows(str(toy / "test.jsonl"))
    swapped = evaluation.swap_media(rows)
    assert all(
        a.media != b.media and a.problem == b.problem for a, b in zip(rows, swapped, strict=True)
    )
    assert {r.media for r in swapped} == {r.media for r in rows}


def test_the_wrong_video_control_keeps_kinds_apart_and_takes_the_other_ones_segment(toy):
    rows = data.load_rows(str(toy / "base.jsonl")) + data.load_rows(str(toy / "base_images.jsonl"))
    where = {(m.path, m.segment) for r in rows for m in r.media}
    for a, b in zip(rows, evaluation.swap_media(rows)):
        assert [m.kind for m in a.media] == [m.kind for m in b.media]
        assert [m.num_frames for m in a.media] == [m.num_frames for m in b.media]
        for old, new in zip(a.media, b.media):
            assert (new.path, new.segment) in where
            assert (new.path, new.segment) != (old.path, old.segment)
            assert new.path.endswith({"video": ".mp4", "image": ".png"}[b.data_type])


def test_the_wrong_media_control_exchanges_all_media_of_a_question():
    """Half the set away among the distinct ones with the same kinds: a sound stays a sound."""
    sets = ["v1", "v2 i1", "v1", "v3 i2", "v2", "", "v1 a1", "v3", "v4 i1", "v2 a1", "v5+", "v6+"]
    kinds = {"v": "video", "i": "image", "a": "audio"}

    def row(media):
        media = [data.Medium(kinds[m[0]], m, 8, None, m[-1] == "+") for m in media.split()]
        return data.Example(" ".join(m.path for m in media), "?", (), "", "", tuple(media), "", "")

    names = lambda e: " ".join(m.path for m in e.media)  # noqa: E731
    swapped = list(map(names, evaluation.swap_media([row(media) for media in sets])))
    wrong = ["v2", "v3 i2", "v2", "v4 i1", "v3", "", "v2 a1", "v1", "v2 i1", "v1 a1", "v6+", "v5+"]
    assert swapped == wrong
    with pytest.raises(data.DataError, match="the wrong-video.image control needs"):
        evaluation.swap_media([row("v2 i1"), row("")])
    with pytest.raises(data.DataError, match="the wrong-video control needs"):
        evaluation.swap_media([row("v1"), row("")])


def test_a_forced_beginning_is_part_of_the_graded_answer(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:2]
    engine = Oracle(model, lambda p: "</think> <answer> A </answer>")
    result = evaluation.evaluate(model, engine, rows, 4, prefill="<think> seen")
    assert all(r["completion"].startswith("<think> seen </think>") for r in result["records"])
    assert all(p.text.endswith("<think> seen") for p in engine.prompts) and result["format"] == 1.0


def test_the_command_line_prints_the_accuracy_of_the_saved_model(toy, model, tmp_path, capsys):
    model.recipe = replace(model.recipe, data=str(toy / "test.jsonl"))
    model.save_pretrained(tmp_path / "m")
    rows = data.load_rows(str(toy / "test.jsonl"))
    here = evaluation.evaluate(model, TorchEngine(model), rows)
    out = tmp_path / "out.jsonl"
    there = evaluation.main(["--model", str(tmp_path / "m"), "--output", str(out)])
    assert there["accuracy"] == here["accuracy"]
    assert there["records"] == here["records"] == [json.loads(line) for line in out.open()]
    assert f"accuracy {here['accuracy']:.4f}" in capsys.readouterr().out


def test_command_line_errors_are_one_line(toy, tmp_path):
    with pytest.raises(SystemExit, match="error: .*is no checkpoint: config.json is missing"):
        evaluation.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*give --data"):
        evaluation.main(["--model", str(toy / "init")])
    with pytest.raises(SystemExit, match="error: need num_frames"):
        evaluation.main(["--model", str(toy / "init"), "--num_frames", "0"])
    with pytest.raises(SystemExit, match="error: .*nothing.jsonl: no such file"):
        evaluation.main(["--model", str(toy / "init"), "--data", "nothing.jsonl"])


def test_a_question_that_cannot_be_asked_counts_as_wrong(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:3]
    rows[1] = replace(rows[1], problem=f"{rows[1].problem} <|im_end|>")
    found = evaluation.evaluate(model, TorchEngine(model), rows)
    ((name, message),) = found["errors"]
    assert name == rows[1].id and "control token" in message
    assert found["questions"] == 3 and found["records"][1]["accuracy"] == 0.0


def test_in_non_thinking_mode_the_bare_completion_is_the_answer(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))
    gold = [r.answer for r in rows]
    for thinking, answer, right in (
        (False, "B", gold.count("B")),
        (False, "B.", gold.count("B")),
        (False, "<answer> B </answer>", gold.count("B")),
        (False, "none of them", 0),
        (True, "B", 0),
    ):
        model.recipe = replace(model.recipe, thinking=thinking)
        engine = Oracle(model, lambda p, answer=answer: answer)
        result = evaluation.evaluate(model, engine, rows, 4)
        assert result["accuracy"] == right / len(rows) and gold.count("B") > 0
        assert ("Think then" in engine.prompts[0].text) == thinking
        assert all(r["completion"] == answer for r in result["records"])
