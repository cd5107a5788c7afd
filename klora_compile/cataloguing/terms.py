"""The terms of linking that a configuration means."""

from __future__ import annotations

from collections.abc import Sequence

from klora_compile.rules.lookup import RULES
from klora_compile.settings.config import Config
from klora_compile.slots import SECOND_DENOISER
from klora_runtime.errors import ConfigError
from klora_runtime.linking.terms import Terms


def terms_of(config: Config, slots: Sequence[str]) -> Terms:
    """Return the terms of a configuration.

    Args:
        config: the rule and the shared settings.
        slots: content, style, and the names of LoRAs that always act.

    Raises:
        ConfigError: pairs cannot be linked by this rule, from numbers of single LoRAs.
    """
    rule, settings = config.rule, config.settings
    if not rule.linkable:
        able = ", ".join(name for name, each in RULES.items() if each.linkable)
        raise ConfigError(
            f"rule {rule.name} needs the LoRAs of a pair together, which a catalogue does not "
            f"have. Take a rule of {able}, or klora compile for each pair."
        )
    weights = {slot: settings.weight(slot, "") for slot in slots}
    for slot in slots:
        second = settings.weight(slot, SECOND_DENOISER)
        if second != weights[slot]:
            weights[f"{slot}.{SECOND_DENOISER}"] = second
    return Terms(
        rule=rule.name,
        parameters=config.parameters(),
        duel=rule.duel(),
        ignores_alpha=rule.ignores_alpha,
        text_encoder=settings.text_encoder,
        unpaired=settings.unpaired,
        clock=settings.clock,
        weights=weights,
    )
