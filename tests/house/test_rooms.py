"""The rooms of the compiler: who imports whom, without a circle."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.lora_files import ROOT

COMPILER = ROOT / "klora_compile"
ROOMS = {path.parent.name for path in COMPILER.glob("*/__init__.py")}


def rooms_of(names: set[str]) -> set[str]:
    """The rooms, or files beside them, that modules of the compiler lie in."""
    return {name.split(".")[1] for name in names if name.startswith("klora_compile.")}


def imported(source: str) -> set[str]:
    """Every module of the compiler that a file imports anywhere, for its types too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "klora_compile":
            modules |= {f"klora_compile.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {name for name in modules if name.startswith("klora_compile.")}


def imports() -> dict[str, set[str]]:
    """Room or file at the top of the package -> what of these it imports."""
    found: dict[str, set[str]] = {}
    for path in COMPILER.rglob("*.py"):
        home = path.relative_to(COMPILER).with_suffix("").parts[0]
        if home in ("__init__", "__main__"):
            continue  # the public names, which nothing inside imports
        found.setdefault(home, set()).update(rooms_of(imported(path.read_text())) - {home})
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The rooms of one circle, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_rooms_import_each_other_without_a_circle() -> None:
    graph = imports()
    assert graph.keys() >= ROOMS
    assert circle(graph) == []


def test_rules_know_no_other_room() -> None:
    assert imports()["rules"] & ROOMS == set()


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "line",
    [
        "import klora_compile.rules.klora",
        "from klora_compile.rules.klora import Klora",
        "from klora_compile import rules",
        "def f():\n    from klora_compile.rules import catalogue",
    ],
)
def test_an_import_is_seen_where_it_stands(line: str) -> None:
    assert rooms_of(imported(line)) == {"rules"}


def test_no_file_of_the_compiler_hides_in_a_folder_without_a_package() -> None:
    folders: set[Path] = {path.parent for path in COMPILER.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone, and refuses the second one."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
