"""Which LoRAs of a store a catalogue takes, in which role, and under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from klora_compile.profiles.profile import Profile
from klora_compile.reading.files.lora_file import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS
from klora_runtime.catalogue.document import WHOLE
from klora_runtime.errors import ConfigError, shown


@dataclass(frozen=True)
class StoredLora:
    """One LoRA of a store, in one file or two."""

    profiles: Mapping[str, Profile]
    """``whole``, or ``high`` and ``low`` -> profile."""

    @property
    def first(self) -> Profile:
        """The profile of its file, or of its file for high noise."""
        return next(iter(self.profiles.values()))

    @property
    def id(self) -> tuple[str, ...]:
        """Digests of its files."""
        return tuple(each.source.sha256 for each in self.profiles.values())

    @property
    def stem(self) -> str:
        """Its name: that of its file, or of its folder if the file has a usual name."""
        path = Path(self.first.path)
        usual = path.name in (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS)
        return path.parent.name if usual else path.stem

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks, ascending."""
        return tuple(sorted({rank for each in self.profiles.values() for rank in each.ranks}))


@dataclass(frozen=True)
class Filters:
    """What LoRAs must state to be taken."""

    families: Collection[str] = ()
    """Keys of base models, one of which it may be for; empty for all."""
    licences: Collection[str] = ()
    """Patterns, one of which its licence matches; empty for all. None stated is ``""``."""

    def take(self, lora: StoredLora) -> bool:
        """Return whether a LoRA is taken."""
        for profile in lora.profiles.values():
            if self.families and not set(self.families) & set(profile.families):
                return False
            licence = (profile.source.license or "").lower()
            if self.licences and not any(fnmatchcase(licence, p.lower()) for p in self.licences):
                return False
        return True


def loras_of(profiles: Iterable[Profile]) -> list[StoredLora]:
    """Return the LoRAs of profiles, sorted by name, then by the digests of their files.

    Raises:
        ConfigError: a LoRA was profiled in several ways, or one of its halves is missing.
    """
    found: dict[str, dict[str, Profile]] = {}
    for profile in profiles:
        half = profile.half or WHOLE
        if half in found.setdefault(profile.lora, {}):
            raise ConfigError(
                f"{shown(profile.path)} was profiled in several ways, with other options or "
                "devices. Take a store for each of them."
            )
        found[profile.lora][half] = profile
    loras = []
    for halves in found.values():
        if set(halves) not in ({WHOLE}, {"high", "low"}):
            path = next(iter(halves.values())).path
            raise ConfigError(
                f"the other half of {shown(path)} is not in the store; profile HIGH,LOW again."
            )
        loras.append(StoredLora({half: halves[half] for half in sorted(halves)}))
    return sorted(loras, key=lambda lora: (lora.stem, lora.id))


def matching(
    loras: Iterable[StoredLora], patterns: Sequence[str], filters: Filters, option: str
) -> list[StoredLora]:
    """Return the LoRAs that match a pattern and pass the filters.

    Args:
        loras: the LoRAs of a store.
        patterns: patterns of shells. One with a slash is compared with whole paths, any other one
            with names of files, with and without their endings.
        filters: what they must state.
        option: the option that named the patterns, for errors.

    Raises:
        ConfigError: a pattern matches no LoRA.
    """
    found: dict[tuple[str, ...], StoredLora] = {}
    every = list(loras)
    for pattern in patterns:
        fitting = [lora for lora in every if _matches(lora, pattern)]
        if not fitting:
            raise ConfigError(
                f"{option} {shown(pattern)}: the store has no such LoRA. Quote the pattern, and "
                "profile the LoRAs first."
            )
        found |= {lora.id: lora for lora in fitting if filters.take(lora)}
    return sorted(found.values(), key=lambda lora: (lora.stem, lora.id))


def names_of(loras: Sequence[StoredLora]) -> dict[tuple[str, ...], str]:
    """Return id of each LoRA -> its name, with as many folders before it as it takes.

    Raises:
        ConfigError: two different LoRAs have one path.
    """
    names = {lora.id: lora.stem for lora in loras}
    for depth in range(1, 32):
        counts = Counter(names.values())
        double = [lora for lora in loras if counts[names[lora.id]] > 1]
        if not double:
            return names
        for lora in double:
            parents = Path(lora.first.path).parent.parts
            names[lora.id] = "/".join((*parents[-depth:], lora.stem))
    raise ConfigError(
        f"two LoRAs were profiled at {shown(double[0].first.path)}; profile the present one again "
        "into a new store."
    )


def _matches(lora: StoredLora, pattern: str) -> bool:
    paths = [Path(profile.path) for profile in lora.profiles.values()]
    if "/" in pattern:
        whole = str(Path(pattern).absolute())
        return any(fnmatchcase(str(path), whole) for path in paths)
    names = {lora.stem, *(path.name for path in paths), *(path.stem for path in paths)}
    return any(fnmatchcase(name, pattern) for name in names)
