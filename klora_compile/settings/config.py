"""What a user may decide about a fusion: a rule with its settings, and what all rules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from klora_compile.rules.lookup import DEFAULT_RULE, rule_class
from klora_compile.rules.rule import Rule
from klora_compile.settings.shared import Settings
from klora_runtime.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """A rule and the settings that all rules share; both are checked when they are made."""

    rule: Rule = field(default_factory=rule_class(DEFAULT_RULE))
    """A rule of :mod:`klora_compile.rules`; its fields are its own settings."""
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        """See that a rule was given as an object, not by its name."""
        if not isinstance(self.rule, Rule):
            example = rule_class(DEFAULT_RULE).__name__
            raise ConfigError(f"rule: expected a rule such as {example}(), found {self.rule!r}.")
        if not isinstance(self.settings, Settings):
            raise ConfigError(f"settings: expected Settings(...), found {self.settings!r}.")

    @classmethod
    def of(cls, rule: Rule | None, settings: Settings | None) -> Self:
        """The config of these two; what is None is as by default."""
        default = cls()
        return cls(
            default.rule if rule is None else rule,
            default.settings if settings is None else settings,
        )

    @classmethod
    def named(cls, rule: str, /, **settings: Any) -> Self:
        """The config that a command line states: a rule by its name, all settings by theirs.

        Args:
            rule: a name in :data:`klora_compile.rules.lookup.RULES`.
            settings: fields of that rule and of :class:`~klora_compile.settings.shared.Settings`.

        Raises:
            ConfigError: an unknown rule or setting, or a value that is out of its range.
        """
        kind = rule_class(rule)
        shared, own = _names(Settings), _names(kind)
        for name in settings:
            if name not in shared and name not in own:
                raise ConfigError(
                    f"{name}: rule {rule} has no such setting; it has {', '.join(own) or 'none'}, "
                    f"all rules have {', '.join(shared)}."
                )
        return cls(
            kind.stated({name: value for name, value in settings.items() if name in own}),
            Settings(**{name: value for name, value in settings.items() if name in shared}),
        )

    @classmethod
    def from_parameters(cls, rule: str, parameters: Mapping[str, Any]) -> Self:
        """The config that :meth:`parameters` gives these values for; other keys are passed over.

        Raises:
            ConfigError: the rule is unknown, a value is missing or out of its range.
        """
        return cls(
            rule_class(rule).from_parameters(parameters), Settings.from_parameters(parameters)
        )

    def parameters(self) -> dict[str, Any]:
        """Every setting with its default filled in, as the artifact records it."""
        return self.rule.parameters() | self.settings.parameters()

    def changed(self, rule: str | None = None, /, **changes: Any) -> Self:
        """Another config: settings that are not named stay, of the rule too unless it is another.

        Of settings by slot, slots that are not named stay.

        Raises:
            ConfigError: as :meth:`named`.
        """
        kept = {name: getattr(self.settings, name) for name in _names(Settings)}
        if rule is None or rule == self.rule.name:
            kept |= {name: getattr(self.rule, name) for name in _names(type(self.rule))}
        for name, before in kept.items():
            if isinstance(before, Mapping) and isinstance(changes.get(name), Mapping):
                changes[name] = {**before, **changes[name]}
        return self.named(rule or self.rule.name, **(kept | changes))


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]
