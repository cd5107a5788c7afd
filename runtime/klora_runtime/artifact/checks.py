"""The rules of ``FORMAT.md`` for the JSON inside an artifact, checked all at once.

Nothing is trusted: every name, shape, range and reference is checked and every problem listed
before values are built from the JSON. Keys that affect a picture must be known; keys that are
provenance (`sources`, `scores`, rule parameters) are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from klora_runtime.artifact.factors import (
    factors_problems,
    is_number,
    packed_problems,
    tensor_names,
)
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.schedule import ALWAYS, ROLES, SILENT_FATES, STEPLESS, fingerprint
from klora_runtime.artifact.timeline import CLOCKS, MAX_SEGMENTS
from klora_runtime.errors import ArtifactError, ConfigError, shown

FORMAT_NAME = "klora-fusion"
FORMAT_VERSION = 1

MAX_ENTRIES = 20_000
MAX_SLOTS = 64
_MAX_ISSUES = 50

_ENTRY_KEYS = frozenset("component module parameter shape fate timeline factors scores".split())
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,31}")
_SLOT = re.compile(r"[a-z][a-z0-9_]*(\.[0-9]+)?")
_TAKEN = (*ROLES, "enabled", "from")
_RULE = re.compile(r"[a-z][a-z0-9_+-]{0,31}")
_WORDS = re.compile(r"[a-z][a-z -]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENSOR = re.compile(r"[0-9a-f]{32}")


def check_document(document: Any, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check the JSON of an artifact against the format and against the file's tensors.

    Args:
        document: the parsed value of ``fusion``.
        tensors: the file's tensors by name.
        where: how to name the file in the error.

    Raises:
        ArtifactError: the document breaks a rule; ``issues`` lists every breach, up to 50.
    """
    check = _Check()
    stated = {"clock"} if isinstance(document, dict) and "clock" in document else set()
    if not check.keys(
        document,
        "fusion",
        {"format", "tool", "sources", "slots", "rule", "fits", "entries"} | stated,
    ) or not check.format_version(document["format"]):
        raise ArtifactError(f"{where} is not a readable fusion:", check.issues)
    check.provenance(document)
    used: set[str] = set()
    if check.slots(document["slots"], document["sources"]):
        used = check.entries(document["entries"], document["slots"], tensors)
    check.tensors(tensors, used)
    if not check.issues:
        check.fits(document)
        for place, problem in packed_problems(document["entries"], tensors):
            check.say(place, problem)
    if check.issues:
        raise ArtifactError(f"{where} breaks its format:", check.issues)


#: Required key of a source -> test of its value.
SOURCE_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "file": lambda v: isinstance(v, str) and "/" not in v and "\\" not in v,
    "sha256": lambda v: isinstance(v, str) and _DIGEST.fullmatch(v) is not None,
    "bytes": lambda v: type(v) is int and v >= 0,
    "layout": lambda v: isinstance(v, str),
    "ranks": lambda v: isinstance(v, list) and all(type(r) is int and r > 0 for r in v),
    "trigger_words": lambda v: isinstance(v, list) and all(isinstance(w, str) for w in v),
    "license": lambda v: v is None or isinstance(v, str),
}


#: The keys of a source that are not notes.
SOURCE_KEYS = frozenset(SOURCE_TESTS)


def is_always_name(name: Any) -> bool:
    """Return whether a slot of role ``always`` may have this name.

    It must be a slot's name, and no name that a slot of another role or the handle has.
    """
    is_slot = isinstance(name, str) and _SLOT.fullmatch(name) is not None
    return is_slot and name.partition(".")[0] not in _TAKEN


def refuse_always_name(name: Any) -> None:
    """Refuse a name that a slot of role ``always`` must not have.

    Raises:
        ConfigError: see :func:`is_always_name`.
    """
    if not is_always_name(name):
        raise ConfigError(
            f"always: {shown(name)} is no name for a LoRA that always acts. Take lower-case "
            f"letters, digits and underscores, such as turbo, and none of {', '.join(_TAKEN)}."
        )


class _Known(NamedTuple):
    """What the check of a timeline needs to know."""

    keys: Set[str]
    """Keys of a row."""
    always: Set[str]
    """Slots of role ``always``."""
    stored: Set[str]
    """Slots whose factors are stored."""
    constant: bool
    """Whether the component has no steps."""


