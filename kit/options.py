"""Options: a frozen dataclass, or several behind subcommands, from a command line.

    field of a dataclass     num_frames: int = 64  # frames taken from a video
    becomes an option        --num_frames 128             its comment is the help text
    of a part                recipe: Recipe = Recipe()  ->  --recipe.num_frames 128

One parser for all commands, tyro: wrong types and unknown options are errors, with the option that
was perhaps meant; `None` unsets what may be unset. What a dataclass itself refuses (a ValueError of
its __post_init__) is an error too. Every error is one line.

Check this file alone:  pytest tests/test_options.py
"""

import contextlib
import dataclasses
import io
import re
import sys
import typing

import tyro

BOX = "─│╭╮╰╯"  # what tyro draws around an error


class OptionError(ValueError):
    """A command line that is not understood: which option, and what is wrong with it."""


def parse(kind, argv: list[str] | None = None, default=None, prog: str = "", about: str = ""):
    """argv (default: the command's) as an instance of the dataclass `kind`, or of one of a union of
    dataclasses (subcommands). default: an instance whose values are the defaults. A field that is
    true or false takes either word; true may be left out ("--dry_run").

    Raises OptionError; --help prints and ends the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = complete(argv, switches(kind, default))
    how = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=given,
                prog=prog or None,
                description=about,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                **how,
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise OptionError(one_line(said.getvalue())) from None


def switches(kind, default=None) -> set[str]:
    """Names of the fields that are true or false, in a dataclass and its parts, or in a union."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if not dataclasses.is_dataclass(kind):  # A | B
        return set().union(*map(switches, typing.get_args(kind)))
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        value = getattr(default, name, None)
        if dataclasses.is_dataclass(value):  # perhaps of a subclass, with more fields
            hint = type(value)
        found |= {name} if hint is bool else switches(hint, value)
    return found


def complete(argv: list[str], known: set[str]) -> list[str]:
    """The words true, false and none as tyro wants them, and the value of a bare switch.

    >>> complete(["--fsdp", "true", "--sp", "2", "--run.dry"], {"fsdp", "dry"})
    ['--fsdp', 'True', '--sp', '2', '--run.dry', 'True']
    """
    words = {"true": "True", "false": "False", "none": "None"}
    given = []
    for word, behind in zip(argv, [*argv[1:], "--"]):
        name, equals, value = word.partition("=")
        given.append(name + equals + words.get(value, value) if equals else words.get(word, word))
        is_switch = word.startswith("--") and word.removeprefix("--").split(".")[-1] in known
        if is_switch and behind.startswith("--"):
            given.append("True")
    return given


def one_line(box: str) -> str:
    """The text of tyro's box without its frame and its hint at --help.

    >>> one_line("╭─ Error ─╮\\n│ lr must be │\\n│ above 0 │\\n│ ─── │\\n│ see x --help │\\n╰─╯")
    'lr must be above 0; --help lists all options'
    """
    lines = [line.strip(f"{BOX} ") for line in box.splitlines()]
    lines = [line for line in lines if line.strip("-")]  # where there is no Unicode, rules are ---
    text = " ".join(line for line in lines[1:] if not line.endswith("--help"))
    text = re.sub(r"Perhaps you meant:\s+(--\S+).*", r"perhaps you meant \1", text)
    text = re.sub(r" Argument helptext: .*| For full helptext.*", "", text).removesuffix(".")
    return f"{text}; --help lists all options"
