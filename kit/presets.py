"""Presets: all settings of a training run, by name, each number with its source.

    command line  >  recipe.json of the checkpoint  >  preset          the first that says it counts

A recipe is how a checkpoint is asked (frames, prompt, length of answers). It was trained with its
own, so its recipe.json comes before the preset's; what differs is printed. `None` on the command
line unsets what may be unset.

Sources of the numbers: P the paper, LRL its released code's defaults (grpo.Config has those that
are not set here), V VILA's nearest public SFT recipe, ours: our choice.

Check this file alone:  pytest tests/test_presets.py
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import OmitArgPrefixes

from grpo import Config as GRPOConfig
from kit.method import Method
from kit.options import OptionError, parse
from kit.toy import ToyConfig
from kit.vllm_engine import RolloutConfig
from model import THINKING, Recipe, read_recipe
from sft import SFTConfig


@dataclass(frozen=True)
class RunConfig:
    """What most runs set."""

    preset: str = "toy"  # named settings, the defaults of all others: see README
    model: str | None = None  # checkpoint folder or hub id; the preset toy makes one
    data: str | None = None  # rows for GRPO: .jsonl, .parquet or DATA_SET@SPLIT
    video_dir: str | None = None  # folder of the rows' media; default: that of the rows
    sft_data: str | None = None  # rows for chain-of-thought SFT before GRPO; None: no SFT
    test_data: str | None = None  # rows to evaluate on, before and after GRPO; None: not at all
    method: str | None = None  # a Python file with a reward, advantages, loss or Config of its own
    output_dir: str = "runs/toy"  # where everything is written
    rollout: Literal["vllm", "torch"] | None = None  # sampler; None: vllm with a GPU, if installed
    dry_run: bool = False  # show settings, ranks, memory and the first prompt; load no weights


@dataclass(frozen=True)
class RanksConfig:
    """How the ranks share the work."""

    sp: int = 1  # ranks that share a sequence (sequence parallelism); divides the number of ranks
    # how attention is shared among them: see mrsp.py
    sp_attention: Literal["auto", "ulysses", "gather", "ring", "ulysses+gather", "ulysses+ring"] = (
        "auto"
    )
    fsdp: bool = False  # shard parameters, gradients and optimizer over all ranks
    dtype: Literal["float32", "bfloat16"] = "float32"  # of sharded layers; masters are float32
    checkpointing: bool = False  # keep only layer inputs for backward, and run layers twice

    def __post_init__(self):
        if self.sp < 1:
            raise ValueError(f"sp must be at least 1, not {self.sp}")
        if self.dtype == "bfloat16" and not self.fsdp:
            raise ValueError("dtype bfloat16 needs --fsdp true: the master weights stay float32")


@dataclass(frozen=True)
class MediaConfig:
    """Videos, images and sounds, and what is kept of them."""

    on_bad_video: Literal["error", "skip"] = "error"  # skip: leave such rows out, and list them
    decode_ahead: int = 1  # videos that child processes open beforehand; 0: decode without them
    decode_seconds: float = 120.0  # a decoder that gives nothing for so long is stopped
    cache_dir: str | None = None  # folder of embeddings kept across runs; None: in memory only
    cache_gb: float = 100.0  # size limit of that folder; least recently used embeddings go first

    def __post_init__(self):
        if self.decode_ahead < 0:
            raise ValueError(f"decode_ahead must be at least 0, not {self.decode_ahead}")
        for name in ("decode_seconds", "cache_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class EvalConfig:
    """What is asked besides the test rows, after GRPO; nothing by default."""

    frames: tuple[int, ...] = ()  # numbers of frames: the curve of accuracy over frames
    prefill: str = ""  # control: the model before GRPO, forced to begin its answers like this
    other_data: str | None = None  # further rows, of another environment
    wrong_media: bool = False  # control: each question about another one's video

    def __post_init__(self):
        if any(n < 1 for n in self.frames):
            raise ValueError(f"frames must be at least 1 each, not {self.frames}")


@dataclass(frozen=True)
class MoreConfig:
    """What few runs set."""

    seed: int = 0  # of data, weights, batches and sampling
    rl_seed: int | None = None  # of batches and sampling in GRPO; None: as seed
    show_every: int = 20  # GRPO steps between two decoded rollouts in samples.jsonl

    def __post_init__(self):
        if self.show_every < 1:
            raise ValueError(f"show_every must be at least 1, not {self.show_every}")


@dataclass(frozen=True)
class Settings:
    """All settings of a run; those of a part with a name are options --PART.FIELD."""

    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    ranks: OmitArgPrefixes[RanksConfig] = field(default_factory=RanksConfig)
    media: OmitArgPrefixes[MediaConfig] = field(default_factory=MediaConfig)
    more: OmitArgPrefixes[MoreConfig] = field(default_factory=MoreConfig)
    recipe: Recipe = field(default_factory=Recipe)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)

    @property
    def makes_toy(self) -> bool:
        """Does the run make its own data and checkpoint first?"""
        return self.run.preset == "toy" and self.run.model is None

    @property
    def for_gpus(self) -> bool:
        """Is the model so large that GPUs share it?"""
        return self.ranks.fsdp and self.run.preset != "toy"

    def __post_init__(self):
        if self.ranks.sp % self.rollout.tp:
            raise ValueError(
                f"--rollout.tp {self.rollout.tp} must divide --sp {self.ranks.sp}: the ranks of an "
                "engine have to hold the same prompts"
            )
        if self.ranks.fsdp and self.sft.optimizer == "muon":
            raise ValueError("muon needs whole matrices: --sft.optimizer adamw, or --fsdp false")


QWEN = Settings(
    run=RunConfig(
        preset="qwen2.5-vl-7b",
        model="Qwen/Qwen2.5-VL-7B-Instruct",  # P: one of the two models of its efficiency figure
        output_dir="runs/qwen2.5-vl-7b",
    ),
    ranks=RanksConfig(
        sp=4,  # P: SP degree of the efficiency figure
        fsdp=True,  # ours, with the next two: 7B on 80 GB
        dtype="bfloat16",
        checkpointing=True,
    ),
    media=MediaConfig(cache_dir="runs/embeddings"),  # ours: 100 GB of embeddings, for all runs
    recipe=Recipe(
        num_frames=256,  # P: its figure has 8 to 1,024
        max_tokens=2048,  # LRL
        max_pixels=128 * 28 * 28,  # ours: 64 tokens a frame, near the 71 of the paper's hour
    ),
    sft=SFTConfig(
        train="llm",  # the tower is frozen
        groups=64,  # ours, with the next two: an epoch of the paper's 36K samples
        texts=1,
        steps=562,
        lr=2e-5,  # V, with the next two
        warmup=0.03,
        weight_decay=0.0,
    ),
    grpo=GRPOConfig(
        group=8,  # P
        prompts=512,  # LRL, with the next
        update_prompts=128,
        steps=133,  # ours: an epoch of the paper's 68K samples
    ),
    rollout=RolloutConfig(max_len=32768, memory=0.5),  # ours: 16k of video, question, answer
)


def like_qwen(name: str, model: str | None = None, sp: int = 4, **parts) -> Settings:
    """QWEN under another name, with other parts."""
    run = replace(QWEN.run, preset=name, output_dir=f"runs/{name}", model=model or QWEN.run.model)
    return replace(QWEN, run=run, ranks=replace(QWEN.ranks, sp=sp), **parts)


# ours: fewer videos a step, because the embeddings of each take 1 to 2 GB.
LONG = replace(QWEN.grpo, prompts=32, update_prompts=8)
HOUR = RolloutConfig(max_len=270_000, memory=0.5)  # ours: 256k, question and answer

PRESETS = {
    "toy": Settings(
        recipe=Recipe(
            max_tokens=24, template="{problem} Think, then answer.", data="../data/test.jsonl"
        ),
        sft=SFTConfig(steps=60, groups=16, texts=8, train="llm", lr=6e-4),
        grpo=GRPOConfig(
            steps=250,
            prompts=32,
            update_prompts=32,
            micro_prompts=16,
            top_p=1.0,
            lr=3e-4,
            weight_decay=0.0,
            kl_coef=0.0,
            scale_std=False,
        ),
        rollout=RolloutConfig(kv_gb=1.0, eager=True),
        eval=EvalConfig(frames=(8, 16, 32, 64), prefill="<think> seen", wrong_media=True),
    ),
    "small": Settings(  # ours, all of it: a model of one's own of about 0.5B on one GPU
        run=RunConfig(preset="small", output_dir="runs/small"),
        ranks=RanksConfig(checkpointing=True),
        recipe=Recipe(num_frames=64, max_tokens=512, max_pixels=128 * 28 * 28),
        sft=SFTConfig(steps=200, groups=16, texts=1, train="llm", lr=2e-5),
        grpo=GRPOConfig(steps=200, prompts=16, update_prompts=16, group=8),
        rollout=RolloutConfig(max_len=16384, memory=0.4),
    ),
    "qwen2.5-vl-7b": QWEN,
    "longvila-7b": like_qwen(
        "longvila-7b",
        "Efficient-Large-Model/LongVILA-R1-7B",  # P
        recipe=Recipe(
            num_frames=512,  # P: where its figure of accuracy over frames ends
            max_tokens=2048,  # LRL
        ),
        grpo=LONG,
        # ours: up to 257 tokens a frame (16k in all, if config.json says TSP)
        rollout=RolloutConfig(max_len=139_264, memory=0.5),
    ),
    "hour": like_qwen(
        "hour",
        sp=8,  # P: an hour on one node of 8 GPUs
        recipe=Recipe(
            num_frames=3600,  # P: an hour at a frame a second
            max_tokens=2048,  # LRL
            max_pixels=145 * 28 * 28,  # P: 256k tokens in all, 71 a frame; 252 x 448 pixels of 16:9
        ),
        grpo=LONG,
        rollout=HOUR,
    ),
    "max-frames": like_qwen(
        "max-frames",
        sp=8,
        recipe=Recipe(
            num_frames=8192,  # P: the most frames of a video
            max_tokens=2048,  # LRL
            max_pixels=65 * 28 * 28,  # ours: 246k tokens, as many as the paper's hour
        ),
        grpo=LONG,
        rollout=HOUR,
    ),
    "omni": like_qwen(
        "omni",
        "Qwen/Qwen2.5-Omni-7B",  # LRL: its audio model, the Thinker alone
        recipe=Recipe(
            num_frames=64,  # ours; with the audio track, 25 tokens a second
            max_tokens=2048,  # LRL
            max_pixels=128 * 28 * 28,  # the least that the family's processor makes of a frame
        ),
    ),
    "text": like_qwen(
        "text",
        "Qwen/Qwen2.5-7B-Instruct",
        sp=1,
        recipe=Recipe(
            template=THINKING.replace(", based on the video", ""),
            max_tokens=2048,  # LRL
        ),
        rollout=RolloutConfig(max_len=8192, memory=0.5),  # ours
    ),
}


def given(argv: list[str], option: str) -> str | None:
    """The value of an option in a command line that is not parsed yet, or None.

    >>> given(["--sp", "2", "--model=m"], "--model"), given(["--sp", "2"], "--model")
    ('m', None)
    """
    for word, behind in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else behind
    return None


def default_preset(argv: list[str]) -> str:
    """The preset of a command line that names none: that of the published model it names, "small"
    for a model of one's own; without a model the paper's setting where there are GPUs or rows of
    one's own, and the toy elsewhere."""
    model = given(argv, "--model")
    if model is not None:
        published = [name for name, preset in PRESETS.items() if preset.run.model == model]
        return published[0] if published else "small"
    own_rows = given(argv, "--data") or given(argv, "--video_dir")
    return "qwen2.5-vl-7b" if own_rows or torch.cuda.is_available() else "toy"


