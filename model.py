"""The policy: towers for what is seen and heard, a decoder, and the one prompt builder.

    video, image (F, H, W, 3) uint8            audio (S,) 16 kHz
       | fit: to which size; preprocess           | log-mel
       | tower, projector                         | tower
    features (T, h, w, W) or (F, K, W)         (A, W)             mrsp.EmbeddingCache: the
       |                                          |               towers are frozen in RL
       | place: Pieces, runs of text tokens and of places for features, with their positions
       v
    Prompt     ids (P,), positions (P,) or (3, P), features (N, W) and where they stand
       v
    policy     [prompt | answers] -> log-probs of the answers' tokens (M,)

A family says how it sees (fit, see), hears (hear) and places media in the prompt (place); the rest
is shared:
                     tower                       a video becomes                        positions
    VILA             SigLIP + projector          F x K tokens, "\\n" after each frame   1-D
    Qwen2.5-VL       own size, groups of 2       <start> T h w <end>                    M-RoPE
    Qwen3-VL         the same, and deepstack     T x "<1.5 seconds><start> h w <end>"  M-RoPE
    Qwen2.5-Omni     Qwen2.5-VL's and Whisper's  <start> T h w <end>, or, with its audio track,
                                                 2 s of video, 2 s of audio, ...        M-RoPE
    text             none                                                               1-D

build_prompt is the ONE builder of the sequence: rollout, policy and reference get the same Prompt,
so they cannot see different inputs (in the public code they do: the video stands at its token in
the rollout, and behind the text in training). A Prompt holds token ids and media features apart:
text embeddings belong to the policy, which is being trained, and are looked up when they are used;
the public code keeps a stale copy of them for the rollout.

Checkpoints are the published ones, a local folder or a hub id; load() tells them apart by
config.json and layout, never by name. Only safetensors are read, and no remote code runs.

Differences from the public code:
    DEVIATION 1: the LM head sees only the hidden states that predict an answer's token, in chunks;
        L x V logits (256k x 152k) never exist.
    DEVIATION 2: frames are resized with torch (bicubic, antialiased, not rounded), not with PIL;
        VILA's images are resized like its frames, never cut into tiles.
    DEVIATION 3: M-RoPE is computed here, once for sampler and trainer: text behind a medium goes on
        at the largest position of all three rows + 1, as in the original code; transformers'
        Qwen2.5-VL goes on at max(h, w), as if a video took no time.
    DEVIATION 4: a group's seconds come from the times of the frames that were really taken.
    DEVIATION 5: TSP averages what is left where the frames do not divide; VILA fails there.
    DEVIATION 6: Qwen3-VL's groups stand in their own marks alone, as its first processor wrote it;
        that of transformers 5.10 and later puts another pair of marks around the video.
    DEVIATION 7: Omni's frames that are further apart than 2 s stand whole, before the sound of
        their time; its processor splits their tokens over the chunks.

Glossary: F frames, T groups of 2 frames, h w tokens of one, K tokens a frame, A tokens of a sound,
P prompt tokens, D decoder width, W = D (1 + deepstack levels) width of a feature, C tower width,
L packed length, M predicted tokens, V vocabulary.
Check this file alone:  pytest tests/test_model.py tests/test_qwen.py tests/test_families.py
"""

import functools
import json
import math
import re
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen2ForCausalLM

import mrsp
from data import DataError, Example, Frames, Medium, Rate, named_errors
from decode import Loader

AttentionInterface.register("mrsp", mrsp.mrsp_attention)

# The user turn in thinking mode; {problem} is the question with its options (section 4; our words).
THINKING = (
    "{problem}\n\nFirst think about the question step by step, based on the video, inside "
    "<think> </think>. Then give the final answer inside <answer> </answer>; if there are "
    "options, answer with the letter of the right one."
)
BARE = "{problem}"  # non-thinking mode is the bare question
# The turns of a checkpoint whose tokenizer has no chat template of its own.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"  # a bare newline at the end of a template is dropped
)
TEXT, MEDIA = "\ufdd0", "\ufdd1"  # no characters: they stand for what a chat template goes around


