"""The Qwen-VL families, by transformers' own classes: Qwen2.5-VL, Qwen3-VL, Qwen2.5-Omni.

                  a video becomes                                          a token stands for
    Qwen2.5-VL    <start> T h w <end>                                      2 frames of 28 x 28 px
    Qwen3-VL      T x "<1.5 seconds><start> h w <end>", and deepstack      2 frames of 32 x 32 px
    Qwen2.5-Omni  <start> T h w <end>; with its sound                      2 frames of 28 x 28 px,
                  <start> 2 s of video, 2 s of sound, ... <end>            40 ms of sound
    an image      <start> h w <end>

Positions (M-RoPE) have three rows, time, height and width, from where a medium begins. Time goes by
seconds: 2 positions a second, Omni 25 (one a token of sound), Qwen3-VL none (seconds are text).
Frames keep their shape: the nearest multiples of a token's size within the checkpoint's limits.

Differences from the families' own processors:
    DEVIATION 1: positions are computed here, once for sampler and trainer: text behind a medium
        goes on at the largest position of all three rows + 1, as in the original code;
        transformers' Qwen2.5-VL goes on at max(h, w), as if a video took no time.
    DEVIATION 2: a group's seconds come from the times of the frames that were really taken.
    DEVIATION 3: Qwen3-VL's groups stand in their own marks alone, as its first processor wrote it;
        that of transformers 5.10 and later puts another pair of marks around the video.
    DEVIATION 4: Omni's frames that are further apart than 2 s stand whole, before the sound of
        their time; its processor splits their tokens over the chunks.

Check this file alone:  pytest tests/test_pixels.py tests/test_families.py -k "qwen or omni"
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mrsp
from families.files import holds, load_part, load_tokenizer, read_json, write_part
from model import Media, ModelError, MultiModal, Piece, read_parameters


def mrope_positions(pieces: list[Piece]) -> Tensor:
    """M-RoPE: positions (3, P) in time, height and width. A piece begins behind the largest
    position so far (DEVIATION 1); text has three equal rows.

    >>> mrope_positions([Piece([7, 8]), Piece([9] * 4, True, grid((0, 3), 1, 2)), Piece([7])])
    tensor([[0, 1, 2, 2, 5, 5, 6],
            [0, 1, 2, 2, 2, 2, 6],
            [0, 1, 2, 3, 2, 3, 6]])
    """
    parts = []
    begin = 0
    for piece in pieces:
        if piece.ids:
            cells = piece.cells
            if cells is None:
                cells = torch.arange(len(piece.ids)).expand(3, -1)
            parts.append(begin + cells)
            begin += int(cells.max()) + 1
    return torch.cat(parts, 1)


def grid(times, h: int, w: int) -> Tensor:
    """Positions (3, T h w) of T groups of frames at these times (in positions), in order."""
    cells = torch.cartesian_prod(torch.arange(len(times)), torch.arange(h), torch.arange(w)).T
    return torch.stack([torch.as_tensor(times)[cells[0]], *cells[1:]])


def window_attention(
    module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_
):
    """Attention of a tower, whose windows (or groups of frames) do not see each other: those of the
    same length are one batch, where transformers calls a kernel for each (7,296 times for 64
    frames). query, key, value (1, H, L, D), window i is [cu[i], cu[i + 1]) -> (1, L, H, D)"""
    ends = cu_seq_lens_q.long()
    lengths = ends.diff()
    out = torch.empty_like(query[0].transpose(0, 1))  # (L, H, D)
    for length in lengths.unique().tolist():
        starts = ends[:-1][lengths == length]
        at = starts[:, None] + torch.arange(length, device=starts.device)  # (n, w): where they are
        q, k, v = (x[0, :, at].transpose(0, 1) for x in (query, key, value))  # (n, H, w, D)
        out[at] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out[None], None


# transformers hands the windows over to an attention with "flash" in its name, and only to that.
WINDOWS = "flash_windows"
transformers.AttentionInterface.register(WINDOWS, window_attention)


class QwenVL(MultiModal):
    """Qwen2.5-VL, by transformers' classes. The tower sees groups of 2 frames, and no group sees
    another (its attention has windows or whole groups): groups are encoded apart, on any rank."""

    takes = ("video", "image")
    mrope = True
    unit = 2
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    decoder_kind = "Qwen2ForCausalLM", "qwen2"
    published = ("model.", "", "")  # prefixes of the decoder's, the towers' and the head's tensors
    skip = None  # a pattern: tensors of the checkpoint that are not needed
    pads = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
    marks = {"video": ("<|vision_start|>", "<|vision_end|>")}  # around features; images too
    towers = ("visual",)
    video_limits = None  # pixels of a video's frame, whatever the checkpoint says
    positions = staticmethod(mrope_positions)

    def __init__(self, whole, tokenizer, preprocess: dict, video: dict | None = None):
        """whole: transformers' model; preprocess, video: how images and videos are preprocessed."""
        parts = {path.split(".")[-1]: part for path, part in whole.named_modules()}
        towers = nn.ModuleDict({name: parts[name] for name in self.towers})
        controls = [token for pair in self.marks.values() for token in pair]
        super().__init__(whole, towers, tokenizer, preprocess, tuple(self.pads.values()), controls)
        # In published files it often stands at the root alone.
        self.policy.config.tie_word_embeddings = whole.config.tie_word_embeddings
        self.config = copy.deepcopy(whole.config)  # as published
        for part in self.tower.values():  # (its own method would look for a package of this name)
            part.config._attn_implementation = WINDOWS
        self.video = video or preprocess
        for kind, token in self.pads.items():
            said = getattr(self.config, f"{kind}_token_id")
            if said != self.ids[token]:
                own = self.ids[token]
                raise ModelError(f"config.json: {kind}_token_id is {said}, the tokenizer's {own}")
        for name in ("image_mean", "image_std"):
            if self.video.get(name) != self.preprocess.get(name):
                raise ModelError(f"{name} of images and videos differ: that is not supported")
        vision = self.config.vision_config
        if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
            raise ModelError("config.json: only 2 frames and 2 x 2 patches are joined to a token")
        rate = getattr(self.config, "position_id_per_seconds", None)  # Omni's
        self.positions_per_second = rate or getattr(vision, "tokens_per_second", 0)

    @property
    def visual(self):
        return self.tower["visual"]

    @property
    def projector(self):
        return self.visual.merger

    @classmethod
    def from_pretrained(cls, root: Path, dtype, weights: bool = True, decoder=True) -> "QwenVL":
        """Load a folder as published; see load()."""
        preprocess = read_json(root, "preprocessor_config.json")
        video = None
        if (root / "video_preprocessor_config.json").exists():
            video = read_json(root, "video_preprocessor_config.json")
        tokenizer = load_tokenizer(root)
        whole = load_part(cls.kind, root, dtype, weights and decoder, cls.skip)
        model = cls(whole, tokenizer, preprocess, video)
        if weights and not decoder:
            model.folder = root
            parts = model.policy.named_parameters(), model.tower.named_parameters()
            wanted = {model.published_name(name): p for part in parts for name, p in part}
            if not holds(root, wanted, cls.skip):
                return cls.from_pretrained(root, dtype)  # transformers knows further names
            read_parameters(model.tower, root, model.published_name)
        return model

    def published_name(self, name: str) -> str:
        """Of the policy's tensors, and of the towers'."""
        body, towers, head = self.published
        if name.startswith("model."):
            return body + name.removeprefix("model.")
        return (head if name.startswith("lm_head.") else towers) + name

    def write(self, root: Path, weights: dict) -> None:
        weights = weights | {name: x.cpu() for name, x in self.tower.state_dict().items()}
        named = {self.published_name(name): x for name, x in weights.items()}
        write_part(root, named, self.outer_config(), self.generation_config, self.tokenizer)
        (root / "preprocessor_config.json").write_text(json.dumps(self.preprocess, indent=2))
        if self.video is not self.preprocess:
            (root / "video_preprocessor_config.json").write_text(json.dumps(self.video, indent=2))

    def outer_config(self):
        self.config.architectures = [self.kind.__name__]
        return self.config

    def encoder_config(self) -> list:
        named = ("hidden_act", "num_heads", "patch_size", "window_size", "fullatt_block_indexes")
        named += ("deepstack_visual_indexes", "n_window", "encoder_attention_heads")
        towers = [{n: getattr(t.config, n, None) for n in named} for t in self.tower.values()]
        return [self.preprocess, self.video, towers]

    def limits(self, kind: str) -> tuple[int, int]:
        """The least and the most pixels of an image, or of a frame."""
        if kind == "video" and self.video_limits:
            return self.video_limits
        p = self.video if kind == "video" else self.preprocess
        size = p.get("size") or {}  # of newer files
        least = p.get("min_pixels") or size.get("shortest_edge", 56 * 56)
        return least, p.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280)

    def image_size(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        """The nearest multiples of a token's sides, within the limits."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        least, most = self.limits(kind)
        most = self.recipe.max_pixels or most
        factor = 2 * self.visual.config.patch_size
        return smart_resize(height, width, factor, min(least, most), most)

    def tokens_per_frame(self, size, kind: str) -> tuple[int, int]:
        """Tokens (h, w) of a group of frames of this size."""
        return tuple(side // (2 * self.visual.config.patch_size) for side in size)

    def patches(self, frames, size=None) -> tuple[Tensor, tuple[int, int, int]]:
        """(F, H, W, 3) uint8 -> patches (T h w, 3 * 2 * p * p) and (T, h, w), here in patches. The
        four patches that the merger joins follow each other."""
        side = self.visual.config.patch_size
        height, width = size or self.image_size("video", *frames.shape[:3])
        x = self.scaled(frames, (height, width))
        if len(x) % 2:  # the last group lacks a frame: repeat it
            x = torch.cat([x, x[-1:]])
        t, h, w = len(x) // 2, height // side, width // side
        # Axes: 0 group, 1 frame in it, 2 colour, 3 block row, 4 row in block, 5 y in patch,
        # 6 block column, 7 column in block, 8 x in patch.
        x = x.view(t, 2, 3, h // 2, 2, side, w // 2, 2, side)
        # Group, block row, block column, row and column in block, | colour, frame, y, x.
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return x.reshape(t * h * w, -1), (t, h, w)

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
        if m.kind == "video":  # DEVIATION 2; in double, and cut off
            seconds = 2 * (m.times[-1] - m.times[0]) / (len(m.times) - 1 or 1)
            steps = (torch.arange(t).double() * (seconds * self.positions_per_second)).long()
        return [self.ids[self.pads[m.kind]]] * (t * h * w), grid(steps, h, w)

    def mark(self, kind: str) -> list[Piece]:
        return [Piece([self.ids[token]]) for token in self.marks[kind]]

    def place(self, m: Media) -> tuple[list[Piece], Tensor]:
        start, end = self.mark("video")
        ids, cells = self.places(m)
        return [start, Piece(ids, True, cells), end], m.features.flatten(0, -2)


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

    def image_size(self, kind: str, frames: int, height: int, width: int) -> tuple[int, int]:
        """The limits of a video are those of all its frames together."""
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        if kind != "video":
            return super().image_size(kind, frames, height, width)
        least, most = self.limits("video")
        if self.recipe.max_pixels:
            most = self.recipe.max_pixels * frames
        factor = 2 * self.visual.config.patch_size
        return smart_resize(max(frames, 2), height, width, 2, factor, min(least, most), most)

    def place(self, m: Media) -> tuple[list[Piece], Tensor]:
        """For each group "<1.5 seconds>", the mean time of its frames, and its features in marks
        (DEVIATION 3)."""
        if m.kind != "video":
            return super().place(m)
        times = m.times
        if len(times) % 2:  # as the last frame, its time is repeated
            times = np.append(times, times[-1:])
        start, end = self.mark("video")
        pieces = []
        for features, seconds in zip(m.features, times.reshape(-1, 2).mean(1)):
            cells = grid([0], *features.shape[:2])
            places = [self.ids[self.pads["video"]]] * cells.shape[1]
            said = Piece(self.tokenize(f"<{seconds:.1f} seconds>"))
            pieces += [said, start, Piece(places, True, cells), end]
        return pieces, m.features.flatten(0, -2)


class Omni(QwenVL):
    """Qwen2.5-Omni's Thinker: Qwen2.5-VL's eyes, Whisper's ears. A second is 25 positions, and 25
    tokens of sound: a video and its sound run side by side."""

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
    video_limits = 128 * 28 * 28, 768 * 28 * 28  # of the family's processor

    @property
    def projector(self):
        return nn.ModuleList([self.visual.merger, self.tower["audio_tower"].proj])

    def outer_config(self):
        config = transformers.Qwen2_5OmniConfig(
            thinker_config=self.config.to_dict(), enable_audio_output=False
        )
        config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        return config

    def mel(self, sound: np.ndarray) -> Tensor:
        """(S,) at 16 kHz -> log-mel spectrogram (ceil(S / 160), 128), whatever the length."""
        ear = transformers.WhisperFeatureExtractor.from_dict(self.preprocess)
        wide = np.pad(sound, (0, ear.n_fft))  # silence behind: as in a longer, padded batch
        out = ear(wide, sampling_rate=16000, padding=True, truncation=False, return_tensors="pt")
        return out.input_features[0].T[: math.ceil(len(sound) / ear.hop_length)]

    def audio_tokens(self, samples: int) -> int:
        """Audio tokens of so many samples: 25 a second."""
        if samples < 2 * 160 + 1:
            raise ModelError(f"a sound of {samples} samples at 16 kHz is too short to be heard")
        frames = math.ceil(samples / 160)  # of the spectrogram
        return ((frames - 1) // 2 - 1) // 2 + 1

    def hear(self, sound: np.ndarray, group=None) -> Tensor:
        """(S,) -> (A, D). The tower's attention stays in units of 2 s, which the ranks of a group
        share, and which go through it 64 at a time."""
        tower = self.tower["audio_tower"]
        tokens = self.audio_tokens(len(sound))
        unit = 2 * tower.n_window  # frames of the spectrogram, four a token

        def encode(mel: Tensor) -> Tensor:  # (t, 128) -> (ceil(t / unit), unit / 4, D)
            parts = []
            for part in mel.to(tower.conv1.weight).split(64 * unit):
                lengths = torch.tensor([len(part)], device=part.device)
                parts.append(tower(part.T, feature_lens=lengths).last_hidden_state)
            x = torch.cat(parts)
            padded = math.ceil(len(mel) / unit) * (unit // 4)
            return F.pad(x, (0, 0, 0, padded - len(x))).view(-1, unit // 4, x.shape[-1])

        return mrsp.encode_parallel(encode, self.mel(sound), group, unit).flatten(0, 1)[:tokens]

    def place(self, m: Media) -> tuple[list[Piece], Tensor]:
        first, last = self.mark("audio")
        token = self.ids[self.pads["audio"]]
        if m.kind == "audio":
            return [first, Piece([token] * len(m.features), True), last], m.features
        if m.track is None:
            return super().place(m)
        # 2 s of video and 2 s of its sound in turn (DEVIATION 4): video has the even turns.
        seen, seen_at = self.places(m)
        heard_at = torch.arange(len(m.track)).expand(3, -1)
        chunk = self.config.seconds_per_chunk * self.positions_per_second
        turn = torch.cat([seen_at[0] // chunk * 2, heard_at[0] // chunk * 2 + 1])
        order = turn.argsort(stable=True)
        ids = torch.tensor(seen + [token] * len(m.track))[order]
        cells = torch.cat([seen_at, heard_at], 1)[:, order]
        rows = torch.cat([m.features.flatten(0, -2), m.track])
        rows = rows[order.to(rows.device)]
        start, end = self.mark("video")
        one = torch.zeros(3, 2, dtype=torch.long)  # the marks of both share a position
        before = Piece(start.ids + first.ids, cells=one)
        behind = Piece(last.ids + end.ids, cells=one)
        return [before, Piece(ids.tolist(), True, cells), behind], rows
