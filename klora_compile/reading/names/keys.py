"""Parsing of LoRA keys by the tables of ``spelling``.

A key that fits no row is never guessed. Module paths in diffusers' names are resolved here; those
in the names of a model's authors become a :class:`~klora_compile.reading.names.placing.Stem`, which
the tables of ``families`` place.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from klora_compile.reading.forms.catalogue import ENDINGS
from klora_compile.reading.forms.parts import Part
from klora_compile.reading.names.spelling import (
    COMFY_PREFIX,
    COMPONENTS,
    FLAT_PREFIXES,
    PARAMETER_ENDINGS,
    PEFT_PREFIX,
    PROCESSORS,
    REFUSED_FORMS,
    ROOTS,
    TEXT_MODELS,
    TEXT_PREFIXES,
)
from klora_compile.reading.names.table_index import Stem
from klora_runtime.families.text_encoders import CLIP_PREFIX

#: PEFT's adapter name between a part and ``weight``.
_ADAPTER = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\."
    r"(?!(?:weight|bias)$)[A-Za-z0-9_-]+(\.weight|\.bias|)$"
)
_FLAT = re.compile(r"[A-Za-z0-9-]+(_+[A-Za-z0-9-]+)*")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

_KNOWN_ENDINGS = frozenset((*ENDINGS, *REFUSED_FORMS))
_ALL_FLAT = tuple(row.prefix for row in FLAT_PREFIXES)
_MOST_NAMES = max(ending.count(".") for ending in _KNOWN_ENDINGS)


@dataclass(frozen=True)
class PlacedModule:
    """A module whose name in a file is that of a component of diffusers' pipeline."""

    layout: str
    """``peft`` (module paths with dots) or ``kohya`` (with underscores)."""
    component: str
    module: str
    stem: Stem | None = field(default=None, compare=False)
    """The module in the file's spelling, if a model's authors may have one of the same name."""
    prefix: str | None = field(default=None, compare=False)
    """The prefix of a text encoder's module; the family determines the pipeline's component."""
    written: str = field(default="", compare=False)
    """The module in the file's spelling with dots, if :attr:`prefix` is a text encoder's; the
        family may also determine klora's name."""
    stated: bool = field(default=False, compare=False)
    """Whether the file names the component; the module is then usually in diffusers' names."""
    raw: str = field(default="", compare=False)
    """Its keys without their endings."""

    @property
    def layer(self) -> str:
        """Component, dot, module path."""
        return f"{self.component}.{self.module}"


@dataclass(frozen=True)
class UnplacedModule:
    """A module in the authors' names, or of an unknown component."""

    layout: str
    stem: Stem
    raw: str = field(default="", compare=False)
    """Its keys without their endings."""

    @property
    def layer(self) -> str:
        """The module in the file's spelling."""
        return self.stem.name


#: A module as the keys of a file name it.
NamedModule = PlacedModule | UnplacedModule


class ParsedKey(NamedTuple):
    """A parsed key."""

    module: NamedModule
    part: Part


@dataclass(frozen=True)
class RefusedKey:
    """A key of a form that klora refuses by name."""

    raw: str
    """The key without its ending."""
    form: str


def parse_key(
    key: str, others: Container[str] = (), modules: dict[str, NamedModule | str] | None = None
) -> ParsedKey | RefusedKey | str:
    """Parse a key of a LoRA file.

    Args:
        key: the key.
        others: all keys of the file.
        modules: modules of the file so far by their keys without ending, or what is wrong with
            them; added to.

    Returns:
        The parsed key, or one sentence about why it cannot be used.
    """
    if names_adapter(key):
        key = _ADAPTER.sub(r"\1\2", key)
    for ending, meaning in PARAMETER_ENDINGS.items():
        if key.endswith(ending):
            key = key.removesuffix(ending) + meaning
    suffix = _ending(key, others)
    if suffix is None:
        return "its ending belongs to no known form of LoRA"
    raw = key.removesuffix(suffix)
    if suffix in REFUSED_FORMS:
        return RefusedKey(raw, REFUSED_FORMS[suffix])
    modules = {} if modules is None else modules
    module = modules.get(raw)
    if module is None:
        module = modules[raw] = _module(raw)
    return module if isinstance(module, str) else ParsedKey(module, ENDINGS[suffix])


