"""Every family: log-probs, features, files, prompts and training, against transformers' own models.

zoo.py has a tiny model of each; CASES says which of conftest's media a question is about. Pixels,
sound and positions: test_pixels.py.
"""

import json
import math
import re
import threading
import unittest.mock
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import zoo
from conftest import answers, run_ranks
from safetensors.torch import load_file, save_file

import data
import families
import mrsp
import sft
from data import Example, Medium
from families import load
from families.files import load_part, load_tokenizer, write_part
from families.qwen import QwenVL
from families.text import Text
from families.vila import VILA, BlockDownsample
from kit.decode import Loader
from kit.sound import load_audio
from model import Media, ModelError, MultiModal, Piece
from rollout import Sampling, TorchEngine, copy_policy

FAMILIES = zoo.FAMILIES
CASES = {"text": "", "video": "v", "frame": "o", "image": "i", "several": "vijs"}
SOUND = {"sound": "a", "track": "tu", "all": "aitjv"}


def cases(family: str) -> dict:
    """The cases that a family takes."""
    some = CASES if zoo.build(family).takes else {"text": ""}
    return some | (SOUND if family == "omni" else {})


def mixed(family: str) -> str:
    """The media of the last case, which has most of them."""
    return [*cases(family).values()][-1]


def same(a: dict, b: dict) -> bool:
    """The same names and tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Some families, and the last case of each, run always, the others with -m slow.
SLOW = pytest.mark.slow
QUICK = ("vila", "qwen2.5-vl", "qwen2")
SOME = [pytest.param(f, marks=[] if f in QUICK else SLOW) for f in FAMILIES]
LAST = [(f, [*cases(f)][-1]) for f in FAMILIES]
EACH = [(f, case) for f in FAMILIES for case in cases(f)]
EACH = [pytest.param(*x, marks=[] if x in LAST else SLOW) for x in EACH]
TIE = pytest.mark.parametrize("tie", [True, pytest.param(False, marks=SLOW)])


# ---------------------------------------------------- log-probs, against transformers' own models


def by_layers(model: VILA, root, medium, num_frames: int) -> list[torch.Tensor]:
    """Embeddings of each (pooled) frame: SigLIP, projector and TSP, layer by layer."""
    p = load_file(root / "mm_projector/model.safetensors")
    tower = transformers.SiglipVisionModel.from_pretrained(root / "vision_tower")
    frames, _ = data.load_media(medium, num_frames)
    size = (tower.config.image_size,) * 2
    x = tower(model.scaled(frames, size), output_hidden_states=True).hidden_states[-2]
    three = "layers.7.weight" in p
    old = model.config["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample"
    x = BlockDownsample(3 if three else 2, old)(x)  # by loops: test_pixels.py
    for i in (1, 2, "gelu", 4, *((5, "gelu", 7) if three else ())):
        if i == "gelu":
            x = F.gelu(x)
        elif (w := p[f"layers.{i}.weight"]).ndim == 1:
            x = F.layer_norm(x, w.shape, w, p[f"layers.{i}.bias"])
        else:
            x = x @ w.T + p[f"layers.{i}.bias"]
    encoder = model.config.get(f"{medium.kind}_encoder", {})
    t, h, w = encoder.get("pool_sizes", [[1, 1, 1]])[0] if isinstance(encoder, dict) else (1, 1, 1)
    side, pooled = math.isqrt(x.shape[1]), []
    for group in x.unflatten(1, (side, side)).split(t):  # (t, side, side, D)
        cells = [(y, x) for y in range(0, side, h) for x in range(0, side, w)]
        means = [group[:, y : y + h, x : x + w].mean((0, 1, 2)) for y, x in cells]
        pooled.append(torch.stack(means))
    return pooled


def seen_apart(model, root, example, num_frames=5) -> tuple[str, dict]:
    """What a prompt of the family has for the media, spelled out; and what transformers' model is
    given for them: pixels or mel. (VILA: the embeddings.)"""
    words, given, mels = "", {}, []
    for m in example.media:
        if isinstance(model, VILA):
            token = "<image>" if m.kind == "image" else "<vila/video>"
            found = by_layers(model, root, m, num_frames)
            words += "".join(token * len(x) + "\n" for x in found)
            given.setdefault("features", []).extend(found)
            continue
        if m.kind == "audio" or m.track:
            mels.append(model.mel(load_audio(m)))
            heard = ((len(mels[-1]) - 1) // 2 + 1 - 2) // 2 + 1
        if m.kind == "audio":
            words += f"<|audio_bos|>{'<|AUDIO|>' * heard}<|audio_eos|>"
            continue
        frames, times = data.load_media(m, num_frames)
        patches, (t, h, w) = model.patches(frames, model.image_size(m.kind, *frames.shape[:3]))
        pixels = "pixel_values" if m.kind == "image" else "pixel_values_videos"
        given.setdefault(pixels, []).append(patches)
        given.setdefault(f"{m.kind}_grid_thw", []).append((t, h, w))
        start, end = model.marks["video"]
        pad = model.pads[m.kind] * (h * w // 4)
        if m.kind == "image":
            words += start + pad + end
            continue
        each = 2 * (times[-1] - times[0]) / (len(times) - 1 or 1)  # seconds a group
        given.setdefault("second_per_grids", []).append(each)
        if m.track:  # 2 s of video, 2 s of sound, ...; a group is in the chunk of its position
            seen = [int(g * each * 25) // 50 for g in range(t)]
            words += f"{start}<|audio_bos|>"
            for c in range(max(math.ceil(heard / 50), seen[-1] + 1)):
                sound = min(50, max(heard - 50 * c, 0))
                words += pad * seen.count(c) + "<|AUDIO|>" * sound
            words += f"<|audio_eos|>{end}"
        elif model.levels:
            for g in range(t):
                both = times[2 * g : 2 * g + 2]
                words += f"<{sum(both) / len(both):.1f} seconds>{start}{pad}{end}"
        else:
            words += start + pad * t + end
    for name, values in given.items():
        if "pixel" in name:
            given[name] = torch.cat(values)
        elif "grid" in name:
            given[name] = torch.tensor(values)
    if mels:
        padded = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)  # (n, longest, 16)
        lengths = torch.tensor([[len(mel)] for mel in mels])
        given["input_features"] = padded.transpose(1, 2)
        given["feature_attention_mask"] = (torch.arange(padded.shape[1]) < lengths).long()
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
        kind = (
            model.kind if hasattr(model, "kind") else getattr(transformers, model.decoder_kind[0])
        )
    return kind.from_pretrained(root, attn_implementation="sdpa").eval()


@TIE
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
        expected = model.tokenize(spelled(model, words, example.problem))
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

        def ours(factor=1):
            media = None if prompt.media is None else prompt.media * factor
            return model(mrsp.pack([replace(prompt, media=media)], [[answer]]))[0]

        assert torch.allclose(ours(), logps, atol=1e-5, rtol=2e-6)
        if example.media:  # the check can fail: without media, without deepstack
            width, where = model.policy.config.hidden_size, torch.arange(prompt.media.shape[1])
            assert (ours(0) - logps).abs().max() > 1e-2
            for level in range(model.levels):
                factor = (where // width != level + 1).float()
                assert (ours(factor) - logps).abs().max() > 1e-2


def test_packed_log_probs_and_gradients_equal_separate_ones(ask):
    model = zoo.build("qwen2.5-vl")
    prompts = [model.prompt(ask(letters), 9) for letters in ("v", "i", "")]
    branches = answers(model, [[7, 1, 4], [3, 5], [6]])
    found = []
    for batch in ((prompts, branches), mrsp.copies(prompts, branches)[:2]):
        model.zero_grad()
        logps, _ = model(mrsp.pack(*batch))
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        found.append((logps, [p.grad for p in model.policy.parameters()]))
    (a, ga), (b, gb) = found
    assert torch.allclose(a, b, atol=1e-5, rtol=0)
    assert all(torch.allclose(x, y, atol=1e-4 * float(y.abs().max())) for x, y in zip(ga, gb))


# ------------------------------------------------------------------ features, in parts and at once


SIGHTED = [f for f in FAMILIES if zoo.build(f).takes]


@pytest.mark.parametrize("family", SIGHTED)
@pytest.mark.parametrize("f, h, w", [(1, 56, 84), (2, 61, 97), (3, 56, 84), (7, 200, 90)])
def test_groups_of_frames_are_encoded_independently(family, f, h, w):
    model, frames = zoo.build(family), zoo.frames(f, h, w)
    group, size = model.unit, model.image_size("video", f, h, w)
    with torch.no_grad():
        whole = model.encode(frames)
        parts = [model.encode(frames[i : i + group], size) for i in range(0, f, group)]
        assert len(whole) == math.ceil(f / group)
        assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
        assert torch.allclose(model.encode(frames, at_once=3), whole, atol=1e-5)
        assert torch.equal(mrsp.encode_parallel(model.encode, frames, None, group), whole)
        if f > 2:
            behind = model.encode(frames, at=range(2, f))
            assert torch.allclose(behind, whole[2 // group :], atol=1e-5)


@pytest.mark.parametrize("family", SIGHTED)
def test_features_are_kept_once_for_all_that_they_depend_on(ask, media, family):
    model, example = zoo.build(family), ask(mixed(family))
    assert {m.kind for m in example.media} == set(model.takes)
    found = model.features(example, 5)
    # one miss each (and the sound of a video); then none
    count = len(example.media) + sum(m.track for m in example.media)
    assert (model.cache.misses, model.cache.hits) == (count, 0)
    again = model.features(example, 5)
    assert (model.cache.misses, model.cache.hits) == (count, count)
    assert all(torch.equal(a.features, b.features) for a, b in zip(found, again))

    def misses(medium, num_frames=5) -> int:
        model.features(replace(example, media=(medium,)), num_frames)
        return model.cache.misses - count

    assert misses(media["v"]) == 0  # that of the mixed question
    assert misses(media["v"], 6) == 1
    assert misses(media["v"]._replace(segment=(0, 3.9))) == 2
    model.recipe = replace(model.recipe, max_pixels=64 * 64)
    assert misses(media["v"]) == 3
    (small,) = model.features(ask("v"), 5)
    if "vila" not in family:  # whose frames have a fixed size
        assert small.features.shape[1:3] == (1, 2)


@pytest.mark.parametrize("family", SIGHTED)
def test_trainable_features_are_the_kept_ones_with_gradients_everywhere(ask, family):
    model, example = zoo.build(family), ask(mixed(family))
    found = model.features(example, 5)
    trained = model.features_trainable([example, ask("v")], 5)
    for a, b in zip(trained[0], found):
        assert torch.allclose(a.features, b.features, atol=1e-5)
        assert a.kind == b.kind and list(a.times) == list(b.times)
        assert (a.track is None) == (b.track is None)
    total = sum((m.features**2).sum() for m in trained[0])
    total += sum(m.track.sum() for m in trained[0] if m.track is not None)
    total.backward()
    dead = {n for n, p in model.tower.named_parameters() if p.grad is None or not p.grad.any()}
    dead |= {n for n, p in model.projector.named_parameters() if p.grad is None}
    # of SigLIP what is behind the layer that is taken; of Whisper what transformers does not use
    assert not [n for n in dead if not re.search(r"layers\.2\.|post_layernorm|bos_eos_token", n)]


def test_features_are_kept_on_disk_with_the_times_of_the_frames_taken(ask, media, tmp_path):
    model = zoo.build("qwen2.5-vl")
    model.cache = mrsp.EmbeddingCache(str(tmp_path))
    (found,) = model.features(ask("v"), 5)
    frames, times = data.load_media(media["v"], 5)
    assert torch.equal(found.features, model.encode(frames))
    assert found.times.tolist() == times.tolist()
    model.cache = mrsp.EmbeddingCache(str(tmp_path))
    (again,) = model.features(ask("v"), 5)
    assert model.cache.hits == 1 and torch.equal(again.features, found.features)
    assert model.features(ask("i"), 5)[0].times.tolist() == [0] and model.features(ask(""), 5) == []
    assert model.features(ask("s"), 5)[0].times[-1] == 2.75
    key = model.encoder_hash()
    model.preprocess["max_pixels"] = 56 * 56
    model.forget_encoder()
    assert model.encoder_hash() != key
    assert model.features(ask("v"), 5)[0].features.shape[1:3] == (1, 2)


def test_the_sound_of_a_video_is_kept_apart_from_its_frames(ask, media):
    model = zoo.build("omni")
    (both,) = model.features(ask("t"), 5)
    (seen,) = model.features(ask("w"), 5)
    sound = Medium("audio", media["t"].path, media["t"].num_frames)
    (heard,) = model.features(replace(ask("a"), media=(sound,)), 5)
    assert (model.cache.misses, model.cache.hits) == (2, 2)
    assert torch.equal(both.features, seen.features) and torch.equal(both.track, heard.features)


def _ranks_agree(rank, root, example):
    """Features and packed log-probs of two ranks are one's, and gradients, of towers too."""
    expected = None
    for method in (None, "gather", "ulysses"):
        m = load(root).train()
        m.loader = Loader()
        if method:
            m.mesh = mrsp.make_mesh(2, method, 4, 2)
            kept = m.features(example, 5, dist.group.WORLD)
            for a, b in zip(kept, m.features(example, 5, dist.group.WORLD)):
                assert torch.equal(a.features, b.features)
        (media,) = m.features_trainable([example], 5)
        for a, b in zip(kept if method else media, media):
            assert torch.allclose(a.features, b.features, atol=1e-5), method
            assert a.track is b.track is None or torch.allclose(a.track, b.track, atol=1e-5)
        text = m.build_prompt(replace(example, media=()), [])
        prompts = [m.build_prompt(example, media), text]
        out, _ = m(mrsp.pack(prompts, answers(m, [[7, 2, 5], [4]])))
        (out * torch.linspace(-1, 1, len(out))).sum().backward()
        if method:
            mrsp.join_gradients([p for p in m.parameters() if p.requires_grad], float("inf"))
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        expected = expected or (out, grads)
        assert torch.allclose(out, expected[0], atol=1e-5, rtol=1e-6), method
        for n, g in expected[1].items():
            gap = (grads[n] - g).abs().max() / (g.abs().max() + 1e-3)
            assert gap < 1e-3, (method, n, gap)


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_see_hear_and_train_like_one(ask, tmp_path, family):
    zoo.build(family).save_pretrained(tmp_path)
    run_ranks(_ranks_agree, 2, tmp_path, ask(mixed(family)))


