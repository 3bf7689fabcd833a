"""Settings: presets, command lines, a checkpoint's recipe; plans; and runs of presets."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import write_video_with_audio
from test_train import ROOT

import data
import train
from families import load
from kit import plan, presets
from kit.decode import Loader
from kit.presets import PRESETS, read_settings
from model import Recipe
from rollout import RolloutError

MODEL = {
    "qwen2.5-vl-7b": "qwen2.5-vl", "hour": "qwen3-vl", "max-frames": "qwen2.5-vl",
    "longvila-7b": "vila", "omni": "omni", "text": "qwen3",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny checkpoint for each preset."""
    root = tmp_path_factory.mktemp("models")
    for family in set(MODEL.values()):
        zoo.build(family).save_pretrained(root / family)
    return root


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four questions of each kind about real files: rows.jsonl, sound.jsonl, text.jsonl, in v/."""
    root = tmp_path_factory.mktemp("rows")
    (root / "v").mkdir()
    frames = zoo.frames(24, 60, 100)
    row = {"problem_type": "goal", "reasoning": "seen", "answer": "<answer>A</answer>"}
    kinds = {"rows": ("video", {}), "sound": ("video", {"audio_track": True}), "text": ("text", {})}
    for name, (kind, more) in kinds.items():
        lines = []
        for i in range(4):
            if kind == "video":
                write_video_with_audio(str(root / f"v/{i}.mp4"), frames, 4, 6, 300 + i)
            row |= {"problem_id": f"{name}{i}", "problem": f"What {i}?\nA. red\nB. blue"}
            row |= {"data_type": kind, "videos": f"{i}.mp4" if kind == "video" else ""}
            lines.append(json.dumps(row | more) + "\n")
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def options(preset, models, rows, out) -> list[str]:
    """A small run of a preset, without a GPU."""
    file = {"omni": "sound", "text": "text"}.get(preset, "rows")
    text = (
        f"--preset {preset} --model {models / MODEL[preset]} --data {rows}/{file}.jsonl "
        f"--video_dir {rows}/v --output_dir {out}/run --cache_dir {out}/cache "
        "--recipe.max_tokens 6 --rollout torch"
    )
    return text.split()


# ------------------------------------------------------------------------------ command lines


def test_the_default_is_the_7b_where_there_is_a_gpu_and_the_toy_elsewhere():
    usual = "qwen2.5-vl-7b" if torch.cuda.is_available() else "toy"
    assert presets.default_preset([]) == usual
    for own in (["--data", "x.jsonl"], ["--video_dir", "v"]):
        assert presets.default_preset(own) == "qwen2.5-vl-7b"
    assert presets.default_preset(["--model=some/folder"]) == "small"
    assert presets.default_preset(["--model", "Qwen/Qwen2.5-Omni-7B", "--data", "x"]) == "omni"
    assert set(PRESETS) == {"toy", "small", *MODEL}
    for name, preset in PRESETS.items():
        assert preset.run.preset == name and preset.run.data is preset.run.sft_data is None
        assert preset.ranks.sp in (1, 2, 4, 8) and preset.grpo.group == 8
        if name in MODEL:
            ranks = preset.ranks
            assert ranks.fsdp and ranks.dtype == "bfloat16" and ranks.checkpointing
            assert preset.rollout.max_len >= preset.recipe.max_tokens


def test_options_override_a_preset_and_each_value_can_be_unset():
    line = "--preset hour --grpo.steps 3 --seed 5 --sft.lr 1e-3 --rollout.max_len None --fsdp false"
    settings, _, notes = read_settings([*line.split(), "--dtype", "float32", "--cache_dir", "none"])
    assert (settings.grpo.steps, settings.more.seed, settings.sft.lr) == (3, 5, 1e-3)
    assert settings.rollout.max_len is settings.media.cache_dir is None and not settings.ranks.fsdp
    assert replace(settings.grpo, steps=133) == PRESETS["hour"].grpo and notes == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("--rollout fast", "'fast' for argument '--rollout'"),
        ("--sp 0", "sp must be at least 1, not 0"),
        ("--sp_attention foo", "'foo' for argument '--sp_attention'"),
        ("--dtype bfloat16", "dtype bfloat16 needs --fsdp true"),
        ("--dtype int8 --fsdp true", "'int8' for argument '--dtype'"),
        ("--fsdp true --sft.optimizer muon", "muon needs whole matrices"),
        ("--cache_gb 0", "cache_gb must be above 0"),
        ("--decode_seconds nan", "decode_seconds must be above 0"),
        ("--rollout.tp 2", "--rollout.tp 2 must divide --sp 1"),
        ("--grpo.group 1", "group must be at least 2, not 1"),
        ("--grpo.average x", "'x' for argument '--grpo.average'"),
        ("--grpo.update_prompts 0", "update_prompts must be at least 1"),
        ("--grpo.temperature 0", "temperature must be above 0"),
        ("--grpo.grad_clip -1", "grad_clip must be at least 0, not -1"),
        ("--sft.grad_clip nan", "grad_clip must be at least 0, not nan"),
        ("--eval.frames a", "--eval.frames"),
        ("--eval.frames 0", "frames must be at least 1"),
        ("--sft.train x", "'x' for argument '--sft.train'"),
        ("--recipe.template why", "template"),
        ("--recipe.num_frames 0", "num_frames"),
        ("--toy.rl 0", "rl must be at least 1"),
        ("--grpo_steps 3", "perhaps you meant --grpo.steps"),
        ("--grpo.step 3", "perhaps you meant --grpo.steps"),
        ("--preset huge", "no such preset; there are toy, small"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_value_is_one_line_about_it_before_anything_runs(line, message, tmp_path):
    argv = line if line.startswith("--preset") else f"--preset toy {line}"
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        train.main([*argv.split(), "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and "Config(" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_s_recipe_comes_before_the_preset_s_and_options_before_both(models, tmp_path):
    model = load(models / "qwen2.5-vl")
    model.recipe = Recipe(num_frames=64, max_tokens=100, template="{problem} Look.")
    model.save_pretrained(tmp_path)
    argv = ["--preset", "hour", "--model", str(tmp_path)]
    settings, _, notes = read_settings([*argv, "--recipe.max_tokens", "7"])
    assert settings.recipe == replace(model.recipe, max_tokens=7)
    said = "\n".join(notes)
    assert "num_frames 64 (preset hour: 3600)" in said and "template '{problem} Look.'" in said
    assert "max_tokens 7 by option (the checkpoint: 100)" in said and len(notes) == 4
    (tmp_path / "recipe.json").unlink()
    assert read_settings(argv)[0].recipe == PRESETS["hour"].recipe
    (tmp_path / "recipe.json").write_text('{"num_frames": 0}')
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/recipe.json: .*num_frames"):
        train.main(argv)


# ----------------------------------------------------------------------------------- plans

PUBLISHED = {
    "qwen2.5-vl-7b": 256 // 2 * 120, "hour": 1800 * 144, "max-frames": 4096 * 60,
    "longvila-7b": 512 * 257, "omni": 32 * 120, "text": 0,
}  # fmt: skip


@pytest.mark.parametrize("preset", list(MODEL))
def test_a_dry_run_needs_nothing_but_this_folder(preset, capsys, monkeypatch):
    """No checkpoint, no rows, no vLLM, no GPU, no network: a plan for 8 ranks, and status 0."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert train.main(["--preset", preset, "--dry_run"]) is None
    out = capsys.readouterr().out
    chosen = PRESETS[preset]
    assert f"num_frames={chosen.recipe.num_frames}" in out and "max_tokens=2048" in out
    assert f"8 rank(s): data parallel {8 // chosen.ranks.sp} x sp {chosen.ranks.sp} (" in out
    assert "sharded over all 8 (FSDP2); a vLLM engine each" in out
    assert "before the run: no rows: give --data FILE.jsonl" in out
    assert f"before the run: the checkpoint {chosen.run.model} is taken from the hub" in out
    part = {
        line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line[:2] == "  "
    }
    assert 25 < part["total"] < 0.92 * 80  # of a GPU of 80 GB
    tokens = int(out.split("prompts of ")[1].split()[0].replace(",", ""))
    assert tokens + chosen.recipe.max_tokens <= chosen.rollout.max_len
    places = int(out.split(" of them media")[0].split()[-1])
    assert places == (512 * 256 if preset == "longvila-7b" else PUBLISHED[preset])
    assert PUBLISHED[preset] <= tokens < PUBLISHED[preset] + 3500
    template = chosen.recipe.template.replace("{problem}", "What happens?")
    assert template in out and "<|im_start|>user\n" in out


