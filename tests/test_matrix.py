"""Every family with everything it takes: SFT, a GRPO step, sequence parallelism, both samplers.

The outcome is a table:  pytest -m "" tests/test_matrix.py --table docs/models.md
(with vLLM). Three cells run always, the others with -m slow.
"""

import importlib.util
import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import CELLS, row, run_ranks, write_jsonl, write_video_with_audio, write_wav
from PIL import Image

import data
import grpo
import mrsp
import sft
import train
from kit.actors import Actors
from kit.method import Method
from kit.vllm_engine import RolloutConfig, make_engine
from model import ModelError

MODALITIES = {  # fields of a row
    "text": {},
    "image": {"data_type": "image", "videos": "a.png"},
    "several images": {"data_type": "image", "videos": ["a.png", "b.png"]},
    "video": {"data_type": "video", "videos": "a.mp4"},
    "video and image": {"data_type": "video", "videos": "b.mp4", "images": ["a.png"]},
    "audio": {"data_type": "audio", "videos": "a.wav"},
    "video with its sound": {"data_type": "video", "videos": "b.mp4", "audio_track": True},
}
MODALITIES["video, image, audio"] = MODALITIES["video"] | {"images": ["b.png"], "audios": ["a.wav"]}
SIGHTED = ["text", "image", "several images", "video", "video and image"]
TAKES = dict.fromkeys(zoo.FAMILIES, ["text"])
TAKES |= dict.fromkeys(("vila", "vila 3x3 tsp", "qwen2.5-vl", "qwen3-vl"), SIGHTED)
TAKES["omni"] = list(MODALITIES)
COLUMNS = ("SFT", "GRPO", "SP 2", "torch", "vLLM")
NAMES = "VILA (2x2)|VILA (3x3, TSP)|Qwen2.5-VL|Qwen3-VL|Qwen2.5-Omni"
NAMES = dict(zip(zoo.FAMILIES, f"{NAMES}|text: Qwen2|text: Qwen3|text: Llama".split("|")))
FAST = [("vila", "video", "SFT"), ("omni", "video, image, audio", "SFT"), ("qwen2", "text", "GRPO")]
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
    for name, fields in MODALITIES.items():
        write_jsonl(root / f"{name}.jsonl", [row(i, **fields) for i in range(2)])
    return root


def rows_of(folder, modality):
    return data.load_rows(str(folder / f"{modality}.jsonl"))


def build(family):
    model = zoo.build(family)
    model.recipe = replace(model.recipe, max_pixels=8000, num_frames=4)
    return model


def changed(model, before: dict) -> list[str]:
    return [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]