class _Check:
    """Collects the problems of a document; each method checks one part."""

    def __init__(self) -> None:
        self.issues: list[str] = []

    def say(self, where: str, problem: str) -> bool:
        if len(self.issues) < _MAX_ISSUES:
            self.issues.append(f"{where}: {problem}")
        return False

    def keys(self, value: Any, where: str, required: Set[str]) -> bool:
        if not isinstance(value, dict):
            return self.say(where, f"expected an object, found {shown(value)}")
        if value.keys() == required:
            return True
        if missing := sorted(required - value.keys()):
            self.say(where, f"lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - required):
            self.say(where, f"has unknown keys {', '.join(map(shown, unknown))}; update klora")
        return False

    def format_version(self, value: Any) -> bool:
        if not self.keys(value, "format", {"name", "version"}):
            return False
        if value["name"] != FORMAT_NAME:
            return self.say("format.name", f"expected {FORMAT_NAME}, found {shown(value['name'])}")
        version = value["version"]
        if type(version) is not int or version < 1:
            return self.say("format.version", f"expected a whole number, found {shown(version)}")
        if version > FORMAT_VERSION:
            return self.say(
                "format.version",
                f"this klora reads up to version {FORMAT_VERSION}, the file has {version}; "
                "update klora",
            )
        return True

    def provenance(self, document: Mapping[str, Any]) -> None:
        if not isinstance(document["tool"], str):
            self.say("tool", "expected a string")
        rule = document["rule"]
        if "clock" in document and document["clock"] not in CLOCKS[1:]:
            expected = f"expected {' or '.join(CLOCKS[1:])}, or no key for {CLOCKS[0]}"
            self.say("clock", f"{expected}, found {shown(document['clock'])}; update klora")
        if self.keys(rule, "rule", {"name", "parameters", "derived"}):
            if not isinstance(rule["name"], str) or not _RULE.fullmatch(rule["name"]):
                self.say("rule.name", f"not a rule's name: {shown(rule['name'])}")
            for part in ("parameters", "derived"):
                if not isinstance(rule[part], dict) or not _is_shallow(rule[part], _is_scalar):
                    self.say(
                        f"rule.{part}",
                        "expected an object of plain values, or of objects with plain values",
                    )
        sources = document["sources"]
        if not isinstance(sources, dict) or not sources or len(sources) > MAX_SLOTS:
            self.say("sources", f"expected an object of 1 to {MAX_SLOTS} sources")
            return
        for name, source in sources.items():
            self.source(source, f"sources.{shown(name)}")

    def source(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            self.say(where, "expected an object")
            return
        for key, test in SOURCE_TESTS.items():
            if key not in value or not test(value[key]):
                self.say(f"{where}.{key}", f"missing or invalid: {shown(value.get(key))}")

    def slots(self, value: Any, sources: Any) -> bool:
        if not isinstance(value, dict) or not 1 <= len(value) <= MAX_SLOTS:
            return self.say("slots", f"expected an object of 1 to {MAX_SLOTS} slots")
        before = len(self.issues)
        for name, slot in value.items():
            where = f"slots.{shown(name)}"
            if not _SLOT.fullmatch(name) or name == "from":
                self.say(where, "not a slot name")
            if not self.keys(slot, where, {"role", "sources", "derived"}):
                continue
            if slot["role"] not in ROLES:
                expected = f"expected {', '.join(ROLES[:-1])} or {ROLES[-1]}"
                self.say(f"{where}.role", f"{expected}, found {shown(slot['role'])}; update klora")
            elif slot["role"] == ALWAYS and not is_always_name(name):
                self.say(where, "not a name of a slot of role always")
            origin = slot["sources"]
            known = isinstance(sources, dict) and isinstance(origin, list)
            if (
                not known
                or not origin
                or not all(isinstance(s, str) and s in sources for s in origin)
            ):
                self.say(f"{where}.sources", f"names no known source: {shown(origin)}")
            if slot["derived"] is not None and not isinstance(slot["derived"], str):
                self.say(f"{where}.derived", "expected a string or null")
        return len(self.issues) == before

    def entries(
        self, value: Any, slots: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> set[str]:
        """Check the entries and return the names of the tensors that they use."""
        used: set[str] = set()
        expected = {"from", *slots}
        always = {name for name, slot in slots.items() if slot.get("role") == ALWAYS}
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ENTRIES:
            self.say("entries", f"expected a list of 1 to {MAX_ENTRIES} entries")
            return used
        previous: tuple[str, ...] = ()
        for index, entry in enumerate(value):
            where = f"entries[{index}]"
            if not self.keys(entry, where, _ENTRY_KEYS) or not self.target(entry, where):
                continue
            place = (entry["component"], entry["module"], entry["parameter"])
            if place <= previous:
                self.say(where, f"{'.'.join(place)} is a duplicate or out of order")
            previous = place
            where += f" ({'.'.join(place)})"
            stored = self.factors(entry, f"{where}.factors", slots, tensors)
            used |= {name for slot in stored for name in tensor_names(entry["factors"][slot])}
            constant = entry["component"] in STEPLESS
            known = _Known(expected, always, stored, constant)
            self.timeline(entry["timeline"], f"{where}.timeline", known)
            if entry["fate"] in SILENT_FATES and stored:
                self.say(f"{where}.fate", f"{entry['fate']}, but {len(stored)} slots are stored")
            if not isinstance(entry["scores"], dict) or not all(
                isinstance(scores, dict) and _are_numbers(scores)
                for scores in entry["scores"].values()
            ):
                self.say(f"{where}.scores", "expected rules with numbers, or objects of numbers")
        return used

    def target(self, entry: Mapping[str, Any], where: str) -> bool:
        component, module, parameter = entry["component"], entry["module"], entry["parameter"]
        shape, fate = entry["shape"], entry["fate"]
        if not isinstance(component, str) or not _IDENTIFIER.fullmatch(component):
            return self.say(f"{where}.component", f"not a component name: {shown(component)}")
        if not isinstance(parameter, str) or not _PARAMETER.fullmatch(parameter):
            return self.say(f"{where}.parameter", f"not a parameter's name: {shown(parameter)}")
        of_component = module == "" and parameter not in ("weight", "bias")
        if not isinstance(module, str) or not (of_component or _MODULE.fullmatch(module)):
            return self.say(f"{where}.module", f"not a module path: {shown(module)}")
        if (
            not isinstance(shape, list)
            or not 1 <= len(shape) <= 5
            or not all(type(n) is int and 0 < n < 2**31 for n in shape)
        ):
            return self.say(f"{where}.shape", f"not a shape: {shown(shape)}")
        if not isinstance(fate, str) or not _WORDS.fullmatch(fate):
            return self.say(f"{where}.fate", f"not a few lower-case words: {shown(fate)}")
        return True

    def factors(
        self,
        entry: Mapping[str, Any],
        where: str,
        slots: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
    ) -> set[str]:
        """Check the factors of an entry and return its stored slots."""
        value = entry["factors"]
        if not isinstance(value, dict):
            self.say(where, "expected an object")
            return set()
        for slot, factors in value.items():
            if slot not in slots:
                self.say(f"{where}.{shown(slot)}", "is not in slots")
            sources = slots[slot]["sources"] if slot in slots else ()
            for place, problem in factors_problems(factors, entry["shape"], tensors, sources):
                self.say(f"{where}.{shown(slot)}{place}", problem)
        return set(value)

    def timeline(self, value: Any, where: str, known: _Known) -> None:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_SEGMENTS:
            self.say(where, f"expected a list of 1 to {MAX_SEGMENTS} segments")
            return
        if known.constant and len(value) > 1:
            self.say(where, "the component has no steps: expected one segment")
        previous = -1.0
        for index, row in enumerate(value):
            here = f"{where}[{index}]"
            if not self.keys(row, here, known.keys):
                return
            start = row["from"]
            if not is_number(start) or not 0.0 <= start < 1.0 or start <= previous:
                self.say(f"{here}.from", f"not an ascending progress in [0, 1): {shown(start)}")
                return
            if index == 0 and start != 0.0:
                self.say(f"{here}.from", f"the first segment must start at 0, found {start}")
            previous = start
            for slot, coefficient in row.items():
                if slot == "from":
                    continue
                if not is_number(coefficient):
                    self.say(f"{here}.{slot}", f"not a number: {shown(coefficient)}")
                elif coefficient != 0 and slot not in known.stored:
                    self.say(f"{here}.{slot}", "acts, but its factors are not stored")
                elif slot in known.always and coefficient != value[0][slot]:
                    self.say(f"{here}.{slot}", "always acts, so its coefficient must not change")

    def tensors(self, tensors: Mapping[str, TensorInfo], used: set[str]) -> None:
        for name in sorted(tensors):
            if not _TENSOR.fullmatch(name):
                self.say(f"tensor {shown(name)}", "its name is not a digest of 32 hex digits")
        extra = sorted(set(tensors) - used)
        if extra and not self.issues:
            self.say("tensors", f"{len(extra)} belong to no entry (first: {shown(extra[0])})")

    def fits(self, document: Mapping[str, Any]) -> None:
        value = document["fits"]
        several = {"families"} if isinstance(value, dict) and "families" in value else set()
        if not self.keys(value, "fits", {"family", "fingerprint"} | several):
            return
        if value["family"] is not None and not isinstance(value["family"], str):
            self.say("fits.family", "expected a string or null")
        if several and (value["family"] is not None or not _is_choice(value["families"])):
            self.say("fits.families", "expected two or more sorted strings, and family null")
        expected = fingerprint(
            (entry["component"], entry["module"], entry["parameter"], tuple(entry["shape"]))
            for entry in document["entries"]
        )
        if value["fingerprint"] != expected:
            self.say("fits.fingerprint", "does not match the entries")


def _is_choice(value: Any) -> bool:
    """Return whether a value is a sorted list of two or more different strings."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return False
    return len(value) > 1 and value == sorted(set(value))


def _is_shallow(value: Mapping[str, Any], test: Callable[[Any], bool]) -> bool:
    """Return whether every value passes the test, or is an object whose values all do."""
    return all(
        all(map(test, inner.values())) if isinstance(inner, dict) else test(inner)
        for inner in value.values()
    )


def _are_numbers(scores: Mapping[str, Any]) -> bool:
    """Return whether every value is a number or null, or an object of these."""
    for value in scores.values():
        for each in value.values() if type(value) is dict else (value,):
            if each is not None and not is_number(each):
                return False
    return True


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool) or _is_number_or_null(value)


def _is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)
