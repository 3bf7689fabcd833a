"""Qwen2.5-VL: pixels, tower, prompt, positions and log-probs are those of transformers and vLLM."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import RECIPE, answers, run_ranks
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
    model = QwenVL.create(
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


def outer(model, folder) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' own model with the same weights, through the checkpoint folder."""
    model.save_pretrained(folder)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    return theirs.eval()


CLIP = (data.Medium("video", "v.mp4"),)
VIDEO = data.Example("v", "Which came first?", (), "A", "temporal", CLIP, "video", "")
MEDIA = Media(torch.linspace(-1, 1, 3 * 2 * 4 * 128).view(3, 2, 4, 128), 1.7)


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind, f, h, w", [("video", 5, 70, 120), ("video", 1, 84, 56),
                                           ("image", 1, 60, 100), ("text", 0, 0, 0)])  # fmt: skip
def test_log_probs_equal_transformers_on_the_same_pixels(toy, rows, tmp_path, tie, kind, f, h, w):
    model = tiny_qwen(texts_of(toy), tie)
    theirs, row = outer(model, tmp_path), next(r for r in rows if r.data_type == kind)
    inputs, media = {}, None
    if f:
        frames = frames_of(f, h, w)
        patches, grid = model.patches(frames)
        name, values = {
            "image": ("image", "pixel_values"),
            "video": ("video", "pixel_values_videos"),
        }[kind]
        inputs = {values: patches, f"{name}_grid_thw": torch.tensor([grid])}
        media = Media(model.encode(frames), 1.3)
        assert media.features.shape == (grid[0], grid[1] // 2, grid[2] // 2, 128)
        assert grid[1] != grid[2]
    prompt = model.build_prompt(row, media)
    answer = answers(model, [[9]])[0][0]
    ids = torch.cat([prompt.ids, answer])
    after = prompt.positions.max() + 1 + torch.arange(9)
    positions = torch.cat([prompt.positions, after.expand(3, -1)], 1)
    with torch.no_grad():
        logits = theirs(input_ids=ids[None], position_ids=positions[:, None], **inputs).logits[0]
        ours, _ = model(mrsp.pack([prompt], [[answer]]))
    expected = logits.log_softmax(-1)[len(prompt.ids) - 1 : -1].gather(-1, answer[:, None])[:, 0]
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


def test_packed_log_probs_and_gradients_equal_separate_ones(qwen, rows):
    prompts = [qwen.prompt(row, 9) for row in rows]
    assert [len(p.grids) for p in prompts] == [1, 1, 0]
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


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_sampler_agrees_with_the_trainer(qwen, rows, dtype):
    prompts = [qwen.prompt(row, 9) for row in rows]
    engine = TorchEngine(qwen, dtype=dtype)
    with torch.no_grad():
        qwen.llm.model.norm.weight.mul_(1.5)
    engine.sync(qwen)
    out = engine.generate(prompts, 3, Sampling(max_tokens=6))
    with torch.no_grad():
        ours, _ = qwen(mrsp.pack(prompts, [[r.ids for r in group] for group in out]))
    sampled = torch.cat([r.logps for group in out for r in group])
    assert torch.allclose(ours, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("train", ["all", "llm", "projector"])
def test_an_sft_step_changes_what_it_trains(qwen, rows, train):
    before, key = {k: v.clone() for k, v in qwen.state_dict().items()}, qwen.encoder_hash()
    losses, config = [], sft.SFTConfig(steps=6, groups=3, train=train, lr=1e-3, warmup=0)
    sft.train(qwen, rows, config, log=lambda step, m: losses.append(m["loss"]))
    assert losses[-1] < losses[0]
    changed = {k for k, v in qwen.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("policy.") for k in changed) == (train != "projector")
    assert any(k.startswith("tower.blocks") for k in changed) == (train == "all")
    assert any(k.startswith("tower.merger") for k in changed) == (train != "llm")
    assert (qwen.encoder_hash() == key) == (train == "llm")
    qwen.enable_gradient_checkpointing()
    sft.train(qwen, rows, replace(config, steps=1))


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
    other = frames_of(2, 84, 84, seed=1)
    many = qwen.encode_many([frames, other])
    assert torch.allclose(many[0], whole, atol=1e-5)
    assert torch.allclose(many[1], qwen.encode(other), atol=1e-5)
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


@pytest.mark.parametrize("f, h, w", [(3, 56, 84), (4, 61, 97), (1, 300, 200)])
def test_patches_equal_the_family_s_processor(qwen, f, h, w):
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    # They resize in bytes, and cut off overshoot between the two directions: leave it room.
    frames, limits = frames_of(f, h, w) // 2 + 64, {"min_pixels": 56 * 56, "max_pixels": 84 * 112}
    ours, grid = qwen.patches(frames)
    tensor = torch.as_tensor(frames).permute(0, 3, 1, 2)
    theirs = Qwen2VLVideoProcessor(**limits)(
        [tensor], do_sample_frames=False, return_tensors="pt", cap_pixels_per_frame=False
    )
    assert theirs["video_grid_thw"].tolist() == [list(grid)]
    tolerance = 1e-5 if (h, w) == (56, 84) else 1.5 / 255 / min(STD)  # they round twice
    assert (ours - theirs["pixel_values_videos"]).abs().max() < tolerance
    ours, grid = qwen.patches(frames[:1])
    theirs = Qwen2VLImageProcessor(**limits)(tensor[0], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert (ours - theirs["pixel_values"]).abs().max() < tolerance


def test_smart_resize_equals_transformers():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for h, w in rng.integers(1, 2000, (300, 2)).tolist():
        if max(h, w) < 200 * min(h, w):
            assert smart_resize(h, w, 28, 3136, 501760) == theirs.smart_resize(
                h, w, 28, 3136, 501760
            )


def test_features_are_kept_with_the_seconds_of_the_frames_taken(qwen, rows, tmp_path):
    video, image, text = rows
    qwen.cache = mrsp.EmbeddingCache(str(tmp_path / "cache"))
    found = qwen.features(video, 5)
    frames, times = data.load_media(video.media[0], 5)
    assert torch.equal(found.features, qwen.encode(frames))
    assert found.seconds == np.float32(2 * (times[-1] - times[0]) / 4)
    again = qwen.features(video, 5)
    assert qwen.cache.hits == 1 and torch.equal(again.features, found.features)
    assert qwen.features(image, 5).seconds == 0.0 and qwen.features(text, 5) is None
    assert qwen.features(video, 1).seconds == 1.0
    part = qwen.features(replace(video, media=(video.media[0]._replace(segment=(0.0, 16.0)),)), 5)
    assert part.seconds == np.float32(2 * 15.75 / 4)
    qwen.preprocess = qwen.preprocess | {"max_pixels": 56 * 56}
    key = qwen.encoder_hash()
    qwen.forget_encoder()
    assert qwen.encoder_hash() != key
    trained = qwen.features_trainable(rows, 5)
    assert trained[0].seconds == found.seconds and trained[2] is None
    assert torch.allclose(trained[0].features, found.features, atol=1e-5)


def _ranks_encode(rank, folder, media):
    """Two ranks: features, and gradients of the tower, of a video of three groups and an image."""
    model, group = load(folder), dist.group.WORLD
    model.mesh = mrsp.Mesh(rank, outer=2, sp_group=group, outer_group=group)
    rows = [data.Example(*row) for row in media]
    alone = QwenVL.from_pretrained(folder)
    for row in rows:
        together, one = model.features(row, 5, group), alone.features(row, 5)
        assert together.seconds == one.seconds
        assert torch.allclose(together.features, one.features, atol=1e-5)
    for m in (model, alone):
        found = m.features_trainable(rows, 5)
        weight = [torch.linspace(-1, 1, f.features.numel()).view_as(f.features) for f in found]
        share = 1 if m is alone else [0.25, 0.75][rank]  # what each rank does with the features
        sum((share * f.features * w).sum() for f, w in zip(found, weight)).backward()
    mrsp.all_reduce_gradients(model.tower.parameters())
    for (name, p), q in zip(model.tower.named_parameters(), alone.tower.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * float(q.grad.abs().max()) + 1e-6), name


def test_ranks_encode_together_what_one_encodes_alone(qwen, rows, tmp_path):
    qwen.save_pretrained(tmp_path)
    run_ranks(_ranks_encode, 2, str(tmp_path), [tuple(vars(r).values()) for r in rows[:2]])


# --------------------------------------------------------------------------------------- prompt


def test_the_prompt_is_that_of_the_chat_template(qwen, rows):
    video, image, text = rows
    media = Media(torch.arange(2 * 2 * 3.0).view(2, 2, 3, 1).expand(-1, -1, -1, 128), 0.5)
    tok = lambda s: qwen.tokenizer(s, add_special_tokens=False).input_ids  # noqa: E731
    still = Media(media.features[:1], 0.0)
    cases = [(video, media, "<|video_pad|>" * 12), (image, still, "<|image_pad|>" * 6)]
    for row, features, pads in (*cases, (text, None, "")):
        p = qwen.build_prompt(row, features)
        pads = f"<|vision_start|>{pads}<|vision_end|>" if pads else ""
        expected = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{pads}{qwen.recipe.template.format(problem=row.problem)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert p.ids.tolist() == tok(expected) and p.positions.shape == (3, len(p.ids))
        if features:
            assert torch.equal(p.media[:, 0], torch.arange(len(p.media_at)))
            assert set(p.ids[p.media_at].tolist()) <= set(qwen.media_tokens)
            assert p.ids[p.shared - 1] == 4 and len(p.media_at) == pads.count("pad")
    assert qwen.build_prompt(video, media).grids == (Grid("video", 2, 4, 6, 0.5),)
    qwen.recipe = replace(qwen.recipe, system="the user")
    assert qwen.build_prompt(text, None).text.startswith("<|im_start|>system\nthe user<|im_end|>")


@pytest.mark.parametrize("token", SPECIAL[1:])
def test_a_control_token_in_a_question_is_refused(qwen, rows, token):
    with pytest.raises(ModelError, match="contains the control token"):
        qwen.build_prompt(replace(rows[2], problem=f"Which {token}?"), None)


CASES = [
    (9, [], []),
    (40, [3], [Grid("video", 4, 4, 6, 1.0)]),
    (60, [2], [Grid("video", 5, 6, 4, 0.999)]),
    (30, [1], [Grid("image", 1, 8, 4, 0.0)]),
    (80, [4, 40], [Grid("video", 3, 4, 10, 0.3), Grid("image", 1, 4, 4, 0.0)]),
    (90, [0, 33], [Grid("image", 1, 6, 4, 0.0), Grid("video", 7, 4, 6, 15.9375)]),
    (70, [5, 18], [Grid("video", 2, 4, 6, 0.1), Grid("video", 6, 2, 6, 3.7)]),
]


@pytest.mark.parametrize("length, starts, grids", CASES)
def test_mrope_positions_equal_a_scalar_loop(length, starts, grids):
    rows, at, i = [], 0, 0
    while i < length:
        if i not in starts:
            rows.append((at, at, at))
            i, at = i + 1, at + 1
            continue
        g = grids[starts.index(i)]
        cells = [(at + int(t * (g.seconds * 2)), at + y, at + x)
                 for t in range(g.t) for y in range(g.h // 2) for x in range(g.w // 2)]  # fmt: skip
        rows += cells
        i, at = i + len(cells), max(map(max, cells)) + 1
    assert mrope_positions(length, starts, grids, 2, 2).T.tolist() == [list(r) for r in rows]


@pytest.mark.parametrize("length, starts, grids", CASES)
def test_mrope_positions_equal_vllm_s(length, starts, grids):
    pytest.importorskip("vllm")
    from types import SimpleNamespace as S

    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Theirs

    if not grids or starts[0] == 0:
        pytest.skip("vLLM has text before the first medium")
    me = S(config=S(vision_config=S(spatial_merge_size=2, tokens_per_second=2)))
    me.iter_mm_grid_thw = lambda features: Theirs.iter_mm_grid_thw(me, features)
    features = []
    for start, g in zip(starts, grids):
        item = {f"{g.kind}_grid_thw": S(data=torch.tensor([g.t, g.h, g.w]))}
        if g.kind == "video":
            item["second_per_grid_ts"] = S(data=torch.tensor(g.seconds, dtype=torch.float64))
        features.append(S(modality=g.kind, mm_position=S(offset=start), data=item))
    theirs, _ = Theirs.get_mrope_input_positions(me, [0] * length, features)
    assert torch.equal(mrope_positions(length, starts, grids, 2, 2), theirs)


# ---------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoint_folder_loads_again_with_the_same_weights(toy, tmp_path, tie):
    model = tiny_qwen(texts_of(toy), tie)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.encoder_hash() == model.encoder_hash() and again.recipe == model.recipe
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {n.split(".")[0] for n in names} == {"model", "visual"} | (
        {"lm_head"} - {tie and "lm_head"}
    )
    assert {"model.embed_tokens.weight", "visual.merger.mlp.0.bias"} <= names
    published = set(again.llm.state_dict()) - {tie and "lm_head.weight"}
    assert published == {n for n in names if not n.startswith("visual")}
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight or not tie
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def _ranks_shard(rank, folder, target):
    """FSDP2 on two ranks: log-probs and what is saved are those of one process."""
    model, alone = load(folder), load(folder)
    model.shard_parameters(torch.float32)
    model.enable_gradient_checkpointing()
    pack = mrsp.pack([model.build_prompt(VIDEO, MEDIA)], answers(alone, [[5, 3]]))
    for m in (model, alone):
        (m(pack)[0].sum() / (2 if m is model else 1)).backward()
    assert torch.allclose(model(pack)[0], alone(pack)[0], atol=1e-5)
    for (name, p), q in zip(model.llm.named_parameters(), alone.llm.parameters()):
        assert torch.allclose(mrsp.whole(p.grad), q.grad, atol=1e-5 * float(q.grad.abs().max())), (
            name
        )
    model.save_pretrained(target, write=rank == 0)


@pytest.mark.parametrize("tie", [True, False])
def test_a_sharded_decoder_trains_and_saves_like_a_whole_one(toy, tmp_path, tie):
    tiny_qwen(texts_of(toy), tie).save_pretrained(tmp_path / "a")
    run_ranks(_ranks_shard, 2, str(tmp_path / "a"), str(tmp_path / "b"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


def test_the_config_alone_has_all_but_weights(qwen, toy, tmp_path):
    qwen.save_config(tmp_path / "q")
    VILA.from_pretrained(toy / "init").save_config(tmp_path / "v")
    for folder in ("q", "v"):  # both decoders are Qwen2's
        names = {p.name for p in (tmp_path / folder).iterdir()}
        assert {"config.json", "tokenizer.json"} <= names and not any("safe" in n for n in names)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
        assert ("mrope_section" in config["rope_parameters"]) == (folder == "q")


def test_load_tells_the_families_apart_and_names_what_it_finds(toy, tmp_path):
    assert isinstance(load(toy / "init"), VILA)
    with pytest.raises(ModelError, match="config.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="'llama' is not supported.*qwen2_5_vl.*VILA"):
        load(tmp_path)
    with pytest.raises(ModelError, match="preprocessor_config.json is missing"):
        QwenVL.from_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match="model_type is 'llama'"):
        QwenVL.from_pretrained(tmp_path)


NAMES = ["visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.2.bias", "lm_head.weight"]


@pytest.mark.parametrize("name", [*NAMES, "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_refused_by_name(toy, tmp_path, name):
    tiny_qwen(texts_of(toy), tie=False).save_pretrained(tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"missing or misshapen tensors.*{name.split('.', 1)[1]}"):
        load(tmp_path / "c")
    path.unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load(tmp_path / "c")


def test_a_tokenizer_of_another_checkpoint_is_refused(qwen, tmp_path):
    qwen.config.video_token_id = 9
    qwen.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="video_token_id is 9, the tokenizer's 6"):
        load(tmp_path)
