"""A tiny model of every family, with random weights and a tokenizer of bytes: nothing is lost."""

from dataclasses import replace

import torch
import transformers
from conftest import RECIPE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import VILA, MultiModal, Omni, Qwen3VL, QwenVL, Text

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
        model = QwenVL.create(config | {"tie_word_embeddings": tie}, tok, CLIP | limits)
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
        model = Qwen3VL.create(config, tok, HALF | sizes[0], HALF | sizes[1])
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
        model = Omni.create(
            config, tok, CLIP | {"min_pixels": 56 * 56, "max_pixels": 84 * 112} | ears
        )
    else:
        tok = tokenizer(SPECIAL)
        kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
        config = getattr(transformers, f"{kind}Config")(**decoder(tok, tie_word_embeddings=tie))
        model = Text(getattr(transformers, f"{kind}ForCausalLM")(config), tok)
    # Omni's own least size of a video frame is 128 tokens.
    model.recipe = replace(RECIPE, max_pixels=84 * 112) if family == "omni" else RECIPE
    return model
