"""The JSON of a catalogue as a value, in both directions; ``runtime/CATALOGUE.md`` specifies it.

file  <-- safetensors_file -->  text  <-- here -->  Document  <-- linking -->  Fusion
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_runtime.artifact.canonical import canonical_json, parse_json
from klora_runtime.artifact.deflated import deflated, inflated
from klora_runtime.artifact.digests import text_digest
from klora_runtime.artifact.document import source_json, source_of
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.schedule import Source
from klora_runtime.catalogue.checks import FORMAT_NAME, FORMAT_VERSION, check_catalogue
from klora_runtime.errors import ArtifactError, shown
from klora_runtime.linking.inequality import Inequality
from klora_runtime.linking.numbers import Place, Ranks, Table
from klora_runtime.linking.terms import Duel, Terms

#: The one metadata key of a catalogue.
METADATA_KEY = "klora_catalogue"

#: Greatest number of bytes of the JSON, decompressed.
MAX_JSON_BYTES = 256 * 2**20

#: Key of the one source of a LoRA that is not in two files.
WHOLE = "whole"


@dataclass(frozen=True)
class Keys:
    """The place of one layer's factors in the files of its LoRA."""

    half: str
    """A key of :attr:`CataloguedLora.sources`."""
    down: str
    up: str
    rows: tuple[tuple[int, int], ...] | None
    """See :class:`~klora_runtime.artifact.schedule.Reference`."""


@dataclass(frozen=True, eq=False)
class CataloguedLora:
    """One LoRA of a catalogue, without its numbers."""

    name: str
    sources: Mapping[str, Source]
    """``whole``, or ``high`` and ``low`` for a LoRA in two files -> its file."""
    families: tuple[str, ...]
    """Sorted keys of the base models that it may be for; empty if that is unknown."""
    table: Table
    ranks: Ranks
    keys: tuple[Keys, ...] | None
    """For each layer of the table, where its factors are; None if the compiler computes them."""
    partners: tuple[int, ...]
    """Keys of :attr:`~klora_runtime.linking.numbers.Numbers.sums`, ascending."""
    digest: str
    """Digest of the tensor with its numbers, 64 hexadecimal digits."""

    @property
    def sha256(self) -> tuple[str, ...]:
        """Digests of its files."""
        return tuple(source.sha256 for source in self.sources.values())


@dataclass(frozen=True)
class Kind:
    """What is the same for many pairs: whether they fit, and for which base models."""

    refused: str | None
    """Why they cannot be fused; None if they can."""
    family: str | None = None
    families: tuple[str, ...] = ()
    """See :class:`~klora_runtime.artifact.schedule.ScheduleOf`."""


@dataclass(frozen=True, eq=False)
class Document:
    """A catalogue without the numbers."""

    tool: str
    terms: Terms
    loras: tuple[CataloguedLora, ...]
    """Sorted by name, then by the digests of their files."""
    contents: tuple[int, ...]
    """Numbers of LoRAs, ascending."""
    styles: tuple[int, ...]
    always: Mapping[str, int]
    """Slot -> number of a LoRA that acts beside every pair."""
    kinds: tuple[Kind, ...]
    components: tuple[str, ...]
    """The columns of gamma."""
    digests: Mapping[str, str]
    """Name of each tensor about pairs -> digest of its bytes."""


def read_document(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], where: str
) -> Document:
    """Read and check the document of a file.

    Raises:
        ArtifactError: the file breaks the format; ``issues`` lists every problem found.
    """
    if set(metadata) != {METADATA_KEY}:
        found = ", ".join(map(shown, metadata)) or "none"
        raise ArtifactError(
            f"{where} is no catalogue: expected exactly the metadata key '{METADATA_KEY}', found "
            f"{found}. Make one with klora catalogue STORE --content GLOB --style GLOB -o FILE"
        )
    try:
        text = inflated(metadata[METADATA_KEY], MAX_JSON_BYTES)
        outer = parse_json(text)
        if not isinstance(outer, dict) or outer.keys() != {"catalogue", "digest"}:
            raise ValueError("it needs exactly the keys catalogue and digest")
        if outer["digest"] != text_digest(canonical_json(outer["catalogue"])):
            raise ValueError("it was altered, so its digest differs")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{where}: its JSON cannot be read: {shown(error)}. Get the file again, or make "
            "it anew."
        ) from error
    check_catalogue(outer["catalogue"], tensors, where)
    return _document(outer["catalogue"])


