"""The Qwen-VL families, by transformers' own classes: Qwen2.5-VL, Qwen3-VL, Qwen2.5-Omni.

                a video becomes                                             positions
Qwen2.5-VL      <start> T h w <end>                                         M-RoPE
Qwen3-VL        T x "<1.5 seconds><start> h w <end>", and deepstack         M-RoPE
Qwen2.5-Omni    <start> T h w <end>, or with its audio track
                2 s of video, 2 s of audio, ...                             M-RoPE
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mrsp
from families.files import folder_of, load_part, load_tokenizer, read_json
from model import Media, ModelError, MultiModal, Piece, grid


def smart_resize(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """The nearest multiples of factor with least..most pixels in all (the family's rule). frames,
    counted: of a video whose frames share the limits (Qwen3-VL), as they are and rounded.

    >>> smart_resize(360, 640, 28, 3136, 12845056), smart_resize(10, 10, 28, 3136, 12845056)
    ((364, 644), (56, 56))
    """
    if max(height, width) > 200 * min(height, width):
        raise ModelError(f"{height} x {width} pixels: one side is more than 200 times the other")
    h, w = (round(side / factor) * factor for side in (height, width))
    if counted * h * w > most:
        shrink = math.sqrt(frames * height * width / most)
        h, w = (max(factor, int(side / shrink / factor) * factor) for side in (height, width))
    elif counted * h * w < least:
        grow = math.sqrt(least / (frames * height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


class Decoder(nn.Module):
    """Text model and LM head of a larger model, as one with the names of a Qwen2ForCausalLM."""

    def __init__(self, model, lm_head):
        super().__init__()
        self.model, self.lm_head, self.config = model, lm_head, model.config

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def gradient_checkpointing_enable(self, settings: dict) -> None:
        self.model.gradient_checkpointing_enable(settings)


class QwenVL(MultiModal):
    """Qwen2.5-VL, by transformers' classes. The tower sees groups of 2 frames, and no group sees
    another (its attention has windows or whole groups): groups are encoded apart, on any rank."""

    takes = ("video", "image")
    mrope = timed = True
    together = 2
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    decoder_kind = "Qwen2ForCausalLM", "qwen2"
    published = ("model.", "", "")  # prefixes of the decoder's, the towers' and the head's tensors
    skip = ""  # a pattern: tensors of the checkpoint that are not needed
    pads = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
    marks = {"video": ("<|vision_start|>", "<|vision_end|>")}  # around features; images too
    towers = ("visual",)

    def __init__(self, whole, tokenizer, preprocess: dict, video: dict | None = None):
        """whole: transformers' model; preprocess, video: how images and videos are preprocessed."""
        text = whole.get_decoder()
        towers = {path.split(".")[-1]: part for path, part in whole.named_modules()}
        super().__init__(
            Decoder(text, whole.lm_head),
            nn.ModuleDict({name: towers[name] for name in self.towers}),
            tokenizer,
            preprocess,
            tuple(self.pads.values()),
            [token for pair in self.marks.values() for token in pair],
        )
        self.config, self.video = whole.config, video or preprocess
        text.config.tie_word_embeddings = self.config.tie_word_embeddings  # often at the root alone
        for kind, token in self.pads.items():
            said, known = getattr(self.config, f"{kind}_token_id"), self.ids[token]
            if said != known:
                raise ModelError(f"config.json: {kind}_token_id is {said}, the tokenizer's {known}")
        for name in ("image_mean", "image_std"):
            if self.video.get(name) != self.preprocess.get(name):
                raise ModelError(f"{name} of images and videos differ: that is not supported")
        vision = self.config.vision_config
        if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
            raise ModelError("config.json: only 2 frames and 2 x 2 patches are joined to a token")

    @property
    def visual(self):
        return self.tower["visual"]

    @property
    def projector(self):
        return self.visual.merger

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32, weights: bool = True) -> "QwenVL":
        """Load a folder as published; ModelError if it is none or tensors are missing."""
        root = folder_of(folder, weights)
        files = [root / f"{name}preprocessor_config.json" for name in ("", "video_")]
        preprocess = read_json(root, files[0].name)
        video = read_json(root, files[1].name) if files[1].exists() else None
        tokenizer = load_tokenizer(root)
        whole = load_part(cls.kind, root, dtype, weights, cls.skip)
        model = cls(whole, tokenizer, preprocess, video)
        model.load_recipe(root)
        return model

    def write(self, root: Path, weights: dict) -> None:
        from huggingface_hub import save_torch_state_dict

        decoder, towers, head = self.published
        at = lambda name: re.sub(r"^model\.", decoder, name) if name[0] == "m" else head + name  # noqa: E731
        state = {at(name): value for name, value in weights.items()}
        state |= {towers + name: value.cpu() for name, value in self.tower.state_dict().items()}
        save_torch_state_dict(state, root)
        self.outer_config().save_pretrained(root)
        self.tokenizer.save_pretrained(root)
        (root / "preprocessor_config.json").write_text(json.dumps(self.preprocess, indent=2))
        if self.video is not self.preprocess:
            (root / "video_preprocessor_config.json").write_text(json.dumps(self.video, indent=2))

    def outer_config(self):
        self.config.architectures = [self.kind.__name__]
        return self.config

    def encoder_settings(self) -> list:
        named = ("hidden_act", "num_heads", "patch_size", "window_size", "fullatt_block_indexes")
        named += ("deepstack_visual_indexes", "n_window", "encoder_attention_heads")
        towers = [{n: getattr(t.config, n, None) for n in named} for t in self.tower.values()]
        return [self.preprocess, self.video, towers]

    def limits(self, kind: str) -> tuple[int, int]:
        """The least and the most pixels of an image, or of a frame, that the checkpoint says."""
        p = self.video if kind == "video" else self.preprocess
        size = p.get("size") or {}  # of newer files
        least = p.get("min_pixels") or size.get("shortest_edge", 56 * 56)
        return least, p.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280)

    def fit(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        least, most = self.limits(kind)
        most = self.recipe.max_pixels or most
        factor = 2 * self.visual.config.patch_size
        return smart_resize(height, width, factor, min(least, most), most)

    def seen(self, size, kind: str) -> tuple[int, int]:
        """Tokens (h, w) of a group of frames of this size."""
        return tuple(side // (2 * self.visual.config.patch_size) for side in size)

    def patches(self, frames, size=None) -> tuple[Tensor, tuple[int, int, int]]:
        """(F, H, W, 3) uint8 -> patches (T h w, 3 * 2 * p * p) and (T, h, w), here in patches. The
        four patches that the merger joins follow each other."""
        side = self.visual.config.patch_size
        height, width = size or self.fit("video", *frames.shape[:3])
        x = self.scaled(frames, (height, width))
        x = torch.cat([x, x[-1:]][: 1 + len(x) % 2])  # the last group lacks a frame: repeat it
        t, h, w = len(x) // 2, height // side, width // side
        x = x.view(t, 2, 3, h // 2, 2, side, w // 2, 2, side)  # t, frame, colour, y y y, x x x
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)

    def see(self, frames, size, kind: str) -> Tensor:
        """(F, H, W, 3) uint8 -> (T, h / 2, w / 2, W)"""
        patches, (t, h, w) = self.patches(frames, size)
        out = self.visual(patches, grid_thw=torch.tensor([[t, h, w]], device=patches.device))
        levels = out.deepstack_features if self.levels else []
        return torch.cat([out.pooler_output, *levels], -1).view(t, h // 2, w // 2, -1)

    def places(self, m: Media) -> tuple[list[int], Tensor]:
        """Ids and positions of the places of a video's or image's features."""
        t, h, w, _ = m.features.shape
        steps = torch.zeros(t, dtype=torch.long)
        if m.kind == "video":  # DEVIATION 4; in double, and cut off
            seconds = 2 * (m.times[-1] - m.times[0]) / (len(m.times) - 1 or 1)
            steps = (torch.arange(t).double() * (seconds * self.positions_per_second)).long()
        return [self.ids[self.pads[m.kind]]] * (t * h * w), grid(steps, h, w)

    @property
    def positions_per_second(self) -> float:
        return self.config.vision_config.tokens_per_second

    def mark(self, kind: str) -> list[Piece]:
        return [Piece([self.ids[token]]) for token in self.marks[kind]]

    def place(self, m: Media) -> list[Piece]:
        start, end = self.mark("video")
        ids, cells = self.places(m)
        return [start, Piece(ids, True, cells), end]


class Qwen3VL(QwenVL):
    """Qwen3-VL: every group of frames stands behind its time, and features of lower tower layers
    come along (deepstack)."""

    kind = transformers.Qwen3VLForConditionalGeneration
    published = ("model.language_model.", "model.", "")
    decoder_kind = "Qwen3ForCausalLM", "qwen3"

    def __init__(self, whole, *rest):
        super().__init__(whole, *rest)
        self.levels = len(self.config.vision_config.deepstack_visual_indexes)

    @property
    def projector(self):
        return nn.ModuleList([self.visual.merger, self.visual.deepstack_merger_list])

    def fit(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        """The limits of a video are those of all its frames together."""
        if kind != "video":
            return super().fit(kind, frames, height, width)
        (least, most), factor = self.limits("video"), 2 * self.visual.config.patch_size
        most = self.recipe.max_pixels * frames if self.recipe.max_pixels else most
        if min(height, width) < factor:
            grow = factor / min(height, width)
            height, width = int(height * grow), int(width * grow)
        counted = max(2, round(frames / 2) * 2)
        return smart_resize(height, width, factor, min(least, most), most, frames, counted)

    def place(self, m: Media) -> list[Piece]:
        """For each group "<1.5 seconds>", the mean time of its frames, and its features in marks
        (DEVIATION 6)."""
        if m.kind != "video":
            return super().place(m)
        times = np.append(m.times, m.times[-1:])[: len(m.times) + len(m.times) % 2]
        (start, end), pieces = self.mark("video"), []
        for features, seconds in zip(m.features, times.reshape(-1, 2).mean(1)):
            ids = self.tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False).input_ids
            cells = grid([0], *features.shape[:2])
            places = [self.ids[self.pads["video"]]] * cells.shape[1]
            pieces += [Piece(ids), start, Piece(places, True, cells), end]
        return pieces


class Omni(QwenVL):
    """Qwen2.5-Omni's Thinker: Qwen2.5-VL's eyes, Whisper's ears. 25 positions are a second, and one
    audio token: a video and its sound run side by side."""

    takes = ("video", "image", "audio")
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    published = ("thinker.model.", "thinker.", "thinker.")
    skip = r"(talker|token2wav)\."
    pads = {"video": "<|VIDEO|>", "image": "<|IMAGE|>", "audio": "<|AUDIO|>"}
    marks = {
        "video": ("<|vision_bos|>", "<|vision_eos|>"),
        "audio": ("<|audio_bos|>", "<|audio_eos|>"),
    }
    towers = ("visual", "audio_tower")

    @property
    def projector(self):
        return nn.ModuleList([self.visual.merger, self.tower["audio_tower"].proj])

    @property
    def positions_per_second(self) -> float:
        return self.config.position_id_per_seconds

    def outer_config(self):
        config = transformers.Qwen2_5OmniConfig(
            thinker_config=self.config.to_dict(), enable_audio_output=False
        )
        config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        return config

    def limits(self, kind: str) -> tuple[int, int]:
        """Those of a video's frames are the family's processor's, not in the checkpoint."""
        return (128 * 28 * 28, 768 * 28 * 28) if kind == "video" else super().limits(kind)

    def mel(self, sound: np.ndarray) -> Tensor:
        """(S,) at 16 kHz -> log-mel spectrogram (ceil(S / 160), 128), whatever the length."""
        ear = transformers.WhisperFeatureExtractor.from_dict(self.preprocess)
        sound = np.pad(sound, (0, ear.n_fft))  # silence behind: as in a longer, padded batch
        out = ear(sound, sampling_rate=16000, padding=True, truncation=False, return_tensors="pt")
        return out.input_features[0].T[: -(-(len(sound) - ear.n_fft) // ear.hop_length)]

    def heard(self, samples: int) -> int:
        """Audio tokens of so many samples: 25 a second."""
        if samples < 2 * 160 + 1:
            raise ModelError(f"a sound of {samples} samples at 16 kHz is too short to be heard")
        frames = -(-samples // 160)
        return ((frames - 1) // 2 - 1) // 2 + 1

    def hear(self, sound: np.ndarray, group=None) -> Tensor:
        """(S,) -> (A, D). The tower's attention stays in units of 2 s, which the ranks of a group
        share, and which go through it 64 at a time."""
        tower, tokens, mel = self.tower["audio_tower"], self.heard(len(sound)), self.mel(sound)
        unit = 2 * tower.n_window  # frames of the spectrogram, four a token

        def encode(part: Tensor) -> Tensor:  # (t, 128) -> (ceil(t / unit), unit / 4, D)
            out = []
            for x in part.to(tower.conv1.weight).split(64 * unit):
                lengths = torch.tensor([len(x)], device=x.device)
                out.append(tower(x.T, feature_lens=lengths).last_hidden_state)
            out = torch.cat(out)
            whole = -(-len(part) // unit) * (unit // 4)
            return F.pad(out, (0, 0, 0, whole - len(out))).view(-1, unit // 4, out.shape[-1])

        return mrsp.encode_parallel(encode, mel, group, unit).flatten(0, 1)[:tokens]

    def side_by_side(self, m: Media) -> tuple[list[int], Tensor, Tensor]:
        """A video and its audio track: ids, positions and order of their tokens, 2 s of video and
        2 s of audio in turn (DEVIATION 7)."""
        ids, cells = self.places(m)
        sound = torch.arange(len(m.track)).expand(3, -1)
        chunk = self.config.seconds_per_chunk * self.positions_per_second
        turn = torch.cat([cells[0] // chunk * 2, sound[0] // chunk * 2 + 1])
        order = turn.argsort(stable=True)
        ids = torch.tensor(ids + [self.ids[self.pads["audio"]]] * len(m.track))[order].tolist()
        return ids, torch.cat([cells, sound], 1)[:, order], order

    def rows(self, m: Media) -> list[Tensor]:
        if m.track is None:
            return super().rows(m)
        rows = torch.cat([m.features.flatten(0, -2), m.track])
        return [rows[self.side_by_side(m)[2].to(rows.device)]]

    def place(self, m: Media) -> list[Piece]:
        if m.kind == "audio":
            start, end = self.mark("audio")
            return [start, Piece([self.ids[self.pads["audio"]]] * len(m.features), True), end]
        if m.track is None:
            return super().place(m)
        ids, cells, _ = self.side_by_side(m)
        (a, z), (b, y) = (  # the marks of both share a position
            [piece.ids[0] for piece in self.mark(kind)] for kind in ("video", "audio")
        )
        one = torch.zeros(3, 2, dtype=torch.long)
        return [Piece([a, b], cells=one), Piece(ids, True, cells), Piece([y, z], cells=one)]
