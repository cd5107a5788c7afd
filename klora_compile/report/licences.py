"""The licence in a card's metadata, from a user's statement and the source files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from klora_compile.report.markdown import plain
from klora_runtime.artifact.schedule import Source

#: Identifiers that the Hub knows; every other licence is ``other`` with a name.
_HUB = frozenset(
    "apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bsd "
    "bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 wtfpl "
    "unlicense unknown other".split()
)
_NAME_LENGTH = 96


def licence_fields(given: str | None, sources: Iterable[str | None]) -> dict[str, str]:
    """Return the Hub's metadata fields.

    Args:
        given: the licence of the fused file, if a user stated it; it overrides the sources'.
        sources: the licence of each source; None if it states none.

    Returns:
        ``license`` and, for a licence that the Hub does not know, ``license_name``. Empty if no
        licence is stated; ``other`` without a name if only some sources state one.
    """
    if given is not None:
        return _fields([given])
    stated = list(sources)
    if not any(stated):
        return {}
    if not all(stated):
        return {"license": "other"}
    return _fields(dict.fromkeys(licence for licence in stated if licence))


def _fields(licences: Iterable[str]) -> dict[str, str]:
    names = list(dict.fromkeys(licence.strip().lower() for licence in licences))
    if len(names) == 1 and names[0] in _HUB:
        return {"license": names[0]}
    slugs = [re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") for name in names]
    name = "-and-".join(filter(None, slugs))[:_NAME_LENGTH].strip("-.")
    return {"license": "other"} | ({"license_name": name} if name else {})


def licence_sentences(given: str | None, sources: Mapping[str, Source]) -> list[str]:
    """Return what may be done with a fused file, a sentence per fact, as Markdown.

    Args:
        given: the licence of the fused file, if a user stated it.
        sources: the sources by name, with their licences.
    """
    sentences = [
        "No licence of its own is stated for the fused file. It holds weights of its sources, and "
        "theirs are as their files state them."
        if given is None
        else f"Licence of the fused file: {plain(given)}."
    ]
    for source in sources.values():
        file = plain(source.file)
        words = set(re.split(r"[^a-z]+", (source.license or "").lower()))
        if not source.license:
            sentences.append(
                f"{file} states no licence: ask its author before you pass this file on."
            )
        if words & {"nd", "noderivatives", "noderivs"}:
            sentences.append(
                f"The licence of {file} forbids changed versions, and a fused file is one: "
                "ask its author before you pass this file on."
            )
        if words & {"nc", "noncommercial"}:
            sentences.append(f"The licence of {file} forbids commercial use.")
    return sentences
