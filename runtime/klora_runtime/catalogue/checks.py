"""The rules of ``CATALOGUE.md`` for the JSON of a catalogue, checked before values are built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from klora_runtime.artifact.checks import SOURCE_TESTS, is_always_name
from klora_runtime.artifact.factors import is_number
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.timeline import CLOCKS
from klora_runtime.errors import ArtifactError, shown

FORMAT_NAME = "klora-catalogue"
FORMAT_VERSION = 1

#: Limits of a catalogue; see ``CATALOGUE.md``.
MAX_LORAS = 65_536
MAX_LAYERS = 20_000
MAX_PARTNERS = 256
MAX_KINDS = 65_536
_MAX_ISSUES = 20
_MAX_NAME = 200

_KEYS = frozenset(
    "format tool terms loras contents styles always kinds components tables ranks keys "
    "digests".split()
)
_LORA_KEYS = frozenset("name sources families table ranks keys partners digest".split())
_TERMS_KEYS = frozenset(
    "rule parameters duel ignores_alpha text_encoder unpaired clock weights".split()
)
_DUEL_KEYS = frozenset("inequality size gamma favour top_k".split())
_INEQUALITY_KEYS = frozenset("pattern alpha beta tie less".split())
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,31}")

#: Name of each tensor about pairs -> its dtype.
PAIR_TENSORS = {"pairs": "I32", "gamma": "F64", "choices": "U8"}


def tensor_of_lora(number: int) -> str:
    """Return the name of the tensor with the numbers of a LoRA."""
    return f"lora.{number}"


def check_catalogue(value: Any, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check the JSON of a catalogue against the format and against the file's tensors.

    Raises:
        ArtifactError: it breaks a rule; ``issues`` lists the first breaches of one part.
    """
    for part in (_whole, _terms, _tables, _loras, _numbers_of_loras, _tensors):
        issues = []
        for issue in part(value, tensors):
            issues.append(issue)
            if len(issues) == _MAX_ISSUES:
                break
        if issues:
            raise ArtifactError(f"{where} breaks its format:", issues)


def _whole(value: Any, _: Mapping[str, TensorInfo]) -> Iterator[str]:
    if not isinstance(value, dict) or not value.keys() >= {"format"}:
        yield "catalogue: expected an object with a format"
        return
    stated = value["format"]
    if not isinstance(stated, dict) or stated.get("name") != FORMAT_NAME:
        yield f"format: expected {FORMAT_NAME}, found {shown(stated)}"
    elif stated != {"name": FORMAT_NAME, "version": FORMAT_VERSION}:
        yield f"format: this klora reads version {FORMAT_VERSION}, found {shown(stated)}; update it"
    elif value.keys() != _KEYS:
        yield f"catalogue: expected the keys {', '.join(sorted(_KEYS))}"
    else:
        yield from _wrong(value, "tool", _is_text)
        yield from _wrong(value, "components", _list_of(_is_word))
        for name in ("loras", "tables", "ranks", "keys", "kinds", "contents", "styles"):
            yield from _wrong(value, name, lambda v: type(v) is list and len(v) <= MAX_LORAS)
        yield from _wrong(value, "always", _object_of(_is_count))
        yield from _wrong(value, "digests", _object_of(_is_digest))


