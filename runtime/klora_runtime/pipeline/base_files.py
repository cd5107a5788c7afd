"""The files that the components of a pipeline were loaded from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from klora_runtime.errors import ConfigError, shown

#: The value of ``base`` that takes the folders that the pipeline says it was loaded from.
AUTO = "auto"

#: A file or folder of the base model, :data:`AUTO`, or None for copies in memory.
Base = str | os.PathLike[str] | None


def refuse_base(base: Base) -> None:
    """Refuse a base that is not there.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if base is None or base == AUTO:
        return
    try:
        is_there = Path(base).exists()
    except (TypeError, ValueError, OSError):
        is_there = False
    if not is_there:
        raise ConfigError(
            f"base={shown(base)}: there is no such file or folder. Name what the pipeline was "
            f"loaded from, or take base={AUTO!r}."
        )


def files_of(base: Base, component: str, model: nn.Module) -> Sequence[Path] | None:
    """Return the safetensors files of a component; None if the base is None.

    Every variant and every shard is listed: the reader compares the numbers.

    Args:
        base: see :data:`Base`; a folder is the pipeline's or the component's.
        component: name of the component, such as ``unet``.
        model: its module, which says where it was loaded from.
    """
    if base is None:
        return None
    place = _loaded_from(model) if base == AUTO else Path(base)
    if place is None:
        return ()
    if place.is_file():
        return (place,)
    for folder in (place / component, place):
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
    return ()


def _loaded_from(model: Any) -> Path | None:
    """Return the local file or folder that diffusers or transformers loaded a model from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).exists() else None
