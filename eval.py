"""Evaluation: accuracy on multiple-choice and open questions, by category and by frames.

    Example --features (cached)--> Prompt --greedy--> completion --grade--> record, 0 or 1

    batches   0  1  2  3  4  5 ...      fixed: they do not depend on the ranks
    rank 0    #     #     #   --append--> answers_64.0.part )  all   answers_64.jsonl,
    rank 1       #     #      --append--> answers_64.1.part ) -----> result.json

    accuracy = mean over ALL questions. What cannot be asked (a malformed row, a video that does not
    decode) counts as wrong and is listed with its error; none is dropped. Results are keyed by the
    question, not by the video.

The public evaluation calls a stub in place of the model, reuses a video's first answer for its
second question, skips failures, and does not accept "B." for "B"; large harnesses start again when
they are killed. Here finished batches are kept: a run that was killed goes on, with any number of
ranks, and ends with the same bytes. Asking, judging open answers (--judge) and the pass rates that
training rows are filtered by (run_filter) are all dealt to ranks and kept by one function, deal.

Two accuracies, each with its 95 % interval: strict by the rules of training's reward (one <answer>
span), lenient also where the answer stands without it. Without --judge no model is asked whether an
open answer means the same (LongVideo-Reason-eval does without, too).

Two controls belong to a result:
    wrong video   each question is asked about another video. Accuracy must fall to chance, or the
                  questions can be answered without looking.
    prefill       the answer's beginning is forced, e.g. into a reasoning style. It tells what RL
                  added to choosing that style.

Command line:  python eval.py --model runs/toy/model          data, frames, prompt: its recipe.json
               torchrun --nproc_per_node 8 eval.py --model M --benchmark videomme --data FILE ...
Check this file alone:  pytest tests/test_eval.py
"""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import data
from data import DataError, Example, Rate, frame_indices, load_rows, read_rows
from families import load
from families.files import folder_of
from grpo import accuracy_reward, format_reward, graded, lenient_accuracy
from kit import benchmarks
from kit.chat import Chat, ReplyError, ServerError
from kit.decode import Loader
from kit.report import read_answers, write_report
from model import ModelError
from mrsp import EmbeddingCache
from rollout import RolloutConfig, RolloutError, Sampling, engine_kind, make_engine