# ----------------------------------------------------------------------------------- checkpoints

# The published names: a tensor of each part, in which file.
UP = "layers.0.mlp.up_proj.weight"
VILA_PARTS = (
    f"llm:model.{UP} mm_projector:layers.2.weight "
    "vision_tower:vision_model.encoder.layers.0.mlp.fc1.weight"
)
PUBLISHED = dict.fromkeys(("qwen2", "qwen3", "llama"), f"model.{UP} lm_head.weight")
PUBLISHED |= {
    "vila": VILA_PARTS,
    "vila 3x3 tsp": VILA_PARTS,
    "qwen2.5-vl": f"model.{UP} visual.merger.mlp.0.weight",
    "qwen3-vl": f"model.language_model.{UP} model.visual.patch_embed.proj.weight "
    "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    "omni": f"thinker.model.{UP} thinker.visual.merger.mlp.0.weight "
    "thinker.audio_tower.conv1.weight thinker.lm_head.weight",
}


def located(root, name):
    """(file, name in it) of a tensor in PUBLISHED."""
    part, _, name = name.rpartition(":")
    return root / part / "model.safetensors", name


@TIE
@pytest.mark.parametrize("family", SOME)
def test_a_checkpoint_is_as_published_and_loads_again(ask, tmp_path, family, tie):
    model, example = zoo.build(family, tie), ask(mixed(family))
    model.save_pretrained(tmp_path)
    for name in PUBLISHED[family].split():
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
    assert same(model.state_dict(), again.state_dict())
    assert (again.policy.lm_head.weight is again.policy.model.get_input_embeddings().weight) == tie
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


