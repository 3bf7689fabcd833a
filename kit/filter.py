"""Filter: keep the rows that a model answers rightly at times; GRPO learns nothing from the others.

    python -m kit.filter --model M --data rows.jsonl --out hard.jsonl --answers 10

    rows --ask, G answers each--> pass rate = mean accuracy of the answers, 0 to 1
                                   |
      0.0       too hard           |  all G answers get the same reward: an advantage of zero
      low..high kept, with its pass_rate
      1.0       too easy           |  the same
      failed    it could not be asked (its row is malformed, its video does not decode)

The paper drops both ends by 10 answers of the base model (section 3). The large systems filter
while they train (DAPO's dynamic sampling: sample on until a batch is informative), which costs
every run again what is found here once. Other limits (--low, --high) ask nothing again: all rates
are kept in OUT_rates/, where a killed filter goes on, with any number of ranks.

Check this file alone:  pytest tests/test_filter.py
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import DataError, Example, read_rows
from grpo import graded
from kit.ask import AskConfig, Job, above_zero, ask, grade
from kit.options import parse
from kit.ranks import reported
from kit.work import Folder
from rollout import Sampling


@dataclass(frozen=True, kw_only=True)
class FilterConfig(AskConfig):
    """Pass rates of rows; keeps those that are neither too easy nor too hard."""

    out: Path  # file (.jsonl) of the rows that are kept
    answers: int = 10  # sampled for a question
    low: float = 0.0  # keep a row if its pass rate is more than this
    high: float = 1.0  # and less than this
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0  # nucleus of sampling
    seed: int = 0  # of sampling

    FREE = f"{AskConfig.FREE} out low high"

    def __post_init__(self):
        super().__post_init__()
        above_zero("answers", self.answers)
        above_zero("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, not {self.top_p}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.temperature == 0 and self.answers > 1:
            raise ValueError("temperature 0 is greedy: give --answers 1, or a temperature")
        if not self.low < self.high:
            raise ValueError(f"--low {self.low:g} --high {self.high:g}: no row lies between them")
        if len(self.frames) > 1:
            raise ValueError("--frames: a pass rate is for one number of frames")


def pass_rate(job: Job, example: Example, answers) -> dict:
    """A line of rates.jsonl. answers: Responses, or the error why there are none."""
    if isinstance(answers, Exception):
        return {"category": example.category, "pass_rate": 0.0, "error": str(answers)}
    texts = [graded(answer.text, job.recipe.thinking) for answer in answers]
    right = sum(grade(job.method, text, example)["accuracy"] for text in texts)
    return {"category": example.category, "pass_rate": right / len(texts), "error": ""}


def sample_rates(job: Job, folder: Folder) -> dict[str, dict]:
    """{id: line} of all questions, on all ranks. A question's seed follows its place, so that its
    answers depend on neither ranks nor interruptions."""
    config = job.config
    recipe = job.recipe
    model, engine = job.asked
    (frames,) = job.frames.values()
    limits = (config.temperature, config.top_p, recipe.max_tokens)
    sampling = Sampling(*limits, stop=recipe.stop)
    places = {example.id: i for i, example in enumerate(job.examples)}

    def work(ids: list[str]) -> list[dict]:
        rows = [job.examples[places[i]] for i in ids]
        seeds = [config.seed * 10**6 + places[i] for i in ids]
        model.prefetch(rows, frames)
        found = ask(
            model, engine, rows, frames, sampling, config.answers, seeds, rewrite=job.rewrite
        )
        return [pass_rate(job, example, answers) for example, answers in zip(rows, found)]

    how = {"size": config.batch, "tp": engine.tp, "field": "problem_id", "bar": "pass rates"}
    return folder.stage("rates", list(places), work, **how)


def fate(rate: dict, config: FilterConfig) -> str:
    """What becomes of a question with this line."""
    if rate["error"]:
        return "failed"
    if rate["pass_rate"] <= config.low:
        return "too hard"
    return "too easy" if rate["pass_rate"] >= config.high else "kept"


def kept_rows(job: Job, rates: dict[str, dict]):
    """Yields the rows of the source that are kept, as they are, each with its pass_rate."""
    for where, row in read_rows(job.source):
        if where in job.malformed:
            continue
        rate = rates.get(str(row["problem_id"]))  # None: left out by --limit
        if rate and fate(rate, job.config) == "kept":
            yield row | {"pass_rate": rate["pass_rate"]}


def run(config: FilterConfig) -> dict[str, int]:
    """Pass rates, the rows that are kept, and how many went which way."""
    job = Job(config)
    if config.out.is_dir() or os.path.realpath(config.out) == os.path.realpath(job.source):
        raise DataError(f"--out {config.out}: give the name of a new file")
    folder = job.begin(config.out.with_name(f"{config.out.stem}_rates"))
    rates = folder.finished("rates", "problem_id") or sample_rates(job, folder)
    job.close()
    counts = dict(Counter(fate(rate, config) for rate in rates.values()))
    if job.ranks.rank == 0:
        beside = Path(f"{config.out}.new")  # a whole file, or none
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept_rows(job, rates)))
        os.replace(beside, config.out)
        for name, rate in rates.items():
            if rate["error"]:
                print(f"failed: {name}: {rate['error']}")
        print(f"{len(rates)} rows: {counts}, in {config.out}; all rates in {folder.path}/")
    return counts


def main(argv: list[str] | None = None) -> dict[str, int]:
    """python -m kit.filter"""
    about = "Pass rates of rows; keeps those that are neither too easy nor too hard."
    with reported():
        return run(parse(FilterConfig, argv, prog="python -m kit.filter", about=about))


if __name__ == "__main__":
    main()
