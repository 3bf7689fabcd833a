"""Evaluation: every question counts, by its own id; the command prints what training printed."""

import http.server
import json
import os
import shutil
import signal
import socket
import threading
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, start_processes

import data
import eval as evaluation
from data import Rate
from families.vila import VILA
from kit import chat
from rollout import Response, RolloutError, TorchEngine


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_of(toy, out):
    return ["--data", str(toy / "test.jsonl"), "--output", str(out / "out")]


@pytest.fixture
def saved(toy, model, tmp_path):
    """A checkpoint whose recipe names the toy's 20 test rows."""
    model.recipe = replace(model.recipe, data=str(toy / "test.jsonl"))
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


class Oracle:
    """An engine that answers as its function says."""

    tp = 1  # ranks that share it

    def __init__(self, model, answer):
        self.model, self.answer, self.prompts = model, answer, []

    def generate(self, prompts, n, sampling, seeds=None):
        self.prompts += prompts
        said = [[self.answer(p) for _ in range(n)] for p in prompts]
        return [[Response(torch.tensor([1]), torch.zeros(1), a, True) for a in s] for s in said]

    def sync(self, policy):
        pass

    close = sync

    def check_fits(self, prompt, sampling, name=""):
        pass


def oracle(monkeypatch, answer):
    """The command line samples from an Oracle. answer(text of the prompt)."""
    made = []

    def make(kind, model, config, dtype):
        made.append(Oracle(model, lambda p: answer(p.text)))
        return made[-1]

    monkeypatch.setattr(evaluation, "make_engine", make)
    monkeypatch.setattr(Oracle, "close", lambda self: None)
    return made


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


def test_the_wrong_video_is_no_other_segment_of_the_right_one():
    media = [data.Medium("video", f"/{'abc'[i % 3]}", None, (i, i + 1)) for i in range(12)]
    rows = [data.Example(str(i), "", (), "", "", (m,), "video", "") for i, m in enumerate(media)]
    swapped = [e.media[0] for e in evaluation.swap_media(rows)]
    assert all(old.path != new.path for old, new in zip(media, swapped))
    assert sorted(swapped) == sorted(media)


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


def test_the_command_line_prints_the_accuracy_of_the_saved_model(saved, toy, capsys):
    rows = data.load_rows(str(toy / "test.jsonl"))
    model = VILA.from_pretrained(saved)
    here = evaluation.evaluate(model, TorchEngine(model), rows)
    there = evaluation.main(["--model", str(saved), "--output", str(saved / "out")])
    assert there["accuracy"] == here["accuracy"]
    assert there["records"] == here["records"] == lines(saved / "out/answers_5.jsonl")
    assert f"accuracy {here['accuracy']:.4f}" in capsys.readouterr().out
    result = json.loads((saved / "out/result.json").read_text())["frames"]["5"]
    assert result == {k: here[k] for k in result} and not {"records"} & set(result)
    files = ["answers_5.jsonl", "report.html", "result.json", "settings.json"]
    assert sorted(os.listdir(saved / "out")) == files


def test_frames_can_be_a_rate_up_to_so_many(saved, capsys, monkeypatch):
    """A toy video has 256 frames in 64 s."""
    asked = []
    whole = VILA.prompt
    monkeypatch.setattr(VILA, "prompt", lambda m, e, n, *a: asked.append(n) or whole(m, e, n, *a))
    seen = []
    shape = VILA.encode
    monkeypatch.setattr(
        VILA, "encode", lambda m, f, *a, **k: seen.append(len(f)) or shape(m, f, *a, **k)
    )
    for options, name, how, count in (
        (["--fps", "0.25"], "0.25fps", Rate(0.25), 16),
        (["--fps", "0.25", "--max_frames", "9"], "0.25fps", Rate(0.25, 9), 9),
        (["--frames", "7"], "7", 7, 7),
    ):
        asked.clear(), seen.clear()
        out = saved / f"{count}"
        found = evaluation.main(["--model", str(saved), "--output", str(out), *options])
        assert set(asked) == {how} and set(seen) == {count}
        assert (
            out / f"answers_{name}.jsonl"
        ).is_file() and f"{name} frames" in capsys.readouterr().out
        assert list(map(str, found["by_frames"])) == [name]
    with pytest.raises(SystemExit, match="--frames or --fps"):
        evaluation.main(["--model", str(saved), "--fps", "1", "--frames", "8"])
    for fps in ("-1", "0", "nan", "inf"):  # 0 is not "no rate given"
        with pytest.raises(SystemExit, match="fps > 0"):
            evaluation.main(["--model", str(saved), "--fps", fps])


