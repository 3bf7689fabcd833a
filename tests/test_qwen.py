"""Qwen2.5-VL: pixels, tower, prompt, positions and log-probs are those of transformers and vLLM."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RECIPE, answers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

import data
import mrsp
import sft
from model import VILA, Grid, Media, ModelError, QwenVL, load, mrope_positions, smart_resize
from rollout import Sampling, TorchEngine

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def tiny_qwen(texts, tie=True, seed=0) -> QwenVL:
    """A Qwen2.5-VL with random weights: windows of 2 x 2 tokens, one layer of whole groups."""
    words = " ".join([*texts, "system user assistant You are a helpful", RECIPE.template])
    words = sorted(set(words.replace(".", " ").replace(":", " ").replace("?", " ").split()))
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,:?]+"), "removed")
    core.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    text = dict(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=2,
        pad_token_id=0, bos_token_id=None, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
        fullatt_block_indexes=[1], window_size=56, tokens_per_second=2, initializer_range=0.2,
    )  # fmt: skip
    ids = {"vision_start": 3, "vision_end": 4, "image": 5, "video": 6}
    model = QwenVL.create(
        {"text_config": text, "vision_config": vision, "tie_word_embeddings": tie}
        | {f"{name}_token_id": i for name, i in ids.items()},
        tokenizer,
        {"min_pixels": 56 * 56, "max_pixels": 84 * 112, "patch_size": 14, "temporal_patch_size": 2,
         "merge_size": 2, "image_mean": MEAN, "image_std": STD},
    )  # fmt: skip
    model.recipe = RECIPE
    return model


def texts_of(root):
    rows = [e for name in root.glob("*.jsonl") for e in data.load_rows(str(name))]
    return [text for e in rows for text in (e.problem, e.response)]


@pytest.fixture
def qwen(toy):
    return tiny_qwen(texts_of(toy))


@pytest.fixture
def rows(toy):
    """A video, an image and a text row."""
    kinds = {}
    for e in data.load_rows(str(toy / "base_images.jsonl")) + data.load_rows(str(toy / "rl.jsonl")):
        kinds.setdefault(e.data_type, e)
    return [kinds[k] for k in ("video", "image", "text")]
