"""The folder of a sweep's cells, from which an interrupted sweep goes on.

    FOLDER/inputs.json        what all pictures have in common
    FOLDER/index.json         the sweep that wrote here last: labels, settings, times
    FOLDER/RULE-KEY.png       the picture of one trial; .webp if it is a video

KEY is a digest of the trial, so a sweep of other axes takes over the pictures that it has in common
with the one before. Each file is written beside and renamed: a sweep that dies leaves whole files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from klora_compile.sampling.album import write_shots
from klora_compile.sampling.making import Making
from klora_compile.sampling.pictures import Shot
from klora_compile.sweeping.inputs import differences
from klora_compile.trying.trial import Trial
from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.artifact.replacing import replacing
from klora_runtime.errors import KloraError, shown

_INPUTS, _INDEX = "inputs.json", "index.json"
_OURS = re.compile(r"(inputs|index)\.json|[\w+-]+-[0-9a-f]{16}\.(png|webp)")
_DIGITS = 16


class CellFolder:
    """The folder of a sweep's cells.

    Args:
        folder: the folder; its parent exists.
        inputs: see :func:`~klora_compile.sweeping.inputs.inputs_of`.

    Raises:
        KloraError: it was begun with other inputs, holds files that no sweep wrote, or cannot be
            written; it is unchanged.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder.exists():
            _check(folder, inputs)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise KloraError(f"{shown(folder)} cannot be made: {shown(error)}.") from error
        self._write(_INPUTS, inputs)

    def path(self, trial: Trial, *, video: bool = False) -> Path:
        """Return where the picture of a trial is, or will be."""
        rule = trial.config.rule.name
        return self.folder / f"{rule}-{trial.key[:_DIGITS]}.{'webp' if video else 'png'}"

    def picture(self, trial: Trial, *, video: bool = False) -> Image.Image | None:
        """Return the picture of a trial, or the middle frame; None if it is missing or damaged."""
        try:
            with Image.open(self.path(trial, video=video)) as image:
                image.seek(getattr(image, "n_frames", 1) // 2)
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError):
            return None

    def keep(self, trial: Trial, shot: Shot, making: Making | None) -> Path:
        """Write the picture of a trial.

        Raises:
            KloraError: it cannot be written.
        """
        path = self.path(trial, video=shot.is_video)
        write_shots([shot], path, making, overwrite=True)
        return path

    def index(self, facts: Mapping[str, Any]) -> None:
        """Write the index of the sweep.

        Raises:
            KloraError: it cannot be written.
        """
        self._write(_INDEX, facts)

    def _write(self, name: str, facts: Mapping[str, Any]) -> None:
        with replacing(self.folder / name, overwrite=True) as temporary:
            temporary.write_text(canonical_json(facts) + "\n", encoding="utf-8")


def _check(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be gone on with."""
    if not folder.is_dir():
        raise KloraError(f"{shown(folder)} is not a folder; name another.")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".klora-")}
    strange = sorted(name for name in names if not _OURS.fullmatch(name))
    if strange or (names and _INPUTS not in names):
        raise KloraError(
            f"{shown(folder)} holds files that no sweep wrote; name another folder.",
            map(shown, strange),
        )
    if not names:
        return
    try:
        before = json.loads((folder / _INPUTS).read_text(encoding="utf-8"))
        wrong = differences(before, inputs)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise KloraError(
            f"{shown(folder / _INPUTS)} cannot be read; name another folder, or remove this one."
        ) from error
    if wrong:
        raise KloraError(
            f"{shown(folder)} holds pictures of other inputs. Name another folder, or remove this "
            "one.",
            map(shown, wrong),
        )
