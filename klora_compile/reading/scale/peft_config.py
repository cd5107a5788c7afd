"""The configuration of PEFT and diffusers: form, rank and alpha of each module.

finetrainers puts the same object into the metadata as ``lora_config`` (``sft_trainer/trainer.py``).
diffusers' research script of LoRA writes one object for each model into ``N_lora_config.json``
(``examples/research_projects/lora/train_text_to_image_lora.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from klora_compile.reading.forms.catalogue import PEFT_TYPES
from klora_compile.reading.forms.parts import Settings
from klora_compile.reading.forms.refused import REFUSED_TYPES
from klora_runtime.artifact.canonical import parse_json
from klora_runtime.errors import LoraError, shown
from klora_runtime.families.text_encoders import CLIP_PREFIX

#: Bounds of plausible settings; an alpha may also be 0.
MAX_ALPHA, MAX_RANK = 1e12, 2**20

#: Names of the alpha and the rank of all modules in configurations.
_ALPHAS = tuple(dict.fromkeys(alpha for alpha in PEFT_TYPES.values() if alpha is not None))
_RANKS = ("r", "rank")
#: What else they may call what is no scale of forms without one.
_OF_SCALE = (*_RANKS, "rank_pattern", "alpha_pattern")

#: Name of a model's configuration in diffusers' research script -> component.
_RESEARCH: Mapping[str, str] = {"peft_config": "unet", "text_encoder_peft_config": "text_encoder"}

#: PEFT setting with which a pair is not up @ down -> the form's name.
_REFUSED_SETTINGS: Mapping[str, str] = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "a LoRA of repeated layers",
}
#: Values of ``init_lora_weights`` that do not change the base weights.
_STARTS = ("true", "false", "gaussian", "eva", "orthogonal")

#: A module path or the end of one, with or without escaped dots. PEFT allows any regular expression
#: here, but a hostile one could take forever.
_NAME = re.compile(r"\^?[A-Za-z0-9_-]+(\\?\.[A-Za-z0-9_-]+)*\$?")


class AdapterConfig:
    """The PEFT configuration of a file, by component.

    Args:
        text: the configuration's JSON.
        name: name of the configuration in errors.
        where: name of the file in errors.

    Raises:
        LoraError: it cannot be read, has a type that klora does not read, or has an invalid number
            or pattern.
    """

    def __init__(self, text: str, name: str, where: str) -> None:
        self.name = name
        try:
            values = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{where}: {name} is not valid JSON: {shown(error)}.") from error
        if not isinstance(values, dict):
            raise LoraError(f"{where}: {name} is not a JSON object.")
        values = dict(_by_component(values))
        scaled = PEFT_TYPES.get(str(values.get("peft_type") or "LORA"), "alpha") is not None
        issues = [
            issue
            for key, value in values.items()
            if scaled or key not in _OF_SCALE
            for issue in _problems(key, value)
        ]
        if issues:
            raise LoraError(f"{where}: {name} cannot be followed.", issues)
        self._values: Mapping[str, Any] = values
        self._firsts: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._ends: dict[int, Mapping[str, Sequence[tuple[str, Any]]]] = {}

    def alpha(self, component: str, module: str, rank: int) -> float | None:
        """Return the alpha that acts as alpha / rank for this module; None if none is stated.

        PEFT scales by alpha / r, or by alpha / sqrt(r) for rank-stabilised LoRA. The result is this
        scale times the rank, so that alpha / rank is correct for both.
        """
        alpha = self._named(component, "alpha_pattern", module)
        if alpha is None:
            alpha = self._first(component, _ALPHAS)
        if alpha is None:
            return None
        divisor = float(self.rank(component, module) or rank)
        if self._get(component, "use_rslora") is True:
            divisor = math.sqrt(divisor)
        return float(alpha) if divisor == rank else float(alpha) * rank / divisor

    def rank(self, component: str, module: str) -> int | None:
        """Return the rank that alpha is divided by for this module; None if none is stated."""
        rank = self._named(component, "rank_pattern", module)
        if rank is None:
            rank = self._first(component, _RANKS)
        return None if rank is None else int(rank)

    def is_lokr(self, component: str) -> bool:
        """Return whether the component's layers are LoKr, whose tensors may not show the rank."""
        return bool(self._get(component, "peft_type") == "LOKR")

    def hindrance(self, component: str) -> str | None:
        """Return why klora cannot read layers of a component, in one sentence; None if it can."""
        start = self._get(component, "init_lora_weights")
        if isinstance(start, str) and start.lower() not in _STARTS:
            return (
                f"was initialised with init_lora_weights={shown(start)}, which may also change "
                "the base weights; those changes are not in this file"
            )
        for key, name in _REFUSED_SETTINGS.items():
            if self._get(component, key):
                return f"its metadata says {name}, which klora does not support"
        return None

    def _named(self, component: str, key: str, module: str) -> Any:
        """Return the value of the first pattern that matches a module; None if none matches."""
        patterns = self._get(component, key)
        if not patterns:
            return None
        ends = self._ends.get(id(patterns))
        if ends is None:
            ends = self._ends[id(patterns)] = _by_end(patterns)
        spellings = [module]
        if component.startswith("text_encoder"):
            spellings.append(CLIP_PREFIX + module)
        found = (
            value
            for name, value in ends.get(module.rpartition(".")[2], ())
            if _matches(name, spellings)
        )
        return next(found, None)

    def is_dora(self, component: str) -> bool:
        """Return whether the file states that its layers are DoRA."""
        return bool(self._get(component, "use_dora"))

    def _first(self, component: str, keys: tuple[str, ...]) -> Any:
        """Return the value of the first of these keys that is present; every module asks for it."""
        place = component, keys
        if place not in self._firsts:
            values = (self._get(component, key) for key in keys)
            self._firsts[place] = next((value for value in values if value is not None), None)
        return self._firsts[place]

    def settings(self, component: str) -> Settings:
        """Return all settings of a component."""
        own = f"{component}."
        stated = {key: value for key, value in self._values.items() if "." not in key}
        special = {k.removeprefix(own): v for k, v in self._values.items() if k.startswith(own)}
        return stated | special

    def _get(self, component: str, key: str) -> Any:
        return self._values.get(f"{component}.{key}", self._values.get(key))


