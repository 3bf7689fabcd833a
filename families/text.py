"""Text: any decoder that transformers loads without remote code (Qwen2.5, Qwen3, Llama ...).

    a prompt    text alone, no media      positions   1-D, one after the other

Answers share a packed prompt here, which not every decoder can: one with linear attention or with
windows is refused, and each is tried when its weights are loaded.

Check this file alone:  pytest tests/test_families.py -k "text or qwen3 or llama"
"""

import math
from pathlib import Path

import torch
import transformers
from torch import nn

import mrsp
from families.files import holds, load_part, load_tokenizer, write_part
from model import ModelError, MultiModal, Prompt

TRIED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")  # by tests/test_families.py


def text_class(root: Path):
    """transformers' class of the decoder in a folder; None if it has none."""
    try:
        config = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
    except (ValueError, OSError):  # unknown, or it wants remote code
        return None
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


class Text(MultiModal):
    """A decoder without eyes or ears."""

    def __init__(self, llm, tokenizer):
        if not (hasattr(llm, "lm_head") and hasattr(getattr(llm, "model", None), "layers")):
            raise ModelError(f"{type(llm).__name__} does not have model.layers and lm_head")
        if llm._is_stateful:
            raise ModelError(
                f"{type(llm).__name__} has linear-attention or state-space layers: an answer would "
                "go on from another answer's state; take a family with full attention"
            )
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(llm.config, name, None)
            if window and window < getattr(llm.config, "max_position_embeddings", math.inf):
                raise ModelError(
                    f"{type(llm).__name__} has a {name} of {window} tokens: attention behind a "
                    "shared prompt has none; take a family with full attention"
                )
        super().__init__(llm, nn.Module(), tokenizer, {})
        self.projector = nn.Module()
        self.decoder_kind = type(llm).__name__, llm.config.model_type

    @classmethod
    def from_pretrained(cls, root: Path, dtype, weights: bool = True, decoder=True) -> "Text":
        """decoder=False counts for those in TRIED alone: others are tried, with all weights."""
        kind = text_class(root)
        later = weights and not decoder and kind.__name__ in TRIED
        llm = load_part(kind, root, dtype, weights and not later)
        model = cls(llm, load_tokenizer(root))
        if later:
            model.folder = root
            if not holds(root, dict(model.policy.named_parameters())):
                return cls.from_pretrained(root, dtype)  # which says what is wrong
        elif weights:
            model.try_packing(llm)
        return model

    @torch.no_grad()
    def try_packing(self, llm) -> None:
        """ModelError unless the log-probs of two answers behind one prompt are those of llm's own
        forward on two sequences. They are not, for instance, where logits are scaled or capped, or
        positions are no rotary ones."""
        g = torch.Generator().manual_seed(0)
        first, *answers = torch.randint(llm.config.vocab_size, (24,), generator=g).split(8)
        prompt = Prompt(first, torch.arange(8), None, first[:0], "", 8)
        self.eval()
        ours = self(mrsp.pack([prompt], [answers]))[0]
        llm.set_attn_implementation("sdpa")
        both = torch.stack([torch.cat([first, a]) for a in answers])  # (2, 16)
        theirs = llm(input_ids=both).logits[:, 7:-1].float().log_softmax(-1)
        theirs = theirs.gather(-1, both[:, 8:, None]).flatten()
        llm.set_attn_implementation("mrsp")
        gap = (ours - theirs).abs().mean().item()
        if not gap < (1e-3 if llm.dtype == torch.float32 else 0.1):
            raise ModelError(
                f"{type(llm).__name__}: log-probs behind a shared prompt differ by {gap:.2g} from "
                "those of the model's own forward: this family cannot be trained here"
            )

    def write(self, root: Path, weights: dict) -> None:
        config = self.policy.config
        config.architectures = [self.decoder_kind[0]]
        write_part(root, weights, config, self.generation_config, self.tokenizer)

    def encoder_config(self) -> list:
        return []
