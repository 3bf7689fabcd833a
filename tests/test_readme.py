"""The README is true: its commands parse, its files exist, its tests can be selected."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
from kit import presets

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text() for name in ("README.md", "docs/models.md", "docs/verified.md")
}


def commands(pattern: str) -> list[str]:
    """Command lines of the pages: indented ones, and those between backticks in tables."""
    found = []
    for text in PAGES.values():
        found += re.findall(rf"^    (.*{pattern}.*)$", text, re.MULTILINE)
        found += [x for x in re.findall(r"`([^`\n]+)`", text) if re.search(pattern, x)]
    return [re.sub(r"\s+# .*", "", line) for line in found]


def test_the_readme_is_one_page_and_its_files_exist():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 190 and len(commands(r"train\.py")) > 3
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / name).exists(), name


def test_ci_finds_the_commands_that_it_runs():
    for block in ("main", "tests", "slow", "vllm"):
        part = PAGES["README.md"].split(f"<!-- {block} -->")[1].split(f"<!-- /{block} -->")[0]
        assert len([line for line in part.splitlines() if line.startswith("    ")]) == 1


@pytest.mark.parametrize("line", commands(r"\btrain\.py\b"))
def test_a_command_that_trains_parses(line, monkeypatch):
    argv = shlex.split(line.split("train.py", 1)[1].replace("...", "").replace("FILE", "f.jsonl"))
    method = [i for i, word in enumerate(argv) if word == "--method"]
    if method:
        del argv[method[0] : method[0] + 2]  # the file is made by the reader
    presets.read_settings([word for word in argv if word not in (";", "&&")])


@pytest.mark.parametrize("line", commands(r"\beval\.py\b.*--"))
def test_a_command_that_evaluates_parses(line):
    argv = shlex.split(line.split("eval.py", 1)[1])
    evaluation.parse(evaluation.EvalConfig, argv)


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(set(commands(r"^(pip .*&& )?pytest .*tests/"))))
def test_a_command_that_tests_selects_something(line):
    argv = shlex.split(line.split("pytest", 1)[1])
    argv = argv if "-m" in argv else ["-m", "", *argv]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
