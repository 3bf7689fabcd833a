"""Presets: --dry_run of each, what is missing, and real runs of them from tiny checkpoints."""

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
    """A small run of a preset."""
    file = {"omni": "sound", "text": "text"}.get(preset, "rows")
    text = (
        f"--preset {preset} --model {models / MODEL[preset]} --data {rows}/{file}.jsonl "
        f"--video_dir {rows}/v --output_dir {out}/run --cache_dir {out}/cache --recipe_max_tokens 6"
    )
    return text.split()


def test_the_default_is_the_7b_where_there_is_a_gpu_and_the_toy_elsewhere():
    assert train.DEFAULT == ("qwen2.5-vl-7b" if torch.cuda.is_available() else "toy")
    for own in (["--data", "x.jsonl"], ["--model=x"], ["--video_dir", "v"]):
        assert train.parse_options(own).grpo == train.PRESETS["qwen2.5-vl-7b"].grpo
    assert train.parse_options(["--preset", "toy", "--data", "x"]).run.model is None
    assert set(train.PRESETS) == {"toy", *MODEL}
    for name, preset in train.PRESETS.items():
        assert preset.run.sp in (1, 2, 4, 8) and preset.grpo.group == 8
        if name != "toy":
            assert preset.run.fsdp and preset.run.dtype == "bfloat16" and preset.run.checkpointing
            assert preset.run.data is None and not preset.sft.data
            assert preset.rollout.max_len >= preset.recipe.max_tokens


@pytest.mark.parametrize("preset", list(train.PRESETS))
def test_a_dry_run_shows_settings_memory_and_the_first_prompt(
    preset, models, rows, tmp_path, capsys
):
    if preset == "toy":
        assert train.main(["--preset", "toy", "--dry_run"]) is None
    else:
        assert train.main([*options(preset, models, rows, tmp_path), "--dry_run"]) is None
    out = capsys.readouterr().out
    chosen = train.PRESETS[preset]
    assert f"num_frames={chosen.recipe.num_frames}" in out and "max_tokens=" in out
    assert "memory of each of 8 ranks" in out and "total" in out and "tower" in out
    assert "first prompt: " in out and "<|im_start|>user" in out
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    if preset != "toy":  # what is shown is what a run would be trained on
        model = load(models / MODEL[preset])
        model.recipe = replace(chosen.recipe, max_tokens=6)
        first = data.load_rows(options(preset, models, rows, tmp_path)[5], str(rows / "v"))[0]
        prompt = model.prompt(first)
        assert f"first prompt: {len(prompt.ids)} tokens, {len(prompt.media_at)} of them" in out
        assert prompt.text in out


PUBLISHED = {
    "qwen2.5-vl-7b": "qwen2.5-vl", "hour": "qwen2.5-vl", "max-frames": "qwen2.5-vl",
    "longvila-7b": "vila", "omni": "omni", "text": "qwen2",
}  # fmt: skip


@pytest.mark.parametrize("preset", list(PUBLISHED))
def test_a_preset_fits_8_gpus_of_80_gb_with_the_published_settings(preset, tmp_path):
    zoo.published(PUBLISHED[preset], tmp_path)
    chosen, model = train.PRESETS[preset], load(tmp_path, weights=False)
    assert sum(p.numel() for p in model.llm.parameters()) > 7e9
    model.recipe = chosen.recipe
    lines, _ = train.memory_plan(chosen, model, 8, "vllm")
    part = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    assert 30 < part["total"] < 0.92 * 80
    tokens = int(lines[0].split("prompts of ")[1].split()[0].replace(",", ""))
    assert tokens + chosen.recipe.max_tokens <= chosen.rollout.max_len
    video = {"hour": 1800 * 144, "max-frames": 4096 * 60, "longvila-7b": 512 * 257}.get(preset, 0)
    assert not video or video < tokens < video + 1500  # letters are tokens here


def test_what_is_missing_is_said_in_a_line_each(models, rows, tmp_path):
    argv = options("qwen2.5-vl-7b", models, rows, tmp_path)

    def error(*more, without=()):
        left = [a for i, a in enumerate(argv) if not {argv[i], argv[i - 1]} & set(without)]
        for flag in ([], ["--dry_run"]):
            with pytest.raises(SystemExit) as caught:
                train.main([*left, "--sp", "1", *more, *flag])
            assert str(caught.value).startswith("error: missing for this run:\n")
        return str(caught.value).splitlines()[1:]

    assert error(without=["--data"]) == [
        "  no rows: give --data FILE.jsonl, with --video_dir DIR, or take --preset toy"
    ]
    (line,) = error("--data", str(tmp_path / "none.jsonl"))
    assert "none.jsonl: no such file" in line
    (line,) = error("--video_dir", str(tmp_path))
    assert f"4 of 4 media files are missing, the first is {tmp_path}/0.mp4: download them" in line
    (line,) = error("--model", str(tmp_path))
    assert "--model" in line and "config.json is missing" in line
    lines = error("--model", str(tmp_path), without=["--data"])
    assert len(lines) == 2
    (line,) = error("--recipe_max_tokens", "2000000000")
    assert "memory: a rank needs" in line and "GiB are here" in line and "8 GPUs of 80 GB" in line


