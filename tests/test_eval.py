"""Evaluation: every question counts, by its own id; the command prints what training printed."""

import itertools
import json
import os
import shutil
import signal
import socket
from dataclasses import fields, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Oracle, read_jsonl, row, says, write_jsonl
from torch.multiprocessing import ProcessExitedException, start_processes

import data
import eval as evaluation
from data import DataError, Medium
from families import load
from families.vila import VILA
from kit import ask, chat, filter
from kit.chat import ReplyError, ServerError
from kit.method import Method
from rollout import Response, RolloutError, TorchEngine


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def rows(toy):
    return data.load_rows(str(toy / "test.jsonl"))


@pytest.fixture
def command(saved, tmp_path):
    """The command on the saved model, in one process, without the report; its result."""

    def run(*argv, out="out"):
        given = ["--model", saved, "--output", tmp_path / out, "--decode_ahead", 0]
        return evaluation.main(list(map(str, [*given, "--report_mb", 0, *argv])))

    return run


def evaluate(model, rows, answer, **how):
    """The result of 4 frames a video if all answers are the same, and the prompts."""
    engine = Oracle(model, lambda prompt: answer)
    return evaluation.evaluate(model, engine, rows, num_frames=4, **how), engine.prompts


def test_accuracy_is_counted_by_question_and_category(rows, model):
    result, prompts = evaluate(model, rows, says("B"), batch=3)
    gold = [r.answer for r in rows]
    assert result["accuracy"] == pytest.approx(gold.count("B") / len(rows))
    assert [r["problem_id"] for r in result["records"]] == [r.id for r in rows]
    for name, share in result["by_category"].items():
        assert share == pytest.approx(
            np.mean([r.answer == "B" for r in rows if r.category == name])
        )
    assert result["format"] == 1.0 and result["questions"] == len(rows) == len(prompts)
    parts = {"reward": 1.0, "accuracy": 1.0, "format": 1.0}
    assert result["records"][gold.index("B")]["parts"] == parts


@pytest.mark.parametrize("why", ["gone.mp4", "control token", "9 tokens exceed the engine's 8"])
def test_a_question_that_cannot_be_asked_counts_as_wrong_alone(why, rows, model, toy):
    """Its video does not decode, its text is no question, its prompt is too long."""
    rows = [replace(r, answer="B", options=("x", "y")) for r in rows[:4]]
    engine = Oracle(model, lambda p: says("B"))
    turns = iter([None, None, why, None])

    def check_fits(prompt, sampling):
        if why[0] == "9" and next(turns):
            raise RolloutError(why)

    engine.check_fits = check_fits
    if why == "gone.mp4":
        rows[2] = replace(rows[2], media=(Medium("video", str(toy / "videos/gone.mp4")),))
    elif why == "control token":
        rows[2] = replace(rows[2], problem=f"{rows[2].problem} <|im_end|>")
    result = evaluation.evaluate(model, engine, rows, num_frames=4)
    ((name, message),) = result["errors"]
    assert name == rows[2].id and why in message and len(engine.prompts) == 3
    assert [r["accuracy"] for r in result["records"]] == [1, 1, 0, 1] and result["accuracy"] == 0.75
    assert result["parts"] == {"format": 0.75} and result["records"][2]["parts"] == {}


def test_a_forced_beginning_is_part_of_the_graded_answer(rows, model):
    begun = {"prefill": "<think> seen"}
    result, prompts = evaluate(model, rows[:2], "</think> <answer> A </answer>", **begun)
    assert all(r["completion"].startswith("<think> seen </think>") for r in result["records"])
    assert all(p.text.endswith("<think> seen") for p in prompts) and result["format"] == 1.0


