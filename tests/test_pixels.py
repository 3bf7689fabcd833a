"""What a tower is given, how many tokens come of it and where they stand: pixels, sound, positions.

Each by plain loops, or by the family's own processor (torchvision), transformers and vLLM.
"""

import functools
import math
from types import SimpleNamespace as S

import numpy as np
import pytest
import torch
import transformers
import zoo
from PIL import Image
from test_families import seen_apart, spelled

import data
from families import load
from families.qwen import grid, mrope_positions
from families.vila import VILA, BlockDownsample
from model import Media, ModelError, Piece

QWENS = ("qwen2.5-vl", "qwen3-vl", "omni")


def more(*values) -> list:
    """Values of a parameter that run with -m slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# ----------------------------------------------------------------------------------- VILA: pixels


def test_pixels_follow_the_preprocessor_config(model):
    frames = torch.as_tensor(zoo.frames(2, 32, 32))
    pixels = model.scaled(frames, (32, 32))
    assert torch.allclose(pixels, frames.permute(0, 3, 1, 2) / 255 * 2 - 1, atol=1e-6)
    large = torch.as_tensor(zoo.frames(1, 50, 70)) // 2 + 64
    ours = model.scaled(large, model.image_size("video", *large.shape[:3]))
    theirs = Image.fromarray(large[0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert ours.shape == (1, 3, 32, 32)
    gap = ours[0].permute(1, 2, 0) - torch.tensor(np.array(theirs) / 127.5 - 1)
    assert gap.abs().max() < 3 / 255  # of a range of 2; PIL rounds, after each direction
    small = torch.as_tensor(zoo.frames(1, 8, 8) // 128 * 255)  # overshoot is cut off
    assert model.scaled(small, (32, 32)).abs().max() <= 1


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("side, n", [(4, 2), (5, 2), (7, 3), (6, 3), (2, 2)])
def test_block_downsample_equals_loops(side, n, columns):
    x = torch.randn(2, side, side, 3)
    out = BlockDownsample(n, columns)(x.flatten(1, 2))
    blocks = math.ceil(side / n)
    assert out.shape == (2, blocks * blocks, n * n * 3)
    wide = torch.zeros(2, blocks * n, blocks * n, 3)
    wide[:, :side, :side] = x
    for by in range(blocks):
        for bx in range(blocks):
            cells = [wide[:, by * n + y, bx * n + x] for y in range(n) for x in range(n)]
            at = bx * blocks + by if columns else by * blocks + bx
            assert torch.equal(out[:, at], torch.cat(cells, -1))


TWO = {"1": 4 * 1152, "2": 4 * 1152, "4": 128}  # layers with tensors: their widths
THREE = {"1": 10368, "2": 10368, "4": 3456, "5": 3456, "7": 128}


@pytest.mark.parametrize(
    "side, kind, tokens, names",
    [
        (448, "mlp_downsample", 256, TWO),
        (448, "mlp_downsample_2x2_fix", 256, TWO),
        (448, "mlp_downsample_3x3_fix", 121, THREE),
        (384, "mlp_downsample", 196, TWO),
    ],
)
def test_vila_has_the_published_projectors_tokens_a_frame_and_a_newline_behind(
    media, side, kind, tokens, names
):
    small = zoo.build("vila")
    tower = {"image_size": side, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 16}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"mm_projector_cfg": {"mm_projector_type": kind}}
    config["video_encoder"] = {"_target_": "TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}
    with torch.device("meta"):
        model = VILA.create(config, small.policy.config.to_dict(), tower, small.tokenizer, zoo.HALF)
        frame = model.project(torch.zeros(1, 3, side, side))
        pooled = model.pool(torch.zeros(11, tokens, 8), "video")  # a last group of 3 frames
    shapes = {name: value.shape for name, value in model.projector.state_dict().items()}
    assert set(shapes) == {f"layers.{i}.{p}" for i in names for p in ("weight", "bias")}
    assert all(shapes[f"layers.{i}.weight"][-1] == width for i, width in names.items())
    measured = model.measure(media["w"], 64)
    assert frame.shape[1] == tokens and measured.features.shape[:2] == (2, tokens)
    assert pooled.shape == (2, tokens, 8)
    pieces, _ = model.place(measured)
    assert [len(piece.ids) for piece in pieces] == [0, tokens, 1] * 2
    assert pieces[2].ids == model.tokenize("\n")


@pytest.mark.parametrize("pools", [[1, 1, 2], [4, 2, 2], *more([2, 2, 1], [8, 1, 1])])
@pytest.mark.parametrize("letters", ["vi", "w"])
def test_vila_pools_frames_rows_and_columns_of_a_video_alone(ask, tmp_path, pools, letters):
    model = zoo.build("vila 3x3 tsp", image_size=192)  # 4 x 4 tokens
    model.config["video_encoder"]["pool_sizes"] = [pools]
    model.save_pretrained(tmp_path)
    model, example = load(tmp_path), ask(letters)
    with torch.no_grad():
        words, given = seen_apart(model, tmp_path, example)
        prompt = model.prompt(example)
    assert prompt.ids.tolist() == model.tokenize(spelled(model, words, example.problem))
    assert torch.allclose(prompt.media, torch.cat(given["features"]), atol=1e-5)
    shapes = [model.measure(m, 5).features.shape for m in example.media]
    assert shapes == [m.features.shape for m in model.features(example, 5)]
    trained = model.features_trainable([example], 5)[0]
    assert [m.features.shape for m in trained] == shapes


def test_images_that_are_pooled_alone_are_pooled_in_training_too(ask):
    model = zoo.build("vila")
    pooled = {"_target_": "llava.TSPVideoEncoder", "pool_sizes": [[1, 2, 2]]}
    model.config["image_encoder"] = pooled
    model.encoders["image"] = model.read_encoder("image")
    example = ask("vi")
    plain, trained = model.features(example, 5), model.features_trainable([example], 5)[0]
    assert plain[1].features.shape[1] * 4 == plain[0].features.shape[1]
    for a, b in zip(plain, trained):
        assert torch.allclose(a.features, b.features, atol=1e-5)


def test_tsp_pools_eight_frames_if_the_config_does_not_say(model):
    config = model.config | {"video_encoder": {"_target_": "llava.TSPVideoEncoder"}}
    llm = transformers.Qwen2ForCausalLM(model.policy.config)
    parts = llm, model.tower, model.projector, model.tokenizer, model.preprocess
    tsp = VILA(config, *parts)
    assert tsp.unit == 8 and VILA(model.config | {"video_encoder": None}, *parts).unit == 1
    frames = zoo.frames(11, 32, 32)
    whole, groups = model.encode(frames), tsp.encode(frames)
    assert torch.allclose(groups, torch.stack([whole[:8].mean(0), whole[8:].mean(0)]), atol=1e-6)


# ----------------------------------------------------------------------------------- Qwen: pixels


def test_patches_equal_loops_and_an_odd_last_frame_is_repeated():
    frames = zoo.frames(3, 56, 84)  # no resize: 4 x 6 patches
    patches, size = zoo.build("qwen2.5-vl").patches(frames)
    assert size == (2, 4, 6) and patches.shape == (48, 3 * 2 * 14 * 14)
    pixels = (frames / 255 - np.array(zoo.CLIP["image_mean"])) / np.array(zoo.CLIP["image_std"])
    expected = []
    for group in ((0, 1), (2, 2)):
        for by in range(2):
            for bx in range(3):
                for y in (2 * by, 2 * by + 1):
                    for x in (2 * bx, 2 * bx + 1):
                        cell = pixels[list(group), 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                        expected.append(cell.transpose(3, 0, 1, 2).ravel())  # colour, time, y, x
    assert np.allclose(patches.numpy(), np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    "family, kind, frames, size, expected",
    [
        ("qwen2.5-vl", "image", 1, (61, 97), (56, 84)),
        ("qwen2.5-vl", "video", 8, (300, 200), (112, 56)),  # each frame by itself
        ("qwen3-vl", "image", 1, (20, 70), (64, 128)),
        ("qwen3-vl", "video", 4, (96, 128), (96, 128)),
        ("qwen3-vl", "video", 16, (96, 128), (64, 64)),  # the limits are those of all frames
        ("qwen3-vl", "video", 1, (96, 128), (96, 128)),  # as of two: the last is repeated
    ],
)
def test_sizes_of_frames(family, kind, frames, size, expected):
    assert zoo.build(family).image_size(kind, frames, *size) == expected


SIZES = [(1, 64, 96), (3, 56, 84), (4, 61, 97), (2, 300, 200), (3, 20, 70), (5, 9, 9), (4, 640, 30)]


@pytest.mark.parametrize("family", QWENS)
@pytest.mark.parametrize("f, h, w", SIZES)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_patches_equal_the_family_s_processor(family, f, h, w, kind):
    pytest.importorskip("torchvision")
    name, more = "Qwen2VLImageProcessor", {}
    if kind == "video":
        name = f"Qwen{3 if family == 'qwen3-vl' else 2}VLVideoProcessor"
        more = {"do_sample_frames": False, "cap_pixels_per_frame": False}
    if name.startswith("Qwen3") and f == 1:
        pytest.skip("theirs wants two frames")
    model = zoo.build(family)
    model.recipe = zoo.RECIPE
    # They resize in bytes, and cut off overshoot between the two directions: leave it room.
    frames = zoo.frames(1 if kind == "image" else f, h, w) // 2 + 64
    size = model.image_size(kind, *frames.shape[:3])
    ours, patches = model.patches(frames, size)
    limits = dict(zip(("shortest_edge", "longest_edge"), model.limits(kind)))
    means = {name: model.preprocess[name] for name in ("image_mean", "image_std")}
    side = model.visual.config.patch_size
    theirs = getattr(transformers, name)(size=limits, patch_size=side, **means)
    tensor = torch.as_tensor(frames).permute(0, 3, 1, 2)
    out = theirs(tensor[0] if kind == "image" else [[tensor]], return_tensors="pt", **more)
    assert out[f"{kind}_grid_thw"].tolist() == [list(patches)]
    pixels = out["pixel_values" if kind == "image" else "pixel_values_videos"]
    same = size == (h, w)  # else they round twice
    assert (ours - pixels).abs().max() < (1e-5 if same else 1.5 / 255 / 0.26)


def test_omni_s_videos_have_the_limits_of_its_processor():
    theirs = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    size = theirs.Qwen2_5OmniProcessorKwargs._defaults["videos_kwargs"]["size"]
    model = zoo.build("omni")
    assert model.limits("video") == (size["shortest_edge"], size["longest_edge"])
    assert model.limits("image") == (56 * 56, 84 * 112)


# ------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("seconds", [0.02, 1, 1.99, 3.37, 131.3, *more(299.9)])
def test_mel_and_tokens_of_a_sound_equal_whisper_s_and_the_tower_s(seconds):
    model = zoo.build("omni")
    sound = zoo.frames(1, 1, int(seconds * 16000))[0, 0, :, 0] / 256 - 0.5
    length = 300 if seconds > 8 else 8
    ear = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=length)
    options = {"padding": "max_length", "return_attention_mask": True, "return_tensors": "pt"}
    theirs = ear(sound, sampling_rate=16000, **options)
    expected = theirs.input_features[0].T[theirs.attention_mask[0].bool()]
    ours = model.mel(sound.astype("f4"))
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-4
    if seconds == 0.02:
        with pytest.raises(ModelError, match="a sound of 320 samples at 16 kHz is too short"):
            model.hear(sound)
    elif seconds < 200:  # in parts of 128 s
        with torch.no_grad():
            lengths, heard = torch.tensor([len(ours)]), model.hear(sound.astype("f4"))
            whole = model.tower["audio_tower"](ours.T, feature_lens=lengths).last_hidden_state
        assert heard.shape == whole.shape and torch.allclose(heard, whole, atol=1e-5)


def test_tokens_of_a_sound_for_every_length():
    model = zoo.build("omni")
    lengths = torch.arange(640, 70000, 37)
    theirs = model.tower["audio_tower"]._get_feat_extract_output_lengths((lengths + 159) // 160)[1]
    assert [model.audio_tokens(int(n)) for n in lengths] == theirs.tolist()


# --------------------------------------------------------------------------------------- positions

# Time of each group (position), h, w of a video; h, w of an image; a number: so many text tokens.
GRIDS = [
    [9],
    [3, ([0, 2, 4], 2, 3), 31],
    [2, ([0, 1, 3, 5], 3, 2), 20],
    [1, (4, 2), 21],
    [4, ([0], 2, 5), 6, (2, 2), 9],
    [(3, 2), 9, ([0, 31, 63, 95], 2, 3), 9],
]


@pytest.mark.parametrize("parts", GRIDS)
def test_mrope_positions_equal_a_scalar_loop(parts):
    rows, at, pieces = [], 0, []
    for part in parts:
        if isinstance(part, int):
            rows += [(at + i,) * 3 for i in range(part)]
            pieces.append(Piece([7] * part))
        else:
            times, h, w = ([0], *part) if len(part) == 2 else part
            rows += [(at + t, at + y, at + x) for t in times for y in range(h) for x in range(w)]
            pieces.append(Piece([9] * (len(times) * h * w), True, grid(times, h, w)))
        at = max(map(max, rows)) + 1
    assert mrope_positions([*pieces, Piece([])]).T.tolist() == [list(row) for row in rows]


STEPS = {0: [0, 0, 0], 1: [0, 4, 8], 0.3: [0, 1, 2], 0.999: [0, 3, 7], 0.124999999: [0, 0, 0]}


@pytest.mark.parametrize("seconds", STEPS)
def test_a_group_s_position_is_its_seconds_times_two_cut_off(seconds):
    m = Media("video", torch.zeros(3, 2, 4, 128), np.arange(5) * seconds)
    (start, piece, end), _ = zoo.build("qwen2.5-vl").place(m)
    assert piece.cells[0].tolist() == [t for t in STEPS[seconds] for _ in range(8)]
    assert len(start.ids) == len(end.ids) == 1 and start.cells is end.cells is None


CASES = [("qwen3-vl", "v"), ("qwen3-vl", "ivoj"), ("omni", "v"), ("omni", "i"), ("omni", "a")]
CASES += [("omni", "ivawj"), ("omni", "t"), ("omni", "tiaj")]


@pytest.mark.parametrize("family, letters", CASES)
def test_positions_equal_transformers(ask, tmp_path, family, letters):
    model, example = zoo.build(family), ask(letters)
    words, given = seen_apart(model, tmp_path, example)
    prompt, whole = model.prompt(example), model.kind(model.config)
    ids = prompt.ids[None]
    grids = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if family == "omni":
        mask = given.get("feature_attention_mask")
        more = {"use_audio_in_video": "t" in letters, "attention_mask": torch.ones_like(ids)}
        more["audio_seqlens"] = None if mask is None else mask.sum(-1)
        more["second_per_grids"] = given.get("second_per_grids")
        theirs, _ = whole.get_rope_index(ids, **grids, **more)
    else:
        kinds = sum((ids == model.ids[model.pads[k]]) * i for i, k in ((1, "image"), (2, "video")))
        theirs, _ = whole.model.get_rope_index(ids, kinds, **grids)
    assert torch.equal(prompt.positions, theirs[:, 0])


@pytest.mark.parametrize("family", QWENS)
@pytest.mark.parametrize("letters", ["", "v", "o", "ijwsv"])
def test_positions_equal_vllm_s(ask, family, letters):
    pytest.importorskip("vllm")
    name = {"omni": "qwen2_5_omni_thinker"}.get(family, family.replace("-", "_").replace(".", "_"))
    theirs = __import__(f"vllm.model_executor.models.{name}", fromlist=[""])
    kind = getattr(theirs, zoo.build(family).kind.__name__)
    model = zoo.build(family)
    example = ask(letters + "a" * (family == "omni"))
    prompt, features, at = model.prompt(example), [], 0
    me = S(config=model.config, get_mrope_input_positions=None)
    methods = ["iter_mm_grid_thw", "iter_mm_features", "_get_mrope_input_positions"]
    methods += ["_get_audio_for_video_mapping", "_compute_audio_token_count"]
    for method in methods:
        if hasattr(kind, method):
            found = getattr(kind, method)
            static = isinstance(kind.__dict__.get(method), staticmethod)
            setattr(me, method, found if static else functools.partial(found, me))

    def value(x, dtype=None):
        return S(data=torch.tensor(x, dtype=dtype))

    for m in model.features(example, 5):
        offset = int(prompt.media_at[at]) - (model.levels > 0 and m.kind == "video")  # of the start
        item = {"audio_feature_lengths": value(337)}
        if m.kind != "audio":
            t, h, w, _ = m.features.shape
            item = {f"{m.kind}_grid_thw": value([t, 2 * h, 2 * w])}
        if m.kind == "video":
            each = 2 * (m.times[-1] - m.times[0]) / (len(m.times) - 1 or 1)
            item["second_per_grid_ts"] = value(each, torch.float64)
        features.append(S(modality=m.kind, mm_position=S(offset=offset), data=item))
        at += m.features[..., 0].numel()
    expected = kind.get_mrope_input_positions(me, prompt.ids.tolist(), features)[0]
    assert torch.equal(expected, prompt.positions)


def test_a_video_s_prompt_equals_that_of_qwen3_vl_s_processor(ask, media):
    theirs = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    model, kind = zoo.build("qwen3-vl"), theirs.Qwen3VLProcessor
    me = S(video_processor=S(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>")
    me.vision_start_token, me.vision_end_token = model.marks["video"]
    me._calculate_timestamps = functools.partial(kind._calculate_timestamps, me)
    for letter in "vows":
        (found,) = model.features(ask(letter), 5)
        t, h, w, _ = found.features.shape
        frames = data.Frames(media[letter], 5)
        given = {"video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}
        given["video_metadata"] = [S(fps=4.0, frames_indices=frames.indices)]
        text = kind.replace_video_token(me, given, 0)
        ids = [i for piece in model.place(found)[0] for i in piece.ids]
        assert ids == model.tokenize(text)


def test_a_video_and_its_sound_take_turns_as_in_omni_s_processor(ask):
    theirs = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    model, kind = zoo.build("omni"), theirs.Qwen2_5OmniProcessor
    me = S(image_processor=S(merge_size=2), video_processor=S(merge_size=2))
    me.get_chunked_index = functools.partial(kind.get_chunked_index, me)
    for name, pad in model.pads.items():
        setattr(me, f"{name}_token", pad)
    for name, (bos, eos) in (("vision", model.marks["video"]), ("audio", model.marks["audio"])):
        vars(me).update({f"{name}_bos_token": bos, f"{name}_eos_token": eos})
    (found,) = model.features(ask("t"), 5)
    (t, h, w, _), each = found.features.shape, 2 * (found.times[-1] - found.times[0]) / 15
    text = me.vision_bos_token + me.video_token + me.vision_eos_token
    sizes = [len(found.track)], [], [np.array([t, 2 * h, 2 * w])], [each]
    (text,) = kind.replace_multimodal_special_tokens(me, [text], *map(iter, sizes), True, 25, 2)
    ids = [i for piece in model.place(found)[0] for i in piece.ids]
    assert ids == model.tokenize(text) and text.count(me.audio_token) == len(found.track)


@pytest.mark.parametrize("sound", [10, 50, 51, 400])
def test_a_video_beside_its_sound_keeps_groups_whole_and_times_in_order(sound):
    """Also frames further apart than a chunk: the family's processor would split such a group."""
    model = zoo.build("omni")
    m = Media("video", torch.zeros(4, 2, 3, 128), np.arange(7) * 1.7, torch.ones(sound, 128))
    m.features[..., 0] = torch.arange(24).view(4, 2, 3)
    m.track[:, 0] = torch.arange(sound)
    pieces, rows = model.place(m)
    ids = torch.tensor([i for piece in pieces for i in piece.ids])
    cells = mrope_positions(pieces)
    assert len(ids) == 24 + sound + 4
    seen, heard = ids == model.ids["<|VIDEO|>"], ids == model.ids["<|AUDIO|>"]
    assert torch.equal(rows[seen[2:-2], 0], torch.arange(24.0))
    assert torch.equal(rows[heard[2:-2], 0], torch.arange(sound * 1.0))
    at = seen.nonzero()[:, 0].view(4, 6)
    assert (at[:, -1] - at[:, 0] == 5).all()  # whole
    assert cells[0, seen].tolist() == [1 + t for t in (0, 85, 170, 255) for _ in range(6)]
    assert cells[:, heard].tolist() == [list(range(1, sound + 1))] * 3
    turn = (cells[0, 2:-2] - 1) // 50 * 2 + heard[2:-2]
    assert (turn.diff() >= 0).all()
