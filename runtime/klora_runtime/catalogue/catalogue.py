"""A catalogue in a service: any subject in any style, linked when it is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.catalogue.opened import OpenCatalogue
from klora_runtime.errors import shown
from klora_runtime.lazy_torch import torch


@dataclass(frozen=True, eq=False, repr=False)
class Catalogue:
    """Many LoRAs of subjects and styles, and the fusion of any two of them.

    Open one with :meth:`open`. Threads may share it.
    """

    opened: OpenCatalogue

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        loras: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Open a catalogue.

        Args:
            path: the file that ``klora catalogue`` wrote.
            loras: the folder with the LoRAs, whose files are found by their digests. Without it,
                fusions are thin: they can be read, and applied once they have their sources.
            device: where factors are kept; see :func:`klora_runtime.load_fusion`.

        Raises:
            ArtifactError: the file breaks the format; ``issues`` lists every problem found.
            ConfigError: there is no such folder or device.
        """
        return cls(OpenCatalogue.open(path, loras=loras, device=device))

    @property
    def contents(self) -> tuple[str, ...]:
        """Names of the subjects' LoRAs, sorted."""
        return self.opened.contents

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles' LoRAs, sorted."""
        return self.opened.styles

    def fusion(self, content: str, style: str) -> Fusion:
        """Return the fusion of a subject and a style, equal to what ``klora compile`` makes.

        With a folder of LoRAs their factors are read from the files each time, and only the
        fusion holds them; :class:`FusionLibrary` keeps those of many LoRAs within a budget. The
        catalogue itself keeps no more than its file holds: the numbers of each LoRA once.

        Args:
            content: name of the subject's LoRA.
            style: name of the style's LoRA.

        Raises:
            ConfigError: the catalogue has no LoRA of this name.
            KloraError: the pair is refused; or the compiler has to compute the factors of a LoRA.
            ArtifactError: the numbers are damaged, or the folder lacks a file or holds another one.
        """
        return self.opened.fusion(content, style)

    def refused(self, content: str, style: str) -> str | None:
        """Return why a pair cannot be fused; None if it can.

        Args:
            content: name of the subject's LoRA.
            style: name of the style's LoRA.

        Raises:
            ConfigError: the catalogue has no LoRA of this name.
        """
        return self.opened.facts(content, style).kind.refused

    def __len__(self) -> int:
        """Return the number of pairs, refused ones included."""
        return len(self.opened)

    def __repr__(self) -> str:
        rule = shown(self.opened.document.terms.rule)
        return (
            f"Catalogue of {len(self.contents)} subjects and {len(self.styles)} styles by rule "
            f"{rule}, {len(self)} pairs"
        )
