"""The policy: towers for what is seen and heard, a decoder, and the one prompt builder.

    video, image (F, H, W, 3) uint8            audio (S,) 16 kHz
       | image_size, scaled                       | log-mel
       | see: tower, projector                    | hear: tower
    features (T, h, w, W) or (F, K, W)         (A, W)             mrsp.EmbeddingCache: the
       |                                          |               towers are frozen in RL
       | place: Pieces, runs of text tokens and of places for features, with their positions
       v
    Prompt     ids (P,), positions (P,) or (3, P), features (N, W) and where they stand
       v
    policy     [prompt | answers] -> log-probs of the answers' tokens (M,)

Here is what all families of models share; a file in families/ says how one sees, hears and places
media, and how its checkpoint is laid out (families/__init__.py lists what a family defines).

build_prompt is the ONE builder of the sequence: rollout, policy and reference get the same Prompt,
so they cannot see different inputs (in the public code they do: the video stands at its token in
the rollout, and behind the text in training). A Prompt holds token ids and media features apart:
text embeddings belong to the policy, which is being trained, and are looked up when they are used;
the public code keeps a stale copy of them for the rollout.

Differences from the public code (those of a family are in its file):
    DEVIATION 1: the LM head sees only the hidden states that predict an answer's token, in chunks;
        L x V logits (256k x 152k) never exist.
    DEVIATION 2: frames are resized with torch (bicubic, antialiased, not rounded), not with PIL.

Glossary: F frames, T groups of frames, h w tokens of one, K tokens a frame, A tokens of a sound,
P prompt tokens, D decoder width, W = D (1 + deepstack levels) width of a feature, L packed length,
M predicted tokens, V vocabulary.
Check this file alone:  pytest tests/test_model.py
"""

import functools
import hashlib
import json
import math
import re
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

import mrsp
from data import DataError, Example, Frames, Medium, Opener, Rate, named_errors

AttentionInterface.register("mrsp", mrsp.mrsp_attention)

# The user turn in thinking mode; {problem} is the question with its options (section 4; our words).
THINKING = (
    "{problem}\n\nFirst think about the question step by step, based on the video, inside "
    "<think> </think>. Then give the final answer inside <answer> </answer>; if there are "
    "options, answer with the letter of the right one."
)
# The turns of a checkpoint whose tokenizer has no chat template of its own.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"  # a bare newline at the end of a template is dropped
)
# Placeholders in a rendered chat template: Unicode noncharacters, which no text contains.
TEXT = "\ufdd0"
MEDIA = "\ufdd1"


