"""Settings as the words of a command line that state them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_compile.fields import Flag
from klora_compile.rules.lookup import DEFAULT_RULE
from klora_compile.trying.names import RULE, SAMPLING, all_settings, rule_settings, split


def schedule_words(settings: Mapping[str, str]) -> list[str]:
    """Return the options of ``klora compile`` that state the settings of a schedule.

    Args:
        settings: full name -> value as text; those of the sampling count only where a rule is made
            for a number of steps.
    """
    words: list[str] = []
    for name, text in settings.items():
        if name not in SAMPLING:
            words += _option(name, text)
    needs_steps = "rule.steps" in rule_settings(settings.get(RULE, DEFAULT_RULE))
    if needs_steps and "rule.steps" not in settings and "steps" in settings:
        words += ["--steps", settings["steps"]]
    return words


def text_of(value: Any) -> str:
    """Return the value of a setting as text, from which the same value is read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


def _option(name: str, text: str) -> list[str]:
    stem, slot = split(name)
    kind = None if stem == RULE else all_settings()[stem].kind
    option = flag(stem.removeprefix("rule."))
    if isinstance(kind, Flag):
        off = [] if kind.off is None else [f"--{kind.off}"]
        return [option] if text == "yes" else off
    return [option, text if slot is None else f"{slot}={text}"]