def _terms(value: Any, _: Mapping[str, TensorInfo]) -> Iterator[str]:
    terms = value["terms"]
    if not isinstance(terms, dict) or terms.keys() != _TERMS_KEYS:
        yield f"terms: expected the keys {', '.join(sorted(_TERMS_KEYS))}"
        return
    yield from _wrong(terms, "rule", _is_text)
    yield from _wrong(terms, "parameters", lambda v: isinstance(v, dict))
    yield from _wrong(terms, "ignores_alpha", lambda v: type(v) is bool)
    yield from _wrong(terms, "text_encoder", _one_of("both", "content", "style", "none"))
    yield from _wrong(terms, "unpaired", _one_of("keep", "drop", "error"))
    yield from _wrong(terms, "clock", _one_of(*CLOCKS))
    yield from _wrong(terms, "weights", _object_of(is_number))
    duel = terms["duel"]
    if duel is None:
        return
    if not isinstance(duel, dict) or duel.keys() != _DUEL_KEYS:
        yield f"terms.duel: expected null or the keys {', '.join(sorted(_DUEL_KEYS))}"
        return
    yield from _wrong(duel, "size", _one_of("top_k", "energy"))
    yield from _wrong(duel, "gamma", lambda v: v in ("paper", "code") or _is_positive(v))
    yield from _wrong(duel, "favour", _is_positive)
    yield from _wrong(duel, "top_k", lambda v: v is None or (_is_count(v) and v > 0))
    own = duel["inequality"]
    if not isinstance(own, dict) or own.keys() != _INEQUALITY_KEYS:
        yield f"inequality: expected the keys {', '.join(sorted(_INEQUALITY_KEYS))}"
        return
    yield from _wrong(own, "pattern", _one_of("s", "s*"))
    yield from _wrong(own, "tie", _one_of("content", "style"))
    least = 1e-3 if own["pattern"] == "s*" else -100.0
    yield from _wrong(own, "alpha", lambda v: is_number(v) and least <= v <= 100.0)
    least_beta = 0.0 if own["pattern"] == "s*" else -100.0
    yield from _wrong(own, "beta", lambda v: is_number(v) and least_beta <= v <= 100.0)
    yield from _wrong(own, "less", lambda v: is_number(v) and abs(v) <= 100.0)


def _tables(value: Any, _: Mapping[str, TensorInfo]) -> Iterator[str]:
    for number, table in enumerate(value["tables"]):
        where = f"tables.{number}"
        if type(table) is not list or not 0 < len(table) <= MAX_LAYERS:
            yield f"{where}: expected a list of 1 to {MAX_LAYERS} layers"
        elif not all(_is_place(place) for place in table):
            wrong = next(place for place in table if not _is_place(place))
            yield f"{where}: expected [component, module, parameter, shape], found {shown(wrong)}"
        elif any(a[:3] >= b[:3] for a, b in pairwise(table)):
            yield f"{where}: its layers are not sorted, or one appears twice"
    for number, ranks in enumerate(value["ranks"]):
        if not _list_of(lambda v: type(v) is int and 0 < v < 2**31)(ranks):
            yield f"ranks.{number}: expected ranks, found {shown(ranks)}"
    for number, keys in enumerate(value["keys"]):
        if not _list_of(_is_key)(keys):
            yield f"keys.{number}: expected [half, down, up, rows] of each layer"
    for number, kind in enumerate(value["kinds"]):
        if not _is_kind(kind):
            yield f"kinds.{number}: expected refused, family and families, found {shown(kind)}"