@TIE
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


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("family", SOME)
def test_a_missing_further_or_misshapen_tensor_is_refused_by_name(tmp_path, family, decoder):
    """Also if the decoder is to be read later."""
    zoo.build(family, tie=False).save_pretrained(tmp_path)
    for name in PUBLISHED[family].split():
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
                load(tmp_path, decoder=decoder)
            save_file(whole, path, {"format": "pt"})
        path.rename(path.with_suffix(".bin"))
        with pytest.raises(ModelError, match="safetensors"):
            load(tmp_path, decoder=decoder)
        path.with_suffix(".bin").rename(path)
    load(tmp_path)


TSP = {"_target_": "x.TSPVideoEncoder"}
TAKEN = [  # a change of the config, how many frames it gives of 5, together, tokens of a frame
    ({"video_encoder": json.dumps(TSP | {"pool_sizes": [[8, 1, 1]]})}, 1, 8, "<vila/video>\n"),
    ({"video_encoder": {"_target_": "x.Basic", "end_tokens": None}}, 5, 1, "<vila/video>"),
    ({"num_video_frames": 4}, 4, 1, "<vila/video>\n"),
    ({"image_encoder": {"_target_": "x.Basic", "start_tokens": "ab"}}, 5, 1, "<vila/video>\n"),
]
REFUSED = [
    ({"video_encoder": {"_target_": "x.OtherEncoder"}}, "video_encoder.*OtherEncoder.*not supp"),
    ({"video_encoder": TSP | {"pool_sizes": [[1, 1, 1], [8, 2, 2]]}}, "one pool size"),
    ({"video_encoder": TSP | {"sep_tokens": "ab"}}, "no sep_tokens"),
    ({"s2": True}, "s2 is True"),
    ({"dynamic_s2": True}, "dynamic_s2 is True"),
    ({"mm_vision_select_feature": "patch"}, "mm_vision_select_feature is 'patch'"),
    ({"mm_projector_type": "linear"}, "'linear' is unknown.*mlp_downsample_3x3_fix"),
]