def test_the_settings_that_come_along_are_those_of_7b_models():
    for name in ("qwen2.5-vl-7b", "longvila-7b", "omni", "text"):
        model = load(plan.CONFIGS / name, weights=False)
        assert sum(p.numel() for p in model.policy.parameters()) > 7.6e9
        assert (model.eos, model.policy.config.hidden_size) == (151645, 3584)


@pytest.mark.parametrize(
    "preset",
    [
        "hour",
        "text",
        *[pytest.param(p, marks=pytest.mark.slow) for p in MODEL if p not in ("hour", "text")],
    ],
)
def test_a_dry_run_on_a_checkpoint_shows_the_prompt_that_a_run_trains_on(
    preset, models, rows, tmp_path, capsys
):
    argv = options(preset, models, rows, tmp_path)
    assert train.main([*argv, "--dry_run"]) is None
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    model = load(models / MODEL[preset])
    model.recipe, model.loader = read_settings(argv)[0].recipe, Loader()  # which can hear
    prompt = model.prompt(data.load_rows(argv[argv.index("--data") + 1], str(rows / "v"))[0])
    assert f"first prompt: {len(prompt.ids)} tokens, {len(prompt.media_at)} of them" in out
    assert prompt.text in out


def test_a_dry_run_of_the_toy_makes_one_video(capsys):
    assert train.main(["--preset", "toy", "--dry_run"]) is None
    out = capsys.readouterr().out
    assert (
        "first prompt: " in out and "1 rank(s): data parallel 1" in out and "toy: base=1200" in out
    )


