"""A checkpoint folder in its published layout: JSON, weights, tokenizer; or the hub's copy of one.

Only safetensors are read, never a pickle, and no remote code runs. A tensor that is missing or left
over is an error: it would be random, or a part of another model.

Check this file alone:  pytest tests/test_families.py -k "checkpoint or tensor or tokenizer"
"""

import json
import re
from pathlib import Path

from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerFast

from model import ModelError


def folder_of(name: str, weights: bool = True) -> Path:
    """A local checkpoint folder as it is, or a hub id (owner/name, owner/name@revision) downloaded
    into the hub's cache: safetensors (if weights are wanted), json and tokenizer files alone."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "*.jinja"]
    if weights:
        wanted.append("*.safetensors")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}): check "
            "the name and the network, or download it and give its folder"
        ) from None


def read_json(root: Path, name: str) -> dict:
    """A JSON file of a checkpoint; ModelError if there is none, or it is broken."""
    try:
        return json.loads((root / name).read_text())
    except FileNotFoundError:
        raise ModelError(f"{root} is no checkpoint of this family: {name} is missing") from None
    except ValueError as error:
        raise ModelError(f"{root / name}: {error}") from None


def load_part(kind, folder: Path, dtype, weights: bool = True, skip: str | None = None):
    """A transformers model of class `kind` from its folder; ModelError as check_tensors'. skip: a
    pattern of tensors that are not needed. weights=False: parameters on the device "meta"."""
    if not weights:
        with init_empty_weights():  # buffers, such as RoPE's frequencies, have their values
            part = kind._from_config(kind.config_class.from_pretrained(folder), dtype=dtype)
        part.tie_weights()
        if (folder / "generation_config.json").exists():
            part.generation_config = GenerationConfig.from_pretrained(folder)
        return part
    part, info = kind.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
    )
    extra = [name for name in info["unexpected_keys"] if not (skip and re.match(skip, name))]
    check_tensors(folder, [*info["missing_keys"], *map(str, info["mismatched_keys"])], extra)
    return part


def holds(folder: Path, wanted: dict, skip: str | None = None) -> bool:
    """Do the safetensors files of a folder hold exactly the names and shapes of these tensors
    {name: tensor}? Only their headers are read. skip: a pattern of others that may be there."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not (skip and re.match(skip, name)):
                    found[name] = tensors.get_slice(name).get_shape()
    return found == {name: list(tensor.shape) for name, tensor in wanted.items()}


def write_part(folder: Path, weights: dict, config, generation_config, tokenizer) -> None:
    """Weights {name: tensor}, config and tokenizer of a model of transformers."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(weights, folder)
    config.save_pretrained(folder)
    # Not its save_pretrained: that refuses settings which published files have.
    generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def check_tensors(where: Path, bad: list[str], extra: list[str]) -> None:
    """ModelError that names the tensors that are missing or of another shape, and those left over,
    if there are such."""
    found = []
    if bad:
        found.append(f"missing or misshapen tensors {sorted(bad)}")
    if extra:
        found.append(f"unexpected tensors {sorted(extra)}")
    if found:
        raise ModelError(f"{where}: {', '.join(found)}: no checkpoint of this family, or damaged")


def load_tokenizer(root: Path):
    """The tokenizer of tokenizer.json as it is: for a Qwen2 folder AutoTokenizer would silently put
    Qwen2's splitting rules in place of the file's (transformers 5)."""
    if not (root / "tokenizer.json").exists():
        raise ModelError(f"{root} is no checkpoint: tokenizer.json is missing")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    if tokenizer.chat_template is None and (root / "chat_template.json").exists():
        tokenizer.chat_template = read_json(root, "chat_template.json")["chat_template"]
    return tokenizer
