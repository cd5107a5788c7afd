"""What a user may decide about a fusion: a rule with its settings, and what all rules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from klora_compile.rules.catalogue import rule_class
from klora_compile.rules.rule import Rule
from klora_compile.settings.shared import Settings
from klora_runtime.errors import ConfigError


@dataclass(frozen=True, init=False)
class Config:
    """Settings of one fusion.

    Args:
        rule: ``klora`` (the default), ``est``, ``np``, ``np+klora``, ``direct``, ``switch`` or
            ``phases``.
        settings: the rule's own by name (for K-LoRA: ``semantics``, ``pattern``, ``alpha``,
            ``beta``, ``gamma``, ``bias``, ``top_k``), and those of all rules: ``content_weight``,
            ``style_weight``, ``weights``, ``text_encoder``, ``unpaired``, ``keep_all_slots``.
            Meaning and range: the fields of the classes in :mod:`klora_compile.rules`, and of
            :class:`klora_compile.settings.shared.Settings`.

    Raises:
        ConfigError: an unknown rule or setting, or a value that is out of its range.
    """

    rule: Rule
    settings: Settings

    def __init__(self, rule: str = "klora", /, **settings: Any) -> None:
        kind = rule_class(rule)
        shared, own = _names(Settings), _names(kind)
        for name in settings:
            if name not in shared and name not in own:
                raise ConfigError(
                    f"{name}: rule {rule} has no such setting; it has {', '.join(own) or 'none'}, "
                    f"all rules have {', '.join(shared)}."
                )
        common = {name: value for name, value in settings.items() if name in shared}
        self._set(
            kind(**{name: value for name, value in settings.items() if name in own}),
            Settings(**common),
        )

    def parameters(self) -> dict[str, Any]:
        """Every setting with its default filled in, as the artifact records it."""
        return self.rule.parameters() | self.settings.parameters()

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], rule: str = "klora") -> Self:
        """The config that :meth:`parameters` gives these values for; other keys are passed over.

        Raises:
            ConfigError: the rule is unknown, a value is missing or out of its range.
        """
        own = rule_class(rule).from_parameters(parameters)
        config = cls.__new__(cls)
        config._set(own, Settings.from_parameters(parameters))
        return config

    def changed(self, rule: str | None = None, /, **changes: Any) -> Config:
        """Another config: settings that are not named stay, of the rule too unless it is another.

        Of settings by slot, slots that are not named stay.

        Raises:
            ConfigError: as the constructor.
        """
        kept = {name: getattr(self.settings, name) for name in _names(Settings)}
        if rule is None or rule == self.rule.name:
            kept |= {name: getattr(self.rule, name) for name in _names(type(self.rule))}
        for name, before in kept.items():
            if isinstance(before, Mapping) and isinstance(changes.get(name), Mapping):
                changes[name] = {**before, **changes[name]}
        return Config(rule or self.rule.name, **(kept | changes))

    def _set(self, rule: Rule, settings: Settings) -> None:
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "settings", settings)


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]