def _by_component(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings; those for one model have its component as prefix."""
    for key, value in values.items():
        if key in _RESEARCH and isinstance(value, dict):
            yield from ((f"{_RESEARCH[key]}.{name}", setting) for name, setting in value.items())
        else:
            yield key, value


def _by_end(patterns: Mapping[str, Any]) -> Mapping[str, Sequence[tuple[str, Any]]]:
    """Group patterns by their last name, in order."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for pattern, value in patterns.items():
        found.setdefault(_plain(pattern).rpartition(".")[2], []).append((pattern, value))
    return found


def _problems(key: str, value: Any) -> Iterator[str]:
    """Yield the problems of a value that affects the scale."""
    name = key.rpartition(".")[2]
    if value is None:
        return
    if name in _ALPHAS:
        if not _is_alpha(value):
            yield f"{shown(key)}: expected a number, found {shown(value)}"
    elif name in _RANKS:
        if not _is_rank(value):
            yield f"{shown(key)}: expected a rank, found {shown(value)}"
    elif name == "peft_type":
        if isinstance(value, str) and value in REFUSED_TYPES:
            why = REFUSED_TYPES[value]
            yield f"{shown(key)}: is {shown(value)}, which klora does not read: {why}"
        elif not isinstance(value, str) or value not in PEFT_TYPES:
            known = ", ".join(PEFT_TYPES)
            yield f"{shown(key)}: is {shown(value)}, which is not supported; {known} are"
    elif name == "use_rslora":
        if not isinstance(value, bool):
            yield f"{shown(key)}: expected true or false, found {shown(value)}"
    elif name in ("alpha_pattern", "rank_pattern"):
        yield from _pattern_problems(key, value, _is_alpha if name[0] == "a" else _is_rank)


def _pattern_problems(key: str, value: Any, fits: Callable[[Any], bool]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{shown(key)}: expected an object, found {shown(value)}"
        return
    for pattern, number in value.items():
        if not _NAME.fullmatch(pattern):
            yield (
                f"{shown(key)}: {shown(pattern) or 'an empty name'} is a regular expression; write "
                "the names of the modules out"
            )
        if not fits(number):
            yield f"{shown(key)}.{shown(pattern)}: expected a number, found {shown(number)}"


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_ALPHA


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _plain(pattern: str) -> str:
    return pattern.removeprefix("^").replace("\\.", ".").removesuffix("$")


def _matches(pattern: str, spellings: list[str]) -> bool:
    """Return whether a pattern matches by PEFT's rule: the path or its end; ``^`` the whole."""
    name = _plain(pattern)
    return any(
        spelling == name or (pattern[:1] != "^" and spelling.endswith(f".{name}"))
        for spelling in spellings
    )