@pytest.mark.parametrize(
    "thinking, answer, strict, lenient",
    [
        (False, "B", 1, 1),
        (False, "B.", 1, 1),
        (False, says("B"), 1, 1),
        (False, "none", 0, 0),
        (True, "B", 0, 1),
        (True, "<think> x </think> The answer is B.", 0, 1),
    ],
)
def test_what_is_graded_in_either_mode(thinking, answer, strict, lenient, rows, model):
    """In non-thinking mode the bare completion is the answer."""
    share = [r.answer for r in rows].count("B") / len(rows)
    model.recipe = replace(model.recipe, thinking=thinking)
    result, prompts = evaluate(model, rows, answer)
    assert (result["accuracy"], result["lenient"]) == (strict * share, lenient * share)
    assert share > 0 and result["lenient_95"] == evaluation.wilson(lenient * share * 20, 20)
    assert ("Think then" in prompts[0].text) == thinking
    assert all(r["completion"] == answer for r in result["records"])


HALF = """
def reward(completion, example, config):
    right = 0.5 if "B" in completion else 0.0
    return {"reward": 7 * right, "accuracy": right, "overlap": 0.25}
"""


def test_a_reward_in_fractions_is_what_is_counted(command, oracle, tmp_path, capsys):
    """A right letter is leniently right all the same."""
    (tmp_path / "half.py").write_text(HALF)
    oracle(lambda text: says("B"))
    method = ["--method", tmp_path / "half.py"]
    result = command(*method, "--limit", 6)
    share = [r["gold"] for r in result["records"]].count("B") / 6
    assert result["accuracy"] == 0.5 and result["accuracy_95"] == evaluation.wilson(3.0, 6)
    assert result["lenient"] == 0.5 + share / 2 and result["parts"] == {"overlap": 0.25}
    said = capsys.readouterr().out
    assert "accuracy 0.5000, overlap 0.2500, 1.0 tokens" in said and "format" not in said
    (tmp_path / "half.py").write_text(HALF.replace("0.25", "0.75"))
    with pytest.raises(SystemExit, match=r"other settings \(method was '\w+', now '\w+'\)"):
        command(*method, "--limit", 6)


def test_a_method_that_fails_ends_the_evaluation_with_one_line(command, oracle, tmp_path):
    oracle(says)
    for name, body, message in (
        ("zero", "1 / 0", r"reward\(\) failed in line 1: ZeroDivisionError"),
        ("two", "{'reward': 0, 'accuracy': 2}", "accuracy = 2.0 to question test_0: it must be a "),
    ):
        file = tmp_path / f"{name}.py"
        file.write_text(f"def reward(text, example, config): return {body}\n")
        with pytest.raises(SystemExit, match=f"error: .*{name}.py: .*{message}"):
            command("--method", file, "--limit", 4, out=name)
        assert not (tmp_path / name / "answers_5.jsonl").exists()


def test_the_wrong_video_is_a_segment_of_another_one_and_all_else_stays():
    media = [Medium("video", f"/{'abc'[i % 3]}", i + 1, (i, i + 1)) for i in range(12)]
    rows = [data.Example(str(i), "", (), "", "", (m,), "video", "") for i, m in enumerate(media)]
    swapped = evaluation.swap_media(rows)
    assert [replace(b, media=a.media) for a, b in zip(rows, swapped)] == rows
    wrong = [e.media[0] for e in swapped]
    assert all(old.path != new.path for old, new in zip(media, wrong))
    assert [m.num_frames for m in wrong] == list(range(1, 13))
    pairs = [(m.path, m.segment) for m in media]
    assert sorted((m.path, m.segment) for m in wrong) == sorted(pairs)


def test_the_wrong_media_control_exchanges_all_media_of_a_question():
    """Half the set away among the distinct ones with the same kinds: a sound stays a sound."""
    kinds = {"v": "video", "i": "image", "a": "audio"}

    def about(media):
        media = [Medium(kinds[m[0]], m, 8, None, m[-1] == "+") for m in media.split()]
        return data.Example(" ".join(m.path for m in media), "?", (), "", "", tuple(media), "", "")

    sets = ["v1", "v2 i1", "v1", "v3 i2", "v2", "", "v1 a1", "v3", "v4 i1", "v2 a1", "v5+", "v6+"]
    wrong = ["v2", "v3 i2", "v2", "v4 i1", "v3", "", "v2 a1", "v1", "v2 i1", "v1 a1", "v6+", "v5+"]
    swapped = evaluation.swap_media([about(media) for media in sets])
    assert [" ".join(m.path for m in e.media) for e in swapped] == wrong
    for only, kind in (("v2 i1", "video.image"), ("v1", "video")):
        with pytest.raises(DataError, match=f"the wrong-{kind} control needs"):
            evaluation.swap_media([about(only), about("")])