def test_only_the_first_rank_shows_a_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--preset", "toy", "--dry_run"]) is None
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_said_in_a_line_each(models, rows, tmp_path, capsys):
    argv = options("qwen2.5-vl-7b", models, rows, tmp_path)

    def error(*more, kind="missing"):
        with pytest.raises(SystemExit) as caught:
            train.main([*argv, "--sp", "1", *more])
        first, *lines = str(caught.value).splitlines()
        assert first == f"error: {kind} for this run:"
        return lines

    # What has to come before the run is no error of a dry run; what is wrong is.
    no_rows = ["--data", "None"]
    said = "  no rows: give --data FILE.jsonl, with --video_dir DIR, or take --preset toy"
    assert error(*no_rows) == [said]
    assert train.main([*argv, "--sp", "1", *no_rows, "--dry_run"]) is None
    assert f"before the run:{said[1:]}" in capsys.readouterr().out
    gone = ["--data", str(tmp_path / "none.jsonl"), "--model", str(tmp_path)]
    lines = error(*gone)
    assert error(*gone, "--dry_run", kind="wrong") == lines
    assert "none.jsonl: no such file" in lines[0]
    assert "--model" in lines[1] and "config.json is missing" in lines[1]
    (line,) = error("--video_dir", str(tmp_path))
    assert f"4 of 4 media files are missing, the first is {tmp_path}/0.mp4: download them" in line
    (line,) = error("--recipe.max_tokens", "2000000000", "--rollout.max_len", "None")
    assert "memory: a rank needs" in line and "8 GPUs of 80 GB" in line
    with pytest.raises(SystemExit, match="--sp 3 does not divide the 1 rank.*--nproc_per_node 3"):
        train.main([*argv, "--sp", "3"])
    with pytest.raises(SystemExit, match="no model: give --model"):
        train.main(["--preset", "small", "--data", f"{rows}/text.jsonl"])


def test_the_hub_and_vllm_are_named_when_they_are_missing(models, rows, tmp_path, monkeypatch):
    argv = options("text", models, rows, tmp_path)

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    said = "--model some/model: no such folder, and the hub does not"
    with pytest.raises(SystemExit, match=said):
        train.main([*argv, "--model", "some/model"])

    def no_vllm(*args):
        raise RolloutError("--rollout vllm needs the package vllm")

    monkeypatch.setattr(train, "engine_kind", no_vllm)
    with pytest.raises(SystemExit, match="^error: --rollout vllm needs the package"):
        train.main([*argv[:-1], "vllm"])


