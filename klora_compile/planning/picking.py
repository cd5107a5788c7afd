"""From a rule that picks another one to the picked one, by what is measured of the LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from klora_compile.rules.kit.picking import Picking, Together
from klora_compile.rules.lookup import rule_class
from klora_compile.rules.rule import Rule
from klora_compile.settings.config import Config, Picked


def settled(config: Config, measured: Callable[[], Together]) -> Config:
    """Return a config whose rule makes a schedule itself.

    A config that states by what rule its own was picked is picked anew, so that verification sees
    what the LoRAs give.

    Args:
        config: the rule and the shared settings.
        measured: returns what is measured of the LoRAs that the rule schedules, together.
    """
    picker: Rule = config.rule
    if config.picked is not None:
        picker = rule_class(config.picked.by)()
    if not isinstance(picker, Picking):
        return config
    together = measured()
    pick = picker.pick(together)
    return replace(config, rule=pick.rule, picked=Picked(picker.name, pick.why, together.numbers()))
