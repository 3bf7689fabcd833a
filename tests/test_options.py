"""kit/options.py: command lines become dataclasses, or errors of one line."""

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from kit.options import OptionError, parse
from kit.presets import PRESETS, Settings


@dataclass(frozen=True)
class Part:
    """A part."""

    lr: float = 1e-3  # learning rate
    fast: bool = False  # go fast

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


@dataclass(frozen=True)
class More(Part):
    extra: int = 1  # of a subclass
    own: bool = False  # a switch of a subclass


@dataclass(frozen=True)
class Whole:
    """All of it."""

    name: str | None = "x"  # a name
    kind: Literal["a", "b"] = "a"  # one of two
    counts: tuple[int, ...] = (1, 2)  # some numbers
    dry: bool = False  # show only
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", Whole()),
        ("--name y --part.lr 2", Whole("y", part=Part(2.0))),
        ("--name None", Whole(None)),
        ("--name none", Whole(None)),
        ("--dry", Whole(dry=True)),
        ("--dry --name y", Whole("y", dry=True)),
        ("--dry true --part.fast True", Whole(dry=True, part=Part(fast=True))),
        ("--dry=false --part.fast=true", Whole(part=Part(fast=True))),
        ("--counts 3", Whole(counts=(3,))),
        ("--counts 3 4 5 --kind b", Whole(kind="b", counts=(3, 4, 5))),
    ],
)
def test_a_command_line_is_a_dataclass(line, expected):
    assert parse(Whole, line.split()) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ("--nam y", "Unrecognized options: --nam.*perhaps you meant --name"),
        ("--part_lr 3", "--part_lr.*perhaps you meant --part.lr"),
        ("stray", "Unrecognized options: stray"),
        ("--part.lr x", "--part.lr.*'x'"),
        ("--part.lr 0", "part: lr must be above 0, not 0.0"),
        ("--kind c", "'c' for argument '--kind'.*'a', 'b'"),
        ("--name", "'--name'"),
        ("--name --dry", "'--name'"),
        ("--dry maybe", "'maybe' for argument '--dry'"),
    ],
)
def test_a_wrong_one_is_one_line_about_that_option(line, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse(Whole, line.split())
    said = str(caught.value)
    assert "\n" not in said and "Whole(" not in said and len(said) < 250


def test_a_default_of_a_subclass_brings_its_own_options():
    found = parse(Whole, ["--part.own", "--part.extra", "3"], Whole(part=More()))
    assert found.part == More(extra=3, own=True)


def test_subcommands_are_a_union_of_dataclasses(capsys):
    one, two = (tyro.conf.subcommand(name) for name in ("one", "two"))
    kinds = Annotated[Part, one] | Annotated[Whole, two]
    assert parse(kinds, ["one", "--lr", "3", "--fast"]) == Part(3.0, True)
    assert parse(kinds, ["two", "--dry"]) == Whole(dry=True)
    with pytest.raises(OptionError, match="three"):
        parse(kinds, ["three"])


def test_help_says_something_about_every_option_and_groups_those_that_most_runs_set(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Settings, ["--help"], PRESETS["toy"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    words = " ".join(text.replace("│", " ").split())
    most_set = words.split("run options")[1].split("ranks options")[0]
    assert len(re.findall(r"--\w+ ", most_set)) == 10
    for part, fields in asdict(PRESETS["toy"]).items():
        prefix = "" if part in ("run", "ranks", "media", "more") else f"{part}."
        for name in (name for name, value in fields.items() if not isinstance(value, dict)):
            behind = words.split(f"--{prefix}{name} ", 1)[1].split("(default")[0]
            plain = [word for word in behind.split() if word.islower() and word.isalpha()]
            assert plain, f"--{prefix}{name} has no help"