def test_training_rows_are_not_called_held_out(models, rows, tmp_path):
    from kit.report import table

    summary = {"questions": 4, "seed": 0, "chance": 0.5, "trained_on": 0, "seconds": {}}
    assert "4 held-out questions" in table(summary)
    assert "4 questions, 3 of them TRAINED ON" in table(summary | {"trained_on": 3})


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(MODEL))
def test_a_preset_trains_and_evaluates_from_a_checkpoint(preset, models, rows, tmp_path):
    """SFT, evaluation, GRPO, checkpoints: FSDP, bfloat16 and checkpointing as the preset says."""
    argv = options(preset, models, rows, tmp_path)
    file = argv[argv.index("--data") + 1]
    small = (
        f"--sp 1 --recipe.num_frames 4 --recipe.max_pixels 8000 --sft_data {file} --sft.steps 2 "
        f"--sft.groups 2 --grpo.steps 2 --grpo.prompts 2 --grpo.update_prompts 1 --grpo.lr 1e-3 "
        f"--test_data {file} --grpo.max_mismatch 40 --grpo.mean_mismatch 4"
    )
    summary = train.main([*argv, *small.split()])
    assert summary["questions"] == 4 and {"sft", "grpo", "chance"} <= set(summary)
    lines = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    assert [x["stage"] for x in lines] == ["sft"] * 2 + ["grpo"] * 2
    assert all(x["grad_norm"] > 0 for x in lines[:2])
    again = load(tmp_path / "run/model")
    before, changed = load(models / MODEL[preset]).state_dict(), set()
    for name, value in again.state_dict().items():
        if name.startswith("policy."):
            changed |= {name} if not torch.equal(value, before[name]) else set()
        else:  # frozen; computed with and kept in bfloat16, as published checkpoints are
            assert torch.equal(value, before[name].bfloat16().float()), name
    assert len(changed) > 10
    assert again.recipe.max_tokens == 6 and again.recipe.num_frames == 4
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hour", "omni"])
def test_the_command_of_the_readme_on_two_ranks_with_lora(preset, models, rows, tmp_path):
    """torchrun, a sequence on both ranks, sharded in bfloat16, adapters in GRPO; then eval.py."""
    argv = options(preset, models, rows, tmp_path)
    file = argv[argv.index("--data") + 1]
    small = (
        f"--sp 2 --recipe.num_frames 6 --recipe.max_pixels 8000 --grpo.steps 2 --grpo.prompts 2 "
        f"--grpo.update_prompts 2 --grpo.lora_rank 4 --grpo.lr 1e-2 --test_data {file} "
        "--grpo.max_mismatch 40 --grpo.mean_mismatch 4 --grpo.kl_coef 0.1"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    done = subprocess.run([*start, "train.py", *argv, *small.split()], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ulysses 2 x 1" in done.stdout and "after GRPO" in done.stdout
    lines = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    assert [x["stage"] for x in lines] == ["grpo"] * 2 and lines[1]["cache_hits"] > 0
    ask = f"eval.py --model {tmp_path}/run/model --data {file} --video_dir {rows}/v"
    again = subprocess.run([sys.executable, *ask.split()], **run)
    assert again.returncode == 0 and "4 questions" in again.stdout, again.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, sft", [("text", "--sft.lora_rank 2"), ("longvila-7b", "--sft.train projector")]
)
def test_a_decoder_that_was_frozen_in_sft_is_trained_in_grpo(preset, sft, models, rows, tmp_path):
    """FSDP takes the precision of gradients from what is trainable at its first forward."""
    argv = options(preset, models, rows, tmp_path)
    small = (
        f"--sp 1 --recipe.num_frames 4 --sft_data {argv[argv.index('--data') + 1]} --sft.steps 1 "
        f"--sft.groups 2 {sft} --grpo.steps 1 --grpo.prompts 2 --grpo.update_prompts 2 "
        "--grpo.max_mismatch 40 --grpo.mean_mismatch 4"
    )
    summary = train.main([*argv, *small.split()])
    assert summary["questions"] == 0 and "grpo" not in summary
    lines = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    assert [x["stage"] for x in lines] == ["sft", "grpo"]
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None


def test_a_run_that_cannot_start_keeps_the_logs_of_the_last_one(models, rows, tmp_path):
    argv = options("text", models, rows, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("kept")
    for more in (["--data", "gone.jsonl"], ["--sp", "3"], ["--cache_dir", "/proc/x"]):
        with pytest.raises(SystemExit, match=f"(?s)error: .*({more[0]}|gone.jsonl)"):
            train.main([*argv, *more])
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept"


def test_questions_that_cannot_be_asked_are_named_before_the_run(models, rows, tmp_path):
    argv = options("qwen2.5-vl-7b", models, rows, tmp_path)
    sound = str(rows / "sound.jsonl")
    with pytest.raises(SystemExit, match="question sound0: QwenVL takes no audio track"):
        train.main([*argv, "--data", sound])
    bad = tmp_path / "bad.jsonl"
    bad.write_text((rows / "rows.jsonl").read_text().replace("What 3", "What <|im_end|>"))
    with pytest.raises(SystemExit, match="question rows3 contains the control token"):
        train.main([*argv, "--data", str(bad)])