def changed_vila(root, change: dict):
    """The folder of a VILA with another config, of the model or of its projector."""
    zoo.build("vila").save_pretrained(root)
    for path in (root / "config.json", root / "mm_projector" / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (root / "recipe.json").unlink()
    return root


@pytest.mark.parametrize("change, said", REFUSED)
def test_a_config_that_vila_does_not_know_is_refused(tmp_path, change, said):
    with pytest.raises(ModelError, match=said):
        load(changed_vila(tmp_path, change))


@pytest.mark.parametrize("change, count, together, frame", TAKEN)
def test_vila_s_config_says_what_stands_around_a_frame(
    ask, tmp_path, change, count, together, frame
):
    model = load(changed_vila(tmp_path, change))
    before = "ab" if "image_encoder" in change else ""
    video = frame.replace("<vila/video>", "<vila/video>" * 4) * count
    expected = model.tokenize(spelled(model, f"{video}{before}{'<image>' * 4}\n", "Why?"))
    assert model.prompt(ask("vi", "Why?")).ids.tolist() == expected
    assert model.unit == together


def test_tokens_that_a_tokenizer_lacks_are_added_for_vila_or_named(tmp_path):
    zoo.build("vila").save_pretrained(tmp_path)
    zoo.tokenizer(zoo.SPECIAL, None).save_pretrained(tmp_path / "llm")
    model = load(tmp_path)
    last = model.policy.config.vocab_size - 1
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
    for config, said in (
        ('{"model_type": "unheard_of"}', "'unheard_of' is not supported.*qwen3_vl"),
        ('{"model_type": "qwen3_vl"}', "preprocessor_config.json is missing"),
        ('{"model_type', "config.json: "),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=said):
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


EXPERTS = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
TEXTS = [
    ("Qwen2", "", {}),
    ("Qwen3", "", {}),
    ("Llama", "", {}),
    ("Mistral", "", {"sliding_window": None}),
    ("Mistral", "sliding_window of 1024", {"sliding_window": 1024}),
    ("Cohere", "differ by", {"logit_scale": 0.5}),
    ("Granite", "differ by", {"logits_scaling": 3.0}),
    ("Gemma2", "differ by", {"final_logit_softcapping": 1.0}),
    ("Qwen3Next", "linear-attention", EXPERTS),
    ("Mamba", "model.layers", {"state_size": 4}),
    ("GPTNeoX", "model.layers", {}),
]


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


def test_a_flat_config_as_first_published_loads(ask, tmp_path):
    """All of the decoder's settings at the root, M-RoPE under rope_scaling, ids of the tokens."""
    model = zoo.build("qwen2.5-vl")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"], text["layer_types"], text["tie_word_embeddings"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | config | {"rope_theta": rope["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    again = load(tmp_path)
    assert same(model.state_dict(), again.state_dict())
    assert "lm_head.weight" not in dict(again.decoder_weights())
    pack = mrsp.pack([model.prompt(ask("v"))], answers(model, [[5]]))
    with torch.no_grad():
        assert torch.equal(again(pack)[0], model(pack)[0])


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    model = zoo.build("qwen2.5-vl")
    model.config.video_token_id = 9
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="video_token_id is 9, the tokenizer's 6"):
        load(tmp_path)


