"""What families share: the recipe, the prompt and where its features stand, a checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import data
import mrsp
from families import load
from model import THINKING, Media, ModelError, Recipe, read_recipe


@pytest.fixture
def question(toy):
    return data.load_rows(str(toy / "rl.jsonl"))[0]


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("num_frames", 0, "num_frames must be at least 1, not 0"),
        ("max_tokens", -3, "max_tokens must be at least 1, not -3"),
        ("max_pixels", 0, "max_pixels must be at least 1, not 0"),
        ("max_frames", 0, "max_frames must be at least 1, not 0"),
        ("fps", 0, "fps must be above 0 and finite, not 0"),
        ("fps", float("nan"), "fps must be above 0 and finite, not nan"),
        ("fps", float("inf"), "fps must be above 0 and finite, not inf"),
        ("template", "Why?", "template must contain {problem}, unlike 'Why?'"),
        ("num_frames", "8", "num_frames must be of type int, not '8'"),
        ("thinking", 1, "thinking must be of type bool, not 1"),
    ],
)
def test_a_wrong_field_of_a_recipe_is_named_in_one_line(tmp_path, field, value, said):
    with pytest.raises(ValueError) as error:
        Recipe(**{field: value})
    assert str(error.value) == said
    (tmp_path / "recipe.json").write_text(json.dumps({field: value}))
    with pytest.raises(ModelError) as error:
        read_recipe(tmp_path)
    assert str(error.value) == f"{tmp_path}/recipe.json: {said}"


def test_a_recipe_is_read_if_the_folder_has_one(tmp_path):
    assert read_recipe(tmp_path) is None
    (tmp_path / "recipe.json").write_text('{"fps": 2, "max_frames": 9, "system": null}')
    assert read_recipe(tmp_path).frames == data.Rate(2, 9)
    for text, said in (('{"frames": 8}', "'frames'"), ("[8]", "a mapping"), ('{"fps', "line 1")):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ModelError, match=f"recipe.json: .*{said}"):
            read_recipe(tmp_path)


def test_the_video_stands_before_the_text_and_nothing_between(model, question):
    model.recipe = replace(model.recipe, system="the user")
    p, (video,) = model.prompt(question), model.features(question, 5)
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
    assert torch.equal(x[12:], model.policy.model.get_input_embeddings()(p.ids[12:]))


def test_end_tokens_follow_every_frame(model, question):
    model.encoders["video"] = (1, 1, 1, [], [9])
    p = model.build_prompt(question, [Media("video", torch.ones(3, 2, 128))])
    (v,) = model.media_tokens
    assert p.ids[2:11].tolist() == [v, v, 9] * 3 and p.media_at.tolist() == [2, 3, 5, 6, 8, 9]


def test_a_template_may_contain_braces_and_the_default_asks_for_both_spans(model, question):
    model.recipe = replace(model.recipe, template='{problem} Answer as {"a": 1}')
    assert model.build_prompt(question, []).ids.tolist()
    text = THINKING.format(problem="Why?")
    assert text.startswith("Why?") and "<think> </think>" in text and "<answer> </answer>" in text


def test_a_tokenizer_of_words_loses_none_in_a_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.recipe == model.recipe and again.encoder_hash() == model.encoder_hash()
    text = "<|im_start|>user Which color came first? A. red<|im_end|>"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert 0 not in again.tokenizer(text).input_ids


def test_broken_checkpoints_are_refused_by_name(toy, tmp_path):
    with pytest.raises(ModelError, match="config.json is missing"):
        load(tmp_path)
    folder = tmp_path / "c"
    shutil.copytree(toy / "init", folder)
    (folder / "recipe.json").write_text('{"frames": 8}')
    with pytest.raises(ModelError, match="recipe.json.*frames"):
        load(folder)
    (folder / "llm/tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        load(folder)


@pytest.mark.parametrize("limit, kept", [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_above_the_limit_and_never_by_zero(limit, kept):
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert mrsp.join_gradients([p, q], limit) == 5.0  # before it
    assert torch.allclose(torch.cat([p.grad, q.grad]), kept * torch.tensor([3.0, 0.0, 4.0]))