class ModelError(ValueError):
    """A checkpoint or an input that the model cannot take; says what and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a model is asked. It belongs to a checkpoint (recipe.json), as its weights do: other
    frames or another wording are another experiment."""

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
        counts = min(self.num_frames, self.max_tokens, self.max_pixels or 1, self.max_frames)
        rate = self.fps is None or 0 < self.fps < math.inf
        if counts < 1 or "{problem}" not in self.template or not rate:
            raise ValueError(
                "need num_frames, max_tokens, max_pixels, max_frames >= 1, fps > 0, and {problem} "
                f"in template: {self}"
            )

    @property
    def frames(self) -> int | Rate:
        """How many frames are taken from a video."""
        return self.num_frames if self.fps is None else Rate(self.fps, self.max_frames)


class Media(NamedTuple):
    """What a tower made of one medium: features (T, h, w, W) of a video or image (VILA:
    (F, K, W)), (A, W) of audio; times (F,) in seconds of the frames, where the family uses
    them; track (A, W), the features of a video's sound."""

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


# ---------------------------------------------------------------------------------- checkpoints


def folder_of(name: str, weights: bool = True) -> Path:
    """A local checkpoint folder as it is, or a hub id (owner/name, owner/name@revision) downloaded
    into the hub's cache: safetensors (if weights are wanted), json and tokenizer files alone."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}): check "
            "the name and the network, or download it and give its folder"
        ) from None


def read_json(root: Path, name: str) -> dict:
    """A JSON file of a checkpoint; ModelError if there is none, or it is broken."""
    try:
        return json.loads((root / name).read_text())
    except FileNotFoundError:
        raise ModelError(f"{root} is no checkpoint of this family: {name} is missing") from None
    except ValueError as error:
        raise ModelError(f"{root / name}: {error}") from None


def load_part(kind, folder: Path, dtype, weights: bool = True, skip: str = ""):
    """A transformers model from its folder. ModelError if tensors are missing (they would be random
    weights) or left over; skip: a pattern of those that are not needed. weights=False: shapes
    alone, on the device "meta". Never a pickle."""
    try:
        if not weights:
            with torch.device("meta"):
                return kind(kind.config_class.from_pretrained(folder))
        part, info = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {error}") from None
    extra = sorted(x for x in info["unexpected_keys"] if not (skip and re.match(skip, x)))
    bad = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if bad or extra:
        found = [f"missing or misshapen tensors {bad}"] * bool(bad)
        found += [f"unexpected tensors {extra}"] * bool(extra)
        raise ModelError(f"{folder}: {', '.join(found)}: no checkpoint of this family, or damaged")
    return part


def load_tokenizer(root: Path):
    """Not AutoTokenizer: for a Qwen2 folder that puts Qwen2's splitting rules over those of
    tokenizer.json, silently (transformers 5)."""
    if not (root / "tokenizer.json").exists():
        raise ModelError(f"{root} is no checkpoint: tokenizer.json is missing")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    if tokenizer.chat_template is None and (root / "chat_template.json").exists():
        tokenizer.chat_template = read_json(root, "chat_template.json")["chat_template"]
    return tokenizer


# ------------------------------------------------------------------------- what families share


class MultiModal(nn.Module):
    """The policy. forward() gives log-probs of a Pack's targets, features() those of an example's
    media. A family adds its checkpoints and fit(), see(), hear() and place()."""

    takes: tuple[str, ...] = ()  # kinds of media
    mrope = False  # positions of three rows
    together = 1  # frames that the tower sees as one
    timed = False  # does place() use the times of frames?
    levels = 0  # features of lower tower layers that the decoder adds after its first layers
    decoder_kind: tuple | None = (
        None  # class and model_type of the decoder, if they are not its own
    )

    def __init__(self, llm, tower, tokenizer, preprocess: dict, media=(), controls=()):
        """media: tokens that stand for features; controls: further tokens no question may hold."""
        super().__init__()
        self.recipe, self.cache, self.loader = Recipe(), mrsp.EmbeddingCache(), Loader()
        self.mesh, self.sharded = mrsp.Mesh(), False  # ranks of a sequence; parameters in FSDP2?
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.policy, self.tower = Policy(llm), tower
        llm.set_attn_implementation("mrsp")
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*media, *controls)}
        if lacking := [token for token, i in self.ids.items() if i is None]:
            raise ModelError(f"the tokenizer lacks {', '.join(map(repr, lacking))}")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos_token: which token ends an answer?")
        self.controls = {*self.ids, *tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>"}
        self.media_tokens = tuple(self.ids[token] for token in media)  # never to be sampled
        self.eos = tokenizer.eos_token_id
        self.times = {}  # of frames; a video whose features are cached is opened once a run
        self._tower_hash, self._turns = None, {}

    @property
    def llm(self):
        return self.policy.llm

    @property
    def media_width(self) -> int:
        return self.llm.config.hidden_size * (1 + self.levels)

    # -- checkpoints

    def decoder_weights(self):
        """The decoder's tensors by their published names, one after the other, a tied head once:
        what is saved, and what samplers get. Sharded ones are gathered: every rank goes through it.
        Those of layers with an adapter (sft.add_adapters) are what merging it would make them."""
        tied = self.llm.config.tie_word_embeddings
        for name, value in self.llm.state_dict().items():
            if (tied and name == "lm_head.weight") or ".lora_" in name:
                continue
            layer, adapted, rest = name.partition(".base_layer")
            value = mrsp.whole(value)
            if adapted and rest == ".weight":
                update = self.llm.get_submodule(layer).get_delta_weight("default").detach()
                value = (value + update).to(value.dtype)
            yield layer + rest, value

    def save_pretrained(self, folder: str, write: bool = True) -> None:
        """Write the published layout, loadable again. With sharded parameters every rank calls this
        (they are gathered one by one), and one of them writes."""
        # A gathered tensor may be a view of a larger, padded one, which is not to be saved: copied.
        each, copied = self.decoder_weights(), self.sharded
        weights = {name: value.to("cpu", copy=copied) for name, value in each if write}
        if write:
            root = Path(folder)
            root.mkdir(parents=True, exist_ok=True)
            self.write(root, weights)
            (root / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2))

    def load_recipe(self, root: Path, default: Recipe | None = None) -> None:
        """Take over recipe.json, if the folder has one."""
        self.recipe = default or self.recipe
        if (root / "recipe.json").exists():
            try:
                self.recipe = Recipe(**json.loads((root / "recipe.json").read_text()))
            except (TypeError, ValueError) as error:
                raise ModelError(f"{root}/recipe.json: {error}") from None

    def save_config(self, folder: str) -> None:
        """Config and tokenizer of the decoder as a text model, no weights: what vLLM builds."""
        config = json.loads(self.llm.config.to_json_string(use_diff=False))
        name, kind = self.decoder_kind or (type(self.llm).__name__, config["model_type"])
        self.tokenizer.save_pretrained(folder)
        config |= {"architectures": [name], "model_type": kind}
        Path(folder, "config.json").write_text(json.dumps(config))

    # -- media

    def scaled(self, frames, size: tuple[int, int]) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, 3, *size), normalised as preprocessor_config.json says, on the
        tower's device and in its precision."""
        weight, p = next(self.projector.parameters()), self.preprocess
        x = torch.as_tensor(np.ascontiguousarray(frames)).to(weight.device).permute(0, 3, 1, 2)
        x = x.float()
        if x.shape[-2:] != size:  # DEVIATION 2
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (
            torch.tensor(p[k], device=x.device)[:, None, None] for k in ("image_mean", "image_std")
        )
        return ((x * p.get("rescale_factor", 1 / 255) - mean) / std).to(weight.dtype)

    def encode(self, frames, size=None, at=None, at_once: int = 64, kind="video") -> Tensor:
        """Features of frames (F, H, W, 3) uint8, an array or Frames, `together` of them by
        themselves. at: of this range alone."""
        size = size or self.fit(kind, *frames.shape[:3])
        parts = self.passes(frames.shape, at or range(len(frames)), at_once)
        pieces = (
            frames.pieces(parts) if isinstance(frames, Frames) else map(frames.__getitem__, parts)
        )
        return torch.cat([self.see(pixels, size, kind) for pixels in pieces])

    def passes(self, shape, at: range, at_once: int = 64) -> list[slice]:
        """The parts of frames (F, H, W, 3) that go through decoder and tower together: at_once of
        them (or a group), fewer of large ones: 512 MiB of pixels, and the hidden states of all
        layers of the tower, are held at a time."""
        fit = min(at_once, 2**29 // math.prod(shape[1:]))
        step = max(fit // self.together, 1) * self.together
        return [slice(i, min(i + step, at.stop)) for i in at[::step]]

    def encoder_hash(self) -> str:
        """Hash of everything that features depend on: weights of tower and projector, settings.
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

    def cast_encoder(self, dtype) -> None:
        """Frozen tower and projector in this precision; buffers (RoPE's frequencies) stay."""
        for p in (*self.tower.parameters(), *self.projector.parameters()):
            p.data = p.data.to(dtype)
        self.forget_encoder()

    @torch.no_grad()
    def features(self, example: Example, num_frames: int | Rate, group=None) -> list[Media]:
        """Features of an example's media, in order. Computed once: on a hit of the cache the file
        is not even decoded. No gradient: for a frozen tower. group: ranks that all call this for
        the same examples in the same order, and encode a medium together."""
        return [self.perceive(m, num_frames, example.id, group, True) for m in example.media]

    def ahead(self, examples: list, num_frames=None, group=None) -> None:
        """features() of these examples will be wanted, in this order: videos that are not in the
        cache may be opened."""
        frames = num_frames or self.recipe.frames

        def first(shape) -> slice:
            share, _, _ = mrsp.encoder_share(shape[0], group, self.together)
            return self.passes(shape, range(shape[0])[share])[0]

        names = {}
        for e in examples:
            for m in e.media:
                names.setdefault(m, e.id)

        def wanted():
            for m, name in names.items():
                with suppress(OSError):  # who wants it will say so
                    if m.kind == "video" and self.key(m, frames) not in self.cache:
                        yield m, frames, name, first

        self.loader.ahead(wanted())

    def usable(self, examples: list, see, lost: dict | None) -> tuple[list, list]:
        """see(examples), a list, without the examples whose media do not decode: what is left of
        examples, and what see() gave for it. lost: takes {example: message} of the others, the same
        on all ranks of a sequence; None: the DataError is raised."""
        examples = [e for e in examples if not lost or e not in lost]
        while True:
            try:
                return examples, see(examples)
            except DataError as error:
                failed = [e for e in examples if e.id == error.question]
                if lost is None or not failed:
                    raise
                lost.update(dict.fromkeys(failed, str(error)))
                examples = [e for e in examples if e not in lost]
                if self.mesh.sp_rank == 0:
                    print(f"left out: {error}", file=sys.stderr, flush=True)

    def features_trainable(self, examples: list, num_frames: int | Rate) -> list[list[Media]]:
        """features() of several examples, with gradients into tower and projector; no cache. The
        ranks of a sequence have the same examples, and encode each medium together."""
        see = functools.partial(self.perceive, group=self.mesh.sp_group)
        return [[see(m, num_frames, e.id) for m in e.media] for e in examples]

    def check_question(self, example: Example) -> None:
        """ModelError, naming the question, if it cannot be asked."""
        for m in example.media:
            self.check_taken(m, example.id)
        for token in self.controls:
            if token in example.problem:
                raise ModelError(f"question {example.id} contains the control token {token}")

    def check_taken(self, medium: Medium, name: str) -> None:
        """ModelError, naming question and file, if the family does not take such media."""
        if medium.kind not in self.takes or (medium.track and "audio" not in self.takes):
            what = medium.kind if medium.kind not in self.takes else "audio track"
            raise ModelError(
                f"question {name}: {type(self).__name__} takes no {what}, only "
                f"{' and '.join(self.takes) or 'text'}: {medium.path}"
            )

    def key(self, medium: Medium, num_frames: int | Rate, kind: str | None = None) -> str:
        """The cache's name for what is seen of a medium, or (kind audio) heard; OSError."""
        kind = kind or medium.kind
        taken = medium.num_frames or num_frames, medium.segment, self.recipe.max_pixels
        taken = taken if kind != "audio" else (medium.segment,)
        return mrsp.media_key(mrsp.file_hash(medium.path), self.encoder_hash(), kind, *taken)

    def perceive(self, medium, num_frames: int | Rate, name="", group=None, cached=False) -> Media:
        """One medium of question `name`, seen or heard; cached: kept, and found again. DataError,
        on all ranks of the group, if one of them cannot decode its share."""
        self.check_taken(medium, name)

        def agreed(decode):  # on all ranks, or none; each calls this equally often
            value = error = None
            try:
                with named_errors(medium, medium.kind, name):
                    value = decode()
            except DataError as failed:
                error = failed
            mrsp.agree(error, group)
            return value

        def kept(kind: str, compute) -> Tensor:
            if not cached:
                return compute()
            key = agreed(lambda: self.key(medium, num_frames, kind))
            return self.cache.get(key, compute, group)

        def listen():
            sound = self.loader.sound(medium, name=name)
            self.heard(len(sound))  # it is long enough
            return sound

        def hear():
            return self.hear(agreed(listen), group)

        with ExitStack() as stack:
            file = functools.partial(self.loader.open, medium, num_frames, name)
            frames = functools.cache(lambda: stack.enter_context(file()))
            known = medium, num_frames

            def times():  # another rank may have them already, from an evaluation
                if known not in self.times:
                    self.times[known] = frames().times
                return self.times[known]

            def look():  # each rank of the group decodes and encodes its share
                size = agreed(lambda: self.fit(medium.kind, *frames().shape[:3]))
                error, weight = None, next(self.projector.parameters())

                def encode(at: range) -> Tensor:
                    nonlocal error
                    try:
                        return self.encode(frames(), size, at, kind=medium.kind)
                    except DataError as failed:  # the others wait for features of this shape
                        error, tokens = failed, self.seen(size, medium.kind)
                        shape = -(-len(at) // self.together), *tokens, self.media_width
                        return torch.zeros(shape, device=weight.device, dtype=weight.dtype)

                found = mrsp.encode_parallel(encode, range(len(frames())), group, self.together)
                mrsp.agree(error, group)
                return found

            if medium.kind == "audio":
                return Media("audio", kept("audio", hear))
            when = agreed(times) if self.timed else ()
            track = kept("audio", hear) if medium.track else None
            return Media(medium.kind, kept(medium.kind, look), when, track)

    def frame_times(self, medium: Medium, num_frames: int | Rate, name="") -> np.ndarray:
        """When the frames that the model sees of a medium are shown: (F,) seconds."""
        known = medium, num_frames
        if known not in self.times:
            with self.loader.open(medium, num_frames, name) as frames:
                self.times[known] = frames.times
        return self.times[known]

    def measure(self, medium: Medium, num_frames: int | Rate, name="") -> Media:
        """What perceive() would give, on the device "meta": its shape, from the file's alone."""
        self.check_taken(medium, name)
        track = None
        with named_errors(medium, medium.kind, name):
            if medium.kind == "audio" or medium.track:
                samples = len(self.loader.sound(medium, name=name))
                track = torch.empty(self.heard(samples), self.media_width, device="meta")
            if medium.kind == "audio":
                return Media("audio", track)
            with self.loader.open(medium, num_frames, name) as frames:
                seen = self.blank(medium.kind, *frames.shape[:3], frames.times)
            return seen._replace(track=track)

    def blank(self, kind: str, frames: int, height: int, width: int, times) -> Media:
        """Features without values, on the device "meta", of frames of this size."""
        tokens = self.seen(self.fit(kind, frames, height, width), kind)
        shape = (-(-frames // self.together), *tokens, self.media_width)
        return Media(kind, torch.empty(shape, device="meta"), times)

    # -- prompt

    def prompt(self, example: Example, num_frames=None, prefill: str = "", group=None) -> Prompt:
        """The Prompt of an example, as the recipe says, from cached features."""
        features = self.features(example, num_frames or self.recipe.frames, group)
        return self.build_prompt(example, features, self.recipe.thinking, prefill)

    def turns(self, thinking: bool) -> tuple[str, str, str]:
        """What stands before the media, between them and the user's text (nothing, mostly), and
        behind it, up to the answer: the family's own chat template."""
        key = self.recipe.system, thinking
        if key not in self._turns:
            messages = [{"role": "user", "content": MEDIA + TEXT}]
            if self.recipe.system is not None:
                messages.insert(0, {"role": "system", "content": self.recipe.system})
            whole = self.tokenizer.apply_chat_template(
                messages, chat_template=self.tokenizer.chat_template or CHATML, tokenize=False,
                add_generation_prompt=True, enable_thinking=thinking,
            )  # fmt: skip
            found = re.fullmatch(f"([^{TEXT}]*){MEDIA}([^{TEXT}]*){TEXT}([^{TEXT}]*)", whole)
            if not found:
                raise ModelError("the tokenizer's chat template changes the user's text")
            self._turns[key] = found.groups()
        return self._turns[key]

    def build_prompt(self, example, media: list, thinking: bool = True, prefill="") -> Prompt:
        """Tokens and positions of one question about its media:

            [system turn] user turn: {media}{text} assistant turn: {prefill}

        media from features(), in front of the text with nothing between. thinking: ask by the
        recipe's template, else the bare question. prefill: the beginning of the answer, if it is
        forced.
        """
        template = self.recipe.template if thinking else BARE
        tok = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.check_question(example)
        head, between, behind = self.turns(thinking)
        pieces = [Piece(tok(head)), *(piece for m in media for piece in self.place(m))]
        shared = sum(len(piece.ids) for piece in pieces)
        rest = tok(f"{between}{template.replace('{problem}', example.problem)}{behind}{prefill}")
        pieces.append(Piece(rest))
        ids = [i for piece in pieces for i in piece.ids]
        places = [piece.places for piece in pieces for _ in piece.ids]
        device = self.llm.get_input_embeddings().weight.device
        device = torch.device("cpu") if device.type == "meta" else device
        rows = [row for m in media for row in self.rows(m)]
        return Prompt(
            ids=torch.tensor(ids, device=device),
            positions=(mrope_positions(pieces) if self.mrope else torch.arange(len(ids))).to(
                device
            ),
            media=(rows[0] if len(rows) == 1 else torch.cat(rows)) if rows else None,
            media_at=torch.tensor(places, dtype=torch.bool).nonzero()[:, 0].to(device),
            text=f"{head}[{sum(places)} media tokens]{self.tokenizer.decode(rest)}",
            shared=shared,
        )

    def rows(self, m: Media) -> list[Tensor]:
        """The features of a medium as rows (n, W), in the order of their places."""
        return [m.features.flatten(0, -2)]

    def idle(self) -> mrsp.Pack:
        """The smallest Pack: a rank that has nothing to train runs it beside the others, because
        gathering sharded parameters needs all ranks. Its loss is multiplied by zero."""
        one, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        one = one.to(next(self.parameters()).device)
        return mrsp.pack([Prompt(one, one, None, none, "", 1)], [[one]])

    # -- policy

    def forward(self, pack: mrsp.Pack, temperature: float = 1.0, chunk: int | None = None):
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
        # At its first forward FSDP takes the precision of gradients from what is trainable then.
        self.llm.requires_grad_(True)
        with torch.no_grad():
            self(self.idle())


def mrope_positions(pieces: list[Piece]) -> Tensor:
    """M-RoPE: positions (3, P) in time, height and width. A piece begins behind the largest
    position so far (DEVIATION 3); text has three equal rows.

    >>> mrope_positions([Piece([7, 8]), Piece([9] * 4, True, grid((0, 3), 1, 2)), Piece([7])])
    tensor([[0, 1, 2, 2, 5, 5, 6],
            [0, 1, 2, 2, 2, 2, 6],
            [0, 1, 2, 3, 2, 3, 6]])
    """
    rows, p = [], 0
    for piece in pieces:
        if piece.ids:
            cells = piece.cells
            cells = torch.arange(len(piece.ids)).expand(3, -1) if cells is None else cells
            rows.append(p + cells)
            p += int(cells.max()) + 1
    return torch.cat(rows, 1)


def grid(times, h: int, w: int) -> Tensor:
    """Positions (3, T h w) of T groups of frames at these times (in positions), in order."""
    cells = torch.cartesian_prod(torch.arange(len(times)), torch.arange(h), torch.arange(w)).T
    return torch.stack([torch.as_tensor(times)[cells[0]], *cells[1:]])


class Policy(nn.Module):
    """Decoder and log-probs as one module. It is the root of FSDP2: whatever touches a sharded
    parameter has to happen inside its forward."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def inputs(self, ids: Tensor, media: Tensor | None = None, media_at=None) -> dict:
        """What the decoder's body is called with: token embeddings (B, L, D), with the media
        features (n, W) at flat positions media_at (n,). Wider ones than D (deepstack) are [D | D of
        level 1 | ...]: level i is added there to what layer i puts out."""
        x, extra = self.llm.get_input_embeddings()(ids), {}
        if media is not None:  # also if none of it is here: its gradient is awaited by all ranks
            flat = x.reshape(-1, x.shape[-1])
            main, *levels = media.to(flat.device, flat.dtype).split(x.shape[-1], -1)
            x = flat.index_copy(0, media_at, main).view_as(x)
            if levels:  # by a mask, so in the order of positions; a share's may be another
                order, mask = media_at.argsort(), torch.zeros_like(ids, dtype=torch.bool)
                mask.view(-1)[media_at] = True
                levels = [level[order] for level in levels]
                extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": levels}
        # All ranks run the same backward (FSDP gathers in it), also where nothing here is trained.
        x = x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()
        return {"inputs_embeds": x, **extra}

    def forward(
        self, share: mrsp.Pack, temperature: float = 1.0, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (M,) float32 (or wider) of the targets at a sampling temperature, and the
        entropy (M,) of each predicted distribution (no gradient). share: this rank's part of a
        Pack (mrsp.shard); the result is that of the whole Pack, on every rank. chunk: targets
        whose logits exist at a time; default: 1 GB of them, in float32."""
        inputs = self.inputs(share.ids, share.media, share.media_at)  # (B, Ls, D)
        hidden = self.llm.model(
            **inputs, position_ids=share.positions, use_cache=False, mrsp=share.layout
        ).last_hidden_state  # (B, Ls, D)
        # DEVIATION 1: only the hidden states that predict a target reach the LM head.
        hidden = mrsp.spread(hidden.reshape(-1, hidden.shape[-1]), share)  # (width, D)
        chunk = chunk or max(1, min(8192, 2**28 // self.llm.lm_head.weight.shape[0]))
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


# ------------------------------------------------------------------------------------------ text


def text_class(root: Path):
    """transformers' class of the decoder in a folder; None if it has none."""
    try:
        config = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
    except (ValueError, OSError):  # unknown, or it wants remote code
        return None
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


class Text(MultiModal):
    """Any decoder that transformers loads without remote code (Qwen2.5, Qwen3, Llama ...) and
    whose answers can share a packed prompt: tried when it is loaded."""

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

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32, weights: bool = True) -> "Text":
        root = folder_of(folder, weights)
        llm = load_part(text_class(root), root, dtype, weights)
        model = cls(llm, load_tokenizer(root))
        model.load_recipe(root)
        if weights:
            model.try_packing()
        return model

    @torch.no_grad()
    def try_packing(self) -> None:
        """ModelError unless the log-probs of two answers behind one prompt are those of the model's
        own forward on two sequences. They are not, for instance, where logits are scaled or capped,
        or positions are no rotary ones."""
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(self.llm.config.vocab_size, (24,), generator=g)
        ids = ids.to(self.llm.get_input_embeddings().weight.device)
        first, *answers = ids.split(8)
        prompt = Prompt(first, torch.arange(8, device=ids.device), None, ids[:0], "", 8)
        self.eval()
        ours = self(mrsp.pack([prompt], [answers]))[0]
        self.llm.set_attn_implementation("sdpa")
        both = torch.stack([torch.cat([first, a]) for a in answers])  # (2, 16)
        theirs = self.llm(input_ids=both).logits[:, 7:-1].float().log_softmax(-1)
        theirs = theirs.gather(-1, both[:, 8:, None]).flatten()
        self.llm.set_attn_implementation("mrsp")
        gap = (ours - theirs).abs().mean().item()
        if not gap < (1e-3 if self.llm.dtype == torch.float32 else 0.1):
            raise ModelError(
                f"{type(self.llm).__name__}: log-probs behind a shared prompt differ by {gap:.2g} "
                "from those of the model's own forward: this family cannot be trained here"
            )

    def write(self, root: Path, weights: dict) -> None:
        self.llm.save_pretrained(root, state_dict=weights)
        self.tokenizer.save_pretrained(root)

    def encoder_settings(self) -> list:
        return []


# ----------------------------------------------------------------------------------------- VILA


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


# ----------------------------------------------------------------------------------------- Qwen


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


# ------------------------------------------------------------------------------------ any of them

FAMILIES = {"qwen2_5_vl": QwenVL, "qwen3_vl": Qwen3VL, "qwen2_5_omni": Omni}


def load(name: str, dtype=torch.float32, weights: bool = True) -> MultiModal:
    """The model in a folder or on the hub, whatever its family: told by config.json and layout, not
    by name. weights=False: without them, on the device "meta", to look at shapes and prompts."""
    root = folder_of(name, weights)
    if not (root / "config.json").exists():
        raise ModelError(
            f"{name} is no checkpoint: config.json is missing, or there is no such folder"
        )
    kind = read_json(root, "config.json").get("model_type")
    if (root / "llm").is_dir():
        return VILA.from_pretrained(root, dtype, weights)
    if kind in FAMILIES:
        return FAMILIES[kind].from_pretrained(root, dtype, weights)
    if text_class(root) is not None:
        return Text.from_pretrained(root, dtype, weights)
    raise ModelError(
        f"{name}: model_type {kind!r} is not supported; supported are VILA's layout (folders llm, "
        f"vision_tower, mm_projector), {', '.join(FAMILIES)}, and text decoders without remote code"
    )