def _ranks_shard(rank, root):
    """FSDP2 on two ranks: log-probs, gradients and what is saved are those of one process."""
    model, alone = load(root / "a", decoder=False), load(root / "a")
    assert next(model.policy.parameters()).is_meta
    whole = TorchEngine(model, dtype=torch.float32).model.policy  # a sampler's copy
    assert same(whole.state_dict(), alone.policy.state_dict())
    tie = alone.policy.config.tie_word_embeddings
    assert (whole.lm_head.weight is whole.model.get_input_embeddings().weight) == tie
    reference = copy_policy(model, torch.bfloat16)  # of a decoder without values
    model.shard_parameters(torch.float32)
    assert same(dict(model.decoder_weights()), dict(alone.decoder_weights()))
    assert same(model.tower.state_dict(), alone.tower.state_dict())
    reference.shard_parameters(torch.bfloat16)
    for (_, x), (_, y) in zip(reference.decoder_weights(), alone.decoder_weights()):
        assert torch.equal(x, y.bfloat16())
    model.enable_gradient_checkpointing()
    features = torch.linspace(-1, 1, 24 * 128).view(3, 2, 4, 128)
    features = features.repeat(1, 1, 1, 1 + model.levels)
    features = features.flatten(1, 2) if isinstance(model, VILA) else features
    media = [Media("video", features, np.arange(5))] if model.takes else []
    question = Example("v", "Which came first?", (), "A", "temporal", (), "video", "")
    pack = mrsp.pack([model.build_prompt(question, media)], answers(alone, [[5, 3]]))
    for m in (model, alone):
        (m(pack)[0].sum() / (dist.get_world_size() if m is model else 1)).backward()
    assert torch.allclose(model(pack)[0], alone(pack)[0], atol=1e-5)
    for (name, p), q in zip(model.policy.named_parameters(), alone.policy.parameters()):
        gap = (mrsp.whole(p.grad) - q.grad).abs().max()
        assert gap < 1e-5 * float(q.grad.abs().max()), name
    model.save_pretrained(root / "b", write=rank == 0)


