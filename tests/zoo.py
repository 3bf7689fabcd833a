"""A tiny model of every family, with random weights and a tokenizer of bytes: nothing is lost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import RECIPE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families.qwen import Omni, Qwen3VL, QwenVL
from families.text import Text
from families.vila import VILA
from kit.decode import Loader
from model import Media, MultiModal

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
OMNI = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>"]
OMNI += ["<|vision_bos|>", "<|vision_eos|>"]
# What Qwen's template does, in short: a system turn of its own, thinking off by an empty thought.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
CLIP = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
FAMILIES = ("vila", "vila 3x3 tsp", "qwen2.5-vl", "qwen3-vl", "omni", "qwen2", "qwen3", "llama")


def tokenizer(special: list[str], template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({w: i for i, w in enumerate([*special, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    found.chat_template = template
    return found


def frames(f, h, w, seed=0) -> np.ndarray:
    """(f, h, w, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (f, h, w, 3), dtype=np.uint8)


def video(features, seconds: float) -> list[Media]:
    """Features (T, h, w, W) as a video of 2 T frames; `seconds` from a group to the next."""
    return [Media("video", features, np.arange(2 * len(features)) * seconds / 2)]


def decoder(tok, layers=2, **more) -> dict:
    """Sizes that vLLM takes on a CPU: heads of 32."""
    return dict(
        vocab_size=len(tok), hidden_size=128, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.2,
        eos_token_id=2, pad_token_id=0, bos_token_id=None, max_position_embeddings=4096,
    ) | more  # fmt: skip


def mrope(**more) -> dict:
    return {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4} | more


def eyes(**more) -> dict:
    return dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=128,
        initializer_range=0.2,
    ) | more  # fmt: skip


def random(kind, config: dict, *rest):
    """A model of a Qwen class with random weights."""
    return kind(kind.kind(kind.kind.config_class(**config)), *rest)


def ids(tok, **tokens) -> dict:
    return {f"{name}_token_id": tok.convert_tokens_to_ids(t) for name, t in tokens.items()}


def build(family: str, tie=True, seed=0, image_size=64) -> MultiModal:
    """One of FAMILIES. image_size: of VILA."""
    torch.manual_seed(seed)
    if family.startswith("vila"):
        tok = tokenizer([*SPECIAL, "<image>", "<vila/video>"], None)
        cubed = "3x3" in family
        video = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1]]}
        config = {
            "mm_projector_cfg": {
                "mm_projector_type": f"mlp_downsample{'_3x3_fix' if cubed else ''}"
            },
            "video_encoder": video if cubed else '{"_target_": "llava.BasicVideoEncoder"}',
            "num_video_frames": 5,
        }
        llm = decoder(tok, tie_word_embeddings=tie)
        del llm["head_dim"]
        tower = dict(
            image_size=image_size, patch_size=16, hidden_size=32, intermediate_size=48,
            num_hidden_layers=3, num_attention_heads=2, vision_use_head=False,
        )  # fmt: skip
        model = VILA.create(config, llm, tower, tok, HALF)
        with torch.no_grad():
            for p in (*model.llm.model.parameters(),):
                if p.ndim == 2:
                    p.normal_(0, 0.2)
    elif family == "qwen2.5-vl":
        tok = tokenizer([*SPECIAL, *VISION])
        vision = eyes(fullatt_block_indexes=[1], window_size=56, tokens_per_second=2)
        config = {"text_config": decoder(tok, rope_parameters=mrope()), "vision_config": vision}
        config |= ids(
            tok, vision_start=VISION[0], vision_end=VISION[1], image=VISION[2], video=VISION[3]
        )
        limits = {"min_pixels": 56 * 56, "max_pixels": 84 * 112}
        config["text_config"].pop("head_dim")
        model = random(QwenVL, config | {"tie_word_embeddings": tie}, tok, CLIP | limits)
    elif family == "qwen3-vl":
        tok = tokenizer([*SPECIAL, *VISION])
        vision = eyes(
            depth=3, patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]
        )
        text = decoder(tok, 3, rope_parameters=mrope(mrope_interleaved=True))
        config = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tie}
        config |= ids(
            tok, vision_start=VISION[0], vision_end=VISION[1], image=VISION[2], video=VISION[3]
        )
        sizes = [
            {"size": {"shortest_edge": 64 * 64, "longest_edge": n}}
            for n in (96 * 128, 8 * 96 * 128)
        ]
        model = random(Qwen3VL, config, tok, HALF | sizes[0], HALF | sizes[1])
    elif family == "omni":
        tok = tokenizer([*SPECIAL, *OMNI])
        vision = eyes(fullatt_block_indexes=[1], window_size=56)
        audio = dict(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
            num_mel_bins=16, output_dim=128,
        )  # fmt: skip
        config = {"vision_config": vision, "audio_config": audio}
        config["text_config"] = decoder(tok, rope_parameters=mrope())
        config["text_config"].pop("head_dim")
        config |= ids(tok, audio=OMNI[0], audio_start=OMNI[1], audio_end=OMNI[2], image=OMNI[3])
        config |= ids(tok, video=OMNI[4], vision_start=OMNI[5], vision_end=OMNI[6])
        config |= {
            "tie_word_embeddings": tie,
            "seconds_per_chunk": 2,
            "position_id_per_seconds": 25,
        }
        ears = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=300).to_dict()
        model = random(
            Omni, config, tok, CLIP | {"min_pixels": 56 * 56, "max_pixels": 84 * 112} | ears
        )
    else:
        tok = tokenizer(SPECIAL)
        kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
        config = getattr(transformers, f"{kind}Config")(**decoder(tok, tie_word_embeddings=tie))
        model = Text(getattr(transformers, f"{kind}ForCausalLM")(config), tok)
    model.loader = Loader()  # which hears
    # Omni's own least size of a video frame is 128 tokens.
    model.recipe = replace(RECIPE, max_pixels=84 * 112) if family == "omni" else RECIPE
    return model


