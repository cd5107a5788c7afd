"""A check of the judges on true drawings, for which the answer is known."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from drawings.evaluation.gallery import Name
from drawings.evaluation.judges import Judges
from drawings.evaluation.scores import separation


def similarities(judges: Judges) -> dict[str, dict[str, float]]:
    """Return the mean similarity of pairs of true drawings, by the kind of pair.

    Returns:
        Kind of pair -> judge -> mean cosine; and under ``separation`` the chance that the judge
        ranks a right pair above a wrong one. For subjects, a right pair is the same subject in
        another style, a wrong pair another subject in the same style; for styles, the reverse.
    """
    names, pictures = judges.gallery.names, judges.gallery.pictures
    seen = {"subject": judges.subject(pictures), "style": judges.style(pictures)}
    table: dict[str, dict[str, float]] = {}
    values = {judge: vectors @ vectors.T for judge, vectors in seen.items()}
    kinds = {
        "same subject, other style": _pairs(names, True, False),
        "other subject, same style": _pairs(names, False, True),
        "other subject, other style": _pairs(names, False, False),
    }
    for kind, pairs in kinds.items():
        rows, columns = zip(*pairs, strict=True)
        table[kind] = {judge: values[judge][rows, columns].mean().item() for judge in values}
    moved = torch.roll(pictures, (2, 2), dims=(2, 3))
    table["the drawing itself, moved by two pixels"] = {
        "subject": _diagonal(judges.subject(moved), seen["subject"]),
        "style": _diagonal(judges.style(moved), seen["style"]),
    }
    by_subject, by_style = list(kinds.values())[:2]
    table["separation"] = {
        "subject": _separation(values["subject"], by_subject, by_style),
        "style": _separation(values["style"], by_style, by_subject),
    }
    return table


def _pairs(names: Iterable[Name], subject: bool, style: bool) -> list[tuple[int, int]]:
    """Return index pairs of drawings that agree in exactly these properties."""
    listed = list(names)
    return [
        (i, j)
        for i, one in enumerate(listed)
        for j, other in enumerate(listed)
        if i < j and (one[0] == other[0], one[1] == other[1]) == (subject, style)
    ]


def _separation(
    values: Tensor, right: list[tuple[int, int]], wrong: list[tuple[int, int]]
) -> float:
    return separation(*([values[i, j].item() for i, j in pairs] for pairs in (right, wrong)))


def _diagonal(one: Tensor, other: Tensor) -> float:
    return (one * other).sum(dim=1).mean().item()
