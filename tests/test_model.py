"""VILA: the projector by loops, the prompt, the toy's folder. (test_families.py has the rest.)"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from families.vila import VILA, BlockDownsample, build_projector
from model import THINKING, Media, ModelError


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("side, n", [(4, 2), (5, 2), (7, 3), (6, 3), (2, 2)])
def test_block_downsample_equals_loops(side, n, columns):
    x = torch.randn(2, side * side, 3)
    out = BlockDownsample(n, columns)(x)
    blocks = -(-side // n)
    assert out.shape == (2, blocks * blocks, n * n * 3)
    for f in range(2):
        for by in range(blocks):
            for bx in range(blocks):
                parts = []
                for dy in range(n):
                    for dx in range(n):
                        y, x_ = by * n + dy, bx * n + dx
                        inside = y < side and x_ < side
                        parts.append(x[f, y * side + x_] if inside else torch.zeros(3))
                at = bx * blocks + by if columns else by * blocks + bx
                assert torch.equal(out[f, at], torch.cat(parts))


@pytest.mark.parametrize(
    "kind, tokens, names",
    [
        ("mlp_downsample", 256, {"1": 4 * 1152, "2": 4 * 1152, "4": 64}),
        ("mlp_downsample_2x2_fix", 256, {"1": 4 * 1152, "2": 4 * 1152, "4": 64}),
        ("mlp_downsample_3x3_fix", 121, {"1": 10368, "2": 10368, "4": 3456, "5": 3456, "7": 64}),
    ],
)  # fmt: skip
def test_projectors_have_the_published_tensors_and_tokens_a_frame(kind, tokens, names):
    with torch.device("meta"):
        projector = build_projector(kind, 1152, 64)
        out = projector.layers(torch.zeros(1, 32 * 32, 1152))  # 448 px, patches of 14
    assert out.shape == (1, tokens, 64)
    shapes = {k: v.shape for k, v in projector.state_dict().items()}
    assert set(shapes) == {f"layers.{i}.{p}" for i in names for p in ("weight", "bias")}
    for i, width in names.items():
        assert shapes[f"layers.{i}.weight"][-1] == width


def test_pixels_follow_the_preprocessor_config(model):
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    pixels = model.scaled(frames, (32, 32))
    assert torch.allclose(pixels, frames.permute(0, 3, 1, 2) / 255 * 2 - 1, atol=1e-6)
    large = torch.randint(64, 192, (1, 50, 70, 3), dtype=torch.uint8)
    ours = model.scaled(large, model.fit("video", *large.shape[:3]))
    theirs = Image.fromarray(large[0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert ours.shape == (1, 3, 32, 32)
    gap = ours[0].permute(1, 2, 0) - torch.tensor(np.array(theirs) / 127.5 - 1)
    assert gap.abs().max() < 3 / 255  # of a range of 2; PIL rounds, after each direction
    small = torch.randint(0, 2, (1, 8, 8, 3), dtype=torch.uint8) * 255  # overshoot is cut off
    assert model.scaled(small, (32, 32)).abs().max() <= 1


def test_the_video_stands_before_the_text_and_nothing_between(toy, model):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    model.recipe = replace(model.recipe, system="the user")
    p, (video,) = model.prompt(row), model.features(row, 5)
    tokens = model.tokenizer.convert_ids_to_tokens(p.ids.tolist())
    head = ["<|im_start|>", "system", "the", "user", "<|im_end|>", "<|im_start|>", "user"]
    assert tokens[: len(head)] == head
    assert tokens[len(head) : len(head) + 5] == ["<vila/video>"] * 5
    assert tokens[-2:] == ["<|im_start|>", "assistant"]
    assert p.media_at.tolist() == list(range(7, 12)) and p.shared == 12
    assert torch.equal(p.positions, torch.arange(len(p.ids)))
    # the features stand at their tokens, and text has the policy's own embeddings
    x = model.policy.inputs(p.ids[None], p.media, p.media_at)["inputs_embeds"][0]
    assert torch.equal(x[7:12], video.features[:, 0])
    assert torch.equal(x[12:], model.llm.get_input_embeddings()(p.ids[12:]))


def test_end_tokens_follow_every_frame(toy, model):
    model.encoders["video"] = (1, 1, 1, [], [9])
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    p = model.build_prompt(row, [Media("video", torch.ones(3, 2, 128))])
    (v,) = model.media_tokens
    assert p.ids[2:11].tolist() == [v, v, 9] * 3 and p.media_at.tolist() == [2, 3, 5, 6, 8, 9]


def test_the_forced_beginning_of_an_answer_ends_the_prompt(toy, model):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    p = model.build_prompt(row, [], prefill="<think> seen")
    assert model.tokenizer.convert_ids_to_tokens(p.ids.tolist())[-3:] == [
        "assistant",
        "<think>",
        "seen",
    ]


def test_the_default_template_asks_for_both_spans():
    text = THINKING.format(problem="Why?")
    assert text.startswith("Why?") and "<think> </think>" in text and "<answer> </answer>" in text


def test_a_checkpoint_folder_loads_again_with_the_same_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VILA.from_pretrained(tmp_path)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.encoder_hash() == model.encoder_hash() and again.recipe == model.recipe
    text = "<|im_start|>user Which color came first? A. red<|im_end|>"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert 0 not in again.tokenizer(text).input_ids  # no word is lost


def test_broken_checkpoints_are_refused_by_name(toy, tmp_path):
    with pytest.raises(ModelError, match="config.json is missing"):
        VILA.from_pretrained(tmp_path)
    folder = tmp_path / "c"
    shutil.copytree(toy / "init", folder)
    (folder / "recipe.json").write_text('{"frames": 8}')
    with pytest.raises(ModelError, match="recipe.json.*frames"):
        VILA.from_pretrained(folder)
    (folder / "llm/tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        VILA.from_pretrained(folder)


def test_a_template_may_contain_braces(toy, model):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    model.recipe = replace(model.recipe, template='{problem} Answer as {"a": 1}')
    assert model.build_prompt(row, []).ids.tolist()


def test_tsp_pools_eight_frames_if_the_config_does_not_say(model):
    config = model.config | {"video_encoder": {"_target_": "llava.TSPVideoEncoder"}}
    parts = model.llm, model.tower, model.projector, model.tokenizer, model.preprocess
    tsp = VILA(config, *parts)
    assert tsp.together == 8 and VILA(model.config | {"video_encoder": None}, *parts).together == 1
    frames = torch.randint(0, 256, (11, 32, 32, 3), dtype=torch.uint8)
    whole, groups = model.encode(frames), tsp.encode(frames)
    assert torch.allclose(groups, torch.stack([whole[:8].mean(0), whole[8:].mean(0)]), atol=1e-6)
