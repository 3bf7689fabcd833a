"""Asking: what eval.py and kit/filter.py share, from the options to the answers.

    AskConfig --> Job   examples, by their ids       rows, or a benchmark's published file
                   |    frames                       the options', or recipe.json's
                   |    settings                     all that the answers depend on
                   |    asked: model, engine         loaded when something is asked first
                   v
    ask(model, engine, examples) --prompt, fits?--> generate --> n Responses each, or an error
    grade(method, text, example) --> parts of the reward; accuracy, 0 to 1, is what counts

A question can be lost in three ways: its row is malformed (a stand-in takes its place), its media
are missing or do not decode, its prompt does not fit. None is dropped: ask() returns the error, and
the caller counts it as wrong. Large harnesses skip what fails, so that the share is of whatever was
left. Media that are missing before anything is asked are mostly a wrong --video_dir: refused,
unless --on_missing wrong.

settings() are compared when a command goes on where it was killed (kit/work.py): what changes an
answer or its grade is among them, where videos lie or how many ranks share an engine is not.

Check this file alone:  pytest tests/test_eval.py
"""

import functools
import hashlib
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import data
from data import DataError, Example, Rate
from families import load
from families.files import folder_of
from kit import benchmarks
from kit.decode import Loader
from kit.method import Method
from kit.ranks import find_ranks
from kit.vllm_engine import RolloutConfig, engine_kind, make_engine
from kit.work import Folder
from model import ModelError, MultiModal
from mrsp import EmbeddingCache
from rollout import RolloutError


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

    # No answer depends on these, or it depends on what becomes of them in the recipe.
    FREE = (
        "frames fps max_frames max_tokens thinking video_dir cache_dir on_missing rollout_tp "
        "rollout_max_len rollout_memory decode_ahead decode_seconds"
    )

    def __post_init__(self):
        counts = "max_frames max_tokens rollout_tp rollout_max_len batch limit fps decode_seconds"
        for name in counts.split():
            above_zero(name, getattr(self, name))
        for number in self.frames:
            above_zero("frames", number)
        if not 0 < self.rollout_memory < 1:
            raise ValueError(f"rollout_memory must be within 0 and 1, not {self.rollout_memory}")
        if self.frames and self.fps is not None:
            raise ValueError("--frames or --fps? give one of them")


def above_zero(name: str, value: float | None) -> None:
    """ValueError for a number that is not above 0, or not finite."""
    if value is not None and not 0 < value < math.inf:  # nan fails too
        raise ValueError(f"{name} must be above 0, not {value}")


# -------------------------------------------------------------------------- asking and grading


def ask(
    model, engine, examples, num_frames, sampling, n=1, seeds=None, prefill="", rewrite=None
) -> list:
    """n answers to each example: a list of Responses, or the error why it cannot be asked.

    seeds: one an example. prefill: forced beginning of every answer. rewrite(example, num_frames):
    the Example that is asked in its place; it may raise DataError.
    """
    found = [None] * len(examples)
    prompts = []
    places = []  # of the prompts' examples
    for i, example in enumerate(examples):
        try:
            worded = rewrite(example, num_frames) if rewrite else example
            prompt = model.prompt(worded, num_frames, prefill)
            engine.check_fits(prompt, sampling)  # else it would refuse the whole batch
            prompts.append(prompt)
            places.append(i)
        except (DataError, ModelError, RolloutError) as error:
            found[i] = error
    if prompts:
        own_seeds = seeds and [seeds[i] for i in places]
        for i, answers in zip(places, engine.generate(prompts, n, sampling, own_seeds)):
            found[i] = answers
    return found


def grade(method: Method, text: str, example: Example) -> dict[str, float]:
    """The parts of an answer's reward by the method's default Config. Its accuracy counts: 0, 1, or
    a fraction; DataError for anything else. text: see grpo.graded."""
    parts = method.reward(text, example, method.config)
    if not 0 <= parts["accuracy"] <= 1:
        raise DataError(
            f"{method.file}: reward() gives accuracy = {parts['accuracy']} to question "
            f"{example.id}: it must be a share, from 0 to 1"
        )
    return parts


# --------------------------------------------------------------------------- what a command asks


