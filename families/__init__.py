"""Families of models, a file each: how one sees, hears and places media, and reads its checkpoints.

load() tells them apart by config.json and layout, never by name. A new family is a subclass of
model.MultiModal, an entry of FAMILIES, and a tiny model in tests/zoo.py. It defines

    takes mrope unit levels decoder_kind      attributes, explained in MultiModal
    tower, projector                          modules, empty if there are none
    from_pretrained(root, dtype, weights, decoder)   read the published layout, as load() says
    write(root, weights)                      write it: the decoder's tensors are given
    published_name(name) -> name              of a tensor in its files, if the policy's is another
    encoder_config() -> list                  what features depend on, besides weights
and, unless it takes no media,
    image_size(kind, F, height, width)        (height, width) to which frames are resized
    tokens_per_frame(size, kind)              (h, w) or (K,), of a frame, or a group, of this size
    see(frames, size, kind) -> features       (T, h, w, W) or (F, K, W), with scaled()
    place(media) -> [Piece], rows             its tokens in the prompt with their positions, and
                                              features (N, W) in the order of their places
and, if it takes audio,
    audio_tokens(samples) -> A                of a sound; an error if it is too short
    hear(sound, group) -> features            (A, W)
and, with positions of its own,
    positions(pieces) -> (P,) or (3, P)       of a prompt's tokens

tests/test_families.py has a small one: test_a_family_of_forty_lines.
Check this file alone:  pytest tests/test_families.py -k checkpoint
"""

import torch

from families.files import folder_of, read_json
from families.qwen import Omni, Qwen3VL, QwenVL
from families.text import Text, text_class
from families.vila import VILA
from model import ModelError, MultiModal, read_recipe

FAMILIES = {"qwen2_5_vl": QwenVL, "qwen3_vl": Qwen3VL, "qwen2_5_omni": Omni}  # by model_type


def load(name: str, dtype=torch.float32, weights=True, decoder=True) -> MultiModal:
    """The model in a folder or on the hub, whatever its family. weights=False: parameters stay on
    the device "meta", to look at shapes and prompts. decoder=False: the decoder's stay there until
    shard_parameters(), in which each rank reads its own part (if the files have the published
    names; else it is read whole now). ModelError for a folder that is no checkpoint, is not
    supported, or is damaged."""
    root = folder_of(name, weights)
    if not (root / "config.json").exists():
        raise ModelError(
            f"{name} is no checkpoint: config.json is missing, or there is no such folder"
        )
    kind = read_json(root, "config.json").get("model_type")
    if (root / "llm").is_dir():
        family = VILA
    elif kind in FAMILIES:
        family = FAMILIES[kind]
    elif text_class(root) is not None:
        family = Text
    else:
        raise ModelError(
            f"{name}: model_type {kind!r} is not supported; supported are VILA's layout (folders "
            f"llm, vision_tower, mm_projector), {', '.join(FAMILIES)}, and text decoders without "
            "remote code"
        )
    try:
        model = family.from_pretrained(root, dtype, weights, decoder)
    except ModelError:
        raise
    except (OSError, ValueError) as error:  # of transformers
        raise ModelError(f"{root}: {error}") from None
    model.recipe = read_recipe(root) or model.recipe
    return model