def _module(raw: str) -> NamedModule | str:
    """Return the module of keys without their endings, or why it is none."""
    place = _place(raw)
    if isinstance(place, str):
        return place
    if place.module is None:
        assert place.stem is not None
        return UnplacedModule(place.layout, place.stem, raw)
    component, module = place.module
    written = module
    if component.startswith("text_encoder"):
        module = _text_module(place.prefix or "", module.removeprefix(CLIP_PREFIX))
    return PlacedModule(
        place.layout,
        component,
        module,
        place.stem,
        prefix=place.prefix,
        written=written,
        stated=place.stated,
        raw=raw,
    )


def names_adapter(key: str) -> bool:
    """Return whether a key has PEFT's adapter name between a part and ``weight``."""
    return _ADAPTER.search(key) is not None


def _ending(key: str, others: Container[str]) -> str | None:
    """Return the longest ending that a key has; None if it has none."""
    _, *names = key.rsplit(".", _MOST_NAMES)
    while names:
        suffix = "." + ".".join(names)
        if suffix in _KNOWN_ENDINGS:
            beside = ENDINGS[suffix].beside if suffix in ENDINGS else None
            if beside is None or key.removesuffix(suffix) + beside in others:
                return suffix
        names = names[1:]
    return None


class _Place(NamedTuple):
    """The prefix and the path of a key; it has a module or a stem, or both."""

    layout: str
    module: tuple[str, str] | None = None
    """Component and path in diffusers' names."""
    stem: Stem | None = None
    prefix: str | None = None
    stated: bool = False


def _place(path: str) -> _Place | str:
    for row in FLAT_PREFIXES if path.startswith(_ALL_FLAT) else ():
        if path.startswith(row.prefix):
            flat = path.removeprefix(row.prefix).removeprefix("_").replace(".", "_")
            dotted = (vocabulary.dotted(flat) for vocabulary in row.vocabularies)
            module = next((each for each in dotted if each is not None), None)
            if module is None and not (row.denoiser and _FLAT.fullmatch(flat)):
                return f"no known {row.component} has a module of this name in kohya's spelling"
            return _Place(
                "kohya",
                None if module is None else (row.component, module),
                Stem(flat, flat=True) if row.denoiser else None,
                prefix=None if row.denoiser else row.prefix,
            )
    for prefix, component in TEXT_PREFIXES.items():
        if path.startswith(prefix) and _PATH.fullmatch(path.removeprefix(prefix)):
            return _Place("peft", (component, path.removeprefix(prefix)), prefix=prefix)
    return _dotted_place(path)


def _text_module(prefix: str, module: str) -> str:
    """Return klora's name of a text encoder's module; unchanged if no known encoder has it."""
    homes = (model.home(module) for model in TEXT_MODELS.get(prefix, ()))
    return next((home for home in homes if home is not None), module)


def _dotted_place(path: str) -> _Place | str:
    inner = path.removeprefix(PEFT_PREFIX)
    component, _, module = inner.partition(".")
    stated = component in COMPONENTS
    if not stated:
        inner = inner.removeprefix(COMFY_PREFIX).removeprefix(PEFT_PREFIX)
        component, module = ROOTS.get(inner.partition(".")[0], ""), inner
    module = module.removeprefix(PEFT_PREFIX)
    if not _PATH.fullmatch(module):
        return "is not a module path"
    for processor, layer in PROCESSORS.items():
        if module.endswith(processor):
            module = module.removesuffix(processor) + layer
    place = (component, module) if component else None
    denoiser = component in ("", "unet", "transformer")
    stem = Stem(module, flat=False) if denoiser else None
    return _Place("peft", place, stem, stated=stated)