def weights_of(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ------------------------------------------------------------------------------------- SFT


def check_sft(family, rows, part) -> None:
    """The loss falls; of decoder, projector and the rest of the towers that changes which is
    trained; the hash of what features depend on follows."""
    model, losses = build(family), []
    before, key, seen = weights_of(model), model.encoder_hash(), bool(model.takes)
    config = sft.SFTConfig(steps=3, groups=1, texts=2, train=part, lr=3e-3, warmup=0)
    sft.train(model, rows, config, log=lambda step, metrics: losses.append(metrics["loss"]))
    assert losses[-1] < losses[0]
    moved = set(changed(model, before))
    outer = {id(p) for p in model.projector.parameters()}
    outer = {name for name, p in model.named_parameters() if id(p) in outer}
    inner = {f"tower.{name}" for name, _ in model.tower.named_parameters()} - outer
    media = seen and any(row.media for row in rows)
    assert any(name.startswith("policy.") for name in moved) == (part != "projector")
    assert bool(moved & inner) == (part == "all" and media)
    assert bool(moved & outer) == (part != "llm" and media)
    assert (model.encoder_hash() == key) == (part == "llm" or not media)
    model.enable_gradient_checkpointing()
    sft.train(model, rows, replace(config, steps=1))
    assert model(model.idle())[0].isfinite().all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_text_model_has_no_projector_to_train(folder, family):
    with pytest.raises(ValueError, match="projector"):
        sft.train(build(family), rows_of(folder, "text"), sft.SFTConfig(train="projector"))


# ------------------------------------------------------------------------------------ GRPO


def reward(text, example, config) -> dict:
    """Any that differs between answers: a random model is never right."""
    return {"reward": len(set(text)) / 10, "accuracy": 0.0, "format": 0.0}


def _steps(rank, family, folder, world, engines):
    """Two GRPO steps on each modality that the family takes, `world` ranks a sequence: metrics of
    each in WORLD.ENGINE.FAMILY.json."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29598"}  # as torchrun does
    method = Method()
    method.names["reward"] = reward
    model, reference = build(family), build(family)
    start = weights_of(model)
    for kind in engines:
        engine = make_engine(kind, model, RolloutConfig(kv_gb=0.25, max_len=2048))
        found = {}
        for modality in TAKES[family]:
            model.load_state_dict(start)
            model.cache = mrsp.EmbeddingCache()
            model.mesh = reference.mesh = mrsp.make_mesh(world)
            model.requires_grad_(False).policy.requires_grad_(True)
            optimizer = torch.optim.AdamW(model.policy.parameters(), CONFIG.lr)
            actors = Actors(model, reference, engine, optimizer, method, CONFIG)
            rows = rows_of(folder, modality)
            engine.sync(model)
            steps = [train.grpo_step(actors, rows, step)[0] for step in range(2)]
            found[modality] = [*steps, changed(model, start)]
        engine.close()
        if rank == 0:
            (folder / f"{world}.{kind}.{family}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def steps(folder):
    """steps(family, modality, world, engine): metrics of two steps, and what they changed."""

    def get(family, modality, world, kind):
        path = folder / f"{world}.{kind}.{family}.json"
        if not path.exists():
            run_ranks(_steps, world, family, folder, world, ENGINES if world > 1 else ["torch"])
        return json.loads(path.read_text())[modality]

    return get


def check_grpo(steps, media: int) -> None:
    """The step trained the decoder, sampler and trainer agreed, each medium was seen once."""
    first, second, moved = steps
    for metrics in (first, second):
        assert metrics["mismatch_max"] < 1e-4 and math.isfinite(metrics["loss"])
        assert 0 < metrics["grad_norm"] < math.inf and metrics["tokens"] > 0
        assert metrics["cache_misses"] == media  # the second row asks about the same
        assert metrics["prefilled_tokens"] < metrics["prompt_tokens"]
    assert second["cache_hits"] == 3 * media and first["cache_hits"] == media
    assert len(moved) > 10 and all(name.startswith("policy.") for name in moved)


# ----------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    "family, modality, column",
    [
        pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.slow)
        for cell in itertools.product(zoo.FAMILIES, MODALITIES, COLUMNS)
    ],
)
def test_cell(family, modality, column, folder, steps, record_property):
    if column == "vLLM" and "vllm" not in ENGINES:
        pytest.skip("needs vllm")
    rows = rows_of(folder, modality)
    media = len(rows[0].media) + sum(m.track for m in rows[0].media)
    if modality not in TAKES[family]:
        record_property("cell", "-")
        with pytest.raises(ModelError, match="question 0: .* takes no"):
            build(family).prompt(rows[0])
        return
    if column == "SFT":
        for part in ("llm", "projector", "all") if media else ("llm", "all"):
            check_sft(family, rows, part)
    elif column == "SP 2":  # the same step as one process
        many, one = (steps(family, modality, world, "torch")[0] for world in (2, 1))
        for name in ("loss", "grad_norm", "entropy", "reward", "tokens", "length"):
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    else:
        kind = "vllm" if column == "vLLM" else "torch"
        check_grpo(steps(family, modality, 1 if column == "GRPO" else 2, kind), media)
    record_property("cell", "yes")


def table(cells: dict) -> str:
    """{(family, modality, column): outcome} as a table, a mark for each column's test."""
    families, inputs, columns = (list(dict.fromkeys(names)) for names in zip(*cells))
    marks = {"yes": "✓", "-": "–", "failed": "✗"}
    lines = [f"| each ✓ a test: {', '.join(columns)} | " + " | ".join(inputs) + " |"]
    lines.append("|---" * (len(inputs) + 1) + "|")
    for family in families:
        line = ["".join(marks.get(cells[family, x, c], "?") for c in columns) for x in inputs]
        line = ["" if set(cell) == {"–"} else cell for cell in line]
        lines.append(f"| {NAMES[family]} | " + " | ".join(line) + " |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_published_table_is_that_of_these_tests(request):
    """Run behind all cells, with vLLM: the table that they make is the one that is published."""
    found = request.config.stash.get(CELLS, {})
    if "vllm" not in ENGINES or len(found) < len(zoo.FAMILIES) * len(MODALITIES) * len(COLUMNS):
        pytest.skip("needs vllm and all cells")
    assert table(found) in (request.config.rootpath / "docs/models.md").read_text()
