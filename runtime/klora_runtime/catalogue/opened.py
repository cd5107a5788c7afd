"""An open catalogue: its pairs, linked when they are asked for, and the factors of its LoRAs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.catalogue.document import CataloguedLora, Document, Kind
from klora_runtime.catalogue.factors import Factors, computed, read_factors
from klora_runtime.catalogue.file import CatalogueFile
from klora_runtime.catalogue.folder import LoraFolder
from klora_runtime.catalogue.fusing import fusion_of_pair
from klora_runtime.errors import ConfigError, KloraError, PairingError, shown
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.entries import Pair, link


@dataclass(frozen=True)
class PairFacts:
    """What a catalogue states about one pair."""

    content: str
    style: str
    kind: Kind
    gamma: Mapping[str, float | None]
    """Component -> gamma; empty if the pair is refused or its rule has none."""
    choices: str
    """Digest of all choices, 32 hexadecimal digits."""


class OpenCatalogue:
    """Many LoRAs of subjects and styles, and the fusion of any two of them. Threads may share it.

    Args:
        file: the open file.
        loras: where the files of the LoRAs are; None for thin fusions.
        device: where factors are kept.
    """

    def __init__(self, file: CatalogueFile, loras: LoraFolder | None, device: torch.device) -> None:
        self.file = file
        self.device = device
        self._folder = loras
        document = file.document
        self._contents = {document.loras[i].name: i for i in document.contents}
        self._styles = {document.loras[i].name: i for i in document.styles}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        loras: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Open a catalogue; see :meth:`klora_runtime.Catalogue.open`."""
        from klora_runtime.devices.names import as_device  # it imports torch

        where = as_device(device)
        folder = None if loras is None else LoraFolder(loras)
        return cls(CatalogueFile(Path(path)), folder, where)

    @property
    def contents(self) -> tuple[str, ...]:
        """Names of the subjects' LoRAs, sorted."""
        return tuple(self._contents)

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles' LoRAs, sorted."""
        return tuple(self._styles)

    def __len__(self) -> int:
        """Return the number of pairs, refused ones included."""
        return len(self.file.pairs.pairs)

    def fusion(self, content: str, style: str) -> Fusion:
        """Return a fusion; see :meth:`klora_runtime.Catalogue.fusion`."""
        if self._folder is None:
            return self.fusion_with(content, style, None)
        self._kind(content, style)  # refuses a pair that does not fit before files are read
        slots = self._slots(content, style)
        read = {number: self.read(number) for number in sorted(set(slots.values()))}
        return self.fusion_with(content, style, {slot: read[n] for slot, n in slots.items()})

    def fusion_with(
        self, content: str, style: str, factors: Mapping[str, Factors] | None
    ) -> Fusion:
        """Return the fusion with these factors, by slot; a thin one without any."""
        kind, slots = self._kind(content, style), self._slots(content, style)
        loras = {slot: self.document.loras[number] for slot, number in slots.items()}
        if factors is None:
            for lora in loras.values():
                if lora.keys is None:
                    raise KloraError(computed(lora))
        return fusion_of_pair(self._link(slots), loras, kind, self.document.tool, factors)

    def link(self, content: str, style: str) -> Pair:
        """Return all choices between a subject and a style, as arrays.

        Raises:
            ConfigError, KloraError, ArtifactError: see :meth:`fusion`.
        """
        self._kind(content, style)
        return self._link(self._slots(content, style))

    def facts(self, content: str, style: str) -> PairFacts:
        """Return what the catalogue states about a pair.

        Raises:
            ConfigError: the catalogue has no such pair.
        """
        return self._facts(self._place(content, style))

    def pairs(self) -> Iterator[PairFacts]:
        """Yield what the catalogue states about each pair, by content, then by style."""
        return map(self._facts, range(len(self)))

    def lora_of(self, slot: str, name: str) -> CataloguedLora:
        """Return the LoRA of a name: a content or a style.

        Raises:
            ConfigError: there is none.
        """
        return self.document.loras[self._number(slot, name)]

    @property
    def document(self) -> Document:
        """What the file states about its LoRAs."""
        return self.file.document

    def slots_of(self, content: str, style: str) -> dict[str, int]:
        """Return slot -> number of its LoRA: content, style, and those that always act."""
        return self._slots(content, style)

    def read(self, number: int, device: torch.device | None = None) -> Factors:
        """Read the factors of a LoRA from its files.

        Args:
            number: its place in the document.
            device: where they are kept; None for the catalogue's.

        Raises:
            ConfigError: the catalogue was opened without a folder of LoRAs.
            ArtifactError, KloraError: see :meth:`fusion`.
        """
        if self._folder is None:
            raise ConfigError("the catalogue was opened without LoRAs; add loras=FOLDER.")
        return read_factors(self.document.loras[number], self._folder, device or self.device)

    def _link(self, slots: Mapping[str, int]) -> Pair:
        numbers = {slot: self.file.numbers(number) for slot, number in slots.items()}
        return link(self.document.terms, numbers)

    def _slots(self, content: str, style: str) -> dict[str, int]:
        return {
            CONTENT: self._number(CONTENT, content),
            STYLE: self._number(STYLE, style),
            **self.document.always,
        }

    def _number(self, slot: str, name: str) -> int:
        names = self._contents if slot == CONTENT else self._styles
        if name not in names:
            some = ", ".join(map(shown, list(names)[:8]))
            more = ", …" if len(names) > 8 else ""
            raise ConfigError(f"there is no {slot} {shown(name)}; the catalogue has {some}{more}.")
        return names[name]

    def _place(self, content: str, style: str) -> int:
        """Return the number of a pair."""
        place = self.file.pairs.place_of(self._number(CONTENT, content), self._number(STYLE, style))
        if place is None:
            raise ConfigError(
                f"the catalogue holds no pair of {shown(content)} and {shown(style)}; add it with "
                "klora catalogue STORE --add."
            )
        return place

    def _kind(self, content: str, style: str) -> Kind:
        """Return the kind of a pair that fits.

        Raises:
            PairingError: it does not.
        """
        place = self._place(content, style)
        kind = self.document.kinds[int(self.file.pairs.pairs[place, 2])]
        if kind.refused is not None:
            raise PairingError(f"{shown(content)} and {shown(style)}: {shown(kind.refused, 2000)}")
        return kind

    def _facts(self, place: int) -> PairFacts:
        held, document = self.file.pairs, self.document
        content, style, number = held.pairs[place].tolist()
        kind = document.kinds[number]
        gamma: dict[str, float | None] = {}
        if kind.refused is None and document.terms.measures:
            values = held.gamma[place].tolist()
            gamma = {
                name: None if value < 0.0 else value
                for name, value in zip(document.components, values, strict=True)
            }
        choices = bytes(held.choices[place].tolist()).hex()
        names = document.loras[content].name, document.loras[style].name
        return PairFacts(*names, kind, gamma, choices)