@SLOW
@pytest.mark.parametrize("world, tie", [(2, True), (2, False), (1, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_decoder_trains_and_saves_like_a_whole_one(tmp_path, family, world, tie):
    zoo.build(family, tie).save_pretrained(tmp_path / "a")
    run_ranks(_ranks_shard, world, tmp_path)
    for path in (tmp_path / "a").rglob("*.safetensors"):
        written = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert same(load_file(path), load_file(written)), path


def test_a_checkpoint_with_the_names_of_a_later_transformers_is_loaded_whole(tmp_path):
    model = zoo.build("qwen2.5-vl")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    later = {"model.": "model.language_model.", "visual.": "model.visual."}
    named = {}
    for name, value in load_file(path).items():
        first, dot, rest = name.partition(".")
        named[later.get(first + dot, first + dot) + rest] = value
    save_file(named, path, {"format": "pt"})
    for again in (load(tmp_path), load(tmp_path, decoder=False)):
        assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("family", SOME)
def test_every_end_token_of_a_checkpoint_ends_an_answer_and_is_kept(tmp_path, family, decoder):
    zoo.build(family).save_pretrained(tmp_path / "a")
    path = "llm/generation_config.json" if "vila" in family else "generation_config.json"
    said = {"eos_token_id": [2, 0], "temperature": 0.5, "do_sample": False}  # which is odd
    (tmp_path / "a" / path).write_text(json.dumps(said))
    model = load(tmp_path / "a", decoder=decoder)
    assert model.ends == {2, 0} and model.eos == 2
    model.read_decoder()
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / path).read_text()).items() >= said.items()
    with torch.no_grad():  # whatever is asked, the answer is <|endoftext|>
        head = torch.nn.Linear(128, model.policy.config.vocab_size)
        head.weight.zero_()
        head.bias.zero_()[0] = 1e3
    model.policy.lm_head = head
    question = Example("q", "Why?", (), "x", "", (), "text", "")
    ((answer,),) = TorchEngine(model).generate([model.prompt(question)], 1, Sampling(max_tokens=5))
    assert (answer.ids.tolist(), answer.finished, answer.text) == ([0], True, "")


class Read(Exception):
    """The decoder is there."""


def _rank_reads(rank, root):
    """The anonymous memory of this process while it loads its share (pages of files, which all
    ranks share and the system takes back, do not count)."""

    def held() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024

    def watch():
        while not done.wait(0.0005):
            seen.append(held())

    load(root / "small", decoder=False)  # what is imported and made once
    before, seen, done = held(), [], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(Read):
        model = load(root / "large", decoder=False)
        model.idle = unittest.mock.Mock(side_effect=Read)  # the first forward gathers layers
        model.shard_parameters()
    done.set()
    watcher.join()
    assert {p.dtype for p in model.policy.parameters()} == {torch.float32}
    sizes = [p.to_local().nbytes / 2**20 for p in model.policy.parameters()]
    largest = max(p.numel() * 2 / 2**20 for p in model.policy.parameters())  # in the file
    share = sum(sizes)
    print(f"rank {rank}: {max(seen) - before:.0f} MiB at most, of which its share is {share:.0f}")
    assert 0.8 * share < max(seen) - before < 1.3 * share + largest


@SLOW
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_rank_reads_its_share_of_a_decoder_and_no_more(tmp_path):
    """Of 180 MB in bfloat16: 364 MB of float32 in all, 182 on each of two ranks."""
    small = zoo.build("qwen2.5-vl", tie=False)
    small.save_pretrained(tmp_path / "small")
    config = small.config
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=24, vocab_size=20_000)
    sizes |= dict(num_attention_heads=16, num_key_value_heads=8)
    for name, size in sizes.items():
        setattr(config.text_config, name, size)
    config.text_config.layer_types = ["full_attention"] * 24
    config.vision_config.out_hidden_size = 512
    large = QwenVL(QwenVL.kind(config), small.tokenizer, small.preprocess)
    large.bfloat16().save_pretrained(tmp_path / "large")
    run_ranks(_rank_reads, 2, tmp_path)


