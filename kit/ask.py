"""Asking: what eval.py and kit/filter.py share, from the options to the answers.

    AskConfig ---> Job    examples, each by its own id       of rows, or of a benchmark's file
                    |       malformed row: a stand-in        each of these is asked too, and the
                    |       medium missing: refused, or kept   error stands in place of an answer
                    |     frames {label: how many}           of the options, or of recipe.json
                    |     settings {name: value}             all that the answers depend on
                    |     model, engine                      made when they are asked first
                    v
    ask(model, engine, examples) --prompt--> fits? --generate--> n Responses each, or an error
                                                --grade(method)--> parts of its reward

A question is lost in three ways: its row is malformed, its media are missing or do not decode, its
prompt does not fit. None is dropped: ask() returns the error in its place, and the caller counts it
as wrong. Media that are missing before anything was asked are mostly a wrong --video_dir: that is
refused, unless --on_missing wrong. Large harnesses skip what fails, so that the share is of
whatever was left.

settings() is compared by kit/work.Folder when a command goes on where it was killed: what changes
an answer or its grade is in it (the weights' files, the rows, the media's sizes, the method), what
does not is left out (where videos and caches lie, how many ranks share an engine).

Check this file alone:  pytest tests/test_eval.py
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import data
from data import DataError, Example, Rate
from families import load
from families.files import folder_of
from kit import benchmarks
from kit.decode import Loader
from kit.method import Method
from kit.run import Ranks
from model import ModelError, MultiModal, Recipe
from mrsp import EmbeddingCache
from rollout import RolloutConfig, RolloutError, engine_kind, make_engine


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """What is asked, whom, and how: the options that commands which ask have in common."""

    model: str  # checkpoint folder or hub id
    data: str | None = None  # rows; default: the test rows that recipe.json names
    video_dir: str | None = None  # folder that paths are relative to; default: the rows' own
    frames: tuple[int, ...] = ()  # frames a video, like 64 128; default: from recipe.json
    fps: float | None = None  # frames a second instead, as many as each video gives
    max_frames: int | None = None  # with fps, of a video; default: from recipe.json
    decode_ahead: int = 2  # videos that child processes open beforehand
    decode_seconds: float = 120.0  # a decoder that hangs is stopped then
    max_tokens: int | None = None  # longest answer; default: from recipe.json
    thinking: bool | None = None  # by the template, or the bare question; default: recipe.json
    method: str | None = None  # Python file whose reward() grades; default: grpo.py's
    rollout: Literal["vllm", "torch"] | None = None  # default: vllm with a GPU, if installed
    dtype: Literal["float32", "bfloat16"] = "float32"  # of model and sampler
    rollout_tp: int = 1  # vLLM: ranks that share an engine
    rollout_max_len: int | None = None  # vLLM: longest prompt and answer; default: the model's
    rollout_memory: float = 0.5  # fraction of a GPU for vLLM
    cache_dir: str | None = None  # folder of embeddings kept across runs; default: none are kept
    batch: int = 64  # questions that are asked, and kept, together
    limit: int | None = None  # a quick look: only so many questions, evenly spread
    on_missing: Literal["refuse", "wrong"] = "refuse"  # media not there or not taken: wrong?

    # What may change between a killed command and the one that goes on with its folder: what other
    # options become (frames in the recipe), and what changes no answer.
    FREE = tuple(
        "frames fps max_frames max_tokens thinking video_dir cache_dir on_missing rollout_tp "
        "rollout_max_len rollout_memory decode_ahead decode_seconds".split()
    )

    def __post_init__(self):
        for name in "fps max_frames decode_seconds max_tokens rollout_max_len limit".split():
            above_zero(self, name)
        for name in ("rollout_tp", "batch"):
            above_zero(self, name)
        for n in self.frames:
            if n < 1:
                raise ValueError(f"frames must be above 0, not {n}")
        if self.decode_ahead < 0:
            raise ValueError(f"decode_ahead must be at least 0, not {self.decode_ahead}")
        if not 0 < self.rollout_memory < 1:
            raise ValueError(f"rollout_memory must be within 0 and 1, not {self.rollout_memory}")
        if self.frames and self.fps is not None:
            raise ValueError("--frames or --fps? give one of them")


def above_zero(config, name: str) -> None:
    """ValueError if a field is a number that is not above 0, or not finite; None is no number."""
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:  # nan fails too
        raise ValueError(f"{name} must be above 0, not {value}")


def digest(value) -> str:
    """A short hash of a value that prints the same whenever it is the same."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------- asking and grading


