"""The files of a catalogue's LoRAs in a folder, found by their digests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from klora_runtime.artifact.digests import file_digest
from klora_runtime.artifact.schedule import Source
from klora_runtime.errors import ArtifactError, ConfigError, shown

#: A version of a file: its size in bytes, and its time of modification.
_Version = tuple[int, int]


class LoraFolder:
    """A folder with LoRA files, searched with all its folders. Threads may share it.

    Args:
        path: the folder.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(f"loras: {shown(path)} is not a folder; name the one with the LoRAs.")
        self._lock = Lock()
        self._files = {each: self._version(each) for each in _files(self.path)}
        self._digests: dict[Path, tuple[_Version, str]] = {}

    def file(self, source: Source) -> Path:
        """Return the file of a source; only files of its size are read to compare their digests.

        Raises:
            ArtifactError: no file has its digest.
        """
        fitting = self._of_size(source)
        if not fitting:  # it may have come since
            self._files = {each: self._version(each) for each in _files(self.path)}
            fitting = self._of_size(source)
        for path in fitting:
            if self._digest(path) == source.sha256:
                return path
        same = [path for path in self._files if path.name == source.file]
        what = f"{shown(same[0])} is another file" if same else "no file there has that digest"
        raise ArtifactError(
            f"the LoRA {shown(source.file)} with sha256 {source.sha256} is not in "
            f"{shown(self.path)}: {what}. Put the file there, or add the new one to the catalogue."
        )

    def _of_size(self, source: Source) -> Sequence[Path]:
        """Return the files that may be a source, those of its name first."""
        fitting = [path for path in self._files if self._version(path)[0] == source.bytes]
        return sorted(fitting, key=lambda path: (path.name != source.file, path))

    def _digest(self, path: Path) -> str:
        version = self._version(path)
        with self._lock:
            known = self._digests.get(path)
        if known is None or known[0] != version:
            try:
                known = version, file_digest(path)
            except OSError as error:
                raise ArtifactError(f"{shown(path)} cannot be read: {error.strerror}.") from error
            with self._lock:
                self._digests[path] = known
        return known[1]

    @staticmethod
    def _version(path: Path) -> _Version:
        try:
            stat = path.stat()
        except OSError:
            return -1, -1
        return stat.st_size, stat.st_mtime_ns


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, followlinks=True):
        yield from (Path(root) / name for name in sorted(names) if name.endswith(".safetensors"))
