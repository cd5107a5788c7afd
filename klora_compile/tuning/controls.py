"""The controls of the page: from their values to settings by name, and back.

Settings are texts here, as a user would type them on a command line, so that commands repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from klora_compile.rules.lookup import RULES
from klora_compile.trying.loras import PLAIN_SUM
from klora_compile.trying.names import RULE, flattened, rule_settings, value_of
from klora_compile.trying.trial import Trial, idle, trial_of
from klora_runtime.artifact.timeline import CLOCKS
from klora_runtime.errors import ConfigError, shown
from klora_runtime.linking.inequality import Pattern

BIAS, PATTERN, CLOCK = "bias", "pattern", "clock"
STEPS, SEED, PROMPT = "steps", "seed", "prompt"
#: The box for all other settings, one ``NAME=VALUE`` a line.
FURTHER = "further"

PATTERNS: tuple[str, ...] = get_args(Pattern)

#: Name of a setting -> its value as text.
Texts = Mapping[str, str]
#: Value of a control, as a browser sends it.
Value = str | int | float | None


@dataclass(frozen=True)
class Controls:
    """The controls of a page about these LoRAs."""

    slots: tuple[str, ...]
    """Slots of the LoRAs, with those that always act; each has a weight."""

    @property
    def names(self) -> tuple[str, ...]:
        """The controls in the order in which the page sends their values."""
        return (RULE, BIAS, PATTERN, CLOCK, *self.weights, STEPS, SEED, PROMPT, FURTHER)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights."""
        return tuple(f"weight.{slot}" for slot in self.slots)

    def settings(self, values: Sequence[Value]) -> dict[str, str]:
        """Return the settings that values of the controls mean, without those at their default.

        What the box of further settings names wins over a control. A control that the rule does
        not use counts for nothing.

        Args:
            values: in the order of :attr:`names`.

        Raises:
            ConfigError: a line of the box is no ``NAME=VALUE``, or no rule is chosen.
        """
        given = dict(zip(self.names, values, strict=True))
        box = given.pop(FURTHER)
        texts = {name: _text(value) for name, value in given.items()}
        if texts[RULE] not in RULES:
            raise ConfigError(f"rule: expected one of {', '.join(RULES)}, found {texts[RULE]!r}.")
        own = rule_settings(texts[RULE])
        kept = {
            name: text
            for name, text in texts.items()
            if not self._is_default(name, text) and (name not in (BIAS, PATTERN) or name in own)
        }
        return kept | _lines(_text(box))

    def values(self, settings: Texts) -> tuple[Value, ...]:
        """Return values of the controls that mean these settings, as a page shows them."""
        texts = {**self._defaults(), **{n: t for n, t in settings.items() if n in self.names}}
        lines = [f"{n}={text}" for n, text in settings.items() if n not in self.names]
        shown_ones = [_value(name, texts.get(name, "")) for name in self.names[:-1]]
        return (*shown_ones, "\n".join(lines))

    def caption(self, settings: Texts, beside: Texts) -> str:
        """Return a few words about settings: what differs from others.

        Args:
            settings: the settings.
            beside: the others, such as those that the page started with.
        """
        differing = [
            f"{name.removeprefix('weight.')} {settings.get(name, self._defaults().get(name, ''))}"
            for name in {**settings, **beside}
            if name not in (RULE, PROMPT) and settings.get(name) != beside.get(name)
        ]
        rule = settings[RULE]
        return ", ".join([rule, *differing] if not differing or rule != beside[RULE] else differing)

    def _defaults(self) -> dict[str, str]:
        fixed = {BIAS: "0", PATTERN: PATTERNS[0], CLOCK: CLOCKS[0]}
        return {**fixed, **dict.fromkeys(self.weights, "1")}

    def _is_default(self, name: str, text: str) -> bool:
        return self._defaults().get(name) == text


def trial_of_texts(settings: Texts) -> Trial:
    """Return the trial of settings as texts.

    Raises:
        ConfigError: a setting is unknown, its rule has no such setting, or a value is out of range.
    """
    return trial_of({name: value_of(name, text) for name, text in settings.items()})


def plain_sum_of(settings: Texts) -> dict[str, str]:
    """Return the same settings by the plain sum, without those that it does not have."""
    plain = {**settings, RULE: PLAIN_SUM}
    without = idle(plain)
    return {name: text for name, text in plain.items() if name not in without}


def known_names(rule: str) -> str:
    """Return the settings that the box can name for a rule, in one line."""
    own = [n for n in rule_settings(rule) if n not in (BIAS, PATTERN)]
    return ", ".join([*own, "guidance", "negative_prompt", "height", "width", "text_encoder"])


def _lines(box: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, box.splitlines())):
        name, sign, text = (part.strip() for part in line.partition("="))
        if not name or not sign:
            raise ConfigError(f"further settings: expected NAME=VALUE, found {shown(line)}.")
        (full,) = flattened({name: text})
        if full in found:
            raise ConfigError(f"further settings: {full} is named twice; leave one of them out.")
        found[full] = text
    return found


def _text(value: Value) -> str:
    return (
        f"{value + 0.0:.10g}" if isinstance(value, float) else str("" if value is None else value)
    )


def _value(name: str, text: str) -> Value:
    """Return a text as the control shows it: sliders and boxes of numbers want numbers."""
    if name in (STEPS, SEED):
        return int(text) if text.lstrip("-").isdigit() else None
    if name == BIAS or name.startswith("weight."):
        return float(text)
    return text