def test_the_hub_and_vllm_are_named_when_they_are_missing(models, rows, tmp_path, monkeypatch):
    argv = options("text", models, rows, tmp_path)

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        SystemExit, match="--model some/model: no such folder, and the hub does not"
    ):
        train.main([*argv, "--model", "some/model"])

    def no_vllm(kind):
        raise RolloutError("--rollout vllm needs the package vllm")

    monkeypatch.setattr(train, "engine_kind", no_vllm)
    with pytest.raises(
        SystemExit, match="missing for this run:\n  --rollout vllm needs the package"
    ):
        train.main([*argv, "--rollout", "vllm"])


@pytest.mark.parametrize("preset", list(MODEL))
def test_a_preset_trains_and_evaluates_from_a_checkpoint(preset, models, rows, tmp_path):
    """SFT, evaluation, GRPO, checkpoints: FSDP, bfloat16 and checkpointing as the preset says."""
    argv = options(preset, models, rows, tmp_path)
    file = argv[argv.index("--data") + 1]
    small = (
        f"--sp 1 --recipe_num_frames 4 --recipe_max_pixels 8000 --sft_data {file} --sft_steps 2 "
        f"--sft_groups 2 --grpo_steps 2 --grpo_prompts 2 --grpo_update_prompts 1 --grpo_lr 1e-3 "
        f"--test_data {file} --rollout torch --grpo_max_mismatch 40 --grpo_mean_mismatch 4"
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


@pytest.mark.parametrize("preset", ["hour", "omni"])
def test_the_command_of_the_readme_on_two_ranks_with_lora(preset, models, rows, tmp_path):
    """torchrun, a sequence on both ranks, sharded in bfloat16, adapters in GRPO; then eval.py."""
    argv = options(preset, models, rows, tmp_path)
    file = argv[argv.index("--data") + 1]
    small = (
        f"--sp 2 --recipe_num_frames 6 --recipe_max_pixels 8000 --grpo_steps 2 --grpo_prompts 2 "
        f"--grpo_update_prompts 2 --grpo_lora_rank 4 --grpo_lr 1e-2 --test_data {file} "
        "--rollout torch --grpo_max_mismatch 40 --grpo_mean_mismatch 4 --grpo_kl_coef 0.1"
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


@pytest.mark.parametrize(
    "preset, sft", [("text", "--sft_lora_rank 2"), ("longvila-7b", "--sft_train projector")]
)
def test_a_decoder_that_was_frozen_in_sft_is_trained_in_grpo(preset, sft, models, rows, tmp_path):
    """FSDP takes the precision of gradients from what is trainable at its first forward."""
    argv = options(preset, models, rows, tmp_path)
    small = (
        f"--sp 1 --recipe_num_frames 4 --sft_data {argv[argv.index('--data') + 1]} --sft_steps 1 "
        f"--sft_groups 2 {sft} --grpo_steps 1 --grpo_prompts 2 --grpo_update_prompts 2 --rollout "
        "torch --grpo_max_mismatch 40 --grpo_mean_mismatch 4"
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
    for more in (["--data", "none.jsonl"], ["--sp", "3"], ["--cache_dir", "/proc/x"]):
        with pytest.raises(SystemExit, match=f"(?s)error: .*({more[0]}|none.jsonl)"):
            train.main([*argv, *more])
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept"


def test_only_the_first_rank_shows_a_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--preset", "toy", "--dry_run"]) is None
    assert capsys.readouterr().out == ""


def test_questions_that_cannot_be_asked_are_named_before_the_run(models, rows, tmp_path):
    argv = options("qwen2.5-vl-7b", models, rows, tmp_path)
    sound = str(rows / "sound.jsonl")
    with pytest.raises(SystemExit, match="question sound0: QwenVL takes no audio track"):
        train.main([*argv, "--data", sound])
    bad = tmp_path / "bad.jsonl"
    bad.write_text((rows / "rows.jsonl").read_text().replace("What 3", "What <|im_end|>"))
    with pytest.raises(SystemExit, match="question rows3 contains the control token"):
        train.main([*argv, "--data", str(bad)])
