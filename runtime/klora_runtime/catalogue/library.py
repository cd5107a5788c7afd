"""A cache of loaded fusions and of LoRAs, for a service that applies many fusions."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.catalogue.catalogue import Catalogue
from klora_runtime.catalogue.factors import Factors
from klora_runtime.devices.names import as_device
from klora_runtime.errors import ConfigError
from klora_runtime.hub.address import address_of
from klora_runtime.hub.choosing import ARTIFACT
from klora_runtime.hub.fetching import located

#: A version of a file: its path, its size in bytes, and its time of modification.
_Key = tuple[str, int, int]

#: Number of a LoRA in the library's catalogue.
_Lora = int


@dataclass(frozen=True)
class _Kept:
    """What is kept, and its bytes once all of it is decoded."""

    value: Fusion | Factors
    nbytes: int


class FusionLibrary:
    """A cache of loaded artifacts that evicts the least recently used ones. Threads may share it.

    With a catalogue it also gives any pair of it. Then the factors of each LoRA are kept once,
    however many pairs use them.

    Args:
        budget: bytes of factors that may stay loaded, 0 or more. A larger fusion is returned but
            not kept. Compressed factors that are decoded later count as if they were decoded.
        device: where the factors are kept; on the pipelines' device, a swap does not send them.
        signed_by: the key that every artifact must be signed by, see
            :func:`klora_runtime.load_fusion`.
        catalogue: opened with its folder of LoRAs, for :meth:`pair`.

    Raises:
        ConfigError: the budget is not a whole number >= 0, or there is no such device.
    """

    def __init__(
        self,
        budget: int,
        *,
        device: str | torch.device = "cpu",
        signed_by: str | os.PathLike[str] | None = None,
        catalogue: Catalogue | None = None,
    ) -> None:
        if type(budget) is not int or budget < 0:
            raise ConfigError(f"budget: expected a whole number of bytes, found {budget!r}.")
        self.budget = budget
        self.device = as_device(device)
        self.signed_by = signed_by
        self._paths: dict[tuple[str, str | None], Path] = {}  # of names on the Hub
        self.catalogue = catalogue
        # The most recently used one is last.
        self._kept: OrderedDict[_Key | _Lora, _Kept] = OrderedDict()
        self._lock = Lock()

    def get(
        self,
        path: str | os.PathLike[str],
        *,
        sources: Mapping[str, str | os.PathLike[str]] | None = None,
        weight_name: str | None = None,
    ) -> Fusion:
        """Return the fusion of an artifact; load it if it is not kept or its file has changed.

        Args:
            path: a ``.klora.safetensors`` file, or its name on the Hub, which is looked up once:
                later calls stay with that commit.
            sources: see :func:`klora_runtime.load_fusion`. Files are identified by their digests,
                so a kept fusion is returned whatever their paths.
            weight_name: see :func:`klora_runtime.load_fusion`.

        Raises:
            ArtifactError: see :func:`klora_runtime.load_fusion`; the file is not kept.
            ConfigError: ``sources`` names an unknown source, or the artifact is not thin.
            KloraError: the Hub does not give a file.
        """
        path = self._located(path, weight_name)
        key = _key(path)
        with self._lock:
            known = None if key is None else self._kept.get(key)
            if key is not None and known is not None and isinstance(known.value, Fusion):
                self._kept.move_to_end(key)
                return known.value
        fusion = load_fusion(path, device=self.device, sources=sources, signed_by=self.signed_by)
        if not fusion.is_thin and key is not None and key == _key(path):  # the file did not change
            self._keep(key, fusion)
        return fusion

    def pair(self, content: str, style: str) -> Fusion:
        """Return the fusion of a subject and a style of the catalogue.

        It is linked anew, which takes milliseconds; the factors of its LoRAs are kept.

        Args:
            content: name of the subject's LoRA.
            style: name of the style's LoRA.

        Raises:
            ConfigError: the library has no catalogue, or the catalogue no LoRA of this name.
            KloraError: the pair is refused; or the compiler has to compute the factors of a LoRA.
            ArtifactError: a LoRA's file is missing or changed.
        """
        if self.catalogue is None:
            raise ConfigError("the library has no catalogue; add catalogue=Catalogue.open(FILE).")
        slots = self.catalogue.opened.slots_of(content, style)
        factors = {slot: self._factors(number) for slot, number in slots.items()}
        return self.catalogue.opened.fusion_with(content, style, factors)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept factors, once all of them are decoded."""
        with self._lock:
            return sum(each.nbytes for each in self._kept.values())

    def __len__(self) -> int:
        """Return the number of kept artifacts and LoRAs."""
        return len(self._kept)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        """Return whether the present version of an artifact is kept."""
        known = [place for (name, _), place in self._paths.items() if name == os.fspath(path)]
        return any(_key(place) in self._kept for place in (path, *known))

    def clear(self) -> None:
        """Drop all that is kept; names on the Hub are looked up again."""
        with self._lock:
            self._kept.clear()
            self._paths.clear()

    def _located(
        self, name: str | os.PathLike[str], weight_name: str | None
    ) -> str | os.PathLike[str]:
        """Return the path of a name; ask the Hub once."""
        if weight_name is None and address_of(name) is None:
            return name
        asked = (os.fspath(name), weight_name)
        if asked not in self._paths:
            self._paths[asked] = Path(located(name, ARTIFACT, weight_name))
        return self._paths[asked]

    def _factors(self, number: _Lora) -> Factors:
        """Return the factors of a LoRA of the catalogue; read them if they are not kept."""
        assert self.catalogue is not None
        with self._lock:
            known = self._kept.get(number)
            if known is not None and isinstance(known.value, Factors):
                self._kept.move_to_end(number)
                return known.value
        found = self.catalogue.opened.read(number, self.device)
        self._keep(number, found)
        return found

    def _keep(self, key: _Key | _Lora, value: Fusion | Factors) -> None:
        with self._lock:
            if isinstance(key, tuple):
                for other in [*self._kept]:  # earlier versions of the file
                    if isinstance(other, tuple) and other[0] == key[0] and other != key:
                        del self._kept[other]
            self._kept[key] = _Kept(value, _bytes_of(value))
            self._kept.move_to_end(key)
            total = sum(each.nbytes for each in self._kept.values())
            while total > self.budget:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.nbytes


def _bytes_of(value: Fusion | Factors) -> int:
    """Return the most bytes that factors take: those of today, and what decoding adds."""
    if isinstance(value, Factors):
        return value.nbytes
    stored = (held for entry in value.entries for held in entry.factors.values())
    return value.nbytes + sum(held.pending for held in stored)


def _key(path: str | os.PathLike[str]) -> _Key | None:
    """Return the version of a file; None if there is no such file, which loading then reports."""
    try:
        place = Path(os.path.realpath(path))
        stat = place.stat()
    except OSError:
        return None
    return str(place), stat.st_size, stat.st_mtime_ns