def test_intervals_are_wilsons():
    """R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3; and symmetry."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    known |= {(0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (right, n), (low, high) in known.items():
        assert evaluation.wilson(right, n) == pytest.approx([low, high], abs=5e-5)
        assert evaluation.wilson(n - right, n) == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_questions_with_one_unit_count_once_and_only_if_all_are_right():
    def answer(name, category, right, lenient):
        grades = {"accuracy": right, "lenient": lenient, "format": 1.0, "parts": {"format": 1.0}}
        return grades | {"problem_id": name, "category": category, "tokens": 2, "error": ""}

    records = [answer(f"a#{i}", "ret", 1.0, 1.0) for i in range(4)]
    records += [answer("b#0", "ret", 1.0, 1.0), answer("b#1", "ret", 0.0, 1.0)]
    records += [answer("c#0", "cnt", 1.0, 1.0)]
    found = evaluation.summarise(records, "vnbench")
    assert found["questions"] == 3 and found["accuracy"] == 2 / 3 and found["lenient"] == 1.0
    assert found["by_category"] == {"cnt": 1.0, "ret": 0.5}
    assert found["categories"]["ret"]["accuracy_95"] == evaluation.wilson(1, 2)
    assert evaluation.summarise(records)["accuracy"] == 6 / 7
    text = evaluation.show({8: found, 16: found}, "rows").splitlines()
    first = "3 questions of rows, 8 frames, greedy: accuracy 0.6667, format 1.0000, 2.0 tokens an"
    assert text[0] == f"{first} answer, 0 failed"
    line = "  ret                             2       50.0   9.5 - 90.5     100.0  34.2 -100.0"
    assert text.count(line) == 2 and text[-1].split() == ["ret", "50.0", "50.0"]


def test_the_command_prints_the_accuracy_of_the_saved_model(
    command, saved, rows, tmp_path, capsys, monkeypatch
):
    """And prints the same again without loading weights; the report is beside it."""
    model = load(saved)
    here = evaluation.evaluate(model, TorchEngine(model), rows)
    there = command("--report_mb", 30)
    said = capsys.readouterr().out
    assert there["records"] == here["records"] == read_jsonl(tmp_path / "out/answers_5.jsonl")
    assert f"accuracy {here['accuracy']:.4f}" in said
    result = json.loads((tmp_path / "out/result.json").read_text())["frames"]["5"]
    assert result == {name: here[name] for name in here if name != "records"}
    before = contents(tmp_path / "out")
    assert sorted(before) == ["answers_5.jsonl", "report.html", "result.json", "settings.json"]
    monkeypatch.setattr(ask, "make_engine", None)
    assert command("--report_mb", 30) == there and contents(tmp_path / "out") == before
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("options, count", [("", 16), ("--max_frames 9", 9)])
def test_frames_can_be_a_rate_up_to_so_many(options, count, command, oracle, tmp_path, capsys):
    """A toy video has 256 frames in 64 s; a frame of it is one token."""
    made = oracle(says)
    command("--fps", 0.25, *options.split(), "--limit", 2)
    assert {len(p.media_at) for p in made[0].prompts} == {count}
    assert (tmp_path / "out/answers_0.25fps.jsonl").is_file()
    assert "0.25fps frames" in capsys.readouterr().out


def test_another_evaluation_stands_beside_in_the_report(command, oracle, tmp_path):
    """It is looked at before anything is asked."""
    made = oracle(says)
    command(out="a")
    command("--limit", 3, out="other")
    assert not (tmp_path / "a/report.html").exists()
    command("--before", tmp_path / "a", "--report_mb", 30, out="b")
    page = (tmp_path / "b/report.html").read_text()
    assert '"runs": ["before", "after"]' in page and page.count("data:image/jpeg") == 4
    del made[:]
    for name, message in (("none", "answers_5.jsonl:1: not an answer"), ("other", "other quest")):
        with pytest.raises(SystemExit, match=message):
            command("--before", tmp_path / name, out="c")
    assert not (tmp_path / "c").exists() and not made


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--model {tmp}", "is no checkpoint: config.json is missing"),
        ("--model {init}", "give --data"),
        ("--model {init} --frames 8 0", "frames must be above 0, not 0"),
        ("--model {init} --frames 8 many", "--frames: .*many"),
        ("--model {init} --fps 1 --frames 8", "--frames or --fps"),
        ("--model {init} --fps 0", "fps must be above 0, not 0"),
        ("--model {init} --fps nan", "fps must be above 0, not nan"),
        ("--model {init} --batch -1 --limit 0", "batch must be above 0, not -1"),
        ("--model {init} --rollout_memory 2", "rollout_memory must be within 0 and 1, not 2"),
        ("--model {init} --thinking maybe", "thinking"),
        ("--model {init} --benchmark mmlu", "benchmark.*videomme"),
        ("--model {init} --benchmark activitynet-qa", "vllm serve MODEL.*--judge http"),
        ("--model {init} --method none.py", "--method none.py: no such file"),
        ("--model {init} --data nothing.jsonl", "nothing.jsonl: no such file"),
        ("--model {init} --data {rows} --rollout_tp 2", "rollout_tp is vLLM's"),
        ("--model {init} --data {rows} --output /dev/null/x", "Not a directory"),
        ("--model {init} --data {rows} --output {tmp}/o --cache_dir /dev/null/x", "--cache_dir: "),
        ("--model {init} --data {rows} --judge http://localhost:1/v1", "localhost:1/v1/models"),
    ],
)
def test_errors_are_one_line(argv, message, toy, tmp_path, monkeypatch):
    """Also of a judge that is not there, before anything is asked."""
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    argv = argv.format(tmp=tmp_path, init=toy / "init", rows=toy / "test.jsonl")
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*$"):
        evaluation.main(argv.split())
    assert not list(tmp_path.glob("o/answers*"))


@pytest.mark.parametrize("config", [evaluation.EvalConfig, filter.FilterConfig])
def test_torchrun_passes_the_options_on(config):
    """It reads all options itself first: one that begins several of its own is an error there."""
    from torch.distributed.run import get_args_parser

    argv = [part for field in fields(config) for part in (f"--{field.name}", "1")]
    assert get_args_parser().parse_args(["eval.py", *argv]).training_script == "eval.py"


def test_questions_are_asked_as_the_options_say(
    command, oracle, rows, tmp_path, capsys, monkeypatch
):
    """A quick look is spread evenly, and says that it is one."""
    made, problems, build = oracle(lambda text: "B"), [], VILA.build_prompt
    monkeypatch.setattr(
        VILA, "build_prompt", lambda m, e, *rest: problems.append(e.problem) or build(m, e, *rest)
    )
    how = ["--thinking", "false", "--frames", 3, 4, "--instruction", "Only a letter."]
    result = command(*how, "--limit", 3)
    assert len(problems) == 6 and all(p.endswith("\nOnly a letter.") for p in problems)
    prompts = made[0].prompts
    assert all("\nD. " in p for p in problems) and not any("Think then" in p.text for p in prompts)
    assert [len(p.media_at) for p in prompts] == [3] * 3 + [4] * 3
    assert [r["problem_id"] for r in result["records"]] == [rows[i].id for i in (0, 9, 19)]
    assert list(result["by_frames"]) == [3, 4]
    assert "3 questions of test (a quick look: of 20), 4 frames" in capsys.readouterr().out
    assert '"questions_in_all": 20' in (tmp_path / "out/result.json").read_text()


def test_what_is_missing_is_refused_or_counted_as_wrong(command, oracle, toy, tmp_path, capsys):
    rows = read_jsonl(toy / "test.jsonl")
    rows[3]["videos"] = rows[7]["videos"] = "videos/gone.mp4"
    rows[11] |= {"data_type": "audio"}
    rows[12]["answer"] = "B"
    argv = ["--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--video_dir", toy]
    first = f"3 of 19 questions cannot be asked, the first: question {rows[3]['problem_id']}: no "
    with pytest.raises(SystemExit, match=f"{first}such file.*gone.mp4.*--on_missing wrong"):
        command(*argv)
    assert not (tmp_path / "out").exists()
    oracle(lambda text: says("B"))
    result = command(*argv, "--on_missing", "wrong")
    errors = dict(result["errors"])
    wrong = [rows[i]["problem_id"] for i in (3, 7, 11)] + [f"{tmp_path}/rows.jsonl:13"]
    assert list(errors) == wrong and "'answer' is 'B'" in errors[wrong[3]]
    assert "takes no audio" in errors[wrong[2]] and result["questions"] == 20
    right = sum(r["answer"] == "<answer>B</answer>" for r in rows if r["problem_id"] not in wrong)
    assert result["accuracy"] == right / 20 and result["by_category"]["malformed row"] == 0.0
    said = capsys.readouterr().out
    assert "4 failed" in said and all(f"counted as wrong: {name}: " in said for name in wrong)


def test_a_folder_of_other_settings_is_refused_by_naming_them(
    command, oracle, saved, toy, tmp_path
):
    shutil.copytree(saved, tmp_path / "m")
    shutil.copytree(toy / "videos", tmp_path / "videos")
    rows = tmp_path / "rows.jsonl"
    text = (toy / "test.jsonl").read_text()
    rows.write_text(text)
    argv = ["--model", tmp_path / "m", "--data", rows]
    oracle(says)
    command(*argv)

    def refused(message, more=""):
        with pytest.raises(SystemExit, match=f"{message}.*another folder"):
            command(*argv, *more.split())

    refused(r"num_frames was \[5\], now \[4\]", "--frames 4")
    refused("thinking was True, now False", "--thinking false")
    refused("batch was 64, now 8.*prefill was ''", "--prefill <think> --batch 8")
    refused("max_tokens was 8, now 4", "--max_tokens 4")
    refused("wrong_video was False.*questions", "--wrong_video")
    refused("limit was None.*questions", "--limit 3")
    rows.write_text(text.replace("<answer>A", "<answer>B"))
    refused(r"settings \(questions was '\w+', now '\w+'\)")
    rows.write_text(text)
    next((tmp_path / "videos").glob("test*")).unlink()
    refused(r"settings \(media was '\w+', now '\w+'\)", "--on_missing wrong")
    shutil.copytree(toy / "videos", tmp_path / "videos", dirs_exist_ok=True)
    os.utime(next((tmp_path / "m").rglob("*.safetensors")), (1, 1))
    refused(r"settings \(weights was '\w+', now '\w+'\)")


def test_each_setting_has_a_folder_of_its_own_by_default(saved, oracle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    oracle(says)
    for more in ("--limit 1", "--limit 2", "--limit 1"):
        argv = f"--model {saved} --report_mb 0 --decode_ahead 0 {more}"
        evaluation.main(argv.split())
    assert len(list(tmp_path.glob("runs/eval/test-*/result.json"))) == 2


def enter(rank, world, port, argv):
    """A rank as torchrun starts it; the second one is killed after three batches."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    turns = itertools.count()

    def asked(*args, **kwargs):
        if rank == 1 and next(turns) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask.ask(*args, **kwargs)

    evaluation.ask = asked
    evaluation.main(argv)


