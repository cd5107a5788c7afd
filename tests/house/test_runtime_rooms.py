"""The rooms of the runtime: who may import whom, and of what each knows nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.lora_files import ROOT

RUNTIME = ROOT / "runtime" / "klora_runtime"
#: Each may import those after it.
ROOMS = ("pipeline", "layers", "catalogue", "linking", "artifact")
_FILES = ("signature", "errors", "lazy_names", "lazy_torch", "__about__")
#: Every room may import these. They may import one another, and no room.
GROUND = ("families", "devices", "hub", *_FILES)

_ABOVE = r"diffusers|transformers|accelerate|peft|scheduler|\bpipe\b|pipeline"
#: What layers know nothing of, and what the artifact knows nothing of, in names and texts of code.
FOREIGN = {
    "layers": re.compile(rf"(?i:{_ABOVE}|timestep)"),
    "artifact": re.compile(rf"(?i:{_ABOVE})|\bnn\b|\bModule\b|named_modules"),
}


def files_of(name: str) -> list[Path]:
    """The files of a room, or the one file of the ground."""
    return sorted((RUNTIME / name).rglob("*.py")) or [RUNTIME / f"{name}.py"]


def imported(path: Path) -> set[str]:
    """What of the runtime a file imports, by the first name after the package's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "klora_runtime":
            names |= {f"klora_runtime.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("klora_runtime.")}


def words_of(source: str) -> Iterator[str]:
    """Names and texts of code, but what explains it: docstrings and comments."""
    tree = ast.parse(source)
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    explained = {id(each.value) for each in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in explained:
                yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_the_rooms_are_all_there_is() -> None:
    there = {path.stem for path in RUNTIME.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} == {*ROOMS, *GROUND}


def test_imports_run_from_the_pipeline_to_layers_to_the_artifact() -> None:
    for place, room in enumerate(ROOMS):
        allowed = {*ROOMS[place:], *GROUND}
        for path in files_of(room):
            assert imported(path) <= allowed, f"{path} imports {imported(path) - allowed}"


def test_the_ground_stands_on_nothing() -> None:
    for name in GROUND:
        for path in files_of(name):
            assert imported(path) <= set(GROUND), path


def test_each_room_knows_nothing_of_what_is_above_it() -> None:
    for room, foreign in FOREIGN.items():
        for path in files_of(room):
            found = {word for word in words_of(path.read_text()) if foreign.search(word)}
            assert not found, f"{path} names {found}"


def test_the_search_finds_them() -> None:
    source = '''"""A pipeline in words."""
from torch import nn
class Field:
    """Of a scheduler."""
    name: str = "peft"
    """Of diffusers."""
    def of(self, pipe): return pipe.scheduler
'''
    words = set(words_of(source))
    assert {"nn", "peft", "pipe", "scheduler"} <= words
    assert not any("words" in word or "diffusers" in word for word in words)
    assert FOREIGN["layers"].search("call pipe.unload()")
    assert imported(RUNTIME / "pipeline" / "host.py") == {"layers", "pipeline"}
