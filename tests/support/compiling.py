"""Fusions by the names of a rule and its settings, for tests that go through many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from klora_compile import Fusion, compile_fusion, reschedule
from klora_compile.settings.config import Config
from klora_compile.sources import Lora


def compiled(
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora],
    rule: str = "klora",
    /,
    **settings: Any,
) -> Fusion:
    """What a rule makes of LoRAs, its settings and those of all rules by their names."""
    config = Config.named(rule, **settings)
    return compile_fusion(content, style, config.rule, config.settings, device="cpu")


def rescheduled(fusion: Fusion, rule: str | None = None, /, **changes: Any) -> Fusion:
    """Another schedule for a fusion; settings that are not named stay."""
    stated = Config.from_parameters(fusion.rule.name, fusion.rule.parameters)
    config = stated.changed(rule, **changes)
    return reschedule(fusion, config.rule, config.settings)
