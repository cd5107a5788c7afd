"""The configuration of a fusion: a rule with its settings, and the settings of all rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from klora_compile.fields import BySlot, settings_of
from klora_compile.rules.kit.picking import Picking
from klora_compile.rules.lookup import DEFAULT_RULE, rule_class
from klora_compile.rules.rule import Rule
from klora_compile.settings.calibration import Calibration
from klora_compile.settings.shared import Settings
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import ConfigError

#: Key of a :class:`Picked` among the parameters of an artifact's rule.
PICKED = "picked"

#: Key of a :class:`~klora_compile.settings.calibration.Calibration` there.
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Picked:
    """How the rule was picked."""

    by: str
    """Name of the rule that picked it."""
    why: str
    """The reason, as a part of a sentence."""
    numbers: Mapping[str, float]
    """What was measured of the LoRAs."""

    def parameters(self) -> dict[str, Any]:
        """Return this as the artifact records it."""
        return {"by": self.by, "why": self.why, **self.numbers}

    @classmethod
    def from_parameters(cls, stated: Any) -> Self | None:
        """Return what :meth:`parameters` gave; None if an artifact states nothing like it."""
        if not isinstance(stated, Mapping):
            return None
        by, why = stated.get("by"), stated.get("why")
        if not isinstance(by, str) or not isinstance(why, str):
            return None
        return cls(by, why, {n: v for n, v in stated.items() if n not in ("by", "why")})


@dataclass(frozen=True)
class Config:
    """A rule and the settings that all rules share; both check themselves on creation."""

    rule: Rule = field(default_factory=rule_class(DEFAULT_RULE))
    """A rule of :mod:`klora_compile.rules`, whose fields are its own settings."""
    settings: Settings = field(default_factory=Settings)
    picked: Picked | None = None
    """How the rule was picked; None if it was named."""
    calibration: Calibration | None = None
    """How a base model calibrated the rule; None if it needs none, or is not calibrated yet."""

    def __post_init__(self) -> None:
        """Check the kinds of both, what picked the rule, and that it can go by the clock."""
        if not isinstance(self.rule, Rule):
            example = rule_class(DEFAULT_RULE).__name__
            raise ConfigError(f"rule: expected a rule such as {example}(), found {self.rule!r}.")
        if not isinstance(self.settings, Settings):
            raise ConfigError(f"settings: expected Settings(...), found {self.settings!r}.")
        if self.picked is not None and not issubclass(rule_class(self.picked.by), Picking):
            raise ConfigError(f"picked: rule {self.picked.by} picks no other rule.")
        if self.rule.made_for_steps is not None and self.settings.clock != "step":
            raise ConfigError(
                f"clock: rule {self.rule.name} counts steps, which a clock that follows the noise "
                "does not. Take --clock step, or another rule."
            )

    @classmethod
    def of(cls, rule: Rule | None, settings: Settings | None) -> Self:
        """Return the config of a rule and settings; None stands for the default."""
        default = cls()
        return cls(
            default.rule if rule is None else rule,
            default.settings if settings is None else settings,
        )

    @classmethod
    def named(cls, rule: str, /, **settings: Any) -> Self:
        """Return the config of a rule and settings given by name, as on a command line.

        Args:
            rule: a name in :data:`klora_compile.rules.lookup.RULES`.
            settings: fields of that rule and of :class:`~klora_compile.settings.shared.Settings`.

        Raises:
            ConfigError: a rule or setting is unknown, or a value is out of range.
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
        """Return the config with these :meth:`parameters`; ignore other keys.

        Raises:
            ConfigError: the rule is unknown, or a value is missing or out of range.
        """
        return cls(
            rule_class(rule).from_parameters(parameters),
            Settings.from_parameters(parameters),
            Picked.from_parameters(parameters.get(PICKED)),
            Calibration.from_parameters(parameters.get(CALIBRATED)),
        )

    @classmethod
    def of_fusion(cls, fusion: Schedule) -> Self:
        """Return the config that a fusion was made with; its own clock is the one it goes by.

        Raises:
            ConfigError: the rule is unknown, or a value is missing or out of range.
        """
        found = cls.from_parameters(fusion.rule.name, fusion.rule.parameters)
        return replace(found, settings=replace(found.settings, clock=fusion.clock))

    def parameters(self) -> dict[str, Any]:
        """Return every setting with its default filled in, as the artifact records it."""
        own = self.rule.parameters() | self.settings.parameters()
        if self.picked is not None:
            own |= {PICKED: self.picked.parameters()}
        if self.calibration is not None:
            own |= {CALIBRATED: self.calibration.parameters()}
        return own

    def changed(self, rule: str | None = None, /, **changes: Any) -> Self:
        """Return a config with some settings changed; a new rule starts with its own defaults.

        In settings by slot, slots that are not named keep their values.

        Raises:
            ConfigError: see :meth:`named`.
        """
        kept = {name: getattr(self.settings, name) for name in _names(Settings)}
        if rule is None or rule == self.rule.name:
            kept |= {name: getattr(self.rule, name) for name in _names(type(self.rule))}
        kinds = {**settings_of(Settings), **settings_of(type(self.rule))}
        for name, before in kept.items():
            if isinstance(kinds[name].kind, BySlot) and name in changes:
                changes[name] = {**before, **changes[name]}
        return self.named(rule or self.rule.name, **(kept | changes))


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]
