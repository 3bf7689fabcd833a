"""Families of models, a file each: how one sees, hears and places media, and reads its checkpoints.

load() tells them apart by config.json and layout, never by name. A new family is a subclass of
model.MultiModal, an entry of load(), and a tiny model in tests/zoo.py. It defines

    takes mrope together levels decoder_kind     attributes, explained in MultiModal
    tower, projector                          modules, empty if there are none
    from_pretrained(folder, dtype, weights)   read the published layout, and recipe.json
    write(root, weights)                      write it: the decoder's tensors are given
and, unless it takes no media,
    encoder_settings() -> list                what features depend on, besides weights
    fit(kind, F, height, width) -> size       (height, width) to which frames are resized
    seen(size, kind) -> (h, w) or (K,)        tokens of a frame, or a group, of this size
    see(frames, size, kind) -> features       (T, h, w, W) or (F, K, W), with scaled()
    place(media) -> [Piece]                   its tokens in the prompt, and their positions
and, if it takes audio,
    heard(samples) -> A                       tokens of a sound; an error if it is too short
    hear(sound, group) -> features            (A, W)
    rows(media) -> (N, W)                     if features stand in another order than they are in

Check this file alone:  pytest tests/test_families.py -k checkpoint
"""

import torch

from families.files import folder_of, read_json
from families.qwen import Omni, Qwen3VL, QwenVL
from families.text import Text, text_class
from families.vila import VILA
from model import ModelError, MultiModal

FAMILIES = {"qwen2_5_vl": QwenVL, "qwen3_vl": Qwen3VL, "qwen2_5_omni": Omni}  # by model_type


def load(name: str, dtype=torch.float32, weights: bool = True) -> MultiModal:
    """The model in a folder or on the hub, whatever its family. weights=False: without them, on the
    device "meta", to look at shapes and prompts. ModelError if it is none, or not supported."""
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
    return family.from_pretrained(root, dtype, weights)
