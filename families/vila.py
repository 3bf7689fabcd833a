"""VILA: SigLIP, a projector that joins n x n patches, Qwen2 (LongVILA-R1, NVILA-Lite).

                tokens                                        positions 1-D, one after the other
    video       F x (K tokens, "\\n")                         tower: frames S x S, patches of p
    with TSP    ceil(F / t) x (K / (h w) tokens, "\\n")       K = ceil(S / p / n) ^ 2, such as
    image       K tokens, "\\n"                               256 (448 px, 2 x 2), 121 (3 x 3)

    folder      config.json, llm/ (Qwen2), vision_tower/ (SigLIP), mm_projector/

config.json says which tokens stand before and behind a frame (the newline, if it says nothing), and
whether frames and tokens are pooled (TSP, temporal and spatial pooling).

Differences from VILA's own processor:
    DEVIATION 1: TSP averages what is left where the frames do not divide; VILA fails there.
    DEVIATION 2: images are resized like frames of a video, never cut into tiles.

Check this file alone:  pytest tests/test_pixels.py tests/test_families.py -k vila
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

import mrsp
from families.files import check_tensors, holds, load_part, load_tokenizer, read_json, write_part
from model import Media, ModelError, MultiModal, Piece, Recipe


class BlockDownsample(nn.Module):
    """(F, N, C) patches on a square grid -> (F, ceil(side / n)^2, n * n * C): each n x n block of
    patches, row by row, becomes one wide token; the grid is zero-padded to a multiple of n. The
    blocks follow each other row by row too, or column by column."""

    def __init__(self, n: int, columns: bool = False):
        super().__init__()
        self.n, self.columns = n, columns

    def forward(self, x: Tensor) -> Tensor:
        f, count, c = x.shape
        side = math.isqrt(count)
        if side * side != count:
            raise ModelError(f"{count} patches are not a square grid")
        x = x.view(f, side, side, c)
        extra = -side % self.n
        x = F.pad(x, (0, 0, 0, extra, 0, extra))
        blocks = (side + extra) // self.n
        # (F, rows of blocks, rows in one, columns of blocks, columns in one, C), then the blocks
        # outside: (F, rows of blocks, columns of blocks, rows in one, columns in one, C).
        x = x.view(f, blocks, self.n, blocks, self.n, c).transpose(2, 3)
        x = x.transpose(1, 2) if self.columns else x
        return x.reshape(f, blocks * blocks, self.n * self.n * c)


def fill(projector: nn.Module, path: Path) -> None:
    """Load the projector's tensors; ModelError unless the file has just their names and shapes."""
    if not path.exists():
        raise ModelError(f"{path.parent.parent} is no VILA checkpoint: {path} is missing")
    found = load_file(path)
    own = projector.state_dict()
    bad = [name for name in own if name not in found or found[name].shape != own[name].shape]
    check_tensors(path, bad, [name for name in found if name not in own])
    projector.load_state_dict(found)


def build_projector(kind: str, tower_width: int, width: int) -> nn.Module:
    """The projector of a VILA config; the indices are those of the published tensor names."""
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        # "fix" mended the order of the tokens; checkpoints from before have the old one.
        layers = [BlockDownsample(2, kind == "mlp_downsample"), nn.LayerNorm(4 * tower_width)]
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


