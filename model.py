"""The policy: a vision tower, a projector and a Qwen2 decoder. Two families, one prompt builder.

    frames (F, H, W, 3) uint8           VILA                       Qwen2.5-VL
       | preprocess                     one square size S          own size, groups of 2 frames
       | tower                          SigLIP      (F, N, C)      windowed ViT  (T, h w, C)
       v projector                      n x n blocks, MLP          2 x 2 blocks, MLP
    features                            (F, K, D)                  (T, h/2, w/2, D), T = ceil(F / 2)
       |                  cached: the tower is frozen in RL (mrsp.EmbeddingCache)
       | build_prompt: chat template, text around the media                Prompt
       v                                positions (P,)             (3, P), M-RoPE
    policy: [prompt | answers] -> log-probs of the answers' tokens         (M,)

build_prompt is the ONE builder of the sequence: rollout, policy and reference get the same Prompt,
so they cannot see different inputs (in the public code they do: the video stands at its token in
the rollout, and behind the text in training). A Prompt holds token ids and media features apart:
text embeddings belong to the policy, which is being trained, and are looked up when they are used;
the public code keeps a stale copy of them for the rollout.

Checkpoint folders are the published ones; load() tells them apart by config.json. VILA (NVlabs'
LongVILA-R1, NVILA): llm/ (a Qwen2 checkpoint with its tokenizer), vision_tower/ (SigLIP and
preprocessor_config.json), mm_projector/. Qwen2.5-VL: one checkpoint of transformers' own classes.
Only safetensors are read, and no remote code runs.

Differences from the public code:
    DEVIATION 1: the LM head sees only the hidden states that predict an answer's token, in chunks;
        L x V logits (256k x 152k) never exist.
    DEVIATION 2: frames are resized with torch (bicubic, antialiased, not rounded), not with PIL.
    DEVIATION 3: M-RoPE is computed here, once for sampler and trainer: text behind a video goes on
        at the largest position of all three rows + 1, as in the original code and vLLM;
        transformers 5 goes on at max(h, w), as if the video took no time.
    DEVIATION 4: a group's seconds come from the times of the frames that were really taken.

Glossary: F frames, T groups of 2 frames, h w patches, K tokens a frame, P prompt tokens, D decoder
width, C tower width, L packed length, M predicted tokens, V vocabulary.
Check this file alone:  pytest tests/test_model.py tests/test_qwen.py
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import mrsp
from data import Example, Frames

AttentionInterface.register("mrsp", mrsp.mrsp_attention)

# The user turn in thinking mode; {problem} is the question with its options (section 4; our words).
THINKING = (
    "{problem}\n\nFirst think about the question step by step, based on the video, inside "
    "<think> </think>. Then give the final answer inside <answer> </answer>; if there are "
    "options, answer with the letter of the right one."
)
BARE = "{problem}"  # non-thinking mode is the bare question


class ModelError(ValueError):
    """A checkpoint or an input that the model cannot take; says what and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a model is asked. It belongs to a checkpoint (recipe.json), as its weights do: other
    frames or another wording are another experiment."""

    num_frames: int = 64  # frames taken from a video
    max_tokens: int = 2048  # longest answer
    template: str = THINKING  # the user's turn in thinking mode; {problem} is the question
    system: str | None = None  # system prompt; None leaves the turn out
    stop: str = ""  # text that ends an answer besides the end token, such as </answer>
    data: str = ""  # rows to evaluate on, relative to the checkpoint folder

    def __post_init__(self):
        if self.num_frames < 1 or self.max_tokens < 1 or "{problem}" not in self.template:
            raise ValueError(
                f"need num_frames, max_tokens >= 1 and {{problem}} in template: {self}"
            )


class Grid(NamedTuple):
    """A medium as its family counts it: t groups of frames, each of h x w patches."""

    kind: str  # "video" or "image"
    t: int
    h: int
    w: int
    seconds: float  # from one group to the next; 0.0 for an image


@dataclass(frozen=True)
class Prompt:
    """One prompt. ids (P,), with a media token's id at every media position; positions (P,);
    media (N, D) features and media_at (N,), where in ids they stand. text: for people and logs.
    shared: how many leading tokens do not depend on the question (SFT shares them). With M-RoPE
    positions are (3, P), and grids has one Grid for each medium in order; else it is empty."""

    ids: Tensor
    positions: Tensor
    media: Tensor | None
    media_at: Tensor
    text: str
    shared: int
    grids: tuple[Grid, ...] = ()


# ------------------------------------------------------------------------- what families share


def load_part(kind, folder: Path, dtype):
    """A transformers model from its folder; ModelError if tensors are missing. Never a pickle."""
    try:
        part, info = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from None
    if info["missing_keys"] or info["mismatched_keys"]:  # would be random weights
        bad = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        raise ModelError(f"{folder}: missing or misshapen tensors {bad}")
    return part


class VisionLanguage(nn.Module):
    """The policy. forward() gives log-probs of a Pack's targets; encode() the media's features.
    A family adds its checkpoints, encode_many(), place() and positions()."""

    mrope = False  # positions of three rows
    levels = 0  # deepstack: features for the outputs of that many decoder layers stand beside media
    decoder_kind = "Qwen2ForCausalLM", "qwen2"  # the decoder by itself: its class and model_type
    together = 1  # frames that the tower sees as one
    default_system: str | None = None  # the system prompt if the recipe has none

    def __init__(
        self, llm, tower, tokenizer, preprocess: dict, media: tuple[str, ...], controls=()
    ):
        """media: tokens that stand for features; controls: further tokens no question may hold."""
        super().__init__()
        self.recipe, self.cache = Recipe(), mrsp.EmbeddingCache()
        self.mesh, self.sharded = mrsp.Mesh(), False  # ranks of a sequence; parameters in FSDP2?
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.policy, self.tower = Policy(llm), tower
        llm.set_attn_implementation("mrsp")
        self.controls = (*media, *controls, "<|im_start|>", "<|im_end|>")
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in self.controls}
        if lacking := [token for token, i in self.ids.items() if i is None]:
            raise ModelError(f"the tokenizer lacks {', '.join(map(repr, lacking))}")
        self.media_tokens = tuple(self.ids[token] for token in media)  # never to be sampled
        self.media_token = self.media_tokens[0]  # a video's
        self.eos = self.ids["<|im_end|>"]
        self._tower_hash = None

    @property
    def llm(self):
        return self.policy.llm

    @property
    def media_width(self) -> int:
        """W of the features (N, W) of a Prompt: [main | level 1 | level 2 ...], each D wide."""
        return self.llm.config.hidden_size * (1 + self.levels)

    # -- checkpoints

    def save_config(self, folder: str) -> None:
        """Config and tokenizer of the decoder as a text model, no weights: what vLLM builds."""
        config = json.loads(self.llm.config.to_json_string(use_diff=False))
        name, config["model_type"] = self.decoder_kind
        self.tokenizer.save_pretrained(folder)
        Path(folder, "config.json").write_text(json.dumps(config | {"architectures": [name]}))

    def decoder_weights(self):
        """The decoder's tensors by their published names, one after the other, a tied head once:
        what is saved, and what vLLM gets. Sharded ones are gathered: every rank goes through it."""
        tied = self.llm.config.tie_word_embeddings
        for name, value in self.llm.state_dict().items():
            if not (tied and name == "lm_head.weight"):
                yield name, mrsp.whole(value)

    def load_recipe(self, root: Path) -> None:
        """Take over recipe.json, if the folder has one."""
        if (root / "recipe.json").exists():
            try:
                self.recipe = Recipe(**json.loads((root / "recipe.json").read_text()))
            except (TypeError, ValueError) as error:
                raise ModelError(f"{root}/recipe.json: {error}") from None

    def save_recipe(self, root: Path) -> None:
        (root / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2))

    # -- media

    def scaled(self, frames, height: int, width: int) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, 3, height, width), normalised as preprocessor_config.json says,
        on the tower's device and in its precision."""
        weight, p = next(self.projector.parameters()), self.preprocess
        x = torch.as_tensor(np.ascontiguousarray(frames)).to(weight.device).permute(0, 3, 1, 2)
        x = x.float()
        if x.shape[-2:] != (height, width):  # DEVIATION 2
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (
            torch.tensor(p[k], device=x.device)[:, None, None] for k in ("image_mean", "image_std")
        )
        return ((x * p.get("rescale_factor", 1 / 255) - mean) / std).to(weight.dtype)

    def encode(self, frames, at_once: int = 64) -> Tensor:
        """(F, H, W, 3) uint8 -> features, `together` frames by themselves; at_once frames a pass,
        since a pass holds the hidden states of all layers of the tower (a multiple of together)."""
        parts = [frames[i : i + at_once] for i in range(0, len(frames), at_once)]
        return torch.cat([self.encode_many([part])[0] for part in parts])

    def encoder_hash(self) -> str:
        """Hash of everything that encode() depends on: weights of tower and projector, settings.
        Computed once: call forget_encoder() after training the tower."""
        if self._tower_hash is None:
            import hashlib

            settings = json.dumps(self.encoder_settings(), sort_keys=True)
            digest = hashlib.sha256(settings.encode())
            for module in (self.tower, self.projector):
                for name, tensor in sorted(module.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
            self._tower_hash = digest.hexdigest()
        return self._tower_hash

    def forget_encoder(self) -> None:
        """The tower's or projector's weights changed: cached embeddings no longer apply."""
        self._tower_hash = None

    @torch.no_grad()
    def features(self, example: Example, num_frames: int, group=None) -> Tensor | None:
        """Features of an example's media; None for text. Computed once: on a hit of the
        cache the file is not even decoded. No gradient: for a frozen tower. group: ranks that all
        call this for the same examples in the same order, and encode a video together."""
        if example.data_type == "text":
            return None

        def compute():  # each rank of the group decodes and encodes its share, 64 at a time
            frames = Frames(example, num_frames)

            def encode(at: range) -> Tensor:
                return torch.cat([self.encode(frames[i : min(i + 64, at.stop)]) for i in at[::64]])

            return mrsp.encode_parallel(encode, range(len(frames)), group, self.together)

        taken = (example.num_frames or num_frames, example.segment, example.data_type)
        content = mrsp.file_hash(example.media) if os.path.isfile(example.media) else example.media
        key = mrsp.media_key(content, self.encoder_hash(), *taken)
        return self.cache.get(key, compute, group)

    # -- prompt

    def prompt(self, example: Example, num_frames=None, prefill: str = "", group=None) -> Prompt:
        """The Prompt of an example in thinking mode, as the recipe says, from cached features."""
        features = self.features(example, num_frames or self.recipe.num_frames, group)
        return self.build_prompt(example, features, prefill=prefill)

    def build_prompt(self, example, features, thinking: bool = True, prefill: str = "") -> Prompt:
        """Tokens and positions of one question about its media, in ChatML:

            [<|im_start|>system ...<|im_end|>] <|im_start|>user {media}{text}<|im_end|>
            <|im_start|>assistant {prefill}

        features from features(), or None. The media precede the text with no newline between (as
        both families do). thinking: ask by the recipe's template, else the bare question.
        prefill: the beginning of the answer, if it is forced.
        """
        system = self.default_system if self.recipe.system is None else self.recipe.system
        template = self.recipe.template if thinking else BARE
        tok = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        for token in self.controls:
            if token in example.problem:
                raise ModelError(f"question {example.id} contains the control token {token}")
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system is not None else ""
        head_ids = tok(head + "<|im_start|>user\n")
        media, media_ids, inside, grids = None, [], [], ()
        if features is not None:
            media, media_ids, inside, grids = self.place(example, features)
        media_at = [len(head_ids) + i for i in inside]
        text = template.format(problem=example.problem)
        rest = tok(f"{text}<|im_end|>\n<|im_start|>assistant\n{prefill}")
        device = self.llm.get_input_embeddings().weight.device
        ids = torch.tensor(head_ids + media_ids + rest, device=device)
        shown = f"[{len(media_ids)} media tokens]{self.tokenizer.decode(rest)}"
        return Prompt(
            ids=ids,
            positions=self.positions(len(ids), media_at[:1], grids).to(device),
            media=media,
            media_at=torch.tensor(media_at, dtype=torch.long, device=device),
            text=f"{head}<|im_start|>user\n{shown}",
            shared=len(head_ids) + len(media_ids),
            grids=grids,
        )

    def idle(self) -> mrsp.Pack:
        """The smallest Pack: a rank that has nothing to train runs it beside the others, because
        gathering sharded parameters needs all ranks. Its loss is multiplied by zero."""
        one, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        one = one.to(next(self.parameters()).device)
        return mrsp.pack([Prompt(one, one, None, none, "", 1)], [[one]])

    # -- policy

    def inputs(self, ids: Tensor, media: Tensor | None, media_at: Tensor | None) -> dict:
        return self.policy.inputs(ids, media, media_at)

    def forward(self, pack: mrsp.Pack, temperature: float = 1.0, chunk: int = 8192):
        """Log-probs (M,) and entropies (M,) of a Pack's targets; see Policy."""
        return self.policy(mrsp.shard(pack, self.mesh), temperature, chunk)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input for backward; layers run twice."""
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    def shard_parameters(self, dtype=torch.bfloat16) -> None:
        """FSDP2 over all ranks: each keeps its share of every decoder layer, in the precision the
        model has now (float32: the master weights, which the optimizer steps); a layer is gathered
        in `dtype` when it runs, its gradients are added up in float32. Tower and projector stay
        whole: small beside the decoder, frozen in RL (mrsp.all_reduce_gradients adds theirs up)."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(self.llm.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        wide = torch.promote_types(next(self.llm.parameters()).dtype, torch.float32)
        settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, wide)}
        for module in (*self.llm.model.layers, self.policy):
            # Freed after each forward, the root too: what a later optimizer step changes is never
            # read from an old copy.
            fully_shard(module, **settings, reshard_after_forward=True)
            # FSDP averages over ranks; ours is a sum (each rank's loss is divided by global counts)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has nothing but sums
        self.sharded = True


