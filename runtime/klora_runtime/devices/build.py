"""What torch was built for, from its record of the build and without importing torch."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

#: Names in torch's record; each is None where torch was built without that kind of GPU.
_KINDS = ("cuda", "hip", "xpu")


def has_no_gpus() -> bool:
    """Return whether torch was surely built for CPUs alone; False where torch has to be asked."""
    if sys.platform == "darwin":
        return False  # Apple's GPUs are in every build
    try:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return False
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
        stated = dict(_assigned(ast.parse(text)))
    except (OSError, ValueError, SyntaxError):
        return False
    return all(stated.get(kind) == "None" for kind in _KINDS)


def _assigned(tree: ast.Module) -> list[tuple[str, str]]:
    """Return name and value of each assignment, as written."""
    pairs: list[tuple[ast.expr, ast.expr | None]] = []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.Assign):
            pairs += [(target, node.value) for target in node.targets]
    return [(ast.unparse(name), ast.unparse(value)) for name, value in pairs if value is not None]
