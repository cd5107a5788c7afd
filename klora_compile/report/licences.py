"""Which licence a card's metadata states, from what people and source files gave."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Identifiers the Hub knows; every other licence is ``other`` with a name.
_HUB = frozenset(
    "apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bsd "
    "bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 wtfpl "
    "unlicense unknown other".split()
)
_NAME_LENGTH = 96


def licence_fields(given: str | None, sources: Iterable[str | None]) -> dict[str, str]:
    """Metadata of the Hub.

    Args:
        given: the licence of the fused file, where a person stated it; it goes before the sources'.
        sources: the licence of each source, None where it states none.

    Returns:
        ``license`` and, for one that the Hub does not know, ``license_name``. Empty where nobody
        states any; ``other`` without a name where only a part of the sources does.
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