@pytest.mark.slow
def test_killed_as_two_ranks_and_gone_on_with_as_one_gives_the_same_bytes(saved, tmp_path):
    """The real engine, real processes."""
    argv = ["--model", str(saved), "--batch", "2", "--frames", "4", "5", "--output"]
    found = evaluation.main([*argv, str(tmp_path / "one")])
    two = [*argv, str(tmp_path / "two")]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        start_processes(enter, (2, port, two), 2, start_method="forkserver")
    kept = sorted(path.name for path in tmp_path.glob("two/answers_*"))
    assert kept == ["answers_4.part.0", "answers_4.part.1"]
    assert evaluation.main(two) == found
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


ANSWERS = [  # completion ("a cat" is right), the judge's reply, strict, lenient, the record's error
    (says("A cat."), None, 1.0, 1.0, ""),
    (says("kitten"), "Yes.", 1.0, 1.0, ""),
    (says("dog"), "<think> or yes? </think>\nNo", 0.0, 0.0, ""),
    ("<think> x </think> a kitty", "**yes**", 0.0, 1.0, ""),
    ("<answer> dog </answer> <answer> puss </answer>", "yes", 0.0, 1.0, ""),
    (says("fur"), "Maybe", 0.0, 0.0, "judge: neither yes nor no: 'Maybe'"),
    (says("tail"), ReplyError("500"), 0.0, 0.0, "judge: 500"),
    (says("paw"), "yesterday", 0.0, 0.0, "judge: neither yes"),
    ("<think> on and on", None, 0.0, 0.0, ""),
    ("<think> x </think> <answer> <answer> puss </answer>", "yes", 0.0, 1.0, ""),
]


