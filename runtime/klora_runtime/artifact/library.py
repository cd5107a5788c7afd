"""Fusions that stay loaded: what a service that answers with many of them keeps at hand."""

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

#: A file as it was when it was loaded: its path, its bytes, when it was changed.
_Key = tuple[str, int, int]


class FusionLibrary:
    """Loads artifacts and keeps those used last, up to a budget of memory. Threads may share it.

    Args:
        budget: bytes of factors that may stay loaded, 0 or more. A fusion that is larger is given
            out and not kept.
        device: where the factors are kept; on that of the pipelines, no swap has to send them.

    Raises:
        ConfigError: the budget is not a whole number of 0 or more, or there is no such device.
    """

    def __init__(self, budget: int, *, device: str | torch.device = "cpu") -> None:
        if type(budget) is not int or budget < 0:
            raise ConfigError(f"budget: expected a whole number of bytes, found {budget!r}.")
        self.budget = budget
        self.device = as_device(device)
        self._kept: OrderedDict[_Key, Fusion] = OrderedDict()  # the one used last at the end
        self._lock = Lock()

    def get(
        self,
        path: str | os.PathLike[str],
        *,
        sources: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> Fusion:
        """The fusion of an artifact, loaded if it is not at hand or its file was changed.

        Args:
            path: a ``.klora.safetensors`` file.
            sources: of a thin artifact, see :func:`klora_runtime.load_fusion`; as their digests
                decide, it does not matter later which files they were.

        Raises:
            ArtifactError: see :func:`klora_runtime.load_fusion`; nothing is kept of this file.
            ConfigError: ``sources`` has a name that the artifact does not have, or it is not thin.
        """
        key = _key(path)
        with self._lock:
            if key is not None and key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        fusion = load_fusion(path, device=self.device, sources=sources)
        if not fusion.is_thin and key is not None and key == _key(path):  # not replaced meanwhile
            self._keep(key, fusion)
        return fusion

    @property
    def nbytes(self) -> int:
        """Bytes of factors that are kept."""
        with self._lock:
            return sum(fusion.nbytes for fusion in self._kept.values())

    def __len__(self) -> int:
        """How many fusions are kept."""
        return len(self._kept)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        """Whether an artifact is at hand as it is now."""
        return _key(path) in self._kept

    def clear(self) -> None:
        """Keep none of them."""
        with self._lock:
            self._kept.clear()

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
    """None where there is no such file; loading it says what is wrong."""
    try:
        place = Path(os.path.realpath(path))
        stat = place.stat()
    except OSError:
        return None
    return str(place), stat.st_size, stat.st_mtime_ns
