"""Families of models, a file each: how one sees, hears and places media, and reads its checkpoints.

load() tells them apart by config.json and layout, never by name.
"""

import torch

from families.files import folder_of, read_json
from families.qwen import Omni, Qwen3VL, QwenVL
from families.text import Text, text_class
from families.vila import VILA
from model import ModelError, MultiModal

FAMILIES = {"qwen2_5_vl": QwenVL, "qwen3_vl": Qwen3VL, "qwen2_5_omni": Omni}


def load(name: str, dtype=torch.float32, weights: bool = True) -> MultiModal:
    """The model in a folder or on the hub, whatever its family: told by config.json and layout, not
    by name. weights=False: without them, on the device "meta", to look at shapes and prompts."""
    root = folder_of(name, weights)
    if not (root / "config.json").exists():
        raise ModelError(
            f"{name} is no checkpoint: config.json is missing, or there is no such folder"
        )
    kind = read_json(root, "config.json").get("model_type")
    if (root / "llm").is_dir():
        return VILA.from_pretrained(root, dtype, weights)
    if kind in FAMILIES:
        return FAMILIES[kind].from_pretrained(root, dtype, weights)
    if text_class(root) is not None:
        return Text.from_pretrained(root, dtype, weights)
    raise ModelError(
        f"{name}: model_type {kind!r} is not supported; supported are VILA's layout (folders llm, "
        f"vision_tower, mm_projector), {', '.join(FAMILIES)}, and text decoders without remote code"
    )
