"""Every family with everything it takes: SFT, a GRPO step, sequence parallelism, both samplers.

The outcome is the README's table:  pytest tests/test_matrix.py --table README.md  (with vLLM)
"""

import importlib.util
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import run_ranks, write_video_with_audio, write_wav
from PIL import Image

import data
import grpo
import mrsp
import sft
import train
from kit.actors import Actors
from kit.method import Method
from model import ModelError
from rollout import RolloutConfig, make_engine

MODALITIES = {  # fields of a row
    "text": {"data_type": "text"},
    "image": {"data_type": "image", "videos": "a.png"},
    "several images": {"data_type": "image", "videos": ["a.png", "b.png"]},
    "video": {"data_type": "video", "videos": "a.mp4"},
    "video and image": {"data_type": "video", "videos": "b.mp4", "images": ["a.png"]},
    "audio": {"data_type": "audio", "videos": "a.wav"},
    "video with its sound": {"data_type": "video", "videos": "b.mp4", "audio_track": True},
    "video, image, audio": {
        "data_type": "video", "videos": "a.mp4", "images": ["b.png"], "audios": ["a.wav"]
    },
}  # fmt: skip
TAKES = dict.fromkeys(zoo.FAMILIES, ["text"])
for family in ("vila", "vila 3x3 tsp", "qwen2.5-vl", "qwen3-vl"):
    TAKES[family] = ["text", "image", "several images", "video", "video and image"]
TAKES["omni"] = list(MODALITIES)
COLUMNS = ("SFT", "GRPO", "SP 2", "torch", "vLLM")
ENGINES = ["torch"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
CONFIG = grpo.Config(prompts=2, update_prompts=2, micro_prompts=1, group=3, lr=1e-3, top_p=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media, and two rows of each modality in MODALITY.jsonl."""
    root = tmp_path_factory.mktemp("matrix")
    for i, name in enumerate("ab"):
        pixels = zoo.frames(13, 60, 100, seed=i)
        write_video_with_audio(root / f"{name}.mp4", pixels, 4, 3.25, 300 * (i + 1))
        Image.fromarray(pixels[0]).save(root / f"{name}.png")
    write_wav(root / "a.wav", 2.4)
    fixed = {"problem_type": "goal", "reasoning": "seen", "answer": "<answer>A</answer>"}
    for name, fields in MODALITIES.items():
        rows = [
            {"videos": "", "problem_id": str(i), "problem": f"What is {i}?\nA. red\nB. blue"}
            for i in range(2)
        ]
        text = "".join(json.dumps(row | fixed | fields) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    return root


def rows_of(folder, modality):
    return data.load_rows(str(folder / f"{modality}.jsonl"))


def build(family):
    model = zoo.build(family)
    model.recipe = replace(model.recipe, max_pixels=8000, num_frames=4)
    return model


def reward(text, answer, options, *weights) -> dict:
    """Any that differs between answers: a random model is never right."""
    return {"reward": len(set(text)) / 10, "accuracy": 0.0, "format": 0.0}


def _steps(rank, family, folder, world, engines):
    """Two GRPO steps on each modality that the family takes, `world` ranks a sequence: metrics of
    each in WORLD.ENGINE.FAMILY.json."""
    grpo.reward = reward
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29598"}  # as torchrun does
    model = build(family)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    reference = build(family)
    for kind in engines:
        engine = make_engine(kind, model, RolloutConfig(kv_gb=0.25, max_len=2048))
        found = {}
        for modality in TAKES[family]:
            model.load_state_dict(start)
            model.cache, model.mesh = mrsp.EmbeddingCache(), mrsp.make_mesh(world)
            reference.mesh = model.mesh
            model.requires_grad_(False).llm.requires_grad_(True)
            optimizer = torch.optim.AdamW(model.llm.parameters(), CONFIG.lr)
            rows, steps = rows_of(folder, modality), []
            engine.sync(model)
            for step in range(2):
                actors = Actors(model, reference, engine, optimizer, Method(), CONFIG)
                metrics, _ = train.grpo_step(actors, rows, step)
                steps.append(metrics)
            changed = [k for k, v in model.state_dict().items() if not torch.equal(v, start[k])]
            found[modality] = [*steps, changed]
        engine.close()
        if rank == 0:
            path = folder / f"{world}.{kind}.{family}.json"
            path.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def steps(folder):
    """steps(family, modality, world, engine): metrics of two steps, and what they changed."""

    def get(family, modality, world, kind):
        path = folder / f"{world}.{kind}.{family}.json"
        if not path.exists():
            run_ranks(_steps, world, family, folder, world, ENGINES if world > 1 else ["torch"])
        return json.loads(path.read_text())[modality]

    return get


def check(steps, media: int) -> None:
    """The step trained the decoder, sampler and trainer agreed, each medium was seen once."""
    first, second, changed = steps
    for metrics in (first, second):
        assert metrics["mismatch_max"] < 1e-4 and math.isfinite(metrics["loss"])
        assert 0 < metrics["grad_norm"] < math.inf and metrics["tokens"] > 0
        assert metrics["cache_misses"] == media  # the second row asks about the same
        assert metrics["prefilled_tokens"] < metrics["prompt_tokens"]
    assert second["cache_hits"] == 3 * media and first["cache_hits"] == media
    assert len(changed) > 10 and all(name.startswith("policy.") for name in changed)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_cell(family, modality, column, folder, steps, record_property):
    if column == "vLLM" and "vllm" not in ENGINES:
        pytest.skip("needs vllm")
    rows = rows_of(folder, modality)
    media = len(rows[0].media) + sum(m.track for m in rows[0].media)
    if modality not in TAKES[family]:
        record_property("cell", "-")
        with pytest.raises(ModelError, match="question 0: .* takes no"):
            build(family).prompt(rows[0])
    elif column == "SFT":
        for part in ("llm",) if media == 0 else ("llm", "projector", "all"):
            model, logged = build(family), []
            before = {name: value.clone() for name, value in model.state_dict().items()}
            config = sft.SFTConfig(steps=3, groups=1, texts=2, train=part, lr=3e-3, warmup=0)
            sft.train(model, rows, config, log=lambda *step: logged.append(step))  # noqa: B023
            assert logged[-1][1]["loss"] < logged[0][1]["loss"]
            changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
            assert any(k.startswith("policy.") for k in changed) == (part != "projector")
            assert any(not k.startswith("policy.") for k in changed) == (part != "llm")
    elif column == "SP 2":  # the same step as one process
        many, one = (steps(family, modality, world, "torch")[0] for world in (2, 1))
        for name in ("loss", "grad_norm", "entropy", "reward", "tokens", "length"):
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    else:
        kind = "vllm" if column == "vLLM" else "torch"
        check(steps(family, modality, 1 if column == "GRPO" else 2, kind), media)
    if modality in TAKES[family]:
        record_property("cell", "yes")


def test_the_readme_s_table_is_that_of_these_tests(request):
    """Run behind all cells, with vLLM: the table that they make is the one in the README."""
    cells = request.config.stash.get(zoo.CELLS, {})
    if "vllm" not in ENGINES or len(cells) < len(zoo.FAMILIES) * len(MODALITIES) * len(COLUMNS):
        pytest.skip("needs vllm and all cells")
    readme = request.config.rootpath / "README.md"
    assert zoo.table(cells) in readme.read_text()