CELLS = pytest.StashKey[dict]()  # of a test run: (family, modality, column) -> outcome
NAMES = {
    "vila": "VILA (2x2)", "vila 3x3 tsp": "VILA (3x3, TSP)", "qwen2.5-vl": "Qwen2.5-VL",
    "qwen3-vl": "Qwen3-VL", "omni": "Qwen2.5-Omni", "qwen2": "text: Qwen2", "qwen3": "text: Qwen3",
    "llama": "text: Llama",
}  # fmt: skip


def table(cells: dict) -> str:
    """Outcomes of tests/test_matrix.py as the README's table, a mark for each column's test."""
    families, inputs, columns = (list(dict.fromkeys(names)) for names in zip(*cells))
    marks = {"yes": "✓", "-": "–", "failed": "✗"}
    lines = [f"| each ✓ a test: {', '.join(columns)} | " + " | ".join(inputs) + " |"]
    lines.append("|---" * (len(inputs) + 1) + "|")
    for family in families:
        row = ["".join(marks.get(cells[family, x, c], "?") for c in columns) for x in inputs]
        row = ["" if set(cell) == {"–"} else cell for cell in row]
        lines.append(f"| {NAMES[family]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------- as published, no weights


def published(family: str, root) -> None:
    """A folder with the settings of a published 7B checkpoint, without weights; its tokenizer has
    the published ids of the special tokens, and letters."""
    special = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6,
        "max_position_embeddings": 128000, "vocab_size": 152064, "sliding_window": 32768,
        "use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    mrope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    pixels = CLIP | {"min_pixels": 3136, "max_pixels": 12845056}
    files, tokens = {}, root
    if family == "qwen2.5-vl":
        special |= dict(zip((151652, 151653, 151655, 151656), VISION))
        ids = {"image_token_id": 151655, "video_token_id": 151656}
        ids |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
        config = text | mrope | ids | {"vision_config": vision, "model_type": "qwen2_5_vl"}
        files = {"config.json": config, "preprocessor_config.json": pixels}
    elif family == "omni":
        names = [*OMNI[:3], *OMNI[3:]]
        numbers = (151646, 151647, 151648, 151655, 151656, 151652, 151653)
        special |= dict(zip(numbers, names))
        keys = ("audio", "audio_start", "audio_end", "image", "video", "vision_start", "vision_end")
        config = {f"{key}_token_id": i for key, i in zip(keys, numbers)}
        audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
        audio |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128, "output_dim": 3584}
        config |= {"text_config": text | mrope, "vision_config": vision, "audio_config": audio}
        config = {
            "thinker_config": config | {"seconds_per_chunk": 2, "position_id_per_seconds": 25}
        }
        ears = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300).to_dict()
        files["config.json"] = config | {"model_type": "qwen2_5_omni"}
        files["preprocessor_config.json"] = pixels | ears
    elif family == "vila":
        special |= {151649: "<image>", 151650: "<vila/video>"}
        kind = {"mm_projector_type": "mlp_downsample", "model_type": "v2l_projector"}
        tower = {"hidden_size": 1152, "image_size": 448, "intermediate_size": 4304}
        tower |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
        files = {
            "config.json": {
                "model_type": "llava_llama", "mm_vision_select_layer": -2, "num_video_frames": 512,
                "mm_vision_select_feature": "cls_patch", "mm_projector_cfg": kind, "s2": False,
                "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
                "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
            },
            "llm/config.json": text | {"vocab_size": 151672, "model_type": "qwen2"},
            "vision_tower/config.json": tower | {"model_type": "siglip_vision_model"},
            "vision_tower/preprocessor_config.json": HALF,
            "mm_projector/config.json": kind,
        }  # fmt: skip
        tokens = root / "llm"
    else:
        files["config.json"] = text | {"model_type": "qwen2"}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    words = [special.get(i, f"w{i}") for i in range(151665)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special.values()])
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(tokens)