class ModelError(ValueError):
    """A checkpoint or an input that the model cannot take; says what and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a model is asked. It belongs to a checkpoint (recipe.json), as its weights do: other
    frames or another wording are another experiment. ValueError for a value that cannot be."""

    num_frames: int = 64  # frames taken from a video
    max_tokens: int = 2048  # longest answer
    template: str = THINKING  # the user's turn in thinking mode; {problem} is the question
    system: str | None = None  # system prompt; default: what the chat template does without one
    stop: str = ""  # text that ends an answer besides the end token, such as </answer>
    data: str = ""  # rows to evaluate on, relative to the checkpoint folder
    thinking: bool = True  # ask by the template; false: the bare question
    max_pixels: int | None = None  # of a frame or image (Qwen); default: as the checkpoint says
    fps: float | None = None  # frames a second instead of num_frames
    max_frames: int = 8192  # of a video, with fps

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = field.type | int if field.name == "fps" else field.type  # JSON's 2 is a rate
            if not isinstance(value, allowed):
                name = getattr(field.type, "__name__", field.type)
                raise ValueError(f"{field.name} must be of type {name}, not {value!r}")
        for name in ("num_frames", "max_tokens", "max_pixels", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be above 0 and finite, not {self.fps}")
        if "{problem}" not in self.template:
            raise ValueError(f"template must contain {{problem}}, unlike {self.template!r}")

    @property
    def frames(self) -> int | Rate:
        """How many frames are taken from a video."""
        return self.num_frames if self.fps is None else Rate(self.fps, self.max_frames)


def read_recipe(root: Path) -> Recipe | None:
    """The recipe.json of a checkpoint folder; None if there is none. ModelError, with file and
    field, if it is no JSON object, or has unknown fields or values that cannot be."""
    try:
        return Recipe(**json.loads((root / "recipe.json").read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:  # of Recipe, of JSON
        raise ModelError(f"{root}/recipe.json: {error}") from None


@torch.no_grad()
def read_parameters(module: nn.Module, folder: Path, published_name, device="cpu") -> None:
    """Memory and values for parameters on the device "meta", from a folder's safetensors files, in
    whatever precision those have: of a DTensor this rank's part alone, a tensor at a time.
    published_name: (name of a parameter) -> its name in the files."""
    module._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
    if isinstance(module, Policy) and module.config.tie_word_embeddings:  # still one matrix
        module.lm_head.weight = module.model.get_input_embeddings().weight
    wanted = {published_name(name): p for name, p in module.named_parameters()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


class Media(NamedTuple):
    """What a tower made of one medium: features (T, h, w, W) of a video or image (VILA:
    (F, K, W)), (A, W) of audio; times (F,) of the frames, in seconds; track (A, W), the features of
    a video's sound."""

    kind: str
    features: Tensor
    times: np.ndarray | tuple = ()
    track: Tensor | None = None


class Piece(NamedTuple):
    """Consecutive tokens of a prompt. places: features stand here, one a token. cells (3, n): their
    positions, from that of the piece; None: one after the other."""

    ids: list[int]
    places: bool = False
    cells: Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt. ids (P,), with a media token's id at every media position; positions (P,), or
    (3, P) for M-RoPE; media (N, W) features and media_at (N,), where in ids they stand. text: for
    people and logs. shared: how many leading tokens do not depend on the question (SFT shares
    them)."""

    ids: Tensor
    positions: Tensor
    media: Tensor | None
    media_at: Tensor
    text: str
    shared: int


# ------------------------------------------------------------------------- what families share


class MultiModal(nn.Module):
    """The policy. forward() gives log-probs of a Pack's targets, features() those of an example's
    media. A family sets these attributes, and defines the methods that families/ lists."""

    takes: tuple[str, ...] = ()  # kinds of media: video, image, audio
    mrope = False  # positions have three rows: time, height, width
    unit = 1  # frames of a video that become one group of features
    levels = 0  # of deepstack: features of lower tower layers, added after the first decoder layers
    decoder_kind: tuple[str, str]  # class and model_type of the decoder as a model of text

    def __init__(self, whole, tower, tokenizer, preprocess: dict, media=(), controls=()):
        """whole: transformers' model, whose decoder and LM head become the policy; media: tokens
        that stand for features; controls: further tokens no question may hold."""
        super().__init__()
        self.policy = Policy(whole.get_decoder(), whole.lm_head)
        self.generation_config = whole.generation_config
        self.tower = tower
        self.folder = None  # of the checkpoint whose decoder is still to be read (read_decoder)
        self.recipe = Recipe()
        self.cache = mrsp.EmbeddingCache()
        self.loader = Opener()
        self.mesh = mrsp.Mesh()  # the ranks of a sequence
        self.sharded = False  # parameters, by FSDP2
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*media, *controls)}
        if lacking := [token for token, i in self.ids.items() if i is None]:
            raise ModelError(f"the tokenizer lacks {', '.join(map(repr, lacking))}")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos_token: which token ends an answer?")
        self.controls = {*self.ids, *tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>"}
        self.controls -= {"<think>", "</think>", "<answer>", "</answer>"}  # answers have these
        self.media_tokens = tuple(self.ids[token] for token in media)  # never to be sampled
        self.eos = tokenizer.eos_token_id  # which SFT teaches behind an answer
        more = self.generation_config.eos_token_id  # None, one or several, as published
        self.ends = {self.eos, *(more if isinstance(more, list) else [more])} - {None}
        self._tower_hash = None

    @property
    def media_width(self) -> int:
        return self.policy.config.hidden_size * (1 + self.levels)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as it is."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    # -- checkpoints

    def published_name(self, name: str) -> str:
        """What a tensor of the policy is called in the family's checkpoints."""
        return name

    def read_decoder(self) -> None:
        """Values for a decoder that was loaded without (load(folder, decoder=False)): of sharded
        parameters each rank reads its own rows alone. All ranks; nothing to do for another one."""
        if next(self.policy.parameters()).is_meta:
            device = next(self.policy.buffers()).device  # RoPE's frequencies are there
            read_parameters(self.policy, self.folder, self.published_name, device)

    def decoder_weights(self):
        """The decoder's tensors by the policy's names (those of a causal language model), one after
        the other, without a tied head: what is saved, and what samplers get. Sharded ones are
        gathered: every rank goes through it. Those of layers with an adapter (add_adapters) are
        what merging it would make them."""
        tied = self.policy.config.tie_word_embeddings
        for name, value in self.policy.state_dict().items():
            if (tied and name == "lm_head.weight") or ".lora_" in name:
                continue
            layer, adapted, rest = name.partition(".base_layer")
            value = mrsp.whole(value)
            if adapted and rest == ".weight":
                update = self.policy.get_submodule(layer).get_delta_weight("default").detach()
                value = (value + update).to(value.dtype)
            yield layer + rest, value

    def save_pretrained(self, folder: str, write: bool = True) -> None:
        """Write the published layout, loadable again. With sharded parameters every rank calls this
        (they are gathered one by one), and one of them writes."""
        # Copied if gathered: a view of a larger, padded tensor cannot be saved.
        weights = {k: x.to("cpu", copy=self.sharded) for k, x in self.decoder_weights() if write}
        if write:
            root = Path(folder)
            root.mkdir(parents=True, exist_ok=True)
            self.write(root, weights)
            (root / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2))

    def save_config(self, folder: str) -> None:
        """Config and tokenizer of the decoder as a text model, no weights: what vLLM builds."""
        config = json.loads(self.policy.config.to_json_string(use_diff=False))
        name, kind = self.decoder_kind
        self.tokenizer.save_pretrained(folder)
        config |= {"architectures": [name], "model_type": kind}
        Path(folder, "config.json").write_text(json.dumps(config))

    # -- media: features (of an example) -> perceive (a medium; the cache) -> look (this rank's
    #    share of its frames) -> encode (passes that fit) -> see (through tower and projector)

    def check_question(self, example: Example) -> None:
        """ModelError, naming the question, if it cannot be asked, or its response not learned."""
        for m in example.media:
            self.check_taken(m, example.id)
        for token in self.controls:
            if token in example.problem or token in example.response:
                raise ModelError(f"question {example.id} contains the control token {token}")

    def check_taken(self, medium: Medium, name: str) -> None:
        """ModelError, naming question and file, if the family does not take such media."""
        if medium.kind not in self.takes or (medium.track and "audio" not in self.takes):
            what = "audio track" if medium.kind in self.takes else medium.kind
            raise ModelError(
                f"question {name}: {type(self).__name__} takes no {what}, only "
                f"{' and '.join(self.takes) or 'text'}: {medium.path}"
            )

    def blank(self, kind: str, frames: int, height: int, width: int, times) -> Media:
        """Features without values, on the device "meta", of frames of this size."""
        tokens = self.tokens_per_frame(self.image_size(kind, frames, height, width), kind)
        shape = (math.ceil(frames / self.unit), *tokens, self.media_width)
        return Media(kind, torch.empty(shape, device="meta"), times)

    def measure(self, medium: Medium, num_frames: int | Rate, name="") -> Media:
        """What perceive() would give, on the device "meta": its shape, from the file's alone."""
        self.check_taken(medium, name)
        track = None
        with named_errors(medium, medium.kind, name):
            if medium.kind == "audio" or medium.track:
                samples = len(self.loader.sound(medium, name=name))
                track = torch.empty(self.audio_tokens(samples), self.media_width, device="meta")
            if medium.kind == "audio":
                return Media("audio", track)
            with self.loader.open(medium, num_frames, name) as frames:
                seen = self.blank(medium.kind, *frames.shape[:3], frames.times)
            return seen._replace(track=track)

    def scaled(self, frames, size: tuple[int, int]) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, 3, *size), normalised as preprocessor_config.json says, on the
        tower's device and in its precision."""
        weight = next(self.projector.parameters())
        p = self.preprocess
        x = torch.as_tensor(np.ascontiguousarray(frames)).to(weight.device)
        x = x.permute(0, 3, 1, 2).float()  # (F, 3, H, W)
        if x.shape[-2:] != size:  # DEVIATION 2
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        mean = torch.tensor(p["image_mean"], device=x.device)[:, None, None]
        std = torch.tensor(p["image_std"], device=x.device)[:, None, None]
        return ((x * p.get("rescale_factor", 1 / 255) - mean) / std).to(weight.dtype)

    def encode(self, frames, size=None, at=None, at_once: int = 64, kind="video") -> Tensor:
        """Features of frames (F, H, W, 3) uint8, an array or Frames, `unit` of them by
        themselves. at: of this range alone."""
        size = size or self.image_size(kind, *frames.shape[:3])
        parts = self.passes(frames.shape, at or range(len(frames)), at_once)
        pieces = frames.pieces(parts) if isinstance(frames, Frames) else (frames[p] for p in parts)
        return torch.cat([self.see(pixels, size, kind) for pixels in pieces])

    def passes(self, shape, at: range, at_once: int = 64) -> list[slice]:
        """The parts of frames (F, H, W, 3) that are decoded, and go through the tower, together:
        at_once of them (or a group), fewer of large ones: 512 MiB of pixels, and the hidden states
        of all layers of the tower, are held at a time."""
        most = min(at_once, 2**29 // math.prod(shape[1:]))
        step = max(most // self.unit, 1) * self.unit
        return [slice(i, min(i + step, at.stop)) for i in at[::step]]

    def encoder_hash(self) -> str:
        """Hash of everything that features depend on: weights of tower and projector, settings.
        Computed once: call forget_encoder() after training the tower."""
        if self._tower_hash is None:
            settings = json.dumps(self.encoder_config(), sort_keys=True)
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

    def cast_encoder(self, dtype) -> None:
        """Frozen tower and projector in this precision; buffers (RoPE's frequencies) stay."""
        for p in (*self.tower.parameters(), *self.projector.parameters()):
            p.data = p.data.to(dtype)
        self.forget_encoder()

    def key(self, medium: Medium, num_frames: int | Rate, kind: str | None = None) -> str:
        """The cache's name for what is seen of a medium, or (kind audio) heard; OSError."""
        kind = kind or medium.kind
        taken = (medium.segment,)
        if kind != "audio":
            taken = (medium.num_frames or num_frames, medium.segment, self.recipe.max_pixels)
        return mrsp.media_key(mrsp.file_hash(medium.path), self.encoder_hash(), kind, *taken)

    @torch.no_grad()
    def features(self, example: Example, num_frames: int | Rate, group=None) -> list[Media]:
        """Features of an example's media, in order. Computed once: on a hit of the cache the file
        is not even decoded. No gradient: for a frozen tower. group: ranks that all call this for
        the same examples in the same order, and encode a medium together."""
        return [self.perceive(m, num_frames, example.id, group, True) for m in example.media]

    def features_trainable(self, examples: list, num_frames: int | Rate) -> list[list[Media]]:
        """features() of several examples, with gradients into tower and projector; no cache. The
        ranks of a sequence have the same examples, and encode each medium together."""
        group = self.mesh.sp_group
        return [[self.perceive(m, num_frames, e.id, group) for m in e.media] for e in examples]

    def perceive(self, medium, num_frames: int | Rate, name="", group=None, cached=False) -> Media:
        """One medium of question `name`, seen or heard; cached: kept, and found again. DataError,
        on all ranks of the group, if one of them cannot decode its share."""
        self.check_taken(medium, name)

        def entry(kind: str, compute) -> dict:
            """features, and of frames their times; computed, or found."""
            make = functools.partial(compute, medium, num_frames, name, group)
            if not cached:
                return make()
            with mrsp.agreed(group), named_errors(medium, medium.kind, name):
                key = self.key(medium, num_frames, kind)
            return self.cache.get(key, make, group)

        if medium.kind == "audio":
            return Media("audio", entry("audio", self.listen)["features"])
        seen = entry(medium.kind, self.look)
        track = entry("audio", self.listen)["features"] if medium.track else None
        return Media(medium.kind, seen["features"], seen["times"].numpy(), track)

    def look(self, medium: Medium, num_frames: int | Rate, name: str, group=None) -> dict:
        """Features and times of a video or image: each rank of the group decodes and encodes its
        share of the frames."""
        with ExitStack() as stack:
            with mrsp.agreed(group), named_errors(medium, medium.kind, name):
                frames = stack.enter_context(self.loader.open(medium, num_frames, name))
                size = self.image_size(medium.kind, *frames.shape[:3])

            def encode(at: range) -> Tensor:
                with mrsp.agreed(group):  # every rank encodes some frames, once
                    return self.encode(frames, size, at, kind=medium.kind)

            every = range(len(frames))
            features = mrsp.encode_parallel(encode, every, group, self.unit)
            return {"features": features, "times": torch.as_tensor(frames.times)}

    def listen(self, medium: Medium, num_frames, name: str, group=None) -> dict:
        """Features of a sound, or of a video's audio track."""
        with mrsp.agreed(group), named_errors(medium, medium.kind, name):
            sound = self.loader.sound(medium, name=name)
            self.audio_tokens(len(sound))  # an error if it is too short
        return {"features": self.hear(sound, group)}

    def prefetch(self, examples: list, num_frames=None, group=None) -> None:
        """features() of these examples will be wanted, in this order: videos that are not in the
        cache may be opened."""
        num_frames = num_frames or self.recipe.frames
        names = {}  # of the first question about each video
        for e in examples:
            for m in e.media:
                if m.kind == "video":
                    names.setdefault(m, e.id)

        def first(shape) -> slice:
            """What this rank decodes first, of frames of this shape."""
            share, _, _ = mrsp.encoder_share(shape[0], group, self.unit)
            return self.passes(shape, range(shape[0])[share])[0]

        def plan():
            for m, name in names.items():
                with suppress(OSError):  # who wants it will say so
                    if self.key(m, num_frames) not in self.cache:
                        yield m, num_frames, name, first

        self.loader.ahead(plan())

    def usable(self, examples: list, make, lost: dict | None) -> tuple[list, list]:
        """make(examples), a list, without the examples whose media do not decode: what is left of
        examples, and what make() gave for it. lost: takes {example: message} of the others, the
        same on all ranks of a sequence; None: the DataError is raised."""
        examples = [e for e in examples if not lost or e not in lost]
        while True:
            try:
                return examples, make(examples)
            except DataError as error:
                failed = [e for e in examples if e.id == error.question]
                if lost is None or not failed:
                    raise
                lost.update(dict.fromkeys(failed, str(error)))
                examples = [e for e in examples if e not in lost]
                if self.mesh.sp_rank == 0:
                    print(f"left out: {error}", file=sys.stderr, flush=True)

    # -- prompt

    def prompt(self, example: Example, num_frames=None, prefill: str = "", group=None) -> Prompt:
        """The Prompt of an example, as the recipe says, from cached features."""
        features = self.features(example, num_frames or self.recipe.frames, group)
        return self.build_prompt(example, features, self.recipe.thinking, prefill)

    def turns(self, thinking: bool) -> tuple[str, str, str]:
        """What stands before the media, between them and the user's text (nothing, mostly), and
        behind it, up to the answer: the family's own chat template."""
        messages = [{"role": "user", "content": MEDIA + TEXT}]
        if self.recipe.system is not None:
            messages.insert(0, {"role": "system", "content": self.recipe.system})
        template = self.tokenizer.chat_template or CHATML
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        whole = self.tokenizer.apply_chat_template(messages, chat_template=template, **options)
        found = re.fullmatch(f"([^{TEXT}]*){MEDIA}([^{TEXT}]*){TEXT}([^{TEXT}]*)", whole)
        if not found:
            raise ModelError("the tokenizer's chat template changes the user's text")
        return found.groups()

    def build_prompt(self, example, media: list, thinking: bool = True, prefill="") -> Prompt:
        """Tokens and positions of one question about its media:

            [system turn] user turn: {media}{text} assistant turn: {prefill}

        media: from features(). thinking: ask by the recipe's template, else the bare question.
        prefill: the beginning of the answer, if it is forced."""
        self.check_question(example)
        head, between, behind = self.turns(thinking)
        pieces = [Piece(self.tokenize(head))]
        rows = []  # of features, of each medium
        for m in media:
            placed, features = self.place(m)
            pieces += placed
            rows.append(features)
        shared = sum(len(piece.ids) for piece in pieces)
        template = self.recipe.template if thinking else "{problem}"
        asked = template.replace("{problem}", example.problem)
        rest = self.tokenize(f"{between}{asked}{behind}{prefill}")
        pieces.append(Piece(rest))
        ids = [i for piece in pieces for i in piece.ids]
        places = torch.tensor([piece.places for piece in pieces for _ in piece.ids])
        media_at = places.nonzero()[:, 0]
        device = self.policy.model.get_input_embeddings().weight.device
        device = torch.device("cpu") if device.type == "meta" else device
        if len(rows) > 1:  # one is not copied
            rows = [torch.cat(rows)]
        return Prompt(
            ids=torch.tensor(ids, device=device),
            positions=self.positions(pieces).to(device),
            media=rows[0] if rows else None,
            media_at=media_at.to(device),
            text=f"{head}[{len(media_at)} media tokens]{self.tokenizer.decode(rest)}",
            shared=shared,
        )

    def positions(self, pieces: list[Piece]) -> Tensor:
        """Of the tokens of a prompt: (P,), or with M-RoPE (3, P)."""
        return torch.arange(sum(len(piece.ids) for piece in pieces))

    def idle(self) -> mrsp.Pack:
        """The smallest Pack: a rank that has nothing to train runs it beside the others, because
        gathering sharded parameters needs all ranks. Its loss is multiplied by zero."""
        one = torch.zeros(1, dtype=torch.long, device=next(self.parameters()).device)
        return mrsp.pack([Prompt(one, one, None, one[:0], "", 1)], [[one]])

    # -- policy

    def forward(self, pack: mrsp.Pack, temperature: float = 1.0, chunk: int | None = None):
        """Log-probs (M,) and entropies (M,) of a Pack's targets; see Policy."""
        return self.policy(mrsp.shard(pack, self.mesh), temperature, chunk)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input for backward; layers run twice."""
        self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})

    def add_adapters(self, rank: int, alpha: float, seed: int) -> None:
        """Freeze the model and give every linear layer of the decoder, but not the LM head, a LoRA
        adapter to train (arXiv 2106.09685), the same, and whole, on all ranks:

            W x + alpha / rank * B A x      W (out, in) frozen, A (rank, in) random, B (out, rank) 0

        ModelError without the package peft."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ModelError(f"lora_rank needs peft ({error}): pip install peft") from None
        body = self.policy.model
        linear = [name for name, layer in body.named_modules() if isinstance(layer, nn.Linear)]
        self.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear)
            inject_adapter_in_model(config, body)
        for p in self.parameters():
            if p.requires_grad:  # made in the precision of the layer, and moved by small steps
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @contextmanager
    def without_adapters(self):
        """Within this block the decoder computes as if it had no adapters."""
        adapted = [layer for layer in self.policy.modules() if hasattr(layer, "base_layer")]
        for layer in adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in adapted:
                layer.enable_adapters(True)

    @torch.no_grad()
    def merge_adapters(self) -> None:
        """Add what the adapters learned to the weights and remove them: the decoder is plain again,
        or stays so if there are none. No communication: each rank adds to its own share."""
        body = self.policy.model
        for name, layer in list(body.named_modules()):
            if hasattr(layer, "base_layer"):
                weight = layer.base_layer.weight
                update = layer.get_delta_weight("default")
                if isinstance(weight, DTensor):
                    mesh, placements = weight.device_mesh, weight.placements
                    update = distribute_tensor(update, mesh, placements, src_data_rank=None)
                weight += update
                body.set_submodule(name, layer.base_layer)
        vars(body).pop("peft_config", None)

    def shard_parameters(self, dtype=torch.bfloat16) -> None:
        """FSDP2 (Policy.shard); then the decoder is read, if load() left that for later. Tower and
        projector stay whole: small beside the decoder, frozen in RL (mrsp.join_gradients adds
        theirs up)."""
        self.policy.shard(dtype)
        self.sharded = True
        self.read_decoder()
        # At its first forward FSDP takes the precision of gradients from what is trainable then.
        self.policy.requires_grad_(True)
        with torch.no_grad():
            self(self.idle())


class Policy(nn.Module):
    """A decoder, its LM head, and log-probs. Parameters have the names of a causal language model
    of transformers: model.layers.0 ..., lm_head.weight. It is the root of FSDP2: whatever touches a
    sharded parameter has to happen inside its forward."""

    def __init__(self, body, head):
        """body: a decoder of transformers, with layers and embedding; head: its LM head."""
        super().__init__()
        self.model = body
        self.lm_head = head
        self.config = body.config
        body.set_attn_implementation("mrsp")

    def shard(self, dtype) -> None:
        """FSDP2 over all ranks: each keeps its share of every layer, in the precision it has now
        (float32: the master weights, which the optimizer steps); a layer is gathered in `dtype`
        when it runs, its gradients are added up in float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(self.buffers()).device  # parameters may be on "meta"
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        own = next(self.parameters()).dtype
        precision = MixedPrecisionPolicy(dtype, torch.promote_types(own, torch.float32))
        for module in (*self.model.layers, self):
            # Freed after each forward, the root too: what a later optimizer step changes is never
            # read from an old copy.
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
            # FSDP averages over ranks; ours is a sum (each rank's loss is divided by global counts)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has nothing but sums

    def inputs(self, ids: Tensor, media: Tensor | None = None, media_at=None) -> dict:
        """What the decoder's body is called with: token embeddings (B, L, D), with the media
        features (n, W) at flat positions media_at (n,). Wider ones than D (deepstack) are [D | D of
        level 1 | ...]: level i is added there to what layer i puts out."""
        x = self.model.get_input_embeddings()(ids)
        extra = {}
        # Also if n = 0 on this rank: backward of the features is a collective of all ranks.
        if media is not None:
            flat = x.reshape(-1, x.shape[-1])  # (B L, D)
            main, *levels = media.to(flat.device, flat.dtype).split(x.shape[-1], -1)  # (n, D) each
            x = flat.index_copy(0, media_at, main).view_as(x)
            if levels:  # by a mask, so in the order of the tokens; media_at of a share may differ
                order = media_at.argsort()
                mask = torch.zeros_like(ids, dtype=torch.bool)
                mask.view(-1)[media_at] = True
                levels = [level[order] for level in levels]
                extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": levels}
        # All ranks run the same backward (FSDP gathers in it), also where nothing here is trained.
        x = x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()
        return {"inputs_embeds": x, **extra}

    def forward(self, share: mrsp.Share, temperature: float = 1.0, chunk: int | None = None):
        """Log-probs (M,) float32 (or wider) of the targets at a sampling temperature, and the
        entropy (M,) of each predicted distribution (no gradient). share: this rank's part of a
        Pack (mrsp.shard); the result is that of the whole Pack, on every rank. chunk: targets
        whose logits exist at a time; default: 1 GB of them, in float32."""
        inputs = self.inputs(share.ids, share.media, share.media_at)  # (B, Ls, D)
        hidden = self.model(
            **inputs, position_ids=share.positions, use_cache=False, mrsp=share.layout
        ).last_hidden_state  # (B, Ls, D)
        # DEVIATION 1: only the hidden states that predict a target reach the LM head.
        hidden = hidden.reshape(-1, hidden.shape[-1])[share.hidden_at]  # (m, D)
        chunk = chunk or max(1, min(8192, 2**28 // self.lm_head.weight.shape[0]))
        parts = []
        for h, t in zip(hidden.split(chunk), share.targets.split(chunk)):
            # Checkpointed: backward computes a chunk's logits again instead of keeping (m, V).
            parts.append(checkpoint(self._log_probs, h, t, temperature, use_reentrant=False))
        logps, entropies = zip(*parts)
        return mrsp.collect(torch.cat(logps), share), mrsp.collect(torch.cat(entropies), share)

    def _log_probs(self, hidden: Tensor, targets: Tensor, temperature: float):
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logp = logits.log_softmax(-1)  # (m, V)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy
