"""All base models by key. A new model is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from itertools import product

from klora_runtime.families.family import Family, Mark

#: Files of records in the order of lists that users see. If several tables, or several text
#: encoders of a prefix, match equally, the first one here is used.
_FILES = (
    "sd1",
    "sd2",
    "sdxl",
    "sdxl_refiner",
    "sd3",
    "flux1",
    "chroma",
    "flux2",
    "qwen_image",
    "z_image",
    "wan",
    "hunyuan_video",
    "ltx",
    "ltx2",
    "lumina2",
    "anima",
    "krea2",
    "auraflow",
    "hidream",
    "hunyuan_video_15",
    "hunyuan_image",
    "wan_vace",
    "qwen_image21",
    "kandinsky5",
    "pixart",
    "sana",
    "cogview4",
    "cogvideox",
    "mochi",
    "ideogram4",
    "flux3",
    "ernie_image",
    "minimax_h3",
    "ace_step",
    "cosmos_predict",
    "sana_video",
    "bria",
    "fibo",
    "glm_image",
)


def _record(file: str) -> Family:
    family = import_module(f"klora_runtime.families.{file}").FAMILY
    assert isinstance(family, Family)
    return family


#: More families than this are not listed.
_LISTED = 5

#: Key -> record.
FAMILIES: Mapping[str, Family] = {family.key: family for family in map(_record, _FILES)}


def family_of(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> str | None:
    """Return the only family whose marks the layers carry.

    Args:
        shapes: (component, module path) -> shape of the weight.

    Returns:
        A key of :data:`FAMILIES`; None if no mark matches, or marks of several families match.
    """
    own = families_of(shapes)
    return next(iter(own)) if len(own) == 1 else None


def families_of(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> frozenset[str]:
    """Return all families whose marks the layers carry; see :func:`family_of`."""
    by_width: dict[tuple[str, int], list[str]] = {}
    for (component, module), shape in shapes.items():
        if len(shape) > 1:
            by_width.setdefault((component, shape[1]), []).append(module)
    found = {
        key: family
        for key, family in FAMILIES.items()
        if any(_carried(mark, family, by_width) for mark in family.marks)
    }
    shared = {other.key for family in found.values() for other in family.shares_marks_of}
    return frozenset(found) - shared


def _carried(mark: Mark, family: Family, by_width: Mapping[tuple[str, int], Sequence[str]]) -> bool:
    """Return whether a layer has the mark.

    Args:
        by_width: component and input width -> paths of such layers.
    """
    components = family.denoisers if mark.component is None else (mark.component,)
    return any(
        mark.names.search(module)
        for place in product(components, mark.widths)
        for module in by_width.get(place, ())
    )


def families_name(keys: Collection[str]) -> str:
    """Return the names of the families that something may be for, for errors and reports."""
    if 1 < len(keys) <= _LISTED:
        return f"one of {', '.join(map(family_name, sorted(keys)))}"
    return family_name(next(iter(keys)) if len(keys) == 1 else None)


def family_name(key: str | None) -> str:
    """Return a family's name for errors and reports."""
    if key is None:
        return "an unknown family"
    return FAMILIES[key].title if key in FAMILIES else key