def ask(
    model: MultiModal,
    engine,
    examples: list[Example],
    num_frames: int | Rate,
    sampling,
    n: int = 1,
    seeds: list[int] | None = None,
    prefill: str = "",
    rewrite: Callable[[Example, int | Rate], Example] | None = None,
) -> list:
    """n answers to each example: a list of Responses, or the error why it cannot be asked.

    seeds: one an example. prefill: forced beginning of every answer. rewrite(example, num_frames):
    the Example that is asked in its place; it may raise DataError.
    """
    found = [None] * len(examples)
    prompts = []
    asked = []  # the index of each prompt's example
    for i, example in enumerate(examples):
        try:
            worded = rewrite(example, num_frames) if rewrite else example
            prompt = model.prompt(worded, num_frames, prefill)
            engine.check_fits(prompt, sampling)  # else it would refuse the whole batch
        except (DataError, ModelError, RolloutError) as error:
            found[i] = error
            continue
        prompts.append(prompt)
        asked.append(i)
    if not prompts:
        return found
    own_seeds = None if seeds is None else [seeds[i] for i in asked]
    for i, answers in zip(asked, engine.generate(prompts, n, sampling, own_seeds)):
        found[i] = answers
    return found


def grade(method: Method, text: str, example: Example) -> dict[str, float]:
    """The parts of an answer's reward by the method's default Config; its accuracy is what counts:
    0 to 1, and a fraction if the method gives one. DataError for anything else. text: see
    grpo.graded."""
    parts = method.reward(text, example, method.Config())
    if not 0 <= parts["accuracy"] <= 1:
        raise DataError(
            f"{method.file}: reward() gives accuracy = {parts['accuracy']} to question "
            f"{example.id}: a share between 0 and 1 is counted"
        )
    return parts


# --------------------------------------------------------------------------- what a command asks


class Job:
    """What a command asks, and whom.

    examples: the questions, malformed rows among them as stand-ins; total: how many there were
    before --limit; frames {what it is called: how many are taken, a number or a Rate}.
    Raises DataError, ModelError, RolloutError before anything large is loaded.
    """

    def __init__(self, config: AskConfig, ranks: Ranks, benchmark: str | None = None):
        self.config = config
        self.ranks = ranks
        self.method = Method(config.method)
        self.loader = Loader(config.decode_ahead, config.decode_seconds)
        self.kind = engine_kind(config.rollout)
        if self.kind == "torch" and config.rollout_tp > 1:
            raise RolloutError("--rollout_tp is vLLM's: add --rollout vllm, or leave it out")
        look = load(config.model, weights=False)
        self.recipe = recipe_of(config, look.recipe)
        if self.recipe.fps is None:
            self.frames = {n: n for n in config.frames or (self.recipe.num_frames,)}
        else:
            self.frames = {f"{self.recipe.fps:g}fps": self.recipe.frames}
        self.source = config.data
        if self.source is None and look.recipe.data:
            self.source = os.path.join(config.model, look.recipe.data)
        if not self.source:
            raise DataError(f"{config.model}/recipe.json names no data; give --data FILE.jsonl")
        bad = []  # (where, message) of malformed rows
        if benchmark:
            rows = benchmarks.load(benchmark, self.source, config.video_dir, bad)
        else:
            rows = data.load_rows(self.source, config.video_dir, bad)
        if config.on_missing == "refuse":
            check_media(look, rows)
        self.malformed = dict(bad)
        rows += map(data.stand_in, self.malformed)
        self.examples, self.total = quick_look(rows, benchmark, config.limit)

    def rewrite(self, example: Example, num_frames: int | Rate) -> Example:
        """See ask: a malformed row cannot be asked."""
        if example.id in self.malformed:
            raise DataError(self.malformed[example.id])
        return example

    def settings(self) -> dict:
        """All that the answers depend on, as JSON has it. Of weights the files' sizes and times: to
        read them all would take as long as to load them. Of media names and sizes: their folder may
        move, but answers to one that was not there, or cut off, are not those to what came
        instead."""
        options = asdict(self.config)
        found = {name: options[name] for name in options if name not in self.config.FREE}
        found |= asdict(self.recipe)
        method = self.config.method and Path(self.config.method).read_text()
        found |= {
            "data": self.source,
            "rollout": self.kind,
            "method": method and digest(method),
            "num_frames": list(self.frames),
            "weights": digest(weight_files(folder_of(self.config.model))),
            "questions": digest((list(map(asked_by, self.examples)), self.malformed)),
            "media": digest(media_sizes(self.examples)),
        }
        return json.loads(json.dumps(found, default=str))

    @functools.cached_property
    def model(self) -> MultiModal:
        """The model, on this rank's device."""
        model = load(self.config.model, getattr(torch, self.config.dtype)).to(self.ranks.device)
        model.recipe = self.recipe
        model.loader = self.loader
        try:
            model.cache = EmbeddingCache(self.config.cache_dir)
        except OSError as error:
            raise DataError(f"--cache_dir {self.config.cache_dir}: {error}") from None
        return model

    @functools.cached_property
    def engine(self):
        """The model's sampler, on this rank."""
        config = RolloutConfig(
            tp=self.config.rollout_tp,
            memory=self.config.rollout_memory,
            max_len=self.config.rollout_max_len,
        )
        engine = make_engine(self.kind, self.model, config, getattr(torch, self.config.dtype))
        engine.sync(self.model)
        return engine

    def close(self) -> None:
        """All is asked: the engine, the decoding processes and the process group go."""
        if "engine" in vars(self):
            self.engine.close()
        self.loader.close()
        if self.ranks.world > 1:
            dist.destroy_process_group()