def swap_media(examples: list) -> list:
    """The wrong-media control: every question about the media that stand half the set away among
    those of the same kinds, with their segments; each medium's num_frames stay. Text questions
    have none, and stay."""
    sets, swap, swapped, paths = {}, {}, [], lambda own: tuple(m.path for m in own)
    keys = [tuple(m._replace(num_frames=None) for m in e.media) for e in examples]
    for media in dict.fromkeys(keys):
        sets.setdefault(tuple((m.kind, m.track) for m in media), []).append(media)
    for kinds, media in sets.items():
        files = {path: i for i, path in enumerate(dict.fromkeys(map(paths, media)))}
        if kinds and len(files) == 1:
            kind = "+".join(kind for kind, _ in kinds)
            raise DataError(f"the wrong-{kind} control needs questions about at least two of them")
        media.sort(key=lambda own: files[paths(own)])  # else half the set away may be the same one
        swap |= {m: media[(i + len(media) // 2) % len(media)] for i, m in enumerate(media)}
    for e, key in zip(examples, keys):
        media = [new._replace(num_frames=m.num_frames) for new, m in zip(swap[key], e.media)]
        swapped.append(replace(e, media=tuple(media)))
    return swapped


# ---------------------------------------------------------------------------- dealt and kept work


def from_first(value, world: int):
    """Rank 0's value, on all ranks."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def deal(count: int, size: int, work, rank=0, world=1, tp=1, bar=iter, part: Path | None = None):
    """The dicts of items 0 to count, on every rank: those that work(start, end) lists for batches
    of `size` items, which are dealt to the ranks (tp neighbours do the same ones together).

    part: a finished batch is kept as a line [start, dicts] of the file PART.RANK.part, and not done
    again, whatever number of ranks there were, and at whatever byte the last one was killed."""
    done, mine = {}, {}
    if part is not None and rank == 0:
        for path in part.parent.glob(f"{part.name}.*.part"):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    done.update([json.loads(line)])
                except ValueError:  # empty, or torn: no beginning of a line is JSON
                    continue
    done = from_first(done, world)
    todo = [start for start in range(0, count, size) if start not in done]
    for start in bar(todo[rank // tp :: world // tp]):
        mine[start] = work(start, min(start + size, count))
        if part is not None and rank % tp == 0:
            with open(f"{part}.{rank}.part", "a") as file:  # a new line: the last may be torn
                file.write(f"\n{json.dumps([start, mine[start]])}\n")
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    for own in parts:
        done |= own
    return [item for start in sorted(done) for item in done[start]]


def write(path: Path, text: str) -> None:
    """A whole file, or none."""
    Path(f"{path}.new").write_text(text)
    os.replace(f"{path}.new", path)


def write_lines(path: Path, items: list[dict]) -> None:
    write(path, "".join(json.dumps(item) + "\n" for item in items))


# ---------------------------------------------------------------------------- asking and grading


def ask(model, engine, examples, num_frames, sampling, n=1, seeds=None, prefill="", before=None):
    """n answers to each example: a list of Responses, or the error why it cannot be asked.
    before(example, num_frames): the Example that is asked in its place; it may raise DataError."""
    found, prompts, rows = [None] * len(examples), [], []
    for i, example in enumerate(examples):
        try:
            asked = before(example, num_frames) if before else example
            prompt = model.prompt(asked, num_frames, prefill)
            engine.check_fits(prompt, sampling)  # else it would refuse the whole batch
            prompts.append(prompt)
            rows.append(i)
        except (DataError, ModelError, RolloutError) as error:
            found[i] = error
    seeds = seeds and [seeds[i] for i in rows]
    for i, answers in zip(rows, engine.generate(prompts, n, sampling, seeds) if rows else []):
        found[i] = answers
    return found


def evaluate(
    model, engine, examples: list, num_frames: int | Rate | None = None, prefill: str = "",
    batch: int = 64, rank: int = 0, world: int = 1, bar=iter, before=None, part: Path | None = None,
) -> dict:  # fmt: skip
    """Greedy answers to all examples. Returns, on every rank, summarise() of the records, and the
    records: one dict a question, in order. before: see ask; part: see deal."""
    recipe = model.recipe
    sampling = Sampling(temperature=0.0, max_tokens=recipe.max_tokens, stop=recipe.stop)

    def work(start, end):
        rows, frames = examples[start:end], num_frames or recipe.frames
        soon = start + batch * (world // engine.tp)  # this rank's next batch
        model.ahead(rows + examples[soon : soon + batch], frames)
        answers = ask(model, engine, rows, frames, sampling, prefill=prefill, before=before)
        return [record(e, a, prefill, recipe.thinking) for e, a in zip(rows, answers)]

    records = deal(len(examples), batch, work, rank, world, engine.tp, bar, part)
    return summarise(records) | {"records": records}


def record(example: Example, answers, prefill: str = "", thinking: bool = True) -> dict:
    """The graded answer to one question. answers: [Response], or the error why there is none."""
    failed, gold = isinstance(answers, Exception), (example.answer, example.options)
    text = "" if failed else f"{prefill} {answers[0].text}" if prefill else answers[0].text
    seen = graded(text, thinking)
    return {
        "problem_id": example.id,
        "category": example.category,
        "gold": example.answer,
        "completion": text,
        "accuracy": 0.0 if failed else accuracy_reward(seen, *gold),
        "lenient": 0.0 if failed else lenient_accuracy(seen, *gold),
        "format": 0.0 if failed else format_reward(seen),
        "tokens": 0 if failed else len(answers[0].ids),
        "error": str(answers) if failed else "",
    }


JUDGE = """\
Question: {}
Reference answer: {}
Given answer: {}
Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""


def judge(chat: Chat, records, examples, thinking, rank=0, world=1, bar=iter, part=None) -> list:
    """The records with a model's verdicts on open answers that are not literally right. It is shown
    the last <answer> span, or what follows the thoughts; its yes is the lenient accuracy, and with
    exactly one span the strict one. No yes or no: wrong, and the record's error says so."""
    seen, said, todo = [graded(r["completion"], thinking) for r in records], [], []
    for i, (e, r) in enumerate(zip(examples, records)):
        behind = seen[i].rpartition("</think>")[2].partition("<think>")[0]
        said.append((re.findall(r"<answer>(.*?)</answer>", behind, re.DOTALL) or [behind])[-1])
        if said[i].strip() and not (e.options or r["error"] or r["lenient"]):
            todo.append(i)

    def verdict(i: int) -> dict:
        question = JUDGE.format(examples[i].problem, examples[i].answer, said[i].strip())
        try:
            reply = chat.ask([{"role": "user", "content": question}])
        except ReplyError as error:
            return {"error": f"judge: {error}"}
        word = re.match(r"\W*(yes|no)\b", reply.rpartition("</think>")[2], flags=re.IGNORECASE)
        if word is None:
            return {"error": f"judge: neither yes nor no: {reply[:80]!r}"}
        right = float(word[1].lower() == "yes")
        return {"accuracy": right * accuracy_reward(seen[i], said[i]), "lenient": right}

    def work(start, end):
        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(verdict, todo[start:end]))

    verdicts = dict(zip(todo, deal(len(todo), 64, work, rank, world, 1, bar, part)))
    return [r | verdicts.get(i, {}) for i, r in enumerate(records)]


# --------------------------------------------------------------------------------------- numbers


def wilson(right: float, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a share: all p from which right / n is at most z standard errors away
    (E. B. Wilson, Journal of the American Statistical Association 22, 1927). It stays in [0, 1] and
    holds for few questions. It takes them as independent, which those on one video are not quite.

    >>> [round(p, 4) for p in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    p, middle = right / n, (right + z**2 / 2) / (n + z**2)
    half = (p * (1 - p) * n + z**2 / 4) ** 0.5 * z / (n + z**2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def score(records: list[dict]) -> dict:
    """questions, and accuracy and lenient, each with its interval."""
    found, n = {"questions": len(records)}, len(records)
    for name in ("accuracy", "lenient"):
        right = sum(r[name] for r in records)
        found |= {name: right / n, f"{name}_95": wilson(right, n)}
    return found


def summarise(records: list[dict], unit=lambda name: name) -> dict:
    """score() of all records and by category, accuracy by category, format (share), tokens (mean)
    and errors [(id, message)]. unit(id): records with the same one are one question, right if all
    of them are (VNBench)."""
    units, by_category, n = defaultdict(list), defaultdict(list), len(records)
    for r in records:
        units[unit(r["problem_id"])].append(r)
    for rs in units.values():
        worst = {name: min(r[name] for r in rs) for name in ("accuracy", "lenient")}
        by_category[rs[0]["category"]].append(worst)
    categories = {name: score(by_category[name]) for name in sorted(by_category)}
    return score(sum(by_category.values(), [])) | {
        "format": sum(r["format"] for r in records) / n,
        "tokens": sum(r["tokens"] for r in records) / n,
        "by_category": {name: found["accuracy"] for name, found in categories.items()},
        "categories": categories,
        "errors": [(r["problem_id"], r["error"]) for r in records if r["error"]],
    }


def show(results: dict[int, dict], title: str) -> str:
    """{frames, or a rate: summary} as the text that ends an evaluation."""
    lines = []
    for frames, r in results.items():
        lines.append(
            f"{r['questions']} questions of {title}, {frames} frames, greedy: accuracy "
            f"{r['accuracy']:.4f}, format {r['format']:.4f}, {r['tokens']:.1f} tokens an answer, "
            f"{len(r['errors'])} failed\n{'':26s}questions   strict %     95 %   lenient %     95 %"
        )
        for name, found in [("all", r), *r["categories"].items()]:
            shares = (
                found["accuracy"],
                *found["accuracy_95"],
                found["lenient"],
                *found["lenient_95"],
            )
            row = "  {:24.24s}{:9d}{:11.1f}{:6.1f} -{:5.1f}{:10.1f}{:6.1f} -{:5.1f}"
            lines.append(row.format(name, found["questions"], *(100 * x for x in shares)))
        lines += [f"  counted as wrong: {name}: {message}" for name, message in r["errors"][:20]]
        lines += ["  ... the others are in result.json"] * (len(r["errors"]) > 20)
    if len(results) > 1:
        lines.append("strict % by frames" + " " * 8 + "".join(f"{n!s:>8}" for n in results))
        for name in ("all", *r["by_category"]):
            of = [{"all": x["accuracy"], **x["by_category"]}[name] for x in results.values()]
            lines.append(f"  {name:24.24s}" + "".join(f"{100 * x:8.1f}" for x in of))
    return "\n".join(lines)


# --------------------------------------------------------------------------------- command line


def options(description: str) -> argparse.ArgumentParser:
    """What evaluation and filter have in common."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add, counts = parser.add_argument, lambda text: [int(n) for n in text.split(",")]
    counts.__name__ = "numbers of frames"  # for argparse's message
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--data", help="rows; default: the test rows that recipe.json names")
    add("--video_dir", help="folder that the rows' paths are relative to; default: the rows' own")
    add("--frames", type=counts, help="frames a video, like 64,128; default: from recipe.json")
    add("--fps", type=float, help="frames a second instead, as many as each video gives")
    add("--max_frames", type=int, help="with --fps, of a video; default: from recipe.json")
    add("--decode_ahead", type=int, default=2, help="videos that child processes open beforehand")
    add("--decode_seconds", type=float, default=120, help="a decoder that hangs is stopped then")
    add("--max_tokens", type=int, help="longest answer; default: from recipe.json")
    add("--thinking", choices=("true", "false"), help="default: from recipe.json")
    add("--rollout", choices=("vllm", "torch"), help="default: vllm with a GPU, if installed")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of model and sampler")
    add("--rollout_tp", type=int, default=1, help="vLLM: ranks that share an engine")
    add("--rollout_max_len", type=int, help="vLLM: longest prompt and answer; default: model's")
    add("--rollout_memory", type=float, default=0.5, help="fraction of a GPU for vLLM")
    add("--cache_dir", help="folder of embeddings kept across runs; default: none are kept")
    add("--batch", type=int, default=64, help="questions that are asked, and kept, together")
    add("--limit", type=int, help="a quick look: only so many questions, evenly spread")
    add("--on_missing", choices=("refuse", "wrong"), default="refuse",
        help="media that are not there, or that the model does not take: count as wrong?",
    )  # fmt: skip
    return parser


class Job:
    """The questions, ranks and folder of a command; what is large is loaded when it is needed."""

    def __init__(self, args, benchmark: str | None = None):
        self.args, self.kind = args, engine_kind(args.rollout)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        look = load(args.model, weights=False)
        thinking = {"true": True, "false": False}.get(args.thinking, look.recipe.thinking)
        length = look.recipe.max_tokens if args.max_tokens is None else args.max_tokens
        if args.fps is not None and args.frames:
            raise DataError("--frames or --fps? give one of them")
        most = look.recipe.max_frames if args.max_frames is None else args.max_frames
        fps = args.fps if args.fps is not None or args.frames else look.recipe.fps
        self.frames = {}  # {what it is called: how many are taken}
        for n in args.frames or [look.recipe.num_frames]:  # a ValueError if it is no number of them
            self.recipe = replace(
                look.recipe, num_frames=n, fps=fps, max_frames=most, max_tokens=length,
                thinking=thinking,
            )  # fmt: skip
            self.frames[n if fps is None else f"{fps:g}fps"] = self.recipe.frames
        self.source = args.data or look.recipe.data and os.path.join(args.model, look.recipe.data)
        if not self.source:
            raise DataError(f"{args.model}/recipe.json names no data; give --data FILE.jsonl")
        bad, gone, unit = [], {}, lambda e: benchmarks.unit(benchmark, e.id)
        if benchmark:
            rows = benchmarks.load(benchmark, self.source, args.video_dir, bad)
        else:
            rows = load_rows(self.source, args.video_dir, bad)
        for e in rows:
            try:
                for m in e.media:
                    look.check_taken(m, e.id)
                    if not os.path.isfile(m.path):
                        raise DataError(f"question {e.id}: no such file: {m.path}")
            except (DataError, ModelError) as error:
                gone[e.id] = str(error)
        if gone and args.on_missing == "refuse":
            raise DataError(
                f"{len(gone)} of {len(rows)} questions cannot be asked, the first: "
                f"{next(iter(gone.values()))}. Check --video_dir and --model, or count them as "
                "wrong with --on_missing wrong"
            )
        self.malformed = dict(bad)
        rows += map(data.stand_in, self.malformed)
        units = list(dict.fromkeys(map(unit, rows)))
        self.of, kept = len(units), set(units)
        if args.limit is not None:
            kept = {units[i] for i in frame_indices(len(units), args.limit)}
        self.examples = [e for e in rows if unit(e) in kept]
        self.subtitles = vars(args).get("subtitles")
        if self.subtitles and not any(Path(self.subtitles).glob("*.srt")):
            raise DataError(f"--subtitles {self.subtitles}: no .srt files are there")

    def before(self, example: Example, num_frames: int | Rate) -> Example:
        """The question as it is asked, or why it cannot be; see ask."""
        if example.id in self.malformed:
            raise DataError(self.malformed[example.id])
        spoken = self.subtitles and example.media and benchmarks.srt_of(example, self.subtitles)
        if spoken and spoken.is_file():
            times = self.asked[0].frame_times(example.media[0], num_frames, example.id)
            return benchmarks.with_subtitles(example, self.subtitles, times)
        return example

    def settings(self) -> dict:
        """All that the answers depend on. Of weights the files' sizes and times: to read them all
        would take as long as to load them. Of media names and sizes: their folder may move, but
        answers to one that was not there, or cut off, are not those to what came instead."""
        free = (
            "frames fps max_frames judge output out low high video_dir cache_dir on_missing "
            "rollout_tp rollout_max_len rollout_memory max_tokens thinking decode_ahead "
            "decode_seconds before report_mb"
        ).split()
        digest = lambda x: hashlib.sha256(repr(x).encode()).hexdigest()[:16]  # noqa: E731
        name = lambda m: m._replace(path=Path(m.path).name)  # noqa: E731
        media = dict.fromkeys(m.path for e in self.examples for m in e.media)
        sizes = [os.path.getsize(path) if os.path.isfile(path) else -1 for path in media]
        asked = [(e.id, e.problem, e.answer, [name(m) for m in e.media]) for e in self.examples]
        root = folder_of(self.args.model)
        files = sorted({*root.rglob("*.safetensors"), *root.rglob("config.json")})
        stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        spoken = sorted(Path(self.subtitles).glob("*.srt")) if self.subtitles else ()
        spoken = [(path.name, path.stat().st_size) for path in spoken]
        found = {k: v for k, v in vars(self.args).items() if k not in free} | asdict(self.recipe)
        found |= {"data": self.source, "rollout": self.kind, "weights": digest(stats)}
        found |= {
            "num_frames": list(self.frames),
            "questions": digest((asked, self.malformed, spoken)),
            "media": digest(sizes),
        }
        return json.loads(json.dumps(found))

    def meet(self, folder: Path | None, name: str = "") -> None:
        """All ranks: process group and device, as train.py's, and the folder, new or one that was
        begun with the same settings. None: one of its own for each name and settings."""
        cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
        if cuda and local >= torch.cuda.device_count():
            raise DataError(f"more ranks than the {torch.cuda.device_count()} GPU(s) here")
        self.device, differ, now = f"cuda:{local}" if cuda else "cpu", [], self.settings()
        if cuda:
            torch.cuda.set_device(local)
        if self.world > 1:  # a rank may wait for the others, for longer than the usual half hour
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))
        digest = hashlib.sha256(json.dumps(now).encode()).hexdigest()[:8]
        self.folder = folder or Path("runs/eval", f"{name}-{digest}")
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "settings.json"
            if not path.exists():
                write(path, json.dumps(now, indent=2) + "\n")
            old = json.loads(path.read_text())
            names = [name for name in old | now if old.get(name) != now.get(name)]
            differ = [f"{n} {old.get(n)!r} there, {now.get(n)!r} now" for n in names]
        if differ := from_first(differ, self.world):
            raise DataError(
                f"{self.folder} was begun with other settings ({'; '.join(differ)}): name another "
                "folder, or delete it"
            )

    def lines(self, name: str, make) -> list[dict]:
        """Those of a file of the folder; if there is none yet, make() lists them."""
        path, old = self.folder / name, None
        if self.rank == 0 and path.exists():
            old = [json.loads(line) for line in path.read_text().splitlines()]
        old = from_first(old, self.world)
        new = make() if old is None else old
        if self.rank == 0:
            write_lines(path, new)
        return new

    @functools.cached_property
    def asked(self):
        """The model and its engine, on this rank."""
        args, dtype = self.args, getattr(torch, self.args.dtype)
        if self.kind == "torch" and args.rollout_tp > 1:
            raise RolloutError("--rollout_tp is vLLM's: add --rollout vllm, or leave it out")
        model = load(args.model, dtype).to(self.device)
        model.cache, model.recipe = EmbeddingCache(args.cache_dir), self.recipe
        model.loader = Loader(args.decode_ahead, args.decode_seconds)
        config = RolloutConfig(args.rollout_tp, args.rollout_memory, max_len=args.rollout_max_len)
        engine = make_engine(self.kind, model, config, dtype)
        engine.sync(model)
        return model, engine

    def bar(self, name: str):
        from tqdm import tqdm

        return lambda batches: tqdm(batches, name, disable=self.rank > 0)

    def part(self) -> None:
        """All is written: the engine and the kept batches go."""
        if "asked" in vars(self):
            self.asked[1].close()
            self.asked[0].loader.close()
        for path in self.folder.glob("*.part") if self.rank == 0 else ():
            path.unlink()
        if self.world > 1:
            dist.destroy_process_group()


def run(args) -> dict:
    """Evaluation: answers, verdicts and result.json of each number of frames."""
    if args.benchmark in benchmarks.OPEN and not args.judge:
        raise DataError(
            f"answers to {args.benchmark} are free text, and a model has to judge them: start one "
            "(vllm serve MODEL --port 8000), and give --judge http://localhost:8000/v1"
        )
    job, results = Job(args, args.benchmark), {}
    chat = Chat(args.judge, args.judge_model) if args.judge else None
    args.judge_model = chat and chat.model  # the verdicts depend on it, not on where it is served
    if args.wrong_video:
        job.examples = swap_media(job.examples)
    if args.instruction:
        ask_for = f"\n{args.instruction}"
        job.examples = [replace(e, problem=e.problem + ask_for) for e in job.examples]
    name, rows, runs = args.benchmark or Path(job.source).stem, job.examples, {}
    if args.before:  # of the last number of frames, as the report
        path = args.before / f"answers_{[*job.frames][-1]}.jsonl"
        runs["before"] = read_answers(path)
        if {r["problem_id"] for r in runs["before"]} != {e.id for e in rows}:
            raise DataError(f"--before: {path} has the answers to other questions")
    job.meet(args.output, name)
    ranks = job.rank, job.world

    def answers(n) -> list[dict]:
        part = job.folder / f"answers_{n}"
        how = *ranks, job.bar(f"{n} frames"), job.before, part
        frames = job.frames[n]
        records = evaluate(*job.asked, rows, frames, args.prefill, args.batch, *how)["records"]
        if chat:
            how = *ranks, job.bar("judge"), job.folder / f"verdicts_{n}"
            records = judge(chat, records, rows, job.recipe.thinking, *how)
        return records

    for n in job.frames:
        records = job.lines(f"answers_{n}.jsonl", lambda n=n: answers(n))
        results[n] = summarise(records, lambda name: benchmarks.unit(args.benchmark, name))
        results[n]["records"] = records
    found = {"questions_in_all": job.of}
    title = f"{name}" + f" (a quick look: of {job.of})" * (args.limit is not None)
    if args.subtitles:
        videos = {e.media[0].path: e for e in rows if e.media}
        bare = [e for e in videos.values() if not benchmarks.srt_of(e, args.subtitles).is_file()]
        found["videos_without_subtitles"] = len(bare)
        title += f", with subtitles ({len(bare)} of {len(videos)} videos have none)"
    if job.rank == 0:
        found["frames"] = {n: {k: r[k] for k in r if k != "records"} for n, r in results.items()}
        write(job.folder / "result.json", json.dumps(found, indent=2) + "\n")
        print(f"{show(results, title)}\nanswers and result.json are in {job.folder}/", flush=True)
    job.part()
    if job.rank == 0 and args.report_mb > 0:  # of the last number of frames
        runs["after" if runs else "answers"] = results[n]["records"]
        text, page = show(results, title), job.folder / "report.html"
        done = "asked" in vars(job)  # what hung once is not tried again
        loader = job.asked[0].loader if done else Loader(1, args.decode_seconds)
        how = {"text": text, "max_mb": args.report_mb, "loader": loader}
        write_report(page, title, rows, runs, job.frames[n], **how)
        print(f"every question with its frames: {page}")
    return results[n] | {"by_frames": {n: r["accuracy"] for n, r in results.items()}}


def run_filter(args) -> dict:
    """Keeps the rows that the model answers rightly at times: of those always right or always wrong
    GRPO learns nothing (the paper drops both, by 10 answers of the base model)."""
    job = Job(args)
    if args.out.is_dir() or os.path.realpath(args.out) == os.path.realpath(job.source):
        raise DataError(f"--out {args.out}: give the name of a new file")
    if args.low >= args.high:
        raise DataError(f"--low {args.low:g} --high {args.high:g}: no row lies between them")
    if len(job.frames) > 1:
        raise DataError("--frames: a pass rate is for one number of frames")
    frames = job.recipe.frames
    job.meet(args.out.with_name(f"{args.out.stem}_rates"))
    recipe, rows = job.recipe, job.examples
    sampling = Sampling(args.temperature, args.top_p, recipe.max_tokens, stop=recipe.stop)

    def work(start, end):
        seeds = [args.seed * 10**6 + i for i in range(start, end)]
        how, rates = (sampling, args.answers, seeds, "", job.before), []
        job.asked[0].ahead(rows[start:end], frames)
        for e, found in zip(rows[start:end], ask(*job.asked, rows[start:end], frames, *how)):
            failed, gold = isinstance(found, Exception), (e.answer, e.options)
            texts = [] if failed else [graded(a.text, recipe.thinking) for a in found]
            share = sum(accuracy_reward(t, *gold) for t in texts) / args.answers
            rate = {"problem_id": e.id, "category": e.category, "pass_rate": share}
            rates.append(rate | {"error": str(found) if failed else ""})
        return rates

    def sample():
        how = job.rank, job.world, job.asked[1].tp, job.bar("pass rates"), job.folder / "rates"
        return deal(len(rows), args.batch, work, *how)

    def fate(r):
        low, high = r["pass_rate"] <= args.low, r["pass_rate"] >= args.high
        return "failed" if r["error"] else "too hard" if low else "too easy" if high else "kept"

    rates, kept = job.lines("rates.jsonl", sample), []
    counts, of = dict(Counter(map(fate, rates))), {r["problem_id"]: r for r in rates}
    if job.rank == 0:
        for where, row in read_rows(job.source):
            if where not in job.malformed:
                rate = of.get(str(row["problem_id"]))  # None: left out by --limit
                if rate and fate(rate) == "kept":
                    kept.append(row | {"pass_rate": rate["pass_rate"]})
        write_lines(args.out, kept)
        for r in rates:
            if r["error"]:
                print(f"failed: {r['problem_id']}: {r['error']}")
        print(f"{len(rates)} rows: {counts}, in {args.out}; all rates in {job.folder}/")
    job.part()
    return counts


def main(argv=None) -> dict:
    """python eval.py"""
    parser = options("Accuracy of a saved model. Started again, it goes on where it stopped.")
    add, known = parser.add_argument, ", ".join(benchmarks.BENCHMARKS)
    add("--benchmark", choices=benchmarks.BENCHMARKS, metavar="NAME", help=f"of --data: {known}")
    add("--subtitles", help="folder of .srt files, one a video: asked with those of its frames")
    add("--instruction", default="", help="a line that ends each question")
    add("--prefill", default="", help="forced beginning of every answer")
    add("--wrong_video", action="store_true", help="control: ask about another video")
    add("--judge", metavar="URL", help="of a server (up to /v1) that judges open answers")
    add("--judge_model", help="its name there; default: the first")
    add("--before", type=Path, help="folder of another evaluation, beside this one in the report")
    add("--report_mb", type=float, default=30, help="limit of report.html in MB; 0: no report")
    add("--output", type=Path, help="folder; default: runs/eval/DATA-HASH, a hash of the settings")
    return guarded(run, parser.parse_args(argv))


def filter_main(argv=None) -> dict:
    """python -m kit.filter"""
    parser = options("Pass rates of rows; keeps those that are neither too easy nor too hard.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file (.jsonl) of the rows that are kept")
    add("--answers", type=int, default=10, help="sampled for a question")
    add("--low", type=float, default=0.0, help="keep a row if more than this share is right")
    add("--high", type=float, default=1.0, help="and less than this")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--top_p", type=float, default=1.0, help="nucleus of sampling")
    add("--seed", type=int, default=0, help="of sampling")
    return guarded(run_filter, parser.parse_args(argv))


def guarded(function, args) -> dict:
    try:
        for name in ("batch", "limit", "answers", "decode_seconds"):
            if (value := vars(args).get(name)) is not None and value <= 0:
                raise DataError(f"--{name} {value}: give a number above 0")
        return function(args)
    except (ValueError, OSError, RolloutError, ServerError) as error:  # DataError, ModelError ...
        # Before they have met all ranks say the same: the first of them is enough.
        first = int(os.environ.get("RANK", 0)) == 0 or dist.is_initialized()
        sys.exit(f"error: {error}" if first else 1)


if __name__ == "__main__":
    if not torch.cuda.is_available() and "WORLD_SIZE" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    main()
