"""Tiny models and data for the tests: everything is made here, nothing is downloaded."""

import os

# One thread a process: at these sizes more are slower, and torchrun's ranks have one each.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from model import VILA  # noqa: E402
from train import toy_checkpoint  # noqa: E402

torch.set_num_threads(1)
TEMPLATE = "{problem} Think, then answer."


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a very small toy data set and an untrained checkpoint in init/."""
    root = tmp_path_factory.mktemp("toy")
    sizes = data.ToyConfig(base=3, sft=3, rl=6, test=4, other=2, images=2)
    data.toy_build(str(root), sizes, seed=7)
    toy_checkpoint(str(root / "init"), root, TEMPLATE, seed=7)
    return root


@pytest.fixture
def model(toy):
    """The toy's VILA with random weights, float32, fresh for each test."""
    return VILA.from_pretrained(toy / "init")


@pytest.fixture
def prompts(toy, model):
    """Three prompts of different lengths: two with video, one text only."""
    cache, out = __import__("mrsp").EmbeddingCache(), []
    rows = data.load_rows(str(toy / "rl.jsonl"))
    for row, frames in ((rows[0], 9), (rows[7], 4)):
        out.append(model.build_prompt(row, model.features(row, frames, cache), TEMPLATE))
    text = next(r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text")
    out.append(model.build_prompt(text, None, TEMPLATE))
    return out


def answers(model, lengths, seed=0):
    """Random answers of the given lengths: a list of id tensors for each inner list."""
    g = torch.Generator().manual_seed(seed)
    vocab = model.llm.config.vocab_size
    return [[torch.randint(8, vocab, (r,), generator=g) for r in group] for group in lengths]
