"""A tiny model of every family, with random weights; its tokenizer takes every text.

build(family)          one of FAMILIES, a token for each byte
tiny_qwen(texts)       Qwen2.5-VL with a token for each word of these texts: short prompts
deepstack(model)       the decoder of a Qwen3-VL in place of the model's own
published(family, at)  the settings of a published checkpoint, without weights
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
from families.qwen import Omni, Qwen3VL, QwenVL
from families.text import Text
from families.vila import VILA
from kit.decode import Loader
from model import Media, MultiModal, Policy, Prompt, Recipe

RECIPE = Recipe(num_frames=5, max_tokens=8, template="{problem} Think, then answer.")
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
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
MARKS = dict(zip(("vision_start", "vision_end", "image", "video"), VISION))
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 84 * 112}
FAMILIES = ("vila", "vila 3x3 tsp", "qwen2.5-vl", "qwen3-vl", "omni", "qwen2", "qwen3", "llama")
LEVELS = 2  # of deepstack()


# -------------------------------------------------------------------------------------- tokenizers


def tokenizer(special: list[str], template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({w: i for i, w in enumerate([*special, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core, special, template)


def of_words(special: list[str], texts: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word of the texts and of RECIPE's prompt; no template of its own."""
    text = " ".join([*texts, "system user assistant You are a helpful", RECIPE.template])
    words = sorted(set(text.replace(".", " ").replace(":", " ").replace("?", " ").split()))
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*special, *words]))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,:?]+"), "removed")
    return wrapped(core, special, None)


def wrapped(core: Tokenizer, special: list[str], template: str | None) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    found = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    found.chat_template = template
    return found


def texts_of(root: Path) -> list[str]:
    """All questions and answers of a folder of rows."""
    rows = [e for name in root.glob("*.jsonl") for e in data.load_rows(str(name))]
    return [text for e in rows for text in (e.problem, e.response)]


# ------------------------------------------------------------------------------------------ models


def decoder(tok, layers=2, **more) -> dict:
    """Sizes that vLLM takes on a CPU: heads of 32."""
    sizes = {"vocab_size": len(tok), "hidden_size": 128, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "max_position_embeddings": 4096, "initializer_range": 0.2}
    return sizes | {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None} | more


def eyes(**more) -> dict:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    return sizes | {"out_hidden_size": 128, "initializer_range": 0.2} | more


def build(family: str, tie=True, seed=0, image_size=64) -> MultiModal:
    """One of FAMILIES. image_size: of VILA."""
    torch.manual_seed(seed)
    if family.startswith("vila"):
        model = vila("3x3" in family, tie, image_size)
    elif family == "qwen2.5-vl":
        model = qwen2_5_vl(tokenizer([*SPECIAL, *VISION]), tie)
    elif family == "qwen3-vl":
        model = qwen3_vl(tokenizer([*SPECIAL, *VISION]), tie)
    elif family == "omni":
        model = omni(tokenizer([*SPECIAL, *OMNI]), tie)
    else:
        tok = tokenizer(SPECIAL)
        kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
        config = getattr(transformers, f"{kind}Config")(**decoder(tok, tie_word_embeddings=tie))
        model = Text(getattr(transformers, f"{kind}ForCausalLM")(config), tok)
    model.loader = Loader()  # which hears
    # Omni's own least size of a video frame is 128 tokens.
    model.recipe = replace(RECIPE, max_pixels=84 * 112) if family == "omni" else RECIPE
    return model


def vila(cubed: bool, tie: bool, image_size: int) -> VILA:
    """cubed: 3 x 3 patches a token, and means of two frames."""
    tok = tokenizer([*SPECIAL, "<image>", "<vila/video>"], None)
    config = {"mm_projector_cfg": {"mm_projector_type": "mlp_downsample"}, "num_video_frames": 5}
    config["video_encoder"] = '{"_target_": "llava.BasicVideoEncoder"}'
    if cubed:
        config["mm_projector_cfg"]["mm_projector_type"] = "mlp_downsample_3x3_fix"
        kind = "llava.model.encoders.TSPVideoEncoder"
        config["video_encoder"] = {"_target_": kind, "pool_sizes": [[2, 1, 1]]}
    tower = {"image_size": image_size, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 3}
    tower |= {"intermediate_size": 48, "num_attention_heads": 2, "vision_use_head": False}
    llm = decoder(tok, tie_word_embeddings=tie)
    del llm["head_dim"]
    model = VILA.create(config, llm, tower, tok, HALF)
    with torch.no_grad():
        for p in model.policy.model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.2)
    return model