def document_text(document: Document) -> str:
    """Return the value of the file's metadata key for a document."""
    tables: dict[object, int] = {}
    ranks: dict[object, int] = {}
    keys: dict[object, int] = {}
    loras = [
        {
            "name": lora.name,
            "sources": {half: source_json(each) for half, each in lora.sources.items()},
            "families": list(lora.families),
            "table": _number(tables, lora.table.places),
            "ranks": _number(ranks, lora.ranks.values),
            "keys": None if lora.keys is None else _number(keys, lora.keys),
            "partners": list(lora.partners),
            "digest": lora.digest,
        }
        for lora in document.loras
    ]
    inner = canonical_json(
        {
            "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
            "tool": document.tool,
            "terms": _terms_json(document.terms),
            "loras": loras,
            "contents": document.contents,
            "styles": document.styles,
            "always": dict(document.always),
            "kinds": [
                {"refused": each.refused, "family": each.family, "families": each.families}
                for each in document.kinds
            ],
            "components": document.components,
            "tables": list(tables),
            "ranks": list(ranks),
            "keys": [[(k.half, k.down, k.up, k.rows) for k in own] for own in keys],  # type: ignore[attr-defined]
            "digests": dict(document.digests),
        }
    )
    return deflated(f'{{"catalogue":{inner},"digest":"{text_digest(inner)}"}}')


def _number(known: dict[object, int], value: object) -> int:
    """Return the number of a value among the distinct ones."""
    return known.setdefault(value, len(known))


def _document(value: Mapping[str, Any]) -> Document:
    """Return the document of checked JSON."""
    tables = [
        Table(tuple(Place(c, m, p, tuple(shape)) for c, m, p, shape in places))
        for places in value["tables"]
    ]
    ranks = [Ranks(tuple(each)) for each in value["ranks"]]
    keys = [tuple(Keys(h, d, u, _rows(rows)) for h, d, u, rows in own) for own in value["keys"]]
    return Document(
        tool=value["tool"],
        terms=_terms(value["terms"]),
        loras=tuple(
            CataloguedLora(
                name=lora["name"],
                sources={half: source_of(each) for half, each in lora["sources"].items()},
                families=tuple(lora["families"]),
                table=tables[lora["table"]],
                ranks=ranks[lora["ranks"]],
                keys=None if lora["keys"] is None else keys[lora["keys"]],
                partners=tuple(lora["partners"]),
                digest=lora["digest"],
            )
            for lora in value["loras"]
        ),
        contents=tuple(value["contents"]),
        styles=tuple(value["styles"]),
        always=value["always"],
        kinds=tuple(
            Kind(each["refused"], each["family"], tuple(each["families"]))
            for each in value["kinds"]
        ),
        components=tuple(value["components"]),
        digests=value["digests"],
    )


def _rows(value: Any) -> tuple[tuple[int, int], ...] | None:
    return None if value is None else tuple((begin, end) for begin, end in value)


def _terms_json(terms: Terms) -> dict[str, object]:
    duel = terms.duel
    stated = None
    if duel is not None:
        stated = {
            "inequality": vars(duel.inequality),
            "size": duel.size,
            "gamma": duel.gamma,
            "favour": duel.favour,
            "top_k": duel.top_k,
        }
    own = {name: value for name, value in vars(terms).items() if name != "duel"}
    return {**own, "parameters": dict(terms.parameters), "duel": stated}


def _terms(value: Mapping[str, Any]) -> Terms:
    duel = value["duel"]
    if duel is not None:
        duel = Duel(**{**duel, "inequality": Inequality(**duel["inequality"])})
    return Terms(**{**value, "duel": duel})
