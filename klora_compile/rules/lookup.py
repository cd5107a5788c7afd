"""A rule by its name, as the command line and artifacts state it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_compile.rules import catalogue
from klora_compile.rules.rule import Rule
from klora_runtime.errors import ConfigError, shown

#: Name -> rule, in the order of the catalogue.
RULES: Mapping[str, type[Rule]] = {
    kind.name: kind
    for kind in vars(catalogue).values()
    if isinstance(kind, type) and issubclass(kind, Rule)
}

DEFAULT_RULE = next(iter(RULES))


def rule_class(name: str) -> type[Rule]:
    """The rule of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"rule: expected one of {', '.join(RULES)}, found {shown(name)}.")
    return RULES[name]


def known_rule(name: str, parameters: Mapping[str, Any]) -> Rule | None:
    """The rule that an artifact states, or None where this klora does not know it so."""
    try:
        return rule_class(name).from_parameters(parameters)
    except (ConfigError, TypeError):
        return None
