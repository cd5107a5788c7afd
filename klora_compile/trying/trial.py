"""Trials: everything that decides one picture, besides the LoRAs and the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_compile.rules.lookup import DEFAULT_RULE, rule_class
from klora_compile.settings.config import Config
from klora_compile.trying.names import (
    RULE,
    SAMPLING,
    flattened,
    rule_settings,
    shared_settings,
    split,
)
from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.errors import ConfigError


@dataclass(frozen=True)
class Trial:
    """One way to make a picture."""

    config: Config
    """The rule with its settings, and the settings of all rules."""
    prompt: str
    seed: int = 0
    call: Mapping[str, Any] | None = None
    """Further arguments of the pipeline's call, such as ``num_inference_steps``."""

    def json(self) -> dict[str, Any]:
        """Return everything as JSON values, with defaults filled in."""
        return {
            "rule": self.config.rule.name,
            "parameters": self.config.parameters(),
            "prompt": self.prompt,
            "seed": self.seed,
            "call": dict(self.call or {}),
        }

    @property
    def key(self) -> str:
        """A digest of everything: equal trials make equal pictures."""
        return hashlib.sha256(canonical_json(self.json()).encode()).hexdigest()


def trial_of(settings: Mapping[str, Any]) -> Trial:
    """Return the trial of settings by name.

    Args:
        settings: such as ``{"rule": "klora", "bias": 0.3, "weight.style": 0.8, "steps": 20,
            "prompt": "a fox"}``; see :mod:`klora_compile.trying.names`. What is not named keeps its
            default; the number of steps that rule ``switch`` is made for is that of the sampling.

    Raises:
        ConfigError: a setting is unknown, its rule has no such setting, or a value is out of range.
    """
    given = flattened(settings)
    rule = given.pop(RULE, DEFAULT_RULE)
    own = {**_fields(rule), **{name: field for name, (field, _) in shared_settings().items()}}
    fields: dict[str, Any] = {}
    if "rule.steps" in own and given.get("steps") is not None:
        fields[own["rule.steps"]] = given["steps"]
    for name, value in given.items():
        if name in SAMPLING:
            SAMPLING[name][1].check(name, value)
            continue
        stem, slot = split(name)
        if stem not in own:
            raise ConfigError(
                f"{name}: rule {rule} has no such setting; leave it out, or take another rule."
            )
        if slot is None:
            fields[own[stem]] = value
        else:
            fields.setdefault(own[stem], {})[slot] = value
    prompt, seed = given.get("prompt"), given.get("seed", 0)
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: expected a text, found {prompt!r}; name one.")
    call = {
        argument: given[name]
        for name, (argument, _) in SAMPLING.items()
        if name not in ("prompt", "seed") and given.get(name) is not None
    }
    return Trial(Config.named(rule, **fields), prompt, seed, call)


def idle(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of settings that the rule among them does not have."""
    given = flattened(settings)
    rule = given.get(RULE, DEFAULT_RULE)
    known = {RULE, *SAMPLING, *_fields(rule), *shared_settings()}
    return tuple(name for name in given if split(name)[0] not in known)


def _fields(rule: str) -> dict[str, str]:
    rule_class(rule)  # refuses unknown ones
    return {name: field for name, (field, _) in rule_settings(rule).items()}
