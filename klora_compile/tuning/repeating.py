"""What leaves the page: commands that repeat its picture, and the artifact."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from klora_compile.trying.names import SAMPLING
from klora_compile.trying.words import flag, schedule_words
from klora_compile.tuning.controls import Texts
from klora_runtime.artifact.file import save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, shown

ENDING = ".klora.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The words of commands that name what a page was opened with."""

    loras: tuple[str, ...]
    """Of ``klora compile``: the LoRAs, and how to read them."""
    model: tuple[str, ...]
    """Of ``klora sample``: the model, and how to load it."""

    def commands(self, settings: Texts, artifact: str, mode: str | None) -> str:
        """Return the two commands that make the picture of some settings.

        Args:
            settings: the settings.
            artifact: name of the artifact between them.
            mode: how the fusion acts on the page's pipeline; None if that is unknown.
        """
        sampling = [w for n, text in settings.items() if n in SAMPLING for w in (flag(n), text)]
        modes = () if mode is None or "--mode" in self.model else ("--mode", mode)
        picture = f"{artifact.removesuffix(ENDING)}.png"
        lines = (
            ("compile", *self.loras, *schedule_words(settings), "-o", artifact),
            ("sample", artifact, *self.model, *modes, *sampling, "-o", picture),
        )
        return "\n".join(f"klora {shlex.join(words)}" for words in lines)


def save_artifact(fusion: Fusion, folder: Path, name: str, *, overwrite: bool) -> Path:
    """Write a fusion into a folder.

    Args:
        fusion: the fusion.
        folder: the folder.
        name: name of the file; ``.klora.safetensors`` is added if it is missing.
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        ConfigError: the name is empty, or leads out of the folder.
        KloraError: the file exists and ``overwrite`` is false, or it cannot be written.
    """
    stem = name.strip().removesuffix(ENDING)
    if not stem or stem.startswith(".") or set(stem) & set("/\\:\0"):
        raise ConfigError(
            f"artifact: expected the name of a file in {shown(folder)}, found {shown(name)!r}."
        )
    path = folder / f"{stem}{ENDING}"
    save_fusion(fusion, path, overwrite=overwrite)
    return path