def read_settings(argv: list[str] | None = None) -> tuple[Settings, Method, list[str]]:
    """A command line -> its settings, its method, and lines that say what a checkpoint's recipe
    changed. Raises OptionError; DataError for a method file, ModelError for a recipe.json."""
    argv = sys.argv[1:] if argv is None else argv
    name = given(argv, "--preset") or default_preset(argv)
    if name not in PRESETS:
        raise OptionError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
    method = Method(given(argv, "--method"))
    preset = PRESETS[name]
    preset = replace(preset, grpo=method.Config(**asdict(preset.grpo)))
    about = "Train LongVILA-R1: chain-of-thought SFT, GRPO, evaluation."
    settings = parse(Settings, argv, preset, about=about)
    own = read_recipe(Path(settings.run.model)) if settings.run.model else None
    if own is None:
        method.config = settings.grpo
        return settings, method, []
    settings = parse(Settings, argv, replace(preset, recipe=own), about=about)
    method.config = settings.grpo
    lines = []
    for key, value in asdict(settings.recipe).items():
        if value != getattr(own, key):
            lines.append(f"{key} {value!r} by option (the checkpoint: {getattr(own, key)!r})")
        elif value != getattr(preset.recipe, key):
            lines.append(f"{key} {value!r} (preset {name}: {getattr(preset.recipe, key)!r})")
    return settings, method, [f"recipe.json of the checkpoint: {line}" for line in lines]
