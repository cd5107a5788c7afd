"""A cache of loaded fusions, for a service that applies many of them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import torch

from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.devices.names import as_device
from klora_runtime.errors import ConfigError
from klora_runtime.hub.address import address_of
from klora_runtime.hub.choosing import ARTIFACT
from klora_runtime.hub.fetching import located

#: A version of a file: its path, its size in bytes, and its time of modification.
_Key = tuple[str, int, int]


class FusionLibrary:
    """A cache of loaded artifacts that evicts the least recently used ones. Threads may share it.

    Args:
        budget: bytes of factors that may stay loaded, 0 or more. A larger fusion is returned but
            not kept.
        device: where the factors are kept; on the pipelines' device, a swap does not send them.
        signed_by: the key that every artifact must be signed by, see
            :func:`klora_runtime.load_fusion`.

    Raises:
        ConfigError: the budget is not a whole number >= 0, or there is no such device.
    """

    def __init__(
        self,
        budget: int,
        *,
        device: str | torch.device = "cpu",
        signed_by: str | os.PathLike[str] | None = None,
    ) -> None:
        if type(budget) is not int or budget < 0:
            raise ConfigError(f"budget: expected a whole number of bytes, found {budget!r}.")
        self.budget = budget
        self.device = as_device(device)
        self.signed_by = signed_by
        self._paths: dict[tuple[str, str | None], Path] = {}  # of names on the Hub
        self._kept: OrderedDict[_Key, Fusion] = OrderedDict()  # the most recently used one is last
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
            if key is not None and key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        fusion = load_fusion(path, device=self.device, sources=sources, signed_by=self.signed_by)
        if not fusion.is_thin and key is not None and key == _key(path):  # the file did not change
            self._keep(key, fusion)
        return fusion

    @property
    def nbytes(self) -> int:
        """Bytes of all kept factors."""
        with self._lock:
            return sum(fusion.nbytes for fusion in self._kept.values())

    def __len__(self) -> int:
        """Return the number of kept fusions."""
        return len(self._kept)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        """Return whether the present version of an artifact is kept."""
        known = [place for (name, _), place in self._paths.items() if name == os.fspath(path)]
        return any(_key(place) in self._kept for place in (path, *known))

    def clear(self) -> None:
        """Drop all kept fusions; names on the Hub are looked up again."""
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

    def _keep(self, key: _Key, fusion: Fusion) -> None:
        with self._lock:
            stale = [other for other in self._kept if other[0] == key[0] and other != key]
            for other in stale:
                del self._kept[other]
            self._kept[key] = fusion
            self._kept.move_to_end(key)
            total = sum(each.nbytes for each in self._kept.values())
            while total > self.budget:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.nbytes


def _key(path: str | os.PathLike[str]) -> _Key | None:
    """Return the version of a file; None if there is no such file, which loading then reports."""
    try:
        place = Path(os.path.realpath(path))
        stat = place.stat()
    except OSError:
        return None
    return str(place), stat.st_size, stat.st_mtime_ns
