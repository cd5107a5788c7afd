"""What differs by type of device lies in one room; nothing else names a type."""

from __future__ import annotations

import ast
import re

from support.lora_files import ROOT

from klora_runtime.devices.device_types import TYPES

ROOM = ROOT / "runtime" / "klora_runtime" / "devices"
SOURCES = sorted(
    path
    for package in (ROOT / "klora_compile", ROOT / "runtime" / "klora_runtime")
    for path in package.rglob("*.py")
    if ROOM not in path.parents
)
_TYPES = "|".join(known.name for known in TYPES.values() if not known.is_host)
#: ``cuda``, ``cuda:0``, and patterns of them; words of a sentence are not meant.
_NAME = re.compile(rf"(auto\|)?(cpu\|)?({_TYPES})\W*\S*")
_MODULE = re.compile(rf"torch\.(backends\.)?({_TYPES}|mkldnn)\b.*")


def named_types(source: str) -> set[str]:
    """Types of device that code names, as a text or as a module of torch."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and _NAME.fullmatch(str(node.value)):
            found.add(str(node.value))
        elif isinstance(node, ast.Attribute) and _MODULE.fullmatch(ast.unparse(node)):
            found.add(ast.unparse(node))
    return found


def test_no_type_of_device_is_named_outside_its_room() -> None:
    assert {path: names for path in SOURCES if (names := named_types(path.read_text()))} == {}


def test_the_search_finds_them() -> None:
    assert named_types("device.type == 'cuda'") == {"cuda"}
    assert named_types("torch.device('mps:0')") == {"mps:0"}
    assert named_types(r"re.fullmatch('auto|cpu|cuda(:\d+)?', text)") == {r"auto|cpu|cuda(:\d+)?"}
    assert named_types("x = torch.cuda.Stream()") == {"torch.cuda.Stream", "torch.cuda"}
    assert named_types("torch.backends.mkldnn.matmul") >= {"torch.backends.mkldnn"}
    assert not named_types("'cuda is a word'; torch.device('cpu'); self.cuda")
    assert len(SOURCES) > 100