class VILA(MultiModal):
    """SigLIP, a projector that joins n x n patches, Qwen2."""

    takes = ("video", "image")
    decoder_kind = "Qwen2ForCausalLM", "qwen2"

    def __init__(self, config: dict, llm, tower, projector, tokenizer, preprocess: dict):
        """config: config.json of the folder."""
        names = ["<vila/video>"]
        if "<image>" in tokenizer.get_vocab():
            names.append("<image>")
        super().__init__(llm, tower, tokenizer, preprocess, names)
        self.config = config
        self.projector = projector
        known = {"mm_vision_select_feature": "cls_patch", "s2": False, "dynamic_s2": False}
        for name, only in known.items():
            if (config.get(name) or only) != only:
                raise ModelError(f"config.json: {name} is {config[name]!r}; only {only!r} is known")
        self.layer = config.get("mm_vision_select_layer", -2)
        self.encoders = {kind: self.read_encoder(kind) for kind in ("image", "video")}
        self.unit = self.encoders["video"][0]

    def read_encoder(self, kind: str) -> tuple:
        """(t, h, w, before, behind) of config.json: so many frames, rows and columns of tokens are
        pooled; tokens before and behind each (pooled) frame."""
        encoder = self.config.get(f"{kind}_encoder") or {"_target_": "Basic"}
        encoder = json.loads(encoder) if isinstance(encoder, str) else encoder
        tsp = "TSP" in encoder["_target_"]  # 8 frames, if the config does not say
        pools = encoder.get("pool_sizes", [[8 if tsp else 1, 1, 1]])
        plain = re.search(r"\b(Basic|TSP)", encoder["_target_"]) and len(pools) == 1
        if not plain or encoder.get("sep_tokens") or encoder.get("pos_embed"):
            raise ModelError(
                f"config.json: {kind}_encoder {encoder} is not supported; supported are Basic "
                "encoders, and TSP ones with one pool size and no sep_tokens"
            )
        before = self.tokenize(encoder.get("start_tokens") or "")
        behind = self.tokenize(encoder.get("end_tokens", "\n") or "")
        return (*pools[0], before, behind)

    @classmethod
    def create(cls, config: dict, llm: dict, tower: dict, tokenizer, preprocess: dict) -> "VILA":
        """A model with random weights. llm and tower are Qwen2 and SigLIP config dicts."""
        llm = Qwen2ForCausalLM(transformers.Qwen2Config(**llm))
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower))
        kind = config["mm_projector_cfg"]["mm_projector_type"]
        projector = build_projector(kind, tower.config.hidden_size, llm.config.hidden_size)
        return cls(config, llm, tower, projector, tokenizer, preprocess)

    @classmethod
    def from_pretrained(cls, root: Path, dtype, weights: bool = True, decoder=True) -> "VILA":
        """Load a folder in VILA's layout; see load()."""
        config = read_json(root, "config.json")
        config["mm_projector_cfg"] = read_json(root, "mm_projector/config.json")
        preprocess = read_json(root, "vision_tower/preprocessor_config.json")
        llm = load_part(Qwen2ForCausalLM, root / "llm", dtype, weights and decoder)
        tower = load_part(transformers.SiglipVisionModel, root / "vision_tower", dtype, weights)
        kind = config["mm_projector_cfg"].get("mm_projector_type")
        with torch.device("cpu" if weights else "meta"):
            projector = build_projector(kind, tower.config.hidden_size, llm.config.hidden_size)
        if weights:
            fill(projector, root / "mm_projector" / "model.safetensors")
        tokenizer = load_tokenizer(root / "llm")
        # As VILA's own loader does where a checkpoint lacks them, in this order.
        if "<vila/video>" not in tokenizer.get_vocab():
            tokenizer.add_tokens(["<image>", "<vila/video>"], special_tokens=True)
        if max(tokenizer.get_vocab().values()) >= llm.config.vocab_size:
            raise ModelError(f"{root}: the embedding has no room for VILA's media tokens")
        model = cls(config, llm, tower, projector.to(dtype), tokenizer, preprocess)
        model.recipe = Recipe(num_frames=config.get("num_video_frames") or Recipe.num_frames)
        if weights and not decoder:
            model.folder = root / "llm"
            if not holds(model.folder, dict(model.policy.named_parameters())):
                return cls.from_pretrained(root, dtype)  # which says what is wrong
        return model

    def write(self, root: Path, weights: dict) -> None:
        """llm/ alone is a Qwen2 checkpoint that vLLM can serve."""
        (root / "mm_projector").mkdir(exist_ok=True)
        (root / "config.json").write_text(json.dumps(self.config, indent=2))
        llm = self.policy.config
        llm.architectures = [self.decoder_kind[0]]
        write_part(root / "llm", weights, llm, self.generation_config, self.tokenizer)
        tower = {f"vision_model.{name}": value for name, value in self.tower.state_dict().items()}
        self.tower.save_pretrained(root / "vision_tower", state_dict=tower)  # as published
        (root / "vision_tower/preprocessor_config.json").write_text(json.dumps(self.preprocess))
        projector = json.dumps(self.config["mm_projector_cfg"])
        (root / "mm_projector/config.json").write_text(projector)
        tensors = {k: v.contiguous() for k, v in self.projector.state_dict().items()}
        save_file(tensors, root / "mm_projector/model.safetensors")

    def encoder_config(self) -> list:
        named = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size")
        tower = {name: getattr(self.tower.config, name) for name in named}
        return [self.config, self.preprocess, tower]

    def image_size(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        side = self.tower.config.image_size  # DEVIATION 2
        return side, side

    def tokens_per_frame(self, size, kind: str) -> tuple[int]:
        """Tokens of a (pooled) frame of this size."""
        patches = size[0] // self.tower.config.patch_size
        side = math.ceil(patches / self.projector.layers[0].n)
        _, h, w, _, _ = self.encoders[kind]
        return ((side // h) * (side // w),)

    def see(self, frames, size, kind: str) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, K, D); with TSP (ceil(F / t), K / (h w), D)."""
        return self.pool(self.project(self.scaled(frames, size)), kind)

    def project(self, pixels: Tensor) -> Tensor:
        """(F, 3, S, S) -> (F, K, D)"""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        return self.projector.layers(hidden[self.layer])

    def pool(self, x: Tensor, kind: str) -> Tensor:
        """TSP: means over t frames, h rows and w columns of tokens; Basic: all 1."""
        t, h, w, _, _ = self.encoders[kind]
        if h * w > 1:
            side = math.isqrt(x.shape[1])
            if side % h or side % w:
                raise ModelError(f"TSP: {side} x {side} tokens are not pooled by {h} x {w}")
            # (F, rows of pools, rows in one, columns of pools, columns in one, D)
            x = x.view(len(x), side // h, h, side // w, w, -1).mean((2, 4)).flatten(1, 2)
        return x if t == 1 else torch.stack([g.mean(0) for g in x.split(t)])  # DEVIATION 1

    def features_trainable(self, examples: list, num_frames: int) -> list[list[Media]]:
        """As of all families; where nothing is pooled, all media go through the tower as one row of
        frames, whose pixels are all held at once: many small images a pass."""
        pooled = any(max(encoder[:3]) > 1 for encoder in self.encoders.values())
        if pooled or not any(e.media for e in examples):
            return super().features_trainable(examples, num_frames)
        size = self.image_size("video", 0, 0, 0)  # that of all frames and images
        pixels = []  # of each medium, (F, 3, S, S): whole, on every rank
        times = []
        for e in examples:
            self.check_question(e)
        with mrsp.agreed(self.mesh.sp_group):
            for e in examples:
                for m in e.media:
                    with self.loader.open(m, num_frames, e.id) as frames:
                        pixels.append(self.scaled(frames[: len(frames)], size))
                        times.append(frames.times)
        joined = mrsp.encode_parallel(self.project, torch.cat(pixels), self.mesh.sp_group)
        found = iter(zip(joined.split([len(frames) for frames in pixels]), times))
        return [[Media(m.kind, *next(found)) for m in e.media] for e in examples]

    def place(self, m: Media) -> tuple[list[Piece], Tensor]:
        """Each frame's features with the tokens before and behind."""
        *_, before, behind = self.encoders[m.kind]
        own = m.kind == "image" and "<image>" in self.ids
        token = self.ids["<image>" if own else "<vila/video>"]
        frame = [Piece(before), Piece([token] * m.features.shape[1], True), Piece(behind)]
        return frame * len(m.features), m.features.flatten(0, 1)