def recipe_of(config: AskConfig, recipe: Recipe) -> Recipe:
    """A checkpoint's recipe with what the options say otherwise."""
    given = {name: getattr(config, name) for name in ("fps", "max_frames", "max_tokens", "thinking")}
    recipe = replace(recipe, **{name: x for name, x in given.items() if x is not None})
    if config.frames:
        return replace(recipe, fps=None, num_frames=config.frames[-1])
    return recipe


def check_media(look: MultiModal, examples: list[Example]) -> None:
    """DataError that counts the questions with media that are not there, or of a kind that the
    model does not take, and names the first."""
    gone = {}
    for example in examples:
        try:
            for medium in example.media:
                look.check_taken(medium, example.id)
                if not os.path.isfile(medium.path):
                    raise DataError(f"question {example.id}: no such file: {medium.path}")
        except (DataError, ModelError) as error:
            gone[example.id] = str(error)
    if gone:
        raise DataError(
            f"{len(gone)} of {len(examples)} questions cannot be asked, the first: "
            f"{next(iter(gone.values()))}. Check --video_dir and --model, or count them as "
            "wrong with --on_missing wrong"
        )


def quick_look(examples: list[Example], benchmark: str | None, limit: int | None):
    """(questions, how many there are in all): all of them, or `limit`, evenly spread; what counts
    as one question (benchmarks.unit) stays together."""
    units = list(dict.fromkeys(benchmarks.unit(benchmark, e.id) for e in examples))
    if limit is None:
        return examples, len(units)
    kept = {units[i] for i in data.frame_indices(len(units), limit)}
    return [e for e in examples if benchmarks.unit(benchmark, e.id) in kept], len(units)


def asked_by(example: Example) -> tuple:
    """What an answer to a question depends on, and its grade; of media not the folder."""
    media = [m._replace(path=Path(m.path).name) for m in example.media]
    return example.id, example.problem, example.answer, media


def media_sizes(examples: list[Example]) -> list[int]:
    """Bytes of each file, in order; -1 for one that is not there."""
    paths = dict.fromkeys(m.path for e in examples for m in e.media)
    return [os.path.getsize(path) if os.path.isfile(path) else -1 for path in paths]


def weight_files(root: Path) -> list[tuple]:
    """(name, bytes, time) of a checkpoint's weights and configs."""
    files = sorted({*root.rglob("*.safetensors"), *root.rglob("config.json")})
    return [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