def test_the_report_shows_another_evaluation_beside(saved):
    for name, options in (("a", ["--report_mb", "0"]), ("b", ["--before", str(saved / "a")])):
        evaluation.main(["--model", str(saved), "--output", str(saved / name), *options])
    assert not (saved / "a/report.html").exists()
    page = (saved / "b/report.html").read_text()
    assert '"runs": ["before", "after"]' in page and page.count("data:image/jpeg") == 4


def test_what_stands_beside_is_looked_at_before_anything_is_asked(saved, monkeypatch):
    argv = ["--model", str(saved), "--report_mb", "0", "--output"]
    evaluation.main([*argv, str(saved / "a"), "--limit", "3"])
    monkeypatch.setattr(evaluation, "make_engine", None)
    for folder, message in (("none", "none/answers_5.jsonl:1: not an answer"), ("a", "other ques")):
        with pytest.raises(SystemExit, match=message):
            evaluation.main([*argv, str(saved / "b"), "--before", str(saved / folder)])
    assert not (saved / "b").exists()


def test_command_line_errors_are_one_line(toy, tmp_path):
    init = ["--model", str(toy / "init")]
    for argv, message in (
        (["--model", str(tmp_path)], "is no checkpoint: config.json is missing"),
        (init, "give --data"),
        ([*init, "--frames", "0"], "need num_frames"),
        ([*init, "--data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        ([*init, "--benchmark", "activitynet-qa"], "vllm serve MODEL.*--judge http"),
        ([*init, "--rollout_tp", "2", *data_of(toy, tmp_path)], "rollout_tp is vLLM's"),
        ([*init, "--batch", "-1"], "--batch -1: give a number above 0"),
        ([*init, "--limit", "0"], "--limit 0: give a number above 0"),
        ([*init, "--data", str(toy / "test.jsonl"), "--output", "/dev/null/x"], "Not a directory"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            evaluation.main(argv)
    with pytest.raises(SystemExit, match="2"):
        evaluation.main([*init, "--frames", "many"])


def test_a_question_that_cannot_be_asked_counts_as_wrong(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:3]
    rows[1] = replace(rows[1], problem=f"{rows[1].problem} <|im_end|>")
    found = evaluation.evaluate(model, TorchEngine(model), rows)
    ((name, message),) = found["errors"]
    assert name == rows[1].id and "control token" in message
    assert found["questions"] == 3 and found["records"][1]["accuracy"] == 0.0


def test_a_prompt_that_is_too_long_for_the_engine_counts_as_wrong_alone(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:3]
    engine, turns = Oracle(model, lambda p: f"<answer>{rows[0].answer}</answer>"), iter(range(3))

    def check_fits(prompt, sampling):
        if next(turns) == 1:
            raise RolloutError("9 tokens exceed the engine's 8")

    engine.check_fits = check_fits
    result = evaluation.evaluate(model, engine, rows)
    assert result["errors"] == [(rows[1].id, "9 tokens exceed the engine's 8")]
    assert result["records"][0]["accuracy"] == 1 and len(engine.prompts) == 2


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


# ------------------------------------------------------------------------------------- numbers


def test_intervals_are_wilsons():
    """R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3; and symmetry."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
             (1, 29): (0.0061, 0.1718)}  # fmt: skip
    for (right, n), interval in known.items():
        low, high = evaluation.wilson(right, n)
        assert (round(low, 4), round(high, 4)) == interval
        assert evaluation.wilson(n - right, n) == pytest.approx([1 - high, 1 - low])


def test_questions_with_one_unit_count_once_and_only_if_all_are_right():
    def answer(name, category, right, lenient=None):
        record = {"problem_id": name, "category": category, "accuracy": right, "format": 1.0}
        return record | {"lenient": right if lenient is None else lenient, "tokens": 2, "error": ""}

    records = [answer(f"a#{i}", "ret", 1.0) for i in range(4)]
    records += [
        answer("b#0", "ret", 1.0),
        answer("b#1", "ret", 0.0, 1.0),
        answer("c#0", "cnt", 1.0),
    ]
    found = evaluation.summarise(records, lambda name: name[0])
    assert found["questions"] == 3 and found["accuracy"] == 2 / 3 and found["lenient"] == 1.0
    assert found["by_category"] == {"cnt": 1.0, "ret": 0.5}
    assert found["categories"]["ret"]["accuracy_95"] == evaluation.wilson(1, 2)
    assert evaluation.summarise(records)["accuracy"] == 6 / 7
    text = evaluation.show({8: found, 16: found}, "rows (a quick look: of 9)")
    assert "3 questions of rows (a quick look: of 9), 16 frames, greedy: accuracy 0.6667" in text
    assert (
        "ret                             2       50.0   9.5 - 90.5     100.0  34.2 -100.0" in text
    )
    assert text.splitlines()[-1].split() == ["ret", "50.0", "50.0"]


def test_lenient_accuracy_counts_what_stands_outside_the_format(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))
    engine = Oracle(model, lambda p: "<think> x </think> The answer is B.")
    result = evaluation.evaluate(model, engine, rows, 4)
    share = [r.answer for r in rows].count("B") / len(rows)
    assert (result["accuracy"], result["lenient"], result["format"]) == (0.0, share, 0.0)
    assert result["categories"] and result["lenient_95"] == evaluation.wilson(share * 20, 20)


# ----------------------------------------------------------------------- killed and begun again


def enter(rank, world, port, argv, death, command):
    """A rank as torchrun starts it. death: (rank, batches that it ends): then it is killed."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if death and death[0] == rank:
        whole, left = evaluation.ask, [death[1]]

        def ask(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        evaluation.ask = ask
    getattr(evaluation, command)(argv)


def launch(world, argv, death=None, command="main"):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start_processes(enter, (world, port, argv, death, command), world, start_method="forkserver")


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("killed, again", [((1, 0), 1), ((2, 1), 1), ((2, 0), 2)])
def test_killed_and_begun_again_gives_the_same_bytes(killed, again, saved, tmp_path, monkeypatch):
    """With one rank, or killed as two and gone on with as one; nothing is asked twice."""
    argv = ["--model", str(saved), "--frames", "4,5", "--batch", "2", "--output"]
    evaluation.main([*argv, str(tmp_path / "whole")])
    folder, (world, victim) = tmp_path / "killed", killed
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch(world, [*argv, str(folder)], (victim, 3))
    parts = list(folder.glob("answers_4.*.part"))
    kept = [line for part in parts for line in part.read_text().splitlines() if line]
    assert 3 <= len(kept) < 10 and not (folder / "answers_4.jsonl").exists()
    torn = folder / f"answers_4.{victim}.part"
    torn.write_text(torn.read_text()[:-9])  # as if killed while it wrote: its last batch is lost
    if again > 1:
        launch(again, [*argv, str(folder)])
    else:
        asked, ask = [], evaluation.ask
        spy = lambda *args, **how: asked.extend(args[2]) or ask(*args, **how)  # noqa: E731
        monkeypatch.setattr(evaluation, "ask", spy)
        evaluation.main([*argv, str(folder)])
        assert len(asked) == 2 * (10 - (len(kept) - 1)) + 20
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_batch_is_kept_behind_a_torn_line(tmp_path):
    done, part = [], tmp_path / "x"

    def work(start, end, stop=9):
        if start >= stop:
            raise KeyboardInterrupt
        done.append(start)
        return [{"item": i} for i in range(start, end)]

    with pytest.raises(KeyboardInterrupt):
        evaluation.deal(7, 2, lambda *batch: work(*batch, stop=2), part=part)
    file = tmp_path / "x.0.part"
    file.write_text(file.read_text().rstrip()[:-1])
    with pytest.raises(KeyboardInterrupt):
        evaluation.deal(7, 2, lambda *batch: work(*batch, stop=4), part=part)
    found = evaluation.deal(7, 2, work, part=part)
    assert done == [0, 0, 2, 4, 6] and found == [{"item": i} for i in range(7)]


def test_neighbours_that_share_an_engine_do_the_same_batches(tmp_path, monkeypatch):
    """Four ranks, two engines; the first rank of each keeps what they did."""
    monkeypatch.setattr(evaluation.dist, "broadcast_object_list", lambda box, src: None)
    monkeypatch.setattr(evaluation.dist, "all_gather_object", lambda parts, mine: parts.clear())
    done = {rank: [] for rank in range(4)}
    for rank in done:
        work = lambda a, z, rank=rank: done[rank].append((a, z)) or [{}] * (z - a)  # noqa: E731
        evaluation.deal(11, 3, work, rank, 4, 2, part=tmp_path / "x")
        for path in tmp_path.glob("x.0.part"):
            path.rename(tmp_path / "y.0.part")  # or rank 0's would be taken as done before
    assert done == {0: [(0, 3), (6, 9)], 1: [(0, 3), (6, 9)], 2: [(3, 6), (9, 11)]} | {3: done[2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.2.part", "y.0.part"]


def test_a_finished_evaluation_is_printed_again_without_loading_weights(saved, monkeypatch, capsys):
    argv = ["--model", str(saved), "--output", str(saved / "out")]
    first, before = evaluation.main(argv), contents(saved / "out")
    said = capsys.readouterr().out
    monkeypatch.setattr(evaluation, "make_engine", None)
    assert evaluation.main(argv) == first and contents(saved / "out") == before
    assert capsys.readouterr().out == said


def test_a_folder_of_other_settings_is_refused_by_naming_them(saved, toy, tmp_path):
    for name in ("videos", "test.jsonl"):
        copy = shutil.copytree if name == "videos" else shutil.copy
        copy(toy / name, tmp_path / name)
    rows = tmp_path / "test.jsonl"
    argv = ["--model", str(saved), "--data", str(rows), "--output", str(tmp_path / "out")]
    evaluation.main(argv)
    for other, message in (
        (["--frames", "4"], r"num_frames \[5\] there, \[4\] now"),
        (["--thinking", "false"], "thinking True there, False now"),
        (["--prefill", "<think>", "--batch", "8"], "batch 64 .*prefill ''"),
        (["--max_tokens", "4"], "max_tokens 8 there, 4 now"),
        (["--wrong_video"], "wrong_video False .*questions"),
        (["--limit", "3"], "limit None .*questions"),
    ):
        with pytest.raises(SystemExit, match=f"other settings .*{message}.*another"):
            evaluation.main([*argv, *other])
    text = rows.read_text()
    rows.write_text(text.replace("<answer>A", "<answer>B"))
    with pytest.raises(SystemExit, match=r"other settings \(questions '\w+' there, '\w+' now\)"):
        evaluation.main(argv)
    rows.write_text(text)
    video = data.load_rows(str(rows))[0].media[0].path
    os.rename(video, tmp_path / "gone.mp4")
    with pytest.raises(SystemExit, match=r"other settings \(media '\w+' there, '\w+' now\)"):
        evaluation.main([*argv, "--on_missing", "wrong"])
    (tmp_path / "gone.mp4").rename(video)
    os.utime(next(saved.rglob("*.safetensors")), (1, 1))
    with pytest.raises(SystemExit, match=r"other settings \(weights '\w+' there, '\w+' now\)"):
        evaluation.main(argv)


def test_each_setting_has_a_folder_of_its_own_by_default(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--frames", "4"], []):
        evaluation.main(["--model", str(saved), *more])
    assert len(list(tmp_path.glob("runs/eval/test-*/result.json"))) == 2


# ------------------------------------------------------------------------------------ failures


def test_what_is_missing_is_refused_or_counted_as_wrong(saved, toy, tmp_path, monkeypatch, capsys):
    rows = lines(toy / "test.jsonl")
    rows[3]["videos"] = rows[7]["videos"] = "videos/gone.mp4"
    rows[11] |= {"data_type": "audio"}
    rows[12]["answer"] = "B"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--model", str(saved), "--data", str(tmp_path / "rows.jsonl"), "--video_dir", str(toy)]
    argv += ["--output", str(tmp_path / "out")]
    first = f"3 of 19 questions cannot be asked, the first: question {rows[3]['problem_id']}: no "
    with pytest.raises(SystemExit, match=f"{first}such file.*gone.mp4.*--on_missing wrong"):
        evaluation.main(argv)
    assert not (tmp_path / "out").exists()
    oracle(monkeypatch, lambda text: "<think> x </think> <answer> B </answer>")
    result = evaluation.main([*argv, "--on_missing", "wrong"])
    errors = dict(result["errors"])
    wrong = [rows[i]["problem_id"] for i in (3, 7, 11)] + [f"{tmp_path}/rows.jsonl:13"]
    assert list(errors) == wrong and "'answer' is 'B'" in errors[wrong[3]]
    assert "takes no audio" in errors[wrong[2]] and result["questions"] == 20
    right = sum(r["answer"] == "<answer>B</answer>" for r in rows if r["problem_id"] not in wrong)
    assert result["accuracy"] == right / 20 and result["by_category"]["malformed row"] == 0.0
    said = capsys.readouterr().out
    assert "4 failed" in said and all(f"counted as wrong: {name}: " in said for name in wrong)


def test_a_quick_look_is_spread_evenly_and_says_so(saved, toy, capsys, monkeypatch):
    oracle(monkeypatch, lambda text: "B")
    argv = ["--model", str(saved), "--output", str(saved / "out"), "--limit", "3"]
    result = evaluation.main([*argv, "--thinking", "false", "--instruction", "Only a letter."])
    ids = [r["problem_id"] for r in lines(toy / "test.jsonl")]
    assert [r["problem_id"] for r in result["records"]] == [ids[0], ids[9], ids[19]]
    assert "3 questions of test (a quick look: of 20), 5 frames" in capsys.readouterr().out
    assert json.loads((saved / "out/result.json").read_text())["questions_in_all"] == 20


@pytest.mark.parametrize("thinking", ["true", "false"])
def test_questions_are_asked_as_the_options_say(thinking, saved, monkeypatch):
    (made, problems), build = (oracle(monkeypatch, lambda text: "B"), []), VILA.build_prompt
    spy = lambda self, e, *rest: problems.append(e.problem) or build(self, e, *rest)  # noqa: E731
    monkeypatch.setattr(VILA, "build_prompt", spy)
    argv = ["--model", str(saved), "--output", str(saved / "out"), "--thinking", thinking]
    result = evaluation.main([*argv, "--instruction", "Only a letter.", "--frames", "3,4"])
    (engine,) = made
    assert all("\nD. " in p and p.endswith("\nOnly a letter.") for p in problems)
    assert all(("Think then" in p.text) == (thinking == "true") for p in engine.prompts)
    assert [len(p.media_at) for p in engine.prompts[::20]] == [3, 4]
    assert list(result["by_frames"]) == [3, 4] and len(engine.prompts) == 40
    assert (result["accuracy"] > 0) == (thinking == "false") and result["lenient"] > 0


# --------------------------------------------------------------------------------------- judge


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server: server.reply(question) is a text, or the code of an error."""
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["temperature"] == 0.0 and body["model"] == "wise"
            question = body["messages"][0]["content"]
            self.server.asked.append(question)
            reply = self.server.reply(question)
            self.answer({"choices": [{"message": {"content": reply}}]}, reply)

        def do_GET(self):
            self.answer({"data": [{"id": "wise"}]}, "")

        def answer(self, body, reply):
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        found.asked, found.url = [], f"http://localhost:{found.server_port}/v1"
        yield found
        found.shutdown()


def open_rows(toy, folder, answers):
    """Open questions, one for each of (gold, what the Oracle says)."""
    row = lines(toy / "test.jsonl")[0] | {"data_type": "text", "videos": ""}
    rows = [
        row
        | {
            "problem_id": f"q{i}",
            "problem": f"What is number {i}?",
            "answer": f"<answer>{gold}</answer>",
        }
        for i, (gold, _) in enumerate(answers)
    ]
    (folder / "open.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--data", str(folder / "open.jsonl"), "--video_dir", str(toy)]


ANSWERS = [  # gold, completion, the judge's reply, strict, lenient, the record's error
    ("a cat", "<think> x </think> <answer> A cat. </answer>", None, 1.0, 1.0, ""),
    ("a cat", "<think> x </think> <answer> kitten </answer>", "Yes.", 1.0, 1.0, ""),
    (
        "a cat",
        "<think> x </think> <answer> dog </answer>",
        "<think> or yes? </think>\nNo",
        0.0,
        0.0,
        "",
    ),
    ("a cat", "<think> x </think> a kitty", "**yes**", 0.0, 1.0, ""),
    ("a cat", "<answer> dog </answer> <answer> puss </answer>", "yes", 0.0, 1.0, ""),
    ("a cat", "<think> x </think> <answer> fur </answer>", "Maybe", 0.0, 0.0, "neither yes nor no"),
    ("a cat", "<think> x </think> <answer> tail </answer>", 500, 0.0, 0.0, "500"),
    ("a cat", "<think> x </think> <answer> paw </answer>", "yesterday", 0.0, 0.0, "neither yes"),
    ("a cat", "<think> on and on", None, 0.0, 0.0, ""),
    ("a cat", "<think> x </think> <answer> <answer> puss </answer>", "yes", 0.0, 1.0, ""),
]


def test_open_answers_are_judged_by_what_they_mean(toy, saved, server, monkeypatch, capsys):
    said = iter(a[1] for a in ANSWERS)
    replies = {f"number {i}?": a[2] for i, a in enumerate(ANSWERS)}
    oracle(monkeypatch, lambda text: next(said))
    server.reply = lambda text: next(r for q, r in replies.items() if q in text)
    argv = ["--model", str(saved), *open_rows(toy, saved, [(a[0], a[1]) for a in ANSWERS])]
    argv += ["--output", str(saved / "out"), "--judge", server.url]
    result = evaluation.main(argv)
    for r, (_, completion, _, strict, lenient, error) in zip(result["records"], ANSWERS):
        assert (r["completion"], r["accuracy"], r["lenient"]) == (completion, strict, lenient)
        assert error in r["error"] and r["error"].startswith("judge: ") == bool(error)
    assert {q for q in replies if any(q in asked for asked in server.asked)} == {
        q for q, reply in replies.items() if reply is not None
    }
    assert any("Given answer: puss\n" in q and "Reference answer: a cat" in q for q in server.asked)
    assert (result["accuracy"], result["lenient"]) == (2 / 10, 5 / 10) and len(
        result["errors"]
    ) == 3
    assert "counted as wrong: q6: judge: " in capsys.readouterr().out


def test_verdicts_are_kept_when_the_judge_goes_away(toy, saved, server, monkeypatch):
    answers = [("a cat", f"<answer> thing {i} </answer>") for i in range(130)]
    made = oracle(monkeypatch, lambda text: "<answer> thing </answer>")
    argv = ["--model", str(saved), *open_rows(toy, saved, answers), "--judge", server.url]
    argv += ["--output", str(saved / "out"), "--frames", "1"]
    server.reply = lambda text: (
        "yes" if "number 3?" in text else "no" if len(server.asked) <= 64 else 401
    )
    with pytest.raises(SystemExit, match="error: .*401"):
        evaluation.main(argv)
    del server.asked[:]
    server.reply = lambda text: "no"
    argv[argv.index("--judge") + 1] = server.url.replace("localhost", "127.0.0.1")  # it moved
    result = evaluation.main([*argv, "--judge_model", "wise"])
    assert json.loads((saved / "out/settings.json").read_text())["judge_model"] == "wise"
    assert len(server.asked) == 130 - 64 and len(made) == 1 + 1 and not made[1].prompts
    assert result["lenient"] == 1 / 130 and result["records"][3]["accuracy"] == 1.0


def test_a_judge_that_is_not_there_is_an_error_before_anything_is_asked(saved, monkeypatch):
    argv = ["--model", str(saved), "--output", str(saved / "out"), "--judge"]
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="error: http://localhost:1/v1/models"):
        evaluation.main([*argv, "http://localhost:1/v1"])
    assert not (saved / "out").exists()


# -------------------------------------------------------------------------------------- filter


def test_filter_keeps_what_is_right_at_times(toy, saved, tmp_path, monkeypatch, capsys):
    rows = lines(toy / "rl.jsonl")[:6]
    rows[4]["videos"] = "videos/gone.mp4"
    rows[2]["note"] = "kept as it is"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{\n{}\n")
    said = []
    for row, right in zip(rows, [4, 1, 3, 0, None, 4]):  # right answers, of 4
        if right is not None:
            said += [row["answer"]] * right + ["<answer> Z </answer>"] * (4 - right)
    said = iter(said)
    oracle(monkeypatch, lambda text: next(said))
    argv = ["--model", str(saved), "--data", str(tmp_path / "rows.jsonl"), "--video_dir", str(toy)]
    argv += ["--out", str(tmp_path / "hard.jsonl"), "--answers", "4", "--on_missing", "wrong"]
    found = evaluation.filter_main(argv)
    assert found == {"too easy": 2, "kept": 2, "too hard": 1, "failed": 3}
    kept = lines(tmp_path / "hard.jsonl")
    assert kept == [rows[1] | {"pass_rate": 0.25}, rows[2] | {"pass_rate": 0.75}]
    rates = lines(tmp_path / "hard_rates/rates.jsonl")
    assert [r["pass_rate"] for r in rates] == [1.0, 0.25, 0.75, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert "gone.mp4" in rates[4]["error"] and "JSON" in rates[6]["error"]
    text = capsys.readouterr().out
    assert text.count("failed: ") == 3 and f"failed: {rows[4]['problem_id']}: " in text
    # other limits: nothing is asked again
    monkeypatch.setattr(evaluation, "make_engine", None)
    assert evaluation.filter_main([*argv, "--low", "0.5"])["kept"] == 1
    assert lines(tmp_path / "hard.jsonl") == kept[1:]
    assert len(data.load_rows(str(tmp_path / "hard.jsonl"), str(toy))) == 1


def test_filter_does_not_begin_with_what_cannot_end_well(saved, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_engine", None)
    rows = tmp_path / "rows.jsonl"
    shutil.copy(toy / "rl.jsonl", rows)
    out, argv = str(tmp_path / "o.jsonl"), ["--model", str(saved), "--data", str(rows)]
    for other, message in (
        (["--out", str(tmp_path / "videos/../rows.jsonl")], "rows.jsonl: give .* a new file"),
        (["--out", str(tmp_path)], "give the name of a new file"),
        (["--out", out, "--low", "0.5", "--high", "0.5"], "--low 0.5 --high 0.5: no row"),
        (["--out", out, "--answers", "0"], "--answers 0: give"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluation.filter_main([*argv, "--video_dir", str(toy), *other])
    assert rows.read_bytes() == (toy / "rl.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["rows.jsonl"]


def test_torchrun_passes_the_options_of_the_filter_on(monkeypatch):
    """It reads all options itself first: one that begins several of its own is an error there."""
    from torch.distributed.run import get_args_parser

    monkeypatch.setattr(evaluation, "guarded", lambda function, args: vars(args))
    given = evaluation.filter_main(["--model", "m", "--out", "o"])
    argv = [part for name in given for part in (f"--{name}", "1")]
    assert get_args_parser().parse_args(["data.py", "filter", *argv]).training_script == "data.py"


def test_seeds_stay_with_their_questions_when_one_cannot_be_asked(toy, model):
    rows = data.load_rows(str(toy / "test.jsonl"))[:4]
    rows[1] = replace(rows[1], media=(data.Medium("video", str(toy / "gone.mp4")),))
    engine, seen = Oracle(model, lambda p: "B"), []
    generate = engine.generate
    engine.generate = lambda *args: seen.append(args[3]) or generate(*args)
    found = evaluation.ask(model, engine, rows, 4, None, 2, [10, 11, 12, 13])
    assert seen == [[10, 12, 13]] and isinstance(found[1], data.DataError)
    assert [len(answers) for i, answers in enumerate(found) if i != 1] == [2, 2, 2]


def test_pass_rates_do_not_depend_on_ranks_or_interruptions(saved, toy, tmp_path):
    """The real engine at temperature 2, killed as two ranks, gone on with as one."""
    argv = ["--model", str(saved), "--video_dir", str(toy), "--answers", "6", "--temperature", "2"]
    argv += ["--data", str(toy / "test.jsonl"), "--thinking", "false", "--max_tokens", "1", "--out"]
    found = evaluation.filter_main([*argv, str(tmp_path / "one.jsonl")])
    two = [*argv, str(tmp_path / "two.jsonl"), "--batch", "3"]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch(2, two, (1, 1), "filter_main")
    assert list((tmp_path / "two_rates").glob("rates.*.part"))
    assert evaluation.filter_main(two) == found and found["kept"] and found["too hard"]
    for name in ("{}.jsonl", "{}_rates/rates.jsonl"):
        one, two = (tmp_path / name.format(n) for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
