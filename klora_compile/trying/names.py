"""The names of all settings of a picture, and their values as text.

A name is that of the field (``bias``, ``clock``, ``steps``), with a slot behind a dot where each
LoRA has a value (``weight.style``). ``steps`` and ``seed`` are those of the sampling; a rule's own
are ``rule.steps`` and ``rule.seed``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from klora_compile.fields import (
    BySlot,
    Flag,
    Kind,
    Number,
    Setting,
    Table,
    Text,
    Whole,
    settings_of,
)
from klora_compile.fields import Word as OneOf
from klora_compile.rules.lookup import RULES
from klora_compile.settings.shared import Settings
from klora_runtime.errors import ConfigError, shown

#: The setting that names the rule, and the one with a factor on each LoRA.
RULE, WEIGHT = "rule", "weight"

LAST_SEED = 2**63 - 1
_LARGEST = 1e15

#: Settings of the sampling -> argument of a pipeline's call, and kind of the value.
SAMPLING: Mapping[str, tuple[str, Kind]] = {
    "prompt": ("prompt", Text("TEXT", "a text")),
    "negative_prompt": ("negative_prompt", Text("TEXT", "a text")),
    "steps": ("num_inference_steps", Whole(1, 10_000)),
    "seed": ("generator", Whole(0, LAST_SEED)),
    "guidance": ("guidance_scale", Number(-_LARGEST, _LARGEST)),
    "height": ("height", Whole(1, 2**20)),
    "width": ("width", Whole(1, 2**20)),
}


def rule_settings(rule: str) -> dict[str, tuple[str, Setting]]:
    """Return name -> field and setting, of what a rule has of its own."""
    return {_name(field, each): (field, each) for field, each in settings_of(RULES[rule]).items()}


def shared_settings() -> dict[str, tuple[str, Setting]]:
    """Return the same of the settings that all rules share."""
    return {_name(field, each): (field, each) for field, each in settings_of(Settings).items()}


@cache
def all_settings() -> Mapping[str, Setting]:
    """Return name -> setting, of everything that decides a schedule besides its rule."""
    of_rules = {n: each for rule in RULES for n, (_, each) in rule_settings(rule).items()}
    return {**of_rules, **{name: each for name, (_, each) in shared_settings().items()}}


def is_by_slot(name: str) -> bool:
    """Return whether a setting has a value for each slot, such as ``weight``."""
    found = all_settings().get(name)
    return found is not None and isinstance(found.kind, BySlot)


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their full names; a mapping from slots becomes a name for each.

    None stands for the default, as if it was not named.

    Raises:
        ConfigError: there is no such setting, or a slot is missing or needless.
    """
    found: dict[str, Any] = {}
    for given, value in settings.items():
        name = str(given).replace("-", "_")
        if is_by_slot(name) and isinstance(value, Mapping):
            found |= {f"{name}.{slot}": each for slot, each in value.items()}
        elif value is not None:
            _refuse_unknown(name)
            found[name] = value
    return found


def split(name: str) -> tuple[str, str | None]:
    """Return the name of a setting, and the slot of its value if it has one for each."""
    stem, _, slot = name.partition(".")
    return (stem, slot) if slot and is_by_slot(stem) else (name, None)


def value_of(name: str, text: str) -> Any:
    """Return a setting's value from text.

    Args:
        name: its full name.
        text: as on a command line or in a table; of a table of groups, its JSON file.

    Raises:
        ConfigError: there is no such setting, or the text is no value of its kind.
    """
    _refuse_unknown(name)
    if name == RULE:
        OneOf(tuple(RULES)).check(RULE, text)
        return text
    setting = all_settings().get(split(name)[0])
    kind = SAMPLING[name][1] if name in SAMPLING else setting and setting.kind
    if setting is not None and setting.unset == text:
        return text
    return _read(name, kind.of if isinstance(kind, BySlot) else kind, text)


def _read(name: str, kind: Any, text: str) -> Any:
    match kind:
        case Number(words=words) if text in words:
            return text
        case Number():
            value: Any = _number(name, text, float)
        case Whole():
            value = _number(name, text, int)
        case Flag():
            OneOf(("yes", "no")).check(name, text)
            return text == "yes"
        case Table(names=names):
            return text if text in names else _table(name, text)
        case _:
            value = text
    kind.check(name, value)
    return value


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}: expected {what}, found {shown(text)}.") from error
    if not math.isfinite(value):
        raise ConfigError(f"{name}: expected a number, found {shown(text)}.")
    return value


def _table(name: str, text: str) -> Any:
    try:
        return json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {shown(text)} is no JSON file that can be read.") from error


def _name(field: str, setting: Setting) -> str:
    name = (setting.option or field).replace("-", "_")
    return f"rule.{name}" if name in SAMPLING else name


def _refuse_unknown(name: str) -> None:
    stem, _ = split(name)
    if name == RULE or name in SAMPLING or (stem in all_settings() and not is_by_slot(name)):
        return
    if is_by_slot(name):
        raise ConfigError(f"{name}: name the LoRA behind a dot, such as {name}.style.")
    every = (RULE, *all_settings(), *SAMPLING)
    raise ConfigError(f"{shown(name)}: there is no such setting; expected {', '.join(every)}.")
