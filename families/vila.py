"""VILA: SigLIP, a projector that joins n x n patches, Qwen2.

a video     F x K tokens, "\\n" after each frame        positions   1-D
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

import mrsp
from data import DataError
from families.files import folder_of, load_part, load_tokenizer, read_json
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
        x = x.view(f, blocks, self.n, blocks, self.n, c).transpose(2, 3)
        x = x.transpose(1, 2) if self.columns else x
        return x.reshape(f, blocks * blocks, self.n * self.n * c)


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

    def __init__(self, config: dict, llm, tower, projector, tokenizer, preprocess: dict):
        """config: config.json of the folder."""
        names = ["<vila/video>", *(["<image>"] if "<image>" in tokenizer.get_vocab() else [])]
        super().__init__(llm, tower, tokenizer, preprocess, names)
        self.config, self.projector = config, projector
        known = {"mm_vision_select_feature": "cls_patch", "s2": False, "dynamic_s2": False}
        for name, only in known.items():
            if (config.get(name) or only) != only:
                raise ModelError(f"config.json: {name} is {config[name]!r}; only {only!r} is known")
        self.layer = config.get("mm_vision_select_layer", -2)
        tok = lambda text: tokenizer(text or "", add_special_tokens=False).input_ids  # noqa: E731
        # kind: pooling over frames, rows and columns; tokens before and after each (pooled) frame
        self.encoders = {}
        for kind in ("image", "video"):
            encoder = config.get(f"{kind}_encoder") or {"_target_": "Basic"}
            encoder = json.loads(encoder) if isinstance(encoder, str) else encoder
            tsp = "TSP" in encoder["_target_"]  # 8 frames, if the config does not say
            pools = encoder.get("pool_sizes", [[8 if tsp else 1, 1, 1]])
            plain = re.search(r"\b(Basic|TSP)", encoder["_target_"]) and len(pools) == 1
            if not plain or encoder.get("sep_tokens") or encoder.get("pos_embed"):
                raise ModelError(
                    f"config.json: {kind}_encoder {encoder} is not supported; supported are Basic "
                    "encoders, and TSP ones with one pool size and no sep_tokens"
                )
            ends = encoder.get("start_tokens"), encoder.get("end_tokens", "\n")
            self.encoders[kind] = (*pools[0], *map(tok, ends))
        self.together = self.encoders["video"][0]

    @classmethod
    def create(cls, config: dict, llm: dict, tower: dict, tokenizer, preprocess: dict) -> "VILA":
        """A model with random weights. llm and tower are Qwen2 and SigLIP config dicts."""
        llm_config = transformers.Qwen2Config(**llm)
        tower_config = transformers.SiglipVisionConfig(**tower)
        kind = config["mm_projector_cfg"]["mm_projector_type"]
        return cls(
            config,
            Qwen2ForCausalLM(llm_config),
            transformers.SiglipVisionModel(tower_config),
            build_projector(kind, tower_config.hidden_size, llm_config.hidden_size),
            tokenizer,
            preprocess,
        )

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32, weights: bool = True) -> "VILA":
        """Load a folder in VILA's layout; ModelError if it is none or tensors are missing."""
        from safetensors.torch import load_file

        root = folder_of(folder, weights)
        config = read_json(root, "config.json")
        config["mm_projector_cfg"] = read_json(root, "mm_projector/config.json")
        preprocess = read_json(root, "vision_tower/preprocessor_config.json")
        llm = load_part(Qwen2ForCausalLM, root / "llm", dtype, weights)
        tower = load_part(transformers.SiglipVisionModel, root / "vision_tower", dtype, weights)
        kind = config["mm_projector_cfg"].get("mm_projector_type")
        with torch.device("cpu" if weights else "meta"):
            projector = build_projector(kind, tower.config.hidden_size, llm.config.hidden_size)
        if weights:
            path = root / "mm_projector" / "model.safetensors"
            if not path.exists():
                raise ModelError(f"{folder} is no VILA checkpoint: {path} is missing")
            found = load_file(path)
            shapes = {k: v.shape for k, v in projector.state_dict().items()}
            if {k: v.shape for k, v in found.items()} != shapes:
                bad = sorted(k for k in shapes if k not in found or found[k].shape != shapes[k])
                extra = sorted(set(found) - set(shapes))
                raise ModelError(f"{path}: missing or misshapen tensors {bad}, unexpected {extra}")
            projector.load_state_dict(found)
        tokenizer = load_tokenizer(root / "llm")
        # As VILA's own loader does where a checkpoint lacks them, in this order.
        if "<vila/video>" not in tokenizer.get_vocab():
            tokenizer.add_tokens(["<image>", "<vila/video>"], special_tokens=True)
        if max(tokenizer.get_vocab().values()) >= llm.config.vocab_size:
            raise ModelError(f"{folder}: the embedding has no room for VILA's media tokens")
        model = cls(config, llm, tower, projector.to(dtype), tokenizer, preprocess)
        frames = config.get("num_video_frames") or Recipe.num_frames
        model.load_recipe(root, Recipe(num_frames=frames))
        return model

    def write(self, root: Path, weights: dict) -> None:
        """llm/ alone is a Qwen2 checkpoint that vLLM can serve."""
        from safetensors.torch import save_file

        (root / "mm_projector").mkdir(exist_ok=True)
        (root / "config.json").write_text(json.dumps(self.config, indent=2))
        self.llm.save_pretrained(root / "llm", state_dict=weights)
        self.tokenizer.save_pretrained(root / "llm")
        tower = {f"vision_model.{name}": value for name, value in self.tower.state_dict().items()}
        self.tower.save_pretrained(root / "vision_tower", state_dict=tower)  # as published
        (root / "vision_tower/preprocessor_config.json").write_text(json.dumps(self.preprocess))
        projector = json.dumps(self.config["mm_projector_cfg"])
        (root / "mm_projector/config.json").write_text(projector)
        tensors = {k: v.contiguous() for k, v in self.projector.state_dict().items()}
        save_file(tensors, root / "mm_projector/model.safetensors")

    def encoder_settings(self) -> list:
        named = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size")
        tower = {name: getattr(self.tower.config, name) for name in named}
        return [self.config, self.preprocess, tower]

    def fit(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        return (self.tower.config.image_size,) * 2

    def seen(self, size, kind: str) -> tuple[int]:
        """Tokens of a (pooled) frame of this size."""
        n, (_, h, w) = self.projector.layers[0].n, self.encoders[kind][:3]
        side = -(-(size[0] // self.tower.config.patch_size) // n)
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
        t, h, w = self.encoders[kind][:3]
        if h * w > 1:
            side = math.isqrt(x.shape[1])
            if side % h or side % w:
                raise ModelError(f"TSP: {side} x {side} tokens are not pooled by {h} x {w}")
            x = x.view(len(x), side // h, h, side // w, w, -1).mean((2, 4)).flatten(1, 2)
        return x if t == 1 else torch.stack([g.mean(0) for g in x.split(t)])  # DEVIATION 5

    def features_trainable(self, examples: list, num_frames: int) -> list[list[Media]]:
        """As of all families; where no frames are pooled, all media go through the tower as one row
        of frames: many small images a pass."""
        if max(self.encoders["video"][:3]) > 1 or not any(e.media for e in examples):
            return super().features_trainable(examples, num_frames)
        size = self.fit("video", 0, 0, 0)
        for e in examples:
            self.check_question(e)
        error, media, group = None, [], self.mesh.sp_group
        try:
            for e in examples:
                for m in e.media:  # whole, on every rank: files are not kept open
                    with self.loader.open(m, num_frames, e.id) as frames:
                        media.append(frames[: len(frames)])
        except DataError as failed:
            error = failed
        mrsp.agree(error, group)
        encode = lambda parts: self.project(torch.cat([self.scaled(f, size) for f in parts]))  # noqa: E731
        joined = mrsp.encode_parallel(encode, InRow(media), group)
        found = iter(joined.split([len(m) for m in media]))
        return [[Media(m.kind, next(found)) for m in e.media] for e in examples]

    def place(self, m: Media) -> list[Piece]:
        """Each frame's features with the tokens before and behind."""
        *_, start, end = self.encoders[m.kind]
        token = self.ids[
            "<image>" if m.kind == "image" and "<image>" in self.ids else "<vila/video>"
        ]
        frame = [Piece(start), Piece([token] * m.features.shape[1], True), Piece(end)]
        return frame * len(m.features)


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