def random(kind, tok, config: dict, tokens: dict, tie: bool, *preprocess):
    """A Qwen of this class with random weights; tokens: of its config."""
    config |= {f"{name}_token_id": tok.convert_tokens_to_ids(t) for name, t in tokens.items()}
    config |= {"tie_word_embeddings": tie}
    return kind(kind.kind(kind.kind.config_class(**config)), tok, *preprocess)


def qwen2_5_vl(tok, tie: bool) -> QwenVL:
    text = decoder(tok, rope_parameters=MROPE)
    del text["head_dim"]
    vision = eyes(fullatt_block_indexes=[1], window_size=56, tokens_per_second=2)
    config = {"text_config": text, "vision_config": vision}
    return random(QwenVL, tok, config, MARKS, tie, CLIP | LIMITS)


def qwen3_vl(tok, tie: bool) -> Qwen3VL:
    text = decoder(tok, 3, rope_parameters=MROPE | {"mrope_interleaved": True})
    vision = eyes(depth=3, patch_size=16, num_position_embeddings=16)
    vision["deepstack_visual_indexes"] = [0, 1]
    config = {"text_config": text, "vision_config": vision}
    image = HALF | {"size": {"shortest_edge": 64 * 64, "longest_edge": 96 * 128}}
    video = HALF | {"size": {"shortest_edge": 64 * 64, "longest_edge": 8 * 96 * 128}}
    return random(Qwen3VL, tok, config, MARKS, tie, image, video)


def omni(tok, tie: bool) -> Omni:
    text = decoder(tok, rope_parameters=MROPE)
    del text["head_dim"]
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": 16, "output_dim": 128}
    vision = eyes(fullatt_block_indexes=[1], window_size=56)
    config = {"text_config": text, "vision_config": vision, "audio_config": audio}
    config |= {"seconds_per_chunk": 2, "position_id_per_seconds": 25}
    ears = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=300).to_dict()
    names = ("audio", "audio_start", "audio_end", "image", "video", "vision_start", "vision_end")
    return random(Omni, tok, config, dict(zip(names, OMNI)), tie, CLIP | LIMITS | ears)


def tiny_qwen(texts: list[str], tie=True, seed=0) -> QwenVL:
    """A Qwen2.5-VL of words: windows of 2 x 2 tokens, one layer of whole groups."""
    torch.manual_seed(seed)
    model = qwen2_5_vl(of_words([*SPECIAL, *VISION], texts), tie)
    model.recipe = RECIPE
    return model


def deepstack(model, tie=True, seed=0):
    """The model with the decoder of a Qwen3-VL of the same vocabulary, random weights."""
    vocabulary = range(model.policy.config.vocab_size)
    torch.manual_seed(seed)
    rope = MROPE | {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    sizes = decoder(vocabulary, 3, initializer_range=0.1, rope_parameters=rope)
    config = transformers.Qwen3VLTextConfig(**sizes, tie_word_embeddings=tie)
    body = transformers.Qwen3VLTextModel(config)
    head = torch.nn.Linear(128, len(vocabulary), bias=False)
    head.weight = body.embed_tokens.weight if tie else torch.nn.Parameter(head.weight * 2)
    model.policy = Policy(body, head)
    model.mrope = True
    model.levels = LEVELS
    model.decoder_kind = "Qwen3ForCausalLM", "qwen3"
    return model.eval()


# ------------------------------------------------------------------------------ what they are asked


def frames(f, h, w, seed=0) -> np.ndarray:
    """(f, h, w, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (f, h, w, 3), dtype=np.uint8)


def video(features, seconds: float) -> list[Media]:
    """Features (T, h, w, W) as a video of 2 T frames; `seconds` from a group to the next."""
    return [Media("video", features, np.arange(2 * len(features)) * seconds / 2)]


def wide_prompt(model, before, n, after, ahead=0, seed=0) -> Prompt:
    """A Prompt with n wide features in any order among its middle tokens, at any position; text
    goes on `ahead` of its index."""
    g = torch.Generator().manual_seed(seed)
    length = before + n + after
    at = before + torch.randperm(n, generator=g)
    positions = torch.arange(length).expand(3, -1).clone()
    positions[:, at] = before + torch.randint(0, max(n, 1), (3, n), generator=g)
    positions[:, before + n :] += ahead
    ids = torch.randint(8, model.policy.config.vocab_size, (length,), generator=g)
    ids[at] = model.media_tokens[0]
    media = torch.randn(n, model.media_width, generator=g) if n else None
    return Prompt(ids, positions, media, at, "", before + n)


def answers(model, lengths, seed=0) -> list[list[torch.Tensor]]:
    """Random answers of the given lengths: a list of id tensors for each inner list."""
    g = torch.Generator().manual_seed(seed)
    vocab = model.policy.config.vocab_size
    return [[torch.randint(8, vocab, (r,), generator=g) for r in group] for group in lengths]
