"""The house: who may import whom. Arrows run down only, and nothing hides one."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file may import those before it, never those behind it; files of one line do not know each other
# unless they are in one room (families, kit), where the graph test below holds.
FLOORS = [
    ("data", "grpo", "mrsp"),
    ("model", "rollout"),
    ("families", "sft"),
    ("kit",),
    ("eval",),
    ("train",),
]
# Copied alone, a file needs these; rollout, families and kit take vllm, av, PIL ... where they use
# them (heavy or optional packages are imported inside functions).
COPYABLE = {"grpo": set(), "mrsp": set(), "rollout": {"mrsp"}, "data": set()}
COPYABLE["kit.vllm_engine"] = {"rollout"}
HEAVY = {"vllm", "flash_attn", "decord", "av", "PIL", "matplotlib", "datasets", "pyarrow", "peft"}


def modules() -> dict[str, Path]:
    """{name with dots: file} of the whole product."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("families/*.py"), *ROOT.glob("kit/*.py")]
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)
    return {name.removesuffix(".__init__"): f for name, f in zip(names, files)}


def imported(file: Path, everywhere: bool = True) -> set[str]:
    """Names that a file imports; everywhere: also within functions."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@cache
def graph() -> dict[str, set[str]]:
    """{file: files of ours that it imports, also within functions}."""
    known = modules()
    out = {}
    for name, file in known.items():
        own = {x for x in imported(file) if x in known and x != name}
        for room in ("kit", "families"):  # `from kit import x`: kit/x.py, not its face
            if any(x.startswith(f"{room}.") for x in own):
                own -= {room}
        out[name] = own
    return out


def floor(name: str) -> int:
    return next(i for i, row in enumerate(FLOORS) if name.split(".")[0] in row)


def test_every_file_has_a_floor():
    assert all(any(name.split(".")[0] in row for row in FLOORS) for name in modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_arrows_run_down_only(name):
    room = name.split(".")[0]
    for other in graph()[name]:
        same_room = other.split(".")[0] == room and room in ("families", "kit")
        assert same_room or floor(other) < floor(name), f"{name} imports {other}"


def test_there_is_no_circle():
    left = dict(graph())
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("name", sorted(COPYABLE))
def test_a_file_that_is_copied_needs_what_it_says(name):
    assert graph()[name] == COPYABLE[name]
    top = {x.split(".")[0] for x in imported(modules()[name], everywhere=False)}
    assert not top & HEAVY
    if name in ("grpo", "mrsp"):
        assert "transformers" not in top and "numpy" not in top


def test_heavy_packages_are_imported_where_they_are_used():
    for name, file in modules().items():
        top = {x.split(".")[0] for x in imported(file, everywhere=False)}
        assert not top & HEAVY, f"{name} imports {top & HEAVY} at its top"


def test_commands_are_imported_by_nobody():
    needs = set().union(*graph().values())
    assert not needs & {"kit.bench", "kit.build", "kit.filter", "train"}


@pytest.mark.parametrize("name", ["kit.build", "kit.report"])
def test_a_command_that_loads_no_model_imports_none(name):
    """Nor transformers, which take seconds: its --help is there sooner."""
    needs, reached = graph(), {name}
    while more := set().union(*(needs[other] for other in reached)) - reached:
        reached |= more
    assert not {other.split(".")[0] for other in reached} & {"model", "rollout", "sft", "families"}
    assert not any("transformers" in imported(modules()[other]) for other in reached)
