"""All rules by name. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_compile.rules.direct import DirectRule
from klora_compile.rules.est import EstRule
from klora_compile.rules.klora_rule import KloraRule
from klora_compile.rules.np_lora import NullspaceKloraRule, NullspaceRule
from klora_compile.rules.phases import PhasesRule
from klora_compile.rules.rule import Rule
from klora_compile.rules.switch import SwitchRule
from klora_runtime.errors import ConfigError, shown

RULES: Mapping[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(KloraRule, EstRule, NullspaceRule, NullspaceKloraRule),
        *(DirectRule, SwitchRule, PhasesRule),
    )
}

DEFAULT_RULE = KloraRule.name


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