class Job:
    """What a command asks, and whom.

    examples: the questions, with stand-ins for malformed rows; total: how many there were before
    --limit; frames {what it is called: how many are taken of a video}. subtitles: folder of .srt
    files. DataError, ModelError, RolloutError: before anything large is loaded.
    """

    def __init__(self, config: AskConfig, benchmark=None, subtitles: str | None = None):
        self.config = config
        self.ranks = find_ranks()
        self.method = Method(config.method)
        self.loader = Loader(config.decode_ahead, config.decode_seconds)
        self.kind = engine_kind(config.rollout)
        if self.kind == "torch" and config.rollout_tp > 1:
            raise RolloutError("--rollout_tp is vLLM's: add --rollout vllm, or leave it out")
        self.subtitles = subtitles
        if subtitles and not any(Path(subtitles).glob("*.srt")):
            raise DataError(f"--subtitles {subtitles}: no .srt files are there")

        look = load(config.model, weights=False)
        options = {n: getattr(config, n) for n in ("fps", "max_frames", "max_tokens", "thinking")}
        given = {name: value for name, value in options.items() if value is not None}
        if config.frames:
            given |= {"num_frames": config.frames[-1], "fps": None}
        self.recipe = replace(look.recipe, **given)
        self.frames = {n: n for n in config.frames or (self.recipe.num_frames,)}
        if self.recipe.fps is not None:
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
        units = list(dict.fromkeys(benchmarks.unit(benchmark, e.id) for e in rows))
        self.total = len(units)
        kept = {units[i] for i in data.frame_indices(self.total, config.limit or self.total)}
        self.examples = [e for e in rows if benchmarks.unit(benchmark, e.id) in kept]

    def settings(self) -> dict:
        """All that the answers depend on. Of weights the files' sizes and times: to read them all
        would take as long as to load them. Of media names and sizes: their folder may move, but
        answers to one that was not there, or cut off, are not those to what came instead."""
        free = self.config.FREE.split()
        found = {k: v for k, v in asdict(self.config).items() if k not in free}
        found |= asdict(self.recipe)
        method = self.config.method and Path(self.config.method).read_text()
        root = folder_of(self.config.model)
        weights = sorted({*root.rglob("*.safetensors"), *root.rglob("config.json")})
        times = [(str(file.relative_to(root)), file.stat().st_mtime_ns) for file in weights]
        media = dict.fromkeys(m.path for e in self.examples for m in e.media)
        spoken = sorted(Path(self.subtitles).glob("*.srt")) if self.subtitles else []
        questions = []
        for e in self.examples:
            names = [m._replace(path=Path(m.path).name) for m in e.media]
            questions.append((e.id, e.problem, e.answer, names))
        return found | {
            "data": self.source,
            "rollout": self.kind,
            "num_frames": list(self.frames),
            "method": digest(method),
            "weights": digest(times, sizes(weights)),
            "questions": digest(questions, self.malformed),
            "media": digest(sizes(media)),
            "srt": digest([file.name for file in spoken], sizes(spoken)),
        }

    @functools.cached_property
    def asked(self) -> tuple:
        """The model and its engine, on this rank."""
        config = self.config
        dtype = getattr(torch, config.dtype)
        model = load(config.model, dtype).to(self.ranks.device)
        model.recipe = self.recipe
        model.loader = self.loader
        try:
            model.cache = EmbeddingCache(config.cache_dir)
        except OSError as error:
            raise DataError(f"--cache_dir: {error}") from None
        memory = config.rollout_memory
        limits = RolloutConfig(config.rollout_tp, memory, None, config.rollout_max_len)
        engine = make_engine(self.kind, model, limits, dtype)
        engine.sync(model)
        return model, engine

    def begin(self, path: Path) -> Folder:
        """The folder of the answers, new or gone on with under the same settings. All ranks."""
        self.ranks.join()
        return Folder(path, self.settings(), self.ranks)

    def rewrite(self, example: Example, num_frames: int | Rate) -> Example:
        """See ask: with the subtitles of the frames that are seen. DataError: a malformed row."""
        if example.id in self.malformed:
            raise DataError(self.malformed[example.id])
        has_any = self.subtitles and example.media
        if not has_any or not benchmarks.srt_of(example, self.subtitles).is_file():
            return example
        times = self.asked[0].features(example, num_frames)[0].times
        return benchmarks.with_subtitles(example, self.subtitles, times)

    def close(self) -> None:
        """All is asked: the engine, the decoding processes and the process group go."""
        if "asked" in vars(self):
            self.asked[1].close()
        self.loader.close()
        self.ranks.leave()


def check_media(look: MultiModal, examples: list[Example]) -> None:
    """DataError if media are not there, or of a kind that the model does not take: how many
    questions that are, and the first of them."""
    gone = []
    for example in examples:
        try:
            for medium in example.media:
                look.check_taken(medium, example.id)
                if not os.path.isfile(medium.path):
                    raise DataError(f"question {example.id}: no such file: {medium.path}")
        except (DataError, ModelError) as error:
            gone.append(error)
    if gone:
        raise DataError(
            f"{len(gone)} of {len(examples)} questions cannot be asked, the first: {gone[0]}. "
            "Check --video_dir and --model, or count them as wrong with --on_missing wrong"
        )


def sizes(paths) -> list[int]:
    """Bytes of each file; -1 for one that is not there."""
    return [os.path.getsize(path) if os.path.isfile(path) else -1 for path in paths]


def digest(*values) -> str:
    """A short hash of values that print the same whenever they are the same."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