def _loras(value: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for number, lora in enumerate(value["loras"]):
        where = f"loras.{number}"
        if not isinstance(lora, dict) or lora.keys() != _LORA_KEYS:
            yield f"{where}: expected the keys {', '.join(sorted(_LORA_KEYS))}"
            continue
        yield from _wrong(lora, "name", lambda v: _is_text(v) and 0 < len(v) <= _MAX_NAME, where)
        yield from _wrong(lora, "families", _list_of(_is_text), where)
        yield from _wrong(lora, "digest", _is_digest, where)
        yield from _wrong(lora, "sources", _are_sources, where)
        yield from _wrong(lora, "partners", _are_partners, where)
        for name, pool in (("table", "tables"), ("ranks", "ranks"), ("keys", "keys")):
            if name == "keys" and lora[name] is None:
                continue
            yield from _wrong(lora, name, _below(len(value[pool])), where)


def _numbers_of_loras(value: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for number, lora in enumerate(value["loras"]):
        where, layers = f"loras.{number}", len(value["tables"][lora["table"]])
        if len(value["ranks"][lora["ranks"]]) != layers:
            yield f"{where}: its ranks are not of its {layers} layers"
        if lora["keys"] is not None:
            own = value["keys"][lora["keys"]]
            if len(own) != layers or not {key[0] for key in own} <= lora["sources"].keys():
                yield f"{where}: its keys are not of its {layers} layers and its sources"
        info = tensors.get(tensor_of_lora(number))
        wanted = ("F64", (4 + len(lora["partners"]), layers))
        if info is None or (info.dtype, info.shape) != wanted:
            yield f"{tensor_of_lora(number)}: expected a tensor {wanted[0]} {list(wanted[1])}"
    count = len(value["loras"])
    for role in ("contents", "styles"):
        numbers = value[role]
        if not all(_below(count)(each) for each in numbers) or sorted(set(numbers)) != numbers:
            yield f"{role}: expected ascending numbers of LoRAs"
        elif len({value["loras"][each]["name"] for each in numbers}) != len(numbers):
            yield f"{role}: two LoRAs have one name"
    for name, each in value["always"].items():
        if not is_always_name(name) or not _below(count)(each):
            yield f"always: expected names and numbers of LoRAs, found {shown(name)}"


def _tensors(value: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    known = {*PAIR_TENSORS, *map(tensor_of_lora, range(len(value["loras"])))}
    for name in sorted(tensors.keys() - known):
        yield f"the tensor {shown(name)} is unknown; update klora"
    if value["digests"].keys() != PAIR_TENSORS.keys():
        yield f"digests: expected those of {', '.join(PAIR_TENSORS)}"
    pairs = tensors["pairs"].shape[:1] if "pairs" in tensors else ()
    widths = {"pairs": 3, "gamma": len(value["components"]), "choices": 16}
    for name, dtype in PAIR_TENSORS.items():
        info = tensors.get(name)
        if info is None or info.dtype != dtype or info.shape != (*pairs, widths[name]):
            yield f"{name}: expected a tensor {dtype} [pairs, {widths[name]}]"


def _wrong(
    owner: Mapping[str, Any], key: str, test: Callable[[Any], bool], where: str = ""
) -> Iterator[str]:
    if not test(owner[key]):
        yield f"{f'{where}.' if where else ''}{key}: found {shown(owner[key])}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0.0 < value <= 1e30


def _below(count: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value < count


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(test(each) for each in value)


def _object_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(each) for each in value.values())


def _is_place(value: Any) -> bool:
    if type(value) is not list or len(value) != 4 or not all(map(_is_text, value[:3])):
        return False
    component, module, parameter, shape = value
    if not _is_word(component) or not _is_word(parameter) or len(module) > 1000:
        return False
    if module and _MODULE.fullmatch(module) is None:
        return False
    return type(shape) is list and 0 < len(shape) <= 5 and all(_is_count(v) and v for v in shape)


def _is_key(value: Any) -> bool:
    if type(value) is not list or len(value) != 4 or not all(map(_is_text, value[:3])):
        return False
    rows = value[3]
    return rows is None or (
        type(rows) is list
        and all(
            type(each) is list
            and len(each) == 2
            and all(map(_is_count, each))
            and each[0] < each[1]
            for each in rows
        )
    )


def _is_kind(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"refused", "family", "families"}
        and all(value[key] is None or _is_text(value[key]) for key in ("refused", "family"))
        and _list_of(_is_text)(value["families"])
    )


def _are_partners(value: Any) -> bool:
    fits = _list_of(lambda v: type(v) is int and 0 < v < 2**53)(value)
    return fits and len(value) <= MAX_PARTNERS and sorted(set(value)) == value


def _are_sources(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) not in ({"whole"}, {"high", "low"}):
        return False
    return all(
        isinstance(each, dict)
        and each.keys() >= SOURCE_TESTS.keys()
        and all(test(each[key]) for key, test in SOURCE_TESTS.items())
        for each in value.values()
    )
