"""Python files that come with a model: they are found, and refused, before anything runs them.

diffusers runs three kinds: a pipeline that ``model_index.json`` names with its file
(``["pipeline", "DrawingPipeline"]``), ``pipeline.py`` beside an index whose class diffusers does
not have, and a part's class with its file in the part's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers

from klora_runtime.errors import KloraError, shown

#: Name of the file with a pipeline's class, if the index does not state it.
PIPELINE = "pipeline.py"


def is_unknown(index: Mapping[str, Any]) -> bool:
    """Return whether an index names a pipeline's class without a file, and diffusers lacks it."""
    named = index.get("_class_name")
    return isinstance(named, str) and not hasattr(diffusers, named)


def named_module(index: Mapping[str, Any]) -> str | None:
    """Return the module that an index names for the pipeline's class, or None."""
    match index.get("_class_name"):
        case [str(module), str()]:
            return module
    return None


def own_pipeline(folder: Path, index: Mapping[str, Any]) -> Path | None:
    """Return the file of a folder with the pipeline's class; None if diffusers has the class.

    Raises:
        KloraError: the file is missing.
    """
    module = named_module(index)
    if module is None and not is_unknown(index):
        return None
    name = PIPELINE if module is None else f"{module}.py"
    path = folder / name
    if not path.is_file() or path.parent != folder:
        raise KloraError(
            f"the model is for {shown(index['_class_name'])}, which diffusers "
            f"{diffusers.__version__} does not have, and there is no {shown(path)}. Update "
            "diffusers, or get that file too."
        )
    return path


def refuse_own_code(folder: Path, index: Mapping[str, Any], model: str) -> None:
    """Refuse a model whose loading would run Python files of its own.

    Args:
        folder: the folder of diffusers.
        index: its ``model_index.json``.
        model: what the user called it.

    Raises:
        KloraError: there are such files; ``issues`` lists them.
    """
    files = [path for path in (own_pipeline(folder, index), *_of_parts(folder, index)) if path]
    if files:
        raise KloraError(
            f"{shown(model)} brings Python code of its own, which would run on this machine. Read "
            "it, and add --trust-remote-code if you trust it.",
            map(shown, files),
        )


def _of_parts(folder: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    for name, part in index.items():
        if isinstance(part, list) and part and isinstance(part[0], str) and name[:1] != "_":
            path = folder / name / f"{part[0]}.py"
            if path.is_file():
                yield path
