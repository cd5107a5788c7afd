"""Rules by name, as on the command line and in artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_compile.rules import catalogue
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.rule import Rule
from klora_runtime.errors import ConfigError, shown

#: Name -> rule, in the order of the catalogue.
RULES: Mapping[str, type[Rule]] = {
    kind.name: kind
    for kind in vars(catalogue).values()
    if isinstance(kind, type) and issubclass(kind, Rule)
}

DEFAULT_RULE = next(iter(RULES))

#: The default for one LoRA alone: the first rule that takes one.
RULE_OF_ONE = next(name for name, kind in RULES.items() if kind.least == 1)

#: The default with a base model: the first rule that one calibrates.
RULE_OF_A_MODEL = next(name for name, kind in RULES.items() if issubclass(kind, Calibrated))


def usual_rule(loras: int) -> str:
    """Return the name of the rule for a number of LoRAs if none is named.

    Args:
        loras: number of LoRAs, without those that always act.
    """
    return RULE_OF_ONE if loras == 1 else DEFAULT_RULE


def rule_class(name: str) -> type[Rule]:
    """Return the rule of this name.

    Raises:
        ConfigError: there is no such rule.
    """
    if name not in RULES:
        raise ConfigError(f"rule: expected one of {', '.join(RULES)}, found {shown(name)}.")
    return RULES[name]


def known_rule(name: str, parameters: Mapping[str, Any]) -> Rule | None:
    """Return the rule that an artifact states; None if this klora does not know it."""
    try:
        return rule_class(name).from_parameters(parameters)
    except (ConfigError, TypeError):
        return None
