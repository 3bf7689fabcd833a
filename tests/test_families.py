"""Every family: log-probs, positions, pixels, sound and files are those of transformers and vLLM.

zoo.py has a tiny model of each. One video with sound, two images and a sound are made here; CASES
says what of it a question is about.
"""

import functools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace as S

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from conftest import answers, run_ranks, write_video_with_audio, write_wav
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import mrsp
import sft
from data import Example, Medium
from families import load
from families.text import Text
from families.vila import VILA
from kit.decode import Loader
from kit.sound import load_audio
from model import Media, ModelError, Piece, grid, mrope_positions
from rollout import Sampling, TorchEngine

FAMILIES, QWENS = zoo.FAMILIES, ("qwen2.5-vl", "qwen3-vl", "omni")
# v: 5 frames of 16 (4 s), w: all 16, o: one, s: those of seconds 1 to 3, t, u: all of w and s with
# the sound, i, j: images, a: sound (3.37 s)
CASES = {"text": "", "video": "v", "frame": "o", "image": "i", "several": "vijs"}
SOUND = {"sound": "a", "track": "tu", "all": "aitjv"}


def frames_of(f, h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (f, h, w, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("media")
    film, a, i, j = (str(root / name) for name in ("film.mp4", "a.wav", "i.png", "j.png"))
    write_video_with_audio(film, frames_of(16, 60, 100), 4, 4.1, 300)
    write_wav(a, 3.37)
    Image.fromarray(frames_of(1, 70, 130)[0]).save(i)
    Image.fromarray(frames_of(1, 90, 64)[0]).save(j)
    return {
        "v": Medium("video", film),
        "w": Medium("video", film, 16),
        "o": Medium("video", film, 1),
        "s": Medium("video", film, 16, (1.0, 3.0)),
        "t": Medium("video", film, 16, None, True),
        "u": Medium("video", film, 16, (1.0, 3.0), True),
        "a": Medium("audio", a),
        "i": Medium("image", i),
        "j": Medium("image", j),
    }


@pytest.fixture
def ask(media):
    def ask(letters, problem="Which came first?", response="<think> so </think> A") -> Example:
        found = tuple(media[x] for x in letters)
        return Example("q", problem, (), "A", "temporal", found, "mixed", response)

    return ask


def cases(family: str) -> dict:
    """The cases that a family takes."""
    some = CASES if zoo.build(family).takes else {"text": ""}
    return some | (SOUND if family == "omni" else {})


def mixed(family: str) -> str:
    return [*cases(family).values()][-1]


EACH = [(family, name) for family in FAMILIES for name in cases(family)]


# ---------------------------------------------------- log-probs, against transformers' own models


def by_loops(model: VILA, root, medium, num_frames: int) -> list[torch.Tensor]:
    """Embeddings of each (pooled) frame: SigLIP, projector and TSP, one value after the other."""
    p, kind = load_file(root / "mm_projector/model.safetensors"), medium.kind
    tower = transformers.SiglipVisionModel.from_pretrained(root / "vision_tower")
    frames, _ = data.load_media(medium, num_frames)
    size, n, found = tower.config.image_size, 3 if "layers.7.weight" in p else 2, []
    hidden = tower(model.scaled(frames, (size, size)), output_hidden_states=True).hidden_states[-2]
    side = size // 16
    layers = [1, 2, "gelu", 4, *([5, "gelu", 7] if n == 3 else [])]
    for patches in hidden:
        rows = []
        for by in range(0, side, n):
            for bx in range(0, side, n):
                cells = [(by + y, bx + x) for y in range(n) for x in range(n)]
                x = torch.cat([patches[y * side + x] if max(y, x) < side else 0 * patches[0]
                               for y, x in cells])  # fmt: skip
                for i in layers:
                    if i == "gelu":
                        x = F.gelu(x)
                    elif (w := p[f"layers.{i}.weight"]).ndim == 1:
                        x = F.layer_norm(x, x.shape, w, p[f"layers.{i}.bias"])
                    else:
                        x = w @ x + p[f"layers.{i}.bias"]
                rows.append(x)
        x = torch.stack(rows).view(math.isqrt(len(rows)), math.isqrt(len(rows)), -1)
        old = model.config["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample"
        found.append(x.transpose(0, 1) if old else x)  # column by column, before it was mended
    encoder = model.config.get(f"{kind}_encoder", {})
    t, h, w = encoder.get("pool_sizes", [[1, 1, 1]])[0] if isinstance(encoder, dict) else (1, 1, 1)
    pooled = []
    for first in range(0, len(found), t):
        group = found[first : first + t]
        cells = [(y, x) for y in range(0, len(group[0]), h) for x in range(0, len(group[0]), w)]
        means = [sum(g[y + b, x + c] for g in group for b in range(h) for c in range(w))
                 / (len(group) * h * w) for y, x in cells]  # fmt: skip
        pooled.append(torch.stack(means))
    return pooled


def seen_apart(model, root, example, num_frames=5) -> tuple[str, dict]:
    """What a prompt of the family has for the media, spelled out; and what transformers' model is
    given for them: pixels or mel. (VILA: the embeddings.)"""
    words, given = "", {}
    for m in example.media:
        if isinstance(model, VILA):
            token = "<image>" if m.kind == "image" else "<vila/video>"
            found = by_loops(model, root, m, num_frames)
            words += "".join(token * len(x) + "\n" for x in found)
            given.setdefault("features", []).extend(found)
            continue
        start, end = model.marks["video"]
        if m.kind == "audio" or m.track:
            mel = model.mel(load_audio(m))
            given.setdefault("input_features", []).append(mel)
            heard = ((len(mel) - 1) // 2 + 1 - 2) // 2 + 1
        if m.kind == "audio":
            words += f"<|audio_bos|>{'<|AUDIO|>' * heard}<|audio_eos|>"
            continue
        frames, times = data.load_media(m, num_frames)
        patches, (t, h, w) = model.patches(frames, model.fit(m.kind, *frames.shape[:3]))
        image, pad = m.kind == "image", model.pads[m.kind] * (h * w // 4)
        given.setdefault(f"pixel_values{'' if image else '_videos'}", []).append(patches)
        given.setdefault("image_grid_thw" if image else "video_grid_thw", []).append((t, h, w))
        each = 2 * (times[-1] - times[0]) / (len(times) - 1 or 1)  # seconds a group
        if not image:
            given.setdefault("second_per_grids", []).append(each)
        if m.track:  # 2 s of video, 2 s of sound, ...; a group is in the chunk of its position
            seen, chunks = [int(g * each * 25) // 50 for g in range(t)], -(-heard // 50)
            turns = "".join(pad * seen.count(c) + "<|AUDIO|>" * min(50, max(heard - 50 * c, 0))
                            for c in range(max(chunks, seen[-1] + 1)))  # fmt: skip
            words += f"{start}<|audio_bos|>{turns}<|audio_eos|>{end}"
        elif model.levels and not image:
            times = [*times, times[-1]]
            words += "".join(
                f"<{(times[2 * g] + times[2 * g + 1]) / 2:.1f} seconds>{start}{pad}{end}"
                for g in range(t)
            )
        else:
            words += start + pad * t + end
    if mels := given.pop("input_features", None):
        longest = max(map(len, mels))
        padded = [F.pad(mel, (0, 0, 0, longest - len(mel))).T for mel in mels]
        given["input_features"] = torch.stack(padded)
        lengths = torch.tensor([len(mel) for mel in mels])
        given["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    for name, values in given.items():
        if "pixel" in name:
            given[name] = torch.cat(values)
        elif "grid" in name:
            given[name] = torch.tensor(values)
    return words, given


def spelled(model, words: str, problem: str) -> str:
    """The whole prompt of zoo.TEMPLATE (VILA: of CHATML) around the media."""
    system = "" if isinstance(model, VILA) else "<|im_start|>system\nYou help.<|im_end|>\n"
    asked = model.recipe.template.format(problem=problem)
    return f"{system}<|im_start|>user\n{words}{asked}<|im_end|>\n<|im_start|>assistant\n"


def whole_of(model, root):
    """transformers' own model, from the folder that was saved."""
    if isinstance(model, VILA):
        kind, root = transformers.Qwen2ForCausalLM, root / "llm"
    else:
        kind = type(model.llm) if isinstance(model, Text) else model.kind
    return kind.from_pretrained(root, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family, case", EACH)
def test_log_probs_equal_transformers_on_the_same_pixels_and_sound(
    ask, tmp_path, family, case, tie
):
    model = zoo.build(family, tie).eval()
    example, answer = ask(cases(family)[case]), answers(model, [[9]])[0][0]
    model.save_pretrained(tmp_path)
    theirs = whole_of(model, tmp_path)
    with torch.no_grad():
        words, given = seen_apart(model, tmp_path, example)
        prompt = model.prompt(example)
        expected = model.tokenizer(spelled(model, words, example.problem)).input_ids
        assert prompt.ids.tolist() == expected
        ids = torch.cat([prompt.ids, answer])[None]
        after = prompt.positions.max() + 1 + torch.arange(9)
        positions = [prompt.positions, after.expand(*prompt.positions.shape[:-1], -1)]
        given.pop("second_per_grids", None)
        if features := given.pop("features", None):
            x, ids = theirs.get_input_embeddings()(ids), None
            places = [i for i, t in enumerate(expected) if t in model.media_tokens]
            x[0, places] = torch.cat(features)
            given = {"inputs_embeds": x}
        positions = torch.cat(positions, -1)[..., None, :]
        logits = theirs(input_ids=ids, position_ids=positions, **given).logits[0, -10:-1]
        logps = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]

        def ours(factor=None):
            seen = prompt if factor is None else replace(prompt, media=prompt.media * factor)
            return model(mrsp.pack([seen], [[answer]]))[0]

        assert torch.allclose(ours(), logps, atol=1e-5, rtol=2e-6)
        if example.media:  # the check can fail: without media, without deepstack
            width, where = model.llm.config.hidden_size, torch.arange(prompt.media.shape[1])
            assert (ours(0) - logps).abs().max() > 1e-2
            for level in range(model.levels):
                factor = (where // width != level + 1).float()
                assert (ours(factor) - logps).abs().max() > 1e-2


@pytest.mark.parametrize("pools", [[2, 2, 1], [1, 1, 2], [4, 2, 2], [8, 1, 1]])
@pytest.mark.parametrize("letters", ["vi", "w"])
def test_vila_pools_frames_rows_and_columns_of_a_video_alone(ask, tmp_path, pools, letters):
    model = zoo.build("vila 3x3 tsp", image_size=192)  # 4 x 4 tokens
    model.config["video_encoder"]["pool_sizes"] = [pools]
    model.save_pretrained(tmp_path)
    model, example = load(tmp_path), ask(letters)
    with torch.no_grad():
        words, given = seen_apart(model, tmp_path, example)
        prompt = model.prompt(example)
    assert prompt.ids.tolist() == model.tokenizer(spelled(model, words, example.problem)).input_ids
    assert torch.allclose(prompt.media, torch.cat(given["features"]), atol=1e-5)
    shapes = [m.features.shape for m in [model.measure(m, 5) for m in example.media]]
    assert shapes == [m.features.shape for m in model.features(example, 5)]
    trained = model.features_trainable([example], 5)[0]
    assert [m.features.shape for m in trained] == shapes


@pytest.mark.parametrize("side, kind, tokens", [(448, "mlp_downsample", 256),
    (448, "mlp_downsample_2x2_fix", 256), (448, "mlp_downsample_3x3_fix", 121),
    (384, "mlp_downsample", 196)])  # fmt: skip
def test_vila_has_the_published_tokens_a_frame_and_a_newline_behind(media, side, kind, tokens):
    llm = zoo.build("vila").llm.config.to_dict()
    tower = dict(image_size=side, patch_size=14, hidden_size=16, intermediate_size=16,
                 num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    tok, config = zoo.build("vila").tokenizer, {"mm_projector_cfg": {"mm_projector_type": kind}}
    config["video_encoder"] = {"_target_": "TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}
    with torch.device("meta"):
        model = VILA.create(config, llm, tower, tok, zoo.HALF)
        frame = model.project(torch.zeros(1, 3, side, side))
        pooled = model.pool(torch.zeros(11, tokens, 8), "video")  # a last group of 3 frames
    measured = model.measure(media["w"], 64)
    assert frame.shape[1] == tokens and measured.features.shape[:2] == (2, tokens)
    assert pooled.shape == (2, tokens, 8)
    pieces = model.place(measured)
    assert [len(piece.ids) for piece in pieces] == [0, tokens, 1] * 2
    assert pieces[2].ids == tok("\n").input_ids


# ------------------------------------------------------------------------------------- positions

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


@pytest.mark.parametrize("family, letters", [
    ("qwen3-vl", "v"), ("qwen3-vl", "ivoj"), ("omni", "v"), ("omni", "i"), ("omni", "a"),
    ("omni", "ivawj"), ("omni", "t"), ("omni", "tiaj")])  # fmt: skip
def test_positions_equal_transformers(ask, tmp_path, family, letters):
    model, example = zoo.build(family), ask(letters)
    words, given = seen_apart(model, tmp_path, example)
    prompt, whole = model.prompt(example), model.kind(model.config)
    ids = prompt.ids[None]
    grids = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if family == "omni":
        mask = given.get("feature_attention_mask")
        theirs, _ = whole.get_rope_index(
            ids, **grids, attention_mask=torch.ones_like(ids), use_audio_in_video="t" in letters,
            audio_seqlens=None if mask is None else mask.sum(-1),
            second_per_grids=given.get("second_per_grids"),
        )  # fmt: skip
    else:
        kinds = sum((ids == model.ids[model.pads[k]]) * i for i, k in ((1, "image"), (2, "video")))
        theirs, _ = whole.model.get_rope_index(ids, kinds, **grids)
    assert torch.equal(prompt.positions, theirs[:, 0])


@pytest.mark.parametrize("family", QWENS)
@pytest.mark.parametrize("letters", ["", "v", "o", "ijwsv"])
def test_positions_equal_vllm_s(ask, tmp_path, family, letters):
    pytest.importorskip("vllm")
    name = {"omni": "qwen2_5_omni_thinker"}.get(family, family.replace("-", "_").replace(".", "_"))
    theirs = __import__(f"vllm.model_executor.models.{name}", fromlist=[""])
    kind = getattr(theirs, zoo.build(family).kind.__name__)
    model, letters = zoo.build(family), letters + "a" * (family == "omni")
    prompt, features, at = model.prompt(ask(letters)), [], 0
    me = S(config=model.config, get_mrope_input_positions=None)
    for method in ("iter_mm_grid_thw", "iter_mm_features", "_get_mrope_input_positions",
                   "_get_audio_for_video_mapping", "_compute_audio_token_count"):  # fmt: skip
        if hasattr(kind, method):
            found = getattr(kind, method)
            static = isinstance(kind.__dict__.get(method), staticmethod)
            setattr(me, method, found if static else functools.partial(found, me))
    ids, value = prompt.ids.tolist(), lambda x: S(data=torch.tensor(x))
    for m in model.features(ask(letters), 5):
        offset = int(prompt.media_at[at]) - (model.levels > 0 and m.kind == "video")  # of the start
        item = {"audio_feature_lengths": value(337)}
        if m.kind != "audio":
            t, h, w, _ = m.features.shape
            item = {f"{m.kind}_grid_thw": value([t, 2 * h, 2 * w])}
        if m.kind == "video":
            each = 2 * (m.times[-1] - m.times[0]) / (len(m.times) - 1 or 1)
            item["second_per_grid_ts"] = S(data=torch.tensor(each, dtype=torch.float64))
        features.append(S(modality=m.kind, mm_position=S(offset=offset), data=item))
        at += m.features[..., 0].numel()
    assert torch.equal(kind.get_mrope_input_positions(me, ids, features)[0], prompt.positions)


def test_a_video_beside_its_sound_keeps_groups_whole_and_times_in_order(ask):
    """Also frames further apart than a chunk: the family's processor would split such a group."""
    model, far = zoo.build("omni"), Media("video", torch.zeros(4, 2, 3, 128), np.arange(7) * 1.7)
    for sound in (10, 50, 51, 400):
        m = far._replace(track=torch.ones(sound, 128))
        m.features[..., 0] = torch.arange(24).view(4, 2, 3)
        m.track[:, 0] = torch.arange(sound)
        ids = torch.tensor([i for piece in model.place(m) for i in piece.ids])
        cells, (rows,) = mrope_positions(model.place(m)), model.rows(m)
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


# ----------------------------------------------------------- frames and sound, before the towers


@pytest.mark.parametrize("family", QWENS)
@pytest.mark.parametrize("f, h, w", [(1, 64, 96), (3, 56, 84), (4, 61, 97), (2, 300, 200),
                                     (3, 20, 70), (5, 9, 9), (4, 640, 30)])  # fmt: skip
def test_patches_equal_the_family_s_processor(family, f, h, w):
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    model, third = zoo.build(family), family == "qwen3-vl"
    model.recipe = zoo.RECIPE
    # They resize in bytes, and cut off overshoot between the two directions: leave it room.
    frames = frames_of(f, h, w) // 2 + 64
    tensor = torch.as_tensor(frames).permute(0, 3, 1, 2)
    side = model.visual.config.patch_size
    for kind in ("image", "video"):
        if third and kind == "video" and f == 1:
            continue  # theirs wants two
        seen = frames[:1] if kind == "image" else frames
        size = model.fit(kind, *seen.shape[:3])
        ours, grid = model.patches(seen, size)
        least, most = model.limits(kind)
        if kind == "image":
            how = Qwen2VLImageProcessor
        else:
            how = Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor
        keys = {name: model.preprocess[name] for name in ("image_mean", "image_std")}
        theirs = how(size={"shortest_edge": least, "longest_edge": most}, patch_size=side, **keys)
        out = theirs(
            *([tensor[0]] if kind == "image" else [[tensor]]), return_tensors="pt",
            **({} if kind == "image" else
               {"do_sample_frames": False, "cap_pixels_per_frame": False}),
        )  # fmt: skip
        assert out[f"{kind}_grid_thw"].tolist() == [list(grid)]
        pixels = out["pixel_values" if kind == "image" else "pixel_values_videos"]
        same = size == (h, w)  # else they round twice
        assert (ours - pixels).abs().max() < (1e-5 if same else 1.5 / 255 / 0.26)


def test_a_video_s_prompt_equals_that_of_qwen3_vl_s_processor(ask, media):
    theirs = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    model = zoo.build("qwen3-vl")
    for letter in "vows":
        (found,) = model.features(ask(letter), 5)
        t, h, w, _ = found.features.shape
        start, end = model.marks["video"]
        me = S(video_processor=S(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>")
        me.vision_start_token, me.vision_end_token, kind = start, end, theirs.Qwen3VLProcessor
        me._calculate_timestamps = functools.partial(kind._calculate_timestamps, me)
        frames = data.Frames(media[letter], 5)
        given = {"video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}
        given["video_metadata"] = [S(fps=4.0, frames_indices=frames.indices)]
        text = kind.replace_video_token(me, given, 0)
        ids = [i for piece in model.place(found) for i in piece.ids]
        assert ids == model.tokenizer(text).input_ids


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
    ids = [i for piece in model.place(found) for i in piece.ids]
    assert ids == model.tokenizer(text).input_ids and text.count(me.audio_token) == len(found.track)


@pytest.mark.parametrize("seconds", [0.02, 1, 1.99, 3.37, 131.3, 299.9])
def test_mel_and_tokens_of_a_sound_equal_whisper_s_and_the_tower_s(seconds):
    model, sound = zoo.build("omni"), frames_of(1, 1, int(seconds * 16000))[0, 0, :, 0] / 256 - 0.5
    length = 300 if seconds > 8 else 8
    ear = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=length)
    theirs = ear(
        sound, sampling_rate=16000, padding="max_length", return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
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
    assert [model.heard(int(n)) for n in lengths] == theirs.tolist()


def test_omni_s_videos_have_the_limits_of_its_processor():
    theirs = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    size = theirs.Qwen2_5OmniProcessorKwargs._defaults["videos_kwargs"]["size"]
    model = zoo.build("omni")
    assert model.limits("video") == (size["shortest_edge"], size["longest_edge"])
    assert model.limits("image") == (56 * 56, 84 * 112)


# ------------------------------------------------------------------ features, in parts and at once


@pytest.mark.parametrize("family", [f for f in FAMILIES if zoo.build(f).takes])
def test_groups_are_encoded_apart_kept_once_and_trained(ask, media, family):
    model = zoo.build(family)
    recipe = model.recipe
    video, group = data.Frames(media["w"], 5)[:][:7], model.together
    with torch.no_grad():
        whole = model.encode(video)
        assert len(whole) == -(-7 // group)
        part = model.encode(video, at=range(2, 7))
        assert torch.allclose(part, whole[2 // group :], atol=1e-5)
        assert torch.allclose(model.encode(video, at_once=3), whole, atol=1e-5)
    example, kinds = ask(mixed(family)), {m.kind for m in ask(mixed(family)).media}
    assert kinds == set(model.takes)
    found = model.features(example, 5)
    # one miss each (and the sound of a video); then none
    count = len(example.media) + sum(m.track for m in example.media)
    assert (model.cache.misses, model.cache.hits) == (count, 0)
    again = model.features(example, 5)
    assert (model.cache.misses, model.cache.hits) == (count, count)
    assert all(torch.equal(a.features, b.features) for a, b in zip(found, again))
    misses = lambda *a: model.features(*a) and model.cache.misses  # noqa: E731
    video = replace(example, media=(media["v"],))
    assert misses(video, 5) == count  # that of the mixed question
    assert misses(video, 6) == count + 1
    assert misses(replace(video, media=(media["v"]._replace(segment=(0, 3.9)),)), 5) == count + 2
    model.recipe = replace(recipe, max_pixels=64 * 64)
    assert misses(video, 5) == count + 3
    if family in QWENS:  # VILA's frames have a fixed size
        assert model.features(video, 5)[0].features.shape[1:3] == (1, 2) != whole.shape[1:3]
    model.recipe = recipe
    trained = model.features_trainable([example, video], 5)
    for a, b in zip(trained[0], found):
        assert torch.allclose(a.features, b.features, atol=1e-5)
        assert a.kind == b.kind and list(a.times if model.timed else ()) == list(b.times)
        assert (a.track is None) == (b.track is None)
    sum((m.features**2).sum() + (0 if m.track is None else m.track.sum())
        for m in trained[0]).backward()  # fmt: skip
    dead = {n for n, p in model.tower.named_parameters() if p.grad is None or not p.grad.any()}
    dead |= {n for n, p in model.projector.named_parameters() if p.grad is None}
    # of SigLIP what is behind the layer that is taken; of Whisper what transformers does not use
    assert not [n for n in dead if not re.search(r"layers\.2\.|post_layernorm|bos_eos_token", n)]


def test_the_sound_of_a_video_is_kept_apart_from_its_frames(ask, media):
    model = zoo.build("omni")
    (both,) = model.features(ask("t"), 5)
    (seen,) = model.features(ask("w"), 5)
    sound = Medium("audio", media["t"].path, media["t"].num_frames)
    (heard,) = model.features(replace(ask("a"), media=(sound,)), 5)
    assert (model.cache.misses, model.cache.hits) == (2, 2)
    assert torch.equal(both.features, seen.features) and torch.equal(both.track, heard.features)


def _ranks_agree(rank, root, letters):
    """Features and packed log-probs of two ranks are one's, and gradients, of towers too."""
    import torch.distributed as dist

    for family, example in letters.items():
        found = {}
        for method in (None, "gather", "ulysses"):
            m = load(f"{root}/{family}").train()
            m.loader = Loader()
            if method:
                m.mesh = mrsp.make_mesh(2, method, 4, 2)
                kept = m.features(example, 5, dist.group.WORLD)
                for a, b in zip(kept, m.features(example, 5, dist.group.WORLD)):
                    assert torch.equal(a.features, b.features)
            (media,) = m.features_trainable([example], 5)
            for a, b in zip(kept if method else media, media):
                assert torch.allclose(a.features, b.features, atol=1e-5), family
                assert a.track is b.track is None or torch.allclose(a.track, b.track, atol=1e-5)
            text = m.build_prompt(replace(example, media=()), [])
            prompts = [m.build_prompt(example, media), text]
            out, _ = m(mrsp.pack(prompts, answers(m, [[7, 2, 5], [4]])))
            (out * torch.linspace(-1, 1, len(out))).sum().backward()
            if method:
                mrsp.all_reduce_gradients(m.parameters())
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            logps, expected = found.setdefault(None, (out, grads))
            assert torch.allclose(out, logps, atol=1e-5, rtol=1e-6), (family, method)
            for n, g in expected.items():
                gap = (grads[n] - g).abs().max() / (g.abs().max() + 1e-3)
                assert gap < 1e-3, (family, method, n, gap)


def test_two_ranks_see_hear_and_train_like_one(ask, tmp_path):
    for family in FAMILIES:
        zoo.build(family).save_pretrained(tmp_path / family)
    run_ranks(_ranks_agree, 2, str(tmp_path), {f: ask(mixed(f)) for f in FAMILIES})


# ----------------------------------------------------------------------------------- checkpoints

# The published names: a tensor of each part, in which file.
PUBLISHED = {
    "vila": ["llm:model.layers.0.mlp.up_proj.weight", "mm_projector:layers.2.weight",
             "vision_tower:vision_model.encoder.layers.0.mlp.fc1.weight"],
    "qwen2.5-vl": ["model.layers.0.mlp.up_proj.weight", "visual.merger.mlp.0.weight"],
    "qwen3-vl": ["model.language_model.layers.0.mlp.up_proj.weight",
                 "model.visual.patch_embed.proj.weight",
                 "model.visual.deepstack_merger_list.0.linear_fc1.weight"],
    "omni": ["thinker.model.layers.0.mlp.up_proj.weight", "thinker.visual.merger.mlp.0.weight",
             "thinker.audio_tower.conv1.weight", "thinker.lm_head.weight"],
    "llama": ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
}  # fmt: skip
PUBLISHED["vila 3x3 tsp"], PUBLISHED["qwen2"] = PUBLISHED["vila"], PUBLISHED["llama"]
PUBLISHED["qwen3"] = PUBLISHED["llama"]


def located(root, name):
    """(file, name in it) of a tensor in PUBLISHED."""
    part, _, name = name.rpartition(":")
    return root / part / "model.safetensors", name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_as_published_and_loads_again(ask, tmp_path, family, tie):
    model, example = zoo.build(family, tie), ask(mixed(family))
    model.save_pretrained(tmp_path)
    for name in PUBLISHED[family]:
        path, name = located(tmp_path, name)
        assert (name in load_file(path)) != (tie and "lm_head" in name)
    if family == "omni":  # as published it can also speak
        more = {f"{part}.x": torch.ones(1) for part in ("talker", "token2wav")}
        save_file(load_file(path) | more, path, {"format": "pt"})
    parts = {"llm", "vision_tower", "mm_projector"} if "vila" in family else {"."}
    assert all((tmp_path / part / "config.json").exists() for part in parts)
    again, shapes = load(tmp_path), load(tmp_path, weights=False)
    again.loader = shapes.loader = model.loader
    assert type(again) is type(shapes) is type(model) and again.recipe == model.recipe
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (again.llm.lm_head.weight is again.llm.get_input_embeddings().weight) == tie
    assert again.encoder_hash() == model.encoder_hash()
    packs = [mrsp.pack([m.prompt(example)], answers(m, [[5, 3]])) for m in (model, again)]
    with torch.no_grad():
        assert torch.equal(model.eval()(packs[0])[0], again.eval()(packs[1])[0])
    # without weights: the same shapes and prompts
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    measured = [shapes.measure(m, 5, "q") for m in example.media]
    for x, y in zip(measured, model.features(example, 5)):
        assert x.features.shape == y.features.shape and x.features.is_meta and x.kind == y.kind
        assert y.track is None or x.track.shape == y.track.shape
    p, q = shapes.build_prompt(example, measured), model.prompt(example)
    assert torch.equal(p.ids, q.ids) and torch.equal(p.positions, q.positions)
    assert torch.equal(p.media_at, q.media_at) and (p.text, p.shared) == (q.text, q.shared)
    assert p.media is q.media is None or p.media.shape == q.media.shape
    if "vila" not in family:
        kind = whole_of(model, tmp_path).__class__
        _, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        lost = [n for n in info["unexpected_keys"] if not n.startswith(("talker", "token2wav"))]
        assert not info["missing_keys"] and not lost


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_s_config_alone_fits_its_weights(tmp_path, family, tie):
    """What vLLM builds, and what it is given."""
    model = zoo.build(family, tie)
    model.save_config(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and (tmp_path / "tokenizer.json").exists()
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        decoder = getattr(transformers, config.architectures[0])(config)
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    assert config.tie_word_embeddings == tie and expected.pop("lm_head.weight").numel()
    found = {name: value.shape for name, value in model.decoder_weights()}
    assert (found.pop("lm_head.weight", None) is None) == tie and found == expected


@pytest.mark.parametrize("family", [*PUBLISHED])
def test_a_missing_further_or_misshapen_tensor_is_refused_by_name(tmp_path, family):
    zoo.build(family, tie=False).save_pretrained(tmp_path)
    for name in PUBLISHED[family]:
        path, name = located(tmp_path, name)
        whole, tail = load_file(path), name.split("model.")[-1].removeprefix("thinker.")
        for change, said in (
            ({}, f"missing or misshapen tensors.*{tail}"),
            ({name: whole[name][1:].clone()}, f"missing or misshapen tensors.*{tail}"),
            (whole | {f"{name}_scale": whole[name].clone()}, f"unexpected.*{tail}_scale"),
        ):
            others = {k: v for k, v in whole.items() if k != name}
            save_file(others | change, path, {"format": "pt"})
            with pytest.raises(ModelError, match=said):
                load(tmp_path)
            save_file(whole, path, {"format": "pt"})
        path.rename(path.with_suffix(".bin"))
        with pytest.raises(ModelError, match="safetensors"):
            load(tmp_path)
        path.with_suffix(".bin").rename(path)
    load(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"video_encoder": '{"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}'}, None),
    ({"video_encoder": {"_target_": "x.BasicVideoEncoder", "end_tokens": None}}, None),
    ({"num_video_frames": 4}, None),
    ({"image_encoder": {"_target_": "x.BasicImageEncoder", "start_tokens": "ab"}}, None),
    ({"video_encoder": {"_target_": "x.OtherEncoder"}}, "video_encoder.*OtherEncoder.*not supp"),
    ({"video_encoder": {"_target_": "TSPVideoEncoder", "pool_sizes": [[1, 1, 1], [8, 2, 2]]}},
     "one pool size"),
    ({"video_encoder": {"_target_": "TSPVideoEncoder", "sep_tokens": "ab"}}, "no sep_tokens"),
    ({"s2": True}, "s2 is True"), ({"dynamic_s2": True}, "dynamic_s2 is True"),
    ({"mm_vision_select_feature": "patch"}, "mm_vision_select_feature is 'patch'"),
    ({"projector": "linear"}, "'linear' is unknown.*mlp_downsample_3x3_fix")])  # fmt: skip
def test_vila_s_config_as_published_or_refused(ask, tmp_path, change, said):
    zoo.build("vila").save_pretrained(tmp_path)
    path = tmp_path / ("mm_projector" if "projector" in change else "") / "config.json"
    config = {"mm_projector_type" if k == "projector" else k: v for k, v in change.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (tmp_path / "recipe.json").unlink()
    if said:
        with pytest.raises(ModelError, match=said):
            load(tmp_path)
        return
    model = load(tmp_path)
    tok = model.tokenizer
    counts = (1, 8) if "8" in str(change) else (change.get("num_video_frames", 5), 1)
    frame = "<vila/video>" * 4 + ("" if "None" in str(change) else "\n")
    image = ("ab" if "ab" in str(change) else "") + "<image>" * 4 + "\n"
    words = frame * counts[0] + image
    expected = tok(spelled(model, words, "Why?")).input_ids
    assert model.prompt(ask("vi", "Why?")).ids.tolist() == expected
    assert model.together == counts[1]


def test_tokens_that_a_tokenizer_lacks_are_added_for_vila_or_named(tmp_path):
    zoo.build("vila").save_pretrained(tmp_path)
    zoo.tokenizer(zoo.SPECIAL, None).save_pretrained(tmp_path / "llm")
    model = load(tmp_path)
    last = model.llm.config.vocab_size - 1
    assert model.ids == {"<image>": last - 1, "<vila/video>": last}
    zoo.tokenizer([*zoo.SPECIAL, "<more>"], None).save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelError, match="no room for VILA's media tokens"):
        load(tmp_path)
    zoo.build("omni").save_pretrained(tmp_path / "o")
    zoo.tokenizer([*zoo.SPECIAL, *zoo.OMNI[:-1]]).save_pretrained(tmp_path / "o")
    with pytest.raises(ModelError, match="tokenizer lacks '<.vision_eos.>'$"):
        load(tmp_path / "o")


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=f"{tmp_path} is no checkpoint.*config.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="/no/where is no checkpoint"):
        load("/no/where")
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ModelError, match="'unheard_of' is not supported.*qwen3_vl"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ModelError, match="preprocessor_config.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type')
    with pytest.raises(ModelError, match="config.json: "):
        load(tmp_path)
    asked = []

    def unreachable(repo, **how):
        asked.append((repo, how))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match="Qwen/Qwen9@main: no such folder, and the hub does not"):
        load("Qwen/Qwen9@main", weights=False)
    ((repo, how),) = asked
    assert (repo, how["revision"]) == ("Qwen/Qwen9", "main")
    assert "*.safetensors" not in how["allow_patterns"]
    zoo.build("qwen3").save_pretrained(tmp_path / "kept")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path / "kept")
    assert isinstance(load("Qwen/Qwen9"), Text)


TEXTS = [
    ("Qwen2", "", {}), ("Qwen3", "", {}), ("Llama", "", {}),
    ("Mistral", "", {"sliding_window": None}),
    ("Mistral", "sliding_window of 1024", {"sliding_window": 1024}),
    ("Cohere", "differ by", {"logit_scale": 0.5}),
    ("Granite", "differ by", {"logits_scaling": 3.0}),
    ("Gemma2", "differ by", {"final_logit_softcapping": 1.0}),
    ("Qwen3Next", "linear-attention", {"num_experts": 2, "moe_intermediate_size": 8,
                                       "shared_expert_intermediate_size": 8}),
    ("Mamba", "model.layers", {"state_size": 4}), ("GPTNeoX", "model.layers", {}),
]  # fmt: skip


@pytest.mark.parametrize("kind, said, more", TEXTS)
def test_a_text_model_is_taken_if_a_shared_prompt_gives_its_log_probs(tmp_path, kind, said, more):
    tok = zoo.tokenizer(zoo.SPECIAL)
    config = getattr(transformers, f"{kind}Config")(**zoo.decoder(tok, **more))
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    if said:
        with pytest.raises(ModelError, match=f"{kind}.*{said}"):
            load(tmp_path)
    else:
        assert load(tmp_path).prompt(Example("q", "?", (), "", "", (), "text", "")).media is None


# --------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_is_asked_by_the_chat_template(ask, media, tmp_path, family):
    model, text = zoo.build(family), ask("", "Why?")
    decoded = lambda **how: model.tokenizer.decode(model.build_prompt(text, [], **how).ids)  # noqa: E731
    system = "" if "vila" in family else "<|im_start|>system\nYou help.<|im_end|>\n"
    user, then = "<|im_start|>user\nWhy?", "<|im_end|>\n<|im_start|>assistant\n"
    assert decoded() == f"{system}{user} Think, then answer.{then}"
    assert decoded(prefill="<th") == f"{system}{user} Think, then answer.{then}<th"
    empty = "" if "vila" in family else "<think>\n\n</think>\n\n"
    assert decoded(thinking=False) == f"{system}{user}{then}{empty}"
    model.recipe = replace(model.recipe, system="Be.", thinking=False)
    other = f"<|im_start|>system\nBe.<|im_end|>\n{user}{then}{empty}"
    assert model.tokenizer.decode(model.prompt(text).ids) == other
    model.recipe = replace(model.recipe, system="")
    assert decoded().startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    for token in sorted(model.controls):
        with pytest.raises(ModelError, match=f"question q contains .*{re.escape(token)}"):
            model.build_prompt(replace(text, problem=f"Which {token}?"), [])
    assert {*model.media_tokens} <= {*model.tokenizer.convert_tokens_to_ids([*model.controls])}
    model.recipe = zoo.RECIPE
    for letter, what in (("v", "video"), ("i", "image"), ("a", "audio"), ("t", "audio track")):
        kind = media[letter].kind
        what = what if kind in model.takes else kind
        for see in (model.prompt, lambda e: model.features_trainable([e], 5),
                    lambda e: model.measure(e.media[0], 5, e.id)):  # fmt: skip
            if what.split()[0] not in model.takes:
                with pytest.raises(ModelError, match=f"q: .* no {what}, .*{media[letter].path}"):
                    see(ask(letter))
            else:
                see(ask(letter))
    model.save_pretrained(tmp_path)
    root = tmp_path / "llm" if "vila" in family else tmp_path
    (root / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (root / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    again = load(tmp_path, weights=False)
    assert again.tokenizer.decode(again.build_prompt(text, []).ids) == (
        "[Why? Think, then answer.]"
    )
    for change in ("| replace('\ufdd0', '')", "~ m.content", "| upper ~ '\ufdd0'"):
        model.tokenizer.chat_template, model._turns = template.replace(" }}", change + " }}"), {}
        with pytest.raises(ModelError, match="changes the user's text"):
            model.build_prompt(text, [])


def test_a_template_may_stand_between_media_and_text(ask):
    model = zoo.build("qwen2.5-vl")
    model.tokenizer.chat_template = "{{ messages[0].content | replace('\ufdd1', '\ufdd1 see: ') }}"
    prompt = model.prompt(ask("i", "Why?"))
    end = model.tokenizer.decode(prompt.ids[prompt.shared :])
    assert end == " see: Why? Think, then answer."


# --------------------------------------------------------------------------- sampling and training


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_agrees_with_the_trainer_and_samples_no_media(ask, family, dtype):
    model = zoo.build(family, tie=False).eval()
    engine = TorchEngine(model, dtype=dtype)  # the model's own weights, or a copy
    with torch.no_grad():  # the model would like to
        model.llm.lm_head.weight[list(model.media_tokens)] *= 8
    engine.sync(model)
    prompts = [model.prompt(ask(letters)) for letters in cases(family).values()]
    out = engine.generate(prompts, 3, Sampling(max_tokens=6))
    with torch.no_grad():
        ours, _ = model(mrsp.pack(prompts, [[r.ids for r in group] for group in out]))
    sampled = torch.cat([r.logps for group in out for r in group])
    assert torch.allclose(ours, sampled, atol=1e-4, rtol=1e-5)
    ids = torch.cat([r.ids for group in out for r in group])
    assert not set(ids.tolist()) & set(model.media_tokens)


@pytest.mark.parametrize("train", ["all", "llm", "projector"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_sft_step_changes_what_it_trains(ask, family, train):
    model = zoo.build(family)
    config = sft.SFTConfig(steps=4, groups=3, train=train, lr=1e-3, warmup=0)
    rows = [ask(letters, f"Why {letters}?") for letters in cases(family).values()]
    if not model.takes and train == "projector":
        with pytest.raises(ValueError, match="projector"):
            sft.train(model, rows, config)
        return
    before, losses = {k: v.clone() for k, v in model.state_dict().items()}, []
    key = model.encoder_hash()
    sft.train(model, rows, config, log=lambda step, m: losses.append(m["loss"]))
    assert losses[-1] < losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("policy.") for k in changed) == (train != "projector")
    inner = {f"tower.{n}" for n, _ in model.tower.named_parameters()}
    outer = {id(p) for p in model.projector.parameters()}
    outer = {n for n, p in model.named_parameters() if id(p) in outer}
    assert bool(changed & (inner - outer)) == (train == "all" and bool(model.takes))
    assert bool(changed & outer) == (train != "llm" and bool(model.takes))
    assert (model.encoder_hash() == key) == (train == "llm" or not model.takes)
    model.enable_gradient_checkpointing()
    sft.train(model, rows, replace(config, steps=1))
    assert model(model.idle())[0].isfinite().all()
