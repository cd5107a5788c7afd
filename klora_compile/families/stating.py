"""A file's base model and trainer, as its metadata state them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from klora_runtime.families.catalogue import FAMILIES

#: Metadata keys of ModelSpec and of kohya's trainers; other trainers also write them.
_KEYS = ("modelspec.architecture", "ss_base_model_version")

_STATED = {
    key: re.compile(rf"(?:{family.stated})(?=[-/]|$)")
    for key, family in FAMILIES.items()
    if family.stated is not None
}
_SEPARATORS = re.compile(r"[\s._]")


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family that trainers state, or None."""
    for statement in (metadata.get(key, "") for key in _KEYS):
        text = _SEPARATORS.sub("-", statement.strip().lower())
        lengths = {
            key: len(match[0])
            for key, pattern in _STATED.items()
            if (match := pattern.match(text)) is not None
        }
        if lengths:
            return max(lengths, key=lambda key: lengths[key])
    return None


def trainers() -> Mapping[str, str]:
    """Return ``ss_network_module`` -> trainer, for modules that only one trainer has."""
    scripts = {family.script for family in FAMILIES.values() if family.script is not None}
    modules = [script.module for script in scripts]
    return {s.module: s.trainer for s in scripts if modules.count(s.module) == 1}