# --------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_is_asked_by_the_chat_template(ask, family):
    model, text = zoo.build(family), ask("", "Why?")

    def asked(**options) -> str:
        return model.tokenizer.decode(model.build_prompt(text, [], **options).ids)

    system = "" if "vila" in family else "<|im_start|>system\nYou help.<|im_end|>\n"
    user, then = "<|im_start|>user\nWhy?", "<|im_end|>\n<|im_start|>assistant\n"
    assert asked() == f"{system}{user} Think, then answer.{then}"
    assert asked(prefill="<th") == f"{system}{user} Think, then answer.{then}<th"
    empty = "" if "vila" in family else "<think>\n\n</think>\n\n"
    assert asked(thinking=False) == f"{system}{user}{then}{empty}"
    model.recipe = replace(model.recipe, system="Be.", thinking=False)
    other = f"<|im_start|>system\nBe.<|im_end|>\n{user}{then}{empty}"
    assert model.tokenizer.decode(model.prompt(text).ids) == other
    model.recipe = replace(model.recipe, system="")
    assert asked().startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_holds_no_control_token(ask, family):
    model = zoo.build(family)
    for token in sorted(model.controls):
        with pytest.raises(ModelError, match=f"question q contains .*{re.escape(token)}"):
            model.build_prompt(ask("", f"Which {token}?"), [])
        with pytest.raises(ModelError, match=f"question q contains .*{re.escape(token)}"):
            model.build_prompt(ask("", "Which?", f"<think> so{token}"), [])
    assert {*model.media_tokens} <= {*model.tokenizer.convert_tokens_to_ids([*model.controls])}


@pytest.mark.parametrize("family", SOME)
def test_media_that_a_family_does_not_take_are_refused_by_name(ask, media, family):
    model = zoo.build(family)
    model.recipe = zoo.RECIPE
    looks = [model.prompt, lambda e: model.features_trainable([e], 5)]
    looks.append(lambda e: model.measure(e.media[0], 5, e.id))
    for letter, what in (("v", "video"), ("i", "image"), ("a", "audio"), ("t", "audio track")):
        if media[letter].kind not in model.takes:
            what = media[letter].kind
        for see in looks:
            if what.split()[0] in model.takes:
                see(ask(letter))
            else:
                with pytest.raises(ModelError, match=f"q: .* no {what}, .*{media[letter].path}"):
                    see(ask(letter))


@pytest.mark.parametrize("family", SOME)
def test_a_template_in_a_file_of_its_own_is_used_and_may_not_change_the_text(ask, tmp_path, family):
    model, text = zoo.build(family), ask("", "Why?")
    model.save_pretrained(tmp_path)
    root = tmp_path / "llm" if "vila" in family else tmp_path
    (root / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (root / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    again = load(tmp_path, weights=False)
    asked = again.tokenizer.decode(again.build_prompt(text, []).ids)
    assert asked == "[Why? Think, then answer.]"
    for change in ("| replace('\ufdd0', '')", "~ m.content", "| upper ~ '\ufdd0'"):
        model.tokenizer.chat_template = template.replace(" }}", change + " }}")
        with pytest.raises(ModelError, match="changes the user's text"):
            model.build_prompt(text, [])


def test_a_template_may_stand_between_media_and_text(ask):
    model = zoo.build("qwen2.5-vl")
    model.tokenizer.chat_template = "{{ messages[0].content | replace('\ufdd1', '\ufdd1 see: ') }}"
    prompt = model.prompt(ask("i", "Why?"))
    end = model.tokenizer.decode(prompt.ids[prompt.shared :])
    assert end == " see: Why? Think, then answer."


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("family", SOME)
def test_the_sampler_agrees_with_the_trainer_and_samples_no_media(ask, family, dtype):
    model = zoo.build(family, tie=False).eval()
    engine = TorchEngine(model, dtype=dtype)  # the model's own weights, or a copy
    with torch.no_grad():  # the model would like to
        model.policy.lm_head.weight[list(model.media_tokens)] *= 8
    engine.sync(model)
    prompts = [model.prompt(ask(letters)) for letters in cases(family).values()]
    out = engine.generate(prompts, 3, Sampling(max_tokens=6))
    with torch.no_grad():
        ours, _ = model(mrsp.pack(prompts, [[r.ids for r in group] for group in out]))
    sampled = torch.cat([r.logps for group in out for r in group])
    assert torch.allclose(ours, sampled, atol=1e-4, rtol=1e-5)
    ids = torch.cat([r.ids for group in out for r in group])
    assert not set(ids.tolist()) & set(model.media_tokens)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "omni"])