@pytest.mark.parametrize("said, reply, strict, lenient, error", ANSWERS)
def test_open_answers_are_judged_by_what_they_mean(said, reply, strict, lenient, error):
    example = data.Example("q", "What is it?", (), "a cat", "", (), "text", "")
    own = evaluation.record(example, [Response([1], None, said, True)], Method(), "", True)
    chat = Mock(**{"ask.side_effect": [reply]})
    found = evaluation.judge(chat, example, own, thinking=True)
    assert (found["accuracy"], found["lenient"]) == (strict, lenient)
    assert found["error"].startswith(error) and bool(found["error"]) == bool(error)
    assert len(chat.ask.mock_calls) == (reply is not None)
    asked = "Question: What is it?\nReference answer: a cat\nGiven answer: "
    assert all(asked in call.args[0][0]["content"] for call in chat.ask.mock_calls)


def test_judged_answers_are_kept_when_the_judge_goes_away(
    command, oracle, toy, tmp_path, monkeypatch, capsys
):
    """It may come back elsewhere, as long as it is the same model."""
    question = row(0, answer="<answer>a cat</answer>")
    asked = [question | {"problem_id": f"q{i}", "problem": f"number {i}?"} for i in range(130)]
    path = write_jsonl(tmp_path / "open.jsonl", asked)
    argv = ["--data", path, "--video_dir", toy, "--frames", 1, "--judge"]
    replies = {"number 3?": "yes", "number 5?": ReplyError("500"), "number 99?": ServerError("401")}

    def reply(messages):
        found = next((r for q, r in replies.items() if q in messages[0]["content"]), "no")
        if isinstance(found, Exception):
            raise found
        return found

    judge = Mock(model="wise", **{"ask.side_effect": reply})
    monkeypatch.setattr(evaluation, "Chat", lambda url, model: judge)
    made = oracle(lambda text: says("thing"))
    with pytest.raises(SystemExit, match="error: 401"):
        command(*argv, "http://one/v1")
    judge.reset_mock()
    del replies["number 99?"]
    result = command(*argv, "http://two/v1")
    assert json.loads((tmp_path / "out/settings.json").read_text())["judge_model"] == "wise"
    assert len(judge.ask.mock_calls) == 130 - 64 == len(made[1].prompts)
    assert result["accuracy"] == 1 / 130 and result["records"][3]["lenient"] == 1.0
    assert "counted as wrong: q5: judge: 500" in capsys.readouterr().out
