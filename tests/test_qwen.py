"""Qwen2.5-VL: patches by loops, packed prompts, shards. (test_families.py has the rest.)"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import RECIPE, answers, run_ranks
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
import mrsp
from families import load
from families.qwen import QwenVL, smart_resize
from families.vila import VILA
from model import Media, ModelError

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
        vocab_size=len(vocab), hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=2,
        pad_token_id=0, bos_token_id=None, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=128,
        fullatt_block_indexes=[1], window_size=56, tokens_per_second=2, initializer_range=0.2,
    )  # fmt: skip
    ids = {"vision_start": 3, "vision_end": 4, "image": 5, "video": 6}
    model = zoo.random(
        QwenVL,
        {"text_config": text, "vision_config": vision, "tie_word_embeddings": tie}
        | {f"{name}_token_id": i for name, i in ids.items()},
        tokenizer,
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 56 * 56,
         "max_pixels": 84 * 112, "patch_size": 14, "temporal_patch_size": 2,
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


def frames_of(f, h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (f, h, w, 3), dtype=np.uint8)


VIDEO = data.Example("v", "Which came first?", (), "A", "temporal", (), "video", "")
MEDIA = [Media("video", torch.linspace(-1, 1, 3 * 2 * 4 * 128).view(3, 2, 4, 128), np.arange(5))]


# ------------------------------------------------------------------------------------ the model


def test_packed_log_probs_and_gradients_equal_separate_ones(qwen, rows):
    prompts = [qwen.prompt(row, 9) for row in rows]
    branches = answers(qwen, [[7, 1, 4], [3, 5], [6]])
    found = []
    for batch in ((prompts, branches), mrsp.copies(prompts, branches)[:2]):
        qwen.zero_grad()
        logps, _ = qwen(mrsp.pack(*batch))
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        found.append((logps, [p.grad for p in qwen.llm.parameters()]))
    (a, ga), (b, gb) = found
    assert torch.allclose(a, b, atol=1e-5, rtol=0)
    assert all(torch.allclose(x, y, atol=1e-4 * float(y.abs().max())) for x, y in zip(ga, gb))


# ---------------------------------------------------------------------------------------- media


@pytest.mark.parametrize(
    "f, h, w", [(1, 56, 84), (2, 61, 97), (3, 56, 84), (7, 200, 90), (4, 9, 30)]
)
def test_groups_of_two_frames_are_encoded_independently(qwen, f, h, w):
    frames = frames_of(f, h, w)
    whole = qwen.encode(frames)
    parts = [qwen.encode(frames[i : i + 2]) for i in range(0, f, 2)]
    assert len(whole) == -(-f // 2) and torch.allclose(whole, torch.cat(parts), atol=1e-5)
    assert torch.allclose(qwen.encode(frames, at_once=4), whole, atol=1e-5)
    assert torch.equal(mrsp.encode_parallel(qwen.encode, frames, None, 2), whole)


def test_patches_equal_loops_and_an_odd_last_frame_is_repeated(qwen):
    frames = frames_of(3, 56, 84)  # no resize: 4 x 6 patches
    patches, grid = qwen.patches(frames)
    assert grid == (2, 4, 6) and patches.shape == (48, 3 * 2 * 14 * 14)
    pixels = (frames / 255 - np.array(MEAN)) / np.array(STD)
    expected = []
    for group in ((0, 1), (2, 2)):
        for by in range(2):
            for bx in range(3):
                for y in (2 * by, 2 * by + 1):
                    for x in (2 * bx, 2 * bx + 1):
                        cell = pixels[list(group), 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                        expected.append(cell.transpose(3, 0, 1, 2).ravel())  # colour, time, y, x
    assert np.allclose(patches.numpy(), np.array(expected), atol=1e-5)


def test_smart_resize_equals_transformers():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for h, w in rng.integers(1, 2000, (300, 2)).tolist():
        if max(h, w) < 200 * min(h, w):
            assert smart_resize(h, w, 28, 3136, 501760) == theirs.smart_resize(
                h, w, 28, 3136, 501760
            )


def test_sizes_of_qwen3_vl_s_videos_equal_transformers():
    theirs = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    model, rng = zoo.build("qwen3-vl"), np.random.default_rng(0)
    least, most = model.limits("video")
    for f, h, w in rng.integers((2, 5, 5), (30, 300, 300), (300, 3)).tolist():
        expected = theirs.smart_resize(f, h, w, 2, 32, least, most)
        assert model.fit("video", f, h, w) == expected


def test_features_are_kept_on_disk_with_the_times_of_the_frames_taken(qwen, rows, tmp_path):
    video, image, text = rows
    qwen.cache = mrsp.EmbeddingCache(str(tmp_path / "cache"))
    (found,) = qwen.features(video, 5)
    frames, times = data.load_media(video.media[0], 5)
    assert torch.equal(found.features, qwen.encode(frames))
    assert found.times.tolist() == times.tolist()
    qwen.cache = mrsp.EmbeddingCache(str(tmp_path / "cache"))
    (again,) = qwen.features(video, 5)
    assert qwen.cache.hits == 1 and torch.equal(again.features, found.features)
    assert qwen.features(image, 5)[0].times.tolist() == [0] and qwen.features(text, 5) == []
    part = replace(video, media=(video.media[0]._replace(segment=(0.0, 16.0)),))
    assert qwen.features(part, 5)[0].times[-1] == 15.75
    key = qwen.encoder_hash()
    qwen.preprocess["max_pixels"] = 56 * 56
    qwen.forget_encoder()
    assert qwen.encoder_hash() != key
    assert qwen.features(video, 5)[0].features.shape[1:3] == (2, 2)


@pytest.mark.parametrize(
    "seconds, steps",
    [(0, [0, 0, 0]), (1, [0, 4, 8]), (0.3, [0, 1, 2]), (0.999, [0, 3, 7]), (0.124999999, [0] * 3)],
)
def test_a_group_s_position_is_its_seconds_times_two_cut_off(qwen, seconds, steps):
    m = MEDIA[0]._replace(times=np.arange(5) * seconds)
    start, piece, end = qwen.place(m)
    assert piece.cells[0].tolist() == [t for t in steps for _ in range(8)]
    assert len(start.ids) == len(end.ids) == 1 and start.cells is end.cells is None


# ---------------------------------------------------------------------------------- checkpoints


def _ranks_shard(rank, root):
    """FSDP2 on two ranks: log-probs, gradients and what is saved are those of one process."""
    for source in sorted(Path(root, "a").iterdir()):
        model, alone = load(source), load(source)
        model.shard_parameters(torch.float32)
        model.enable_gradient_checkpointing()
        levels, media = 1 + model.levels, [m for m in MEDIA if model.takes]
        features = MEDIA[0].features.repeat(1, 1, 1, levels)
        features = features.flatten(1, 2) if isinstance(model, VILA) else features
        media = [m._replace(features=features) for m in media]
        pack = mrsp.pack([model.build_prompt(VIDEO, media)], answers(alone, [[5, 3]]))
        for m in (model, alone):
            (m(pack)[0].sum() / (2 if m is model else 1)).backward()
        assert torch.allclose(model(pack)[0], alone(pack)[0], atol=1e-5), source
        for (name, p), q in zip(model.llm.named_parameters(), alone.llm.parameters()):
            gap = (mrsp.whole(p.grad) - q.grad).abs().max()
            assert gap < 1e-5 * float(q.grad.abs().max()), (source, name)
        model.save_pretrained(Path(root, "b", source.name), write=rank == 0)


@pytest.mark.parametrize("tie", [True, False])
def test_a_sharded_decoder_trains_and_saves_like_a_whole_one(toy, tmp_path, tie):
    for family in zoo.FAMILIES:
        zoo.build(family, tie).save_pretrained(tmp_path / "a" / family)
    run_ranks(_ranks_shard, 2, str(tmp_path))
    for path in (tmp_path / "a").rglob("*.safetensors"):
        a, b = load_file(path), load_file(tmp_path / "b" / path.relative_to(tmp_path / "a"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), path


def test_a_flat_config_as_first_published_loads(qwen, tmp_path):
    """All of the decoder's settings at the root, M-RoPE under rope_scaling, ids of the tokens."""
    qwen.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"], text["layer_types"], text["tie_word_embeddings"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | config | {"rope_theta": rope["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    again = load(tmp_path)
    a, b = qwen.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "lm_head.weight" not in dict(again.decoder_weights())
    pack = mrsp.pack([qwen.build_prompt(VIDEO, MEDIA)], answers(qwen, [[5]]))
    with torch.no_grad():
        assert torch.equal(again(pack)[0], qwen(pack)[0])


def test_a_tokenizer_of_another_checkpoint_is_refused(qwen, tmp_path):
    qwen.config.video_token_id = 9
    qwen.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="video_token_id is 9, the tokenizer's 6"):
        load(tmp_path)
