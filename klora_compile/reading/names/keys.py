"""Parsing of LoRA keys by the tables of ``spelling``.

A key that fits no row is never guessed. Module paths in diffusers' names are resolved here; those
in the names of a model's authors become a :class:`~klora_compile.reading.names.placing.Stem`, which
the tables of ``families`` place.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field

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

#: Last part of a key -> its possible endings, the longest first.
_BY_LAST_NAME: dict[str, list[str]] = {}
for _ending in sorted([*ENDINGS, *REFUSED_FORMS], key=len, reverse=True):
    _BY_LAST_NAME.setdefault(_ending.rpartition(".")[2], []).append(_ending)


@dataclass(frozen=True)
class ParsedKey:
    """A parsed key."""

    layout: str
    """``peft`` (module paths with dots) or ``kohya`` (with underscores)."""
    component: str
    module: str
    part: Part
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
    """The key without its ending."""

    @property
    def layer(self) -> str:
        """Component, dot, module path."""
        return f"{self.component}.{self.module}"


@dataclass(frozen=True)
class UnplacedKey:
    """A parsed key whose module is in the authors' names, or of an unknown component."""

    layout: str
    stem: Stem
    part: Part
    raw: str = field(default="", compare=False)
    """The key without its ending."""

    @property
    def layer(self) -> str:
        """The module in the file's spelling."""
        return self.stem.name


@dataclass(frozen=True)
class RefusedKey:
    """A key of a form that klora refuses by name."""

    raw: str
    """The key without its ending."""
    form: str


def parse_key(key: str, others: Container[str] = ()) -> ParsedKey | UnplacedKey | RefusedKey | str:
    """Parse a key of a LoRA file.

    Args:
        key: the key.
        others: all keys of the file.

    Returns:
        The parsed key, or one sentence about why it cannot be used.
    """
    key = _ADAPTER.sub(r"\1\2", key)
    for ending, meaning in PARAMETER_ENDINGS.items():
        if key.endswith(ending):
            key = key.removesuffix(ending) + meaning
    endings = _BY_LAST_NAME.get(key.rpartition(".")[2], ())
    suffix = next((s for s in endings if _ends_in(key, s, others)), None)
    if suffix is None:
        return "its ending belongs to no known form of LoRA"
    if suffix in REFUSED_FORMS:
        return RefusedKey(key.removesuffix(suffix), REFUSED_FORMS[suffix])
    raw = key.removesuffix(suffix)
    place = _place(raw)
    if isinstance(place, str):
        return place
    if place.module is None:
        assert place.stem is not None
        return UnplacedKey(place.layout, place.stem, ENDINGS[suffix], raw)
    component, module = place.module
    written = module
    if component.startswith("text_encoder"):
        module = _text_module(place.prefix or "", module.removeprefix(CLIP_PREFIX))
    return ParsedKey(
        place.layout,
        component,
        module,
        ENDINGS[suffix],
        place.stem,
        prefix=place.prefix,
        written=written,
        stated=place.stated,
        raw=raw,
    )


def names_adapter(key: str) -> bool:
    """Return whether a key has PEFT's adapter name between a part and ``weight``."""
    return _ADAPTER.search(key) is not None


def _ends_in(key: str, suffix: str, others: Container[str]) -> bool:
    if not key.endswith(suffix):
        return False
    beside = ENDINGS[suffix].beside if suffix in ENDINGS else None
    return beside is None or key.removesuffix(suffix) + beside in others


@dataclass(frozen=True)
class _Place:
    """The prefix and the path of a key; it has a module or a stem, or both."""

    layout: str
    module: tuple[str, str] | None = None
    """Component and path in diffusers' names."""
    stem: Stem | None = None
    prefix: str | None = None
    stated: bool = False


def _place(path: str) -> _Place | str:
    for row in FLAT_PREFIXES:
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