class Policy(nn.Module):
    """Decoder and log-probs as one module. It is the root of FSDP2: whatever touches a sharded
    parameter has to happen inside its forward."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def inputs(self, ids: Tensor, media: Tensor | None, media_at: Tensor | None) -> dict:
        """What the decoder's body is called with: embeddings (B, L, D) of the tokens, with media
        features (N, D) at flat positions media_at. Of wider ones, D * (1 + levels), the body adds
        the further columns to the outputs of its first layers (deepstack)."""
        x, extra = self.llm.get_input_embeddings()(ids), {}
        if media is not None:  # also if none of it is here: its gradient is awaited by all ranks
            flat = x.reshape(-1, x.shape[-1])
            main, *deep = media.to(flat.device, flat.dtype).split(x.shape[-1], -1)
            x = flat.index_copy(0, media_at, main).view_as(x)
            if deep:  # by a mask, so in the order of positions; media_at of a share may be another
                order, mask = media_at.argsort(), torch.zeros_like(ids, dtype=torch.bool)
                mask.view(-1)[media_at] = True
                deep = [level[order] for level in deep]
                extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}
        # All ranks run the same backward (FSDP gathers in it), also where nothing here is trained.
        x = x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()
        return {"inputs_embeds": x, **extra}

    def forward(
        self, share: mrsp.Pack, temperature: float = 1.0, chunk: int = 8192
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (M,) float32 (or wider) of the targets at a sampling temperature, and the
        entropy (M,) of each predicted distribution (no gradient). share: this rank's part of a
        Pack (mrsp.shard); the result is that of the whole Pack, on every rank."""
        hidden = self.llm.model(
            **self.inputs(share.ids, share.media, share.media_at),
            position_ids=share.positions,
            use_cache=False,
            mrsp=share.layout,
        ).last_hidden_state  # (B, Ls, D)
        # DEVIATION 1: only the hidden states that predict a target reach the LM head.
        hidden = mrsp.spread(hidden.reshape(-1, hidden.shape[-1]), share)  # (width, D)
        parts = []
        for h, t in zip(hidden.split(chunk), share.targets.split(chunk)):
            # Checkpointed: backward computes a chunk's logits again instead of keeping (width, V).
            parts.append(checkpoint(self._log_probs, h, t, temperature, use_reentrant=False))
        logps, entropies = zip(*parts)
        return mrsp.collect(torch.cat(logps), share), mrsp.collect(torch.cat(entropies), share)

    def _log_probs(self, hidden: Tensor, targets: Tensor, temperature: float):
        logits = self.llm.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logp = logits.log_softmax(-1)  # (m, V)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy


# ----------------------------------------------------------------------------------------- VILA


class BlockDownsample(nn.Module):
    """(F, N, C) patches on a square grid -> (F, ceil(side / n)^2, n * n * C): each n x n block of
    patches, row by row, becomes one wide token; the grid is zero-padded to a multiple of n."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        f, count, c = x.shape
        side = int(count**0.5)
        if side * side != count:
            raise ModelError(f"{count} patches are not a square grid")
        x = x.view(f, side, side, c)
        extra = -side % self.n
        x = F.pad(x, (0, 0, 0, extra, 0, extra))
        blocks = (side + extra) // self.n
        x = x.view(f, blocks, self.n, blocks, self.n, c).transpose(2, 3)
        return x.reshape(f, blocks * blocks, self.n * self.n * c)


def build_projector(kind: str, tower_width: int, width: int) -> nn.Module:
    """The projector of a VILA config; the indices are those of the published tensor names."""
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        layers = [BlockDownsample(2), nn.LayerNorm(4 * tower_width)]
        layers += [nn.Linear(4 * tower_width, width), nn.GELU(), nn.Linear(width, width)]
    elif kind == "mlp_downsample_3x3_fix":
        wide, mid = 9 * tower_width, 3 * tower_width
        layers = [BlockDownsample(3), nn.LayerNorm(wide), nn.Linear(wide, mid), nn.GELU()]
        layers += [nn.LayerNorm(mid), nn.Linear(mid, width), nn.GELU(), nn.Linear(width, width)]
    else:
        raise ModelError(
            f"mm_projector_type {kind!r} is unknown; known: mlp_downsample, "
            "mlp_downsample_2x2_fix, mlp_downsample_3x3_fix"
        )
    projector = nn.Module()
    projector.layers = nn.Sequential(*layers)
    return projector


class InRow:
    """Several media as one row of frames; a slice of it is a list of their slices.

    >>> InRow([[0, 1, 2], [3], [4, 5]])[2:5]
    [[2], [3], [4]]
    """

    def __init__(self, media: list):
        self.media = media

    def __len__(self) -> int:
        return sum(map(len, self.media))

    def __getitem__(self, part: slice) -> list:
        first, last, _ = part.indices(len(self))
        found = []
        for m in self.media:
            if first < len(m) and last > 0:
                found.append(m[max(first, 0) : last])
            first, last = first - len(m), last - len(m)
        return found


class VILA(VisionLanguage):
    """SigLIP, a projector that joins n x n patches, Qwen2."""

    def __init__(self, config: dict, llm, tower, projector, tokenizer, preprocess: dict):
        super().__init__(llm, tower, tokenizer, preprocess, (config["video_token"],))
        self.config, self.projector = config, projector
        encoder = config["video_encoder"]
        if "Basic" not in encoder["_target_"]:
            raise ModelError(f"video encoder {encoder['_target_']!r} is not supported; only Basic")
        end = encoder.get("end_tokens")
        self.end_ids = tokenizer(end, add_special_tokens=False).input_ids if end else []

    @classmethod
    def create(cls, config: dict, llm: dict, tower: dict, tokenizer, preprocess: dict) -> "VILA":
        """A model with random weights. llm and tower are Qwen2 and SigLIP config dicts."""
        llm_config, tower_config = Qwen2Config(**llm), SiglipVisionConfig(**tower)
        kind = config["mm_projector_type"]
        return cls(
            config,
            Qwen2ForCausalLM(llm_config),
            SiglipVisionModel(tower_config),
            build_projector(kind, tower_config.hidden_size, llm_config.hidden_size),
            tokenizer,
            preprocess,
        )

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32) -> "VILA":
        """Load a folder in VILA's layout; ModelError if it is none or tensors are missing."""
        root = Path(folder)
        for part in ("config.json", "llm", "vision_tower", "mm_projector/model.safetensors"):
            if not (root / part).exists():
                raise ModelError(f"{folder} is no VILA checkpoint: {part} is missing")
        from safetensors.torch import load_file

        config = json.loads((root / "config.json").read_text())
        parts = {}
        for part, kind in (("llm", Qwen2ForCausalLM), ("vision_tower", SiglipVisionModel)):
            parts[part] = load_part(kind, root / part, dtype)
        llm, tower = parts["llm"], parts["vision_tower"]
        projector = build_projector(
            config["mm_projector_type"], tower.config.hidden_size, llm.config.hidden_size
        )
        tensors = load_file(root / "mm_projector" / "model.safetensors")
        expected = set(projector.state_dict())
        if set(tensors) != expected:
            raise ModelError(
                f"{folder}/mm_projector: missing tensors {sorted(expected - set(tensors))}, "
                f"unexpected {sorted(set(tensors) - expected)}"
            )
        projector.load_state_dict(tensors)
        model = cls(
            config,
            llm,
            tower,
            projector.to(dtype),
            # Not AutoTokenizer: for a Qwen2 folder that puts Qwen2's splitting rules over those of
            # tokenizer.json, silently (transformers 5).
            PreTrainedTokenizerFast.from_pretrained(root / "llm"),
            json.loads((root / "vision_tower" / "preprocessor_config.json").read_text()),
        )
        model.load_recipe(root)
        return model

    def save_pretrained(self, folder: str, write: bool = True) -> None:
        """Write the same layout; llm/ alone is a Qwen2 checkpoint that vLLM can serve. With sharded
        parameters every rank calls this (they are gathered one by one), and one of them writes."""
        from safetensors.torch import save_file

        weights = {name: value.cpu() for name, value in self.decoder_weights() if write}
        if not write:
            return
        root = Path(folder)
        (root / "mm_projector").mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps(self.config, indent=2))
        self.save_recipe(root)
        self.llm.save_pretrained(root / "llm", state_dict=weights)
        self.tokenizer.save_pretrained(root / "llm")
        self.tower.save_pretrained(root / "vision_tower")
        (root / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(self.preprocess))
        tensors = {k: v.contiguous() for k, v in self.projector.state_dict().items()}
        save_file(tensors, root / "mm_projector" / "model.safetensors")

    def pixels(self, frames) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, 3, S, S) normalised."""
        size = self.tower.config.image_size
        return self.scaled(frames, size, size)

    def encode_many(self, media: list) -> list[Tensor]:
        """encode() for several media, whose sizes may differ, in one pass of the tower."""
        pixels = torch.cat([self.pixels(frames) for frames in media])
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        features = self.projector.layers(hidden[self.config["mm_vision_select_layer"]])
        return list(features.split([len(frames) for frames in media]))

    def encoder_settings(self) -> list:
        named = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size")
        tower = {name: getattr(self.tower.config, name) for name in named}
        return [self.config, self.preprocess, tower]

    def features_trainable(self, examples: list[Example], num_frames: int) -> list[Tensor | None]:
        """features() of several examples, with gradients into tower and projector; no cache. The
        ranks of a sequence have the same examples, and encode them as one row of frames."""
        media = {i: Frames(e, num_frames) for i, e in enumerate(examples) if e.data_type != "text"}
        if not media:
            return [None] * len(examples)
        encode = lambda parts: torch.cat(self.encode_many(parts))  # noqa: E731
        joined = mrsp.encode_parallel(encode, InRow(list(media.values())), self.mesh.sp_group)
        found = dict(zip(media, joined.split([len(m) for m in media.values()])))
        return [found.get(i) for i in range(len(examples))]

    def place(self, example: Example, features: Tensor) -> tuple:
        """Features (F, K, D) -> (F * K, D), the token ids of the media, where among them the
        features stand, no grids."""
        n, k, _ = features.shape
        frame = [self.media_token] * k + self.end_ids
        inside = [f * len(frame) + i for f in range(n) for i in range(k)]
        return features.flatten(0, 1), frame * n, inside, ()

    def positions(self, length: int, starts, grids) -> Tensor:
        return torch.arange(length)


# ----------------------------------------------------------------------------------- Qwen2.5-VL


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The nearest multiples of factor with least..most pixels in all (the family's rule).

    >>> smart_resize(360, 640, 28, 3136, 12845056), smart_resize(10, 10, 28, 3136, 12845056)
    ((364, 644), (56, 56))
    """
    if max(height, width) > 200 * min(height, width):
        raise ModelError(f"{height} x {width} pixels: one side is more than 200 times the other")
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, int(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def mrope_positions(length: int, starts, grids, merge: int, tokens_per_second: float) -> Tensor:
    """M-RoPE: positions (3, P) in time, height and width, for P = length tokens with media whose
    tokens begin at `starts` (DEVIATION 3). Text has three equal rows.

        text   p, p, p            p = 0, 1, 2 ...
        media  p + int(t * seconds * tokens_per_second), p + y, p + x       for t, y, x in order
        text   from (largest position so far) + 1
    """
    rows, at, p = [], 0, 0  # at: tokens so far; p: next position
    text = lambda n: (p + torch.arange(n)).expand(3, -1)  # noqa: E731
    for start, grid in zip(starts, grids, strict=True):
        rows.append(text(start - at))
        p += start - at
        sides = (grid.t, grid.h // merge, grid.w // merge)
        cells = torch.cartesian_prod(*map(torch.arange, sides)).T.clone()  # (3, t h w), t slowest
        # In double, and cut off: a float32 product is another integer now and then.
        cells[0] = (cells[0].double() * (grid.seconds * tokens_per_second)).long()
        rows.append(p + cells)
        at, p = start + math.prod(sides), p + int(cells.max()) + 1
    return torch.cat([*rows, text(length - at)], 1)


class Media(NamedTuple):
    """Features (T, h/2, w/2, D); seconds from one group of frames to the next (0.0: image), a
    number that float32 holds: vLLM computes positions from that."""

    features: Tensor
    seconds: float


class Decoder(nn.Module):
    """Text model and LM head of a larger model, as one with the names of a Qwen2ForCausalLM."""

    def __init__(self, model, lm_head):
        super().__init__()
        self.model, self.lm_head, self.config = model, lm_head, model.config

    @property
    def dtype(self):
        return self.model.dtype

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def gradient_checkpointing_enable(self, settings: dict) -> None:
        self.model.gradient_checkpointing_enable(settings)


class QwenVL(VisionLanguage):
    """Qwen2.5-VL, by transformers' classes. The tower sees groups of 2 frames, and no group sees
    another (its attention has windows or whole groups): groups are encoded apart, on any rank."""

    mrope = True
    together = 2
    default_system = "You are a helpful assistant."  # its chat template adds this turn

    def __init__(self, model, tokenizer, preprocess: dict):
        super().__init__(
            Decoder(model.model.language_model, model.lm_head),
            model.model.visual,
            tokenizer,
            preprocess,
            ("<|video_pad|>", "<|image_pad|>"),
            ("<|vision_start|>", "<|vision_end|>"),
        )
        self.config, text = model.config, model.config.text_config
        text.tie_word_embeddings = self.config.tie_word_embeddings  # published: at the root alone
        self.seconds = {}  # of media whose times are known; a cached video is opened once a run
        for name in ("video", "image"):
            said, known = getattr(self.config, f"{name}_token_id"), self.ids[f"<|{name}_pad|>"]
            if said != known:
                raise ModelError(f"config.json: {name}_token_id is {said}, the tokenizer's {known}")
        vision = self.config.vision_config
        if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
            raise ModelError("config.json: only 2 frames and 2 x 2 patches are joined to a token")

    @property
    def projector(self):
        return self.tower.merger

    @classmethod
    def create(cls, config: dict, tokenizer, preprocess: dict) -> "QwenVL":
        """A model with random weights. config: that of Qwen2_5_VLConfig."""
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
        return cls(model, tokenizer, preprocess)

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32) -> "QwenVL":
        """Load a folder as published; ModelError if it is none or tensors are missing."""
        root = Path(folder)
        for part in ("config.json", "preprocessor_config.json", "tokenizer.json"):
            if not (root / part).exists():
                raise ModelError(f"{folder} is no Qwen2.5-VL checkpoint: {part} is missing")
        kind = json.loads((root / "config.json").read_text()).get("model_type")
        if kind != "qwen2_5_vl":
            raise ModelError(f"{folder} is no Qwen2.5-VL checkpoint: its model_type is {kind!r}")
        model = cls(
            load_part(Qwen2_5_VLForConditionalGeneration, root, dtype),
            PreTrainedTokenizerFast.from_pretrained(root),
            json.loads((root / "preprocessor_config.json").read_text()),
        )
        model.load_recipe(root)
        return model

    def save_pretrained(self, folder: str, write: bool = True) -> None:
        """Write the published layout. All ranks call this, as in VILA."""
        from safetensors.torch import save_file

        weights = {name: value.cpu() for name, value in self.decoder_weights() if write}
        if not write:
            return
        weights |= {f"visual.{k}": v.cpu() for k, v in self.tower.state_dict().items()}
        self.config.architectures = [Qwen2_5_VLForConditionalGeneration.__name__]
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        Path(folder, "preprocessor_config.json").write_text(json.dumps(self.preprocess, indent=2))
        self.save_recipe(Path(folder))
        weights = {k: v.contiguous() for k, v in weights.items()}
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})

    def patches(self, frames) -> tuple[Tensor, tuple[int, int, int]]:
        """(F, H, W, 3) uint8 -> patches (T h w, 3 * 2 * p * p) and (T, h, w). The four patches
        that the merger joins follow each other."""
        side, p = self.tower.config.patch_size, self.preprocess
        size = p.get("size", {})  # of newer files
        least = p.get("min_pixels") or size.get("shortest_edge", 56 * 56)
        most = p.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280)
        height, width = smart_resize(*frames.shape[1:3], side * 2, least, most)
        x = self.scaled(frames, height, width)
        x = torch.cat([x, x[-1:]][: 1 + len(x) % 2])  # the last group lacks a frame: repeat it
        t, h, w = len(x) // 2, height // side, width // side
        x = x.view(t, 2, 3, h // 2, 2, side, w // 2, 2, side)  # t, frame, colour, y y y, x x x
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)

    def encode_many(self, media: list) -> list[Tensor]:
        """encode() for several media, whose sizes may differ, in one pass of the tower."""
        patches, grids = zip(*map(self.patches, media))
        grid = torch.tensor(grids, device=patches[0].device)
        # (sum of T h w, 3 * 2 * p * p) -> (sum of T h w / 4, D)
        merged = self.tower(torch.cat(patches), grid_thw=grid).pooler_output
        parts = merged.split([t * h * w // 4 for t, h, w in grids])
        return [x.view(t, h // 2, w // 2, -1) for x, (t, h, w) in zip(parts, grids)]

    def encoder_settings(self) -> list:
        named = ("hidden_act", "num_heads", "patch_size", "window_size", "fullatt_block_indexes")
        return [self.preprocess, {name: getattr(self.tower.config, name) for name in named}]

    def features(self, example: Example, num_frames: int, group=None) -> Media | None:
        features = super().features(example, num_frames, group)
        if features is None:
            return None
        key = (example.media, example.segment, example.num_frames or num_frames)
        if key not in self.seconds:
            self.seconds[key] = self.group_seconds(Frames(example, num_frames))
        return Media(features, self.seconds[key])

    def features_trainable(self, examples: list[Example], num_frames: int) -> list[Media | None]:
        """features() with gradients into the tower; no cache. One medium after the other, each by
        all ranks of the sequence: their sizes differ."""

        def one(example: Example) -> Media:
            frames, encode = Frames(example, num_frames), lambda part: self.encode_many([part])[0]
            features = mrsp.encode_parallel(encode, frames, self.mesh.sp_group, self.together)
            return Media(features, self.group_seconds(frames))

        return [None if e.data_type == "text" else one(e) for e in examples]

    @staticmethod
    def group_seconds(frames: Frames) -> float:
        """DEVIATION 4: twice the mean distance of the frames taken (s), as float32 holds it: that
        is how vLLM gets it. A video of one frame: 1.0, which no position depends on."""
        if frames.example.data_type == "image":
            return 0.0
        times = frames.times
        return float(np.float32(2 * (times[-1] - times[0]) / (len(times) - 1 or 1))) or 1.0

    def place(self, example: Example, media: Media) -> tuple:
        """Features (N, D), <|vision_start|> N pads <|vision_end|>, where the pads are, the Grid."""
        t, h, w, _ = media.features.shape
        kind, n = "image" if example.data_type == "image" else "video", t * h * w
        start, end = self.ids["<|vision_start|>"], self.ids["<|vision_end|>"]
        ids = [start, *[self.ids[f"<|{kind}_pad|>"]] * n, end]
        grid = Grid(kind, t, 2 * h, 2 * w, media.seconds)
        return media.features.flatten(0, 2), ids, range(1, n + 1), (grid,)

    def positions(self, length: int, starts, grids) -> Tensor:
        vision = self.config.vision_config
        return mrope_positions(length, starts, grids, 2, vision.tokens_per_second)


def load(folder: str, dtype=torch.float32) -> VisionLanguage:
    """The model in a folder, whatever its family: told by config.json and layout, not by name."""
    root = Path(folder)
    if not (root / "config.json").exists():
        raise ModelError(f"{folder} is no checkpoint: config.json is missing")
    kind = json.loads((root / "config.json").read_text()).get("model_type")
    if kind == "qwen2_5_vl":
        return QwenVL.from_pretrained(folder, dtype)
    if (root / "llm").is_dir():
        return VILA.from_pretrained(folder, dtype)
    raise ModelError(
        f"{folder}: model_type {kind!r} is not supported; supported are Qwen2.5-VL "
        "(qwen2_5_vl) and VILA's layout (folders llm, vision_tower, mm_projector)"
    )


# ------------------------------------------------------------------------------------ the toy


def toy_checkpoint(folder: str, texts: list[str], image_size: int, recipe: Recipe, seed: int):
    """A VILA of 0.9 M parameters with random weights, in a checkpoint folder like any other. Its
    tokenizer has one token for each word of `texts`; white space and . , : ? are dropped."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<vila/video>"]
    special += ["<think>", "</think>", "<answer>", "</answer>"]
    texts = [*texts, "system user assistant", recipe.template.replace("{problem}", "")]
    words = sorted(set(re.findall(r"[^\s.,:?]+", " ".join(texts))) - set(special))
    vocab = {word: i for i, word in enumerate(special + words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,:?]+"), "removed")
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    torch.manual_seed(seed)
    model = VILA.create(
        config={
            "mm_projector_type": "mlp_downsample",
            "mm_vision_select_layer": -1,
            "video_encoder": {"_target_": "BasicVideoEncoder", "end_tokens": None},
            "video_token": "<vila/video>",
        },
        llm=dict(
            vocab_size=len(vocab), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05,
            tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=2,
            pad_token_id=0, bos_token_id=None,
        ),
        tower=dict(
            image_size=image_size, patch_size=16, hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, vision_use_head=False,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        ),
        preprocess={"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255},
    )  # fmt: skip
    model.recipe = recipe
    model.save_pretrained(folder)