def test_windows_of_a_tower_as_a_batch_equal_one_after_the_other(family, monkeypatch):
    """Features and their gradients, by far fewer calls of a kernel."""
    frames = torch.randint(0, 256, (6, 120, 200, 3), generator=torch.Generator().manual_seed(0))
    kernel, found, calls = torch.nn.functional.scaled_dot_product_attention, [], []

    def record(*args, **how):
        calls.append(1)
        return kernel(*args, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    for name in ("flash_windows", "sdpa"):
        model = zoo.build(family)
        model.visual.config._attn_implementation = name
        features = model.encode(frames.to(torch.uint8))
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad for p in model.visual.parameters())])
        calls.append(0)
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    assert calls.index(0) * 2 <= len(calls) - calls.index(0) - 2


# ---------------------------------------------------------------------------------- a new family


class Colours(MultiModal):
    """A frame is one token: the colours of its quarters, through a linear layer."""

    takes = ("video", "image")
    decoder_kind = "Qwen2ForCausalLM", "qwen2"

    def __init__(self, llm, tokenizer):
        preprocess = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        super().__init__(llm, torch.nn.Module(), tokenizer, preprocess, ["<frame>"])
        self.projector = torch.nn.Linear(12, llm.config.hidden_size)

    @classmethod
    def from_pretrained(cls, root, dtype, weights=True, decoder=True):
        llm = load_part(transformers.Qwen2ForCausalLM, root, dtype, weights)
        model = cls(llm, load_tokenizer(root))
        if weights:
            model.projector.load_state_dict(load_file(root / "eyes/model.safetensors"))
        return model

    def write(self, root, weights):
        write_part(root, weights, self.policy.config, self.generation_config, self.tokenizer)
        (root / "eyes").mkdir()
        save_file(self.projector.state_dict(), root / "eyes/model.safetensors")

    def encoder_config(self):
        return [self.preprocess]

    def image_size(self, kind, frames, height, width):
        return 2, 2

    def tokens_per_frame(self, size, kind):
        return (1,)

    def see(self, frames, size, kind):
        return self.projector(self.scaled(frames, size).flatten(1))[:, None]  # (F, 1, D)

    def place(self, m):
        return [Piece([self.ids["<frame>"]] * len(m.features), True)], m.features.flatten(0, 1)


def test_a_family_of_forty_lines(ask, tmp_path, monkeypatch):
    """What families/__init__.py lists is all that a family has to define: it is loaded, sees,
    samples, is trained, saved and found again."""
    monkeypatch.setitem(families.FAMILIES, "qwen2", Colours)
    tokens = zoo.tokenizer([*zoo.SPECIAL, "<frame>"])
    llm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**zoo.decoder(tokens)))
    Colours(llm, tokens).save_pretrained(tmp_path / "a")
    model, rows = load(tmp_path / "a"), [ask("v"), ask("i"), ask("vi")]
    assert isinstance(model, Colours)
    prompts = [model.prompt(row, 5) for row in rows]
    assert [len(prompt.media_at) for prompt in prompts] == [5, 1, 6]
    engine = TorchEngine(model)
    sampled = engine.generate(prompts, 2, Sampling(max_tokens=4))
    logps, _ = model(mrsp.pack(prompts, [[r.ids for r in group] for group in sampled]))
    theirs = torch.cat([r.logps for group in sampled for r in group])
    assert torch.allclose(logps, theirs, atol=1e-5)
    key = model.encoder_hash()
    sft.train(model, rows, sft.SFTConfig(steps=2, groups=2, texts=1, train="all", warmup=0.0))
    assert model.encoder_hash() != key  # it sees otherwise now
    model.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert same(again.state_dict(), model.state_dict())
    assert again.recipe == model.recipe and again.encoder_hash() == model.encoder_hash()
