"""How good judges are: measured on drawings for which the answer is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drawings.evaluation.gallery import Gallery
from drawings.evaluation.scores import separation
from drawings.judges.degraded import MEASURED

#: Pictures in [0, 1] -> unit vectors.
_Judge = Callable[[Tensor], Tensor]

#: Similarities by the kind of pair, and separations.
Check = dict[str, dict[str, float]]


def check(subject: _Judge, style: _Judge, gallery: Gallery) -> Check:
    """Measure judges on true drawings of subjects that they were not fitted on.

    Returns:
        Kind of pair -> judge -> mean similarity. Degraded drawings are compared with the drawing
        itself. Under ``separation``, the chance that a right pair is above a wrong one, and for
        each degradation the same where one drawing of each pair is degraded. For subjects, a right
        pair is the same subject in another style, and a wrong pair another subject in the same
        style; for styles, the reverse.
    """
    judges = {"subject": subject, "style": style}
    true = {name: judge(gallery.pictures) for name, judge in judges.items()}
    subjects, styles = (
        torch.tensor([[a[part] == b[part] for b in gallery.names] for a in gallery.names])
        for part in (0, 1)
    )
    kinds = {
        "same subject, other style": subjects & ~styles,
        "other subject, same style": ~subjects & styles,
        "other subject, other style": ~subjects & ~styles,
    }
    right = {"subject": "same subject, other style", "style": "other subject, same style"}
    wrong = {"subject": right["style"], "style": right["subject"]}

    def separated(name: str, vectors: Tensor) -> float:
        values = vectors @ true[name].T
        apart = (values[kinds[kind[name]]].tolist() for kind in (right, wrong))
        return separation(*apart)

    found: Check = {
        kind: {name: (v @ v.T)[pairs].mean().item() for name, v in true.items()}
        for kind, pairs in kinds.items()
    }
    found["separation"] = {name: separated(name, vectors) for name, vectors in true.items()}
    for degradation, worse in MEASURED.items():
        seen = {name: judge(worse(gallery.pictures)) for name, judge in judges.items()}
        found[f"the drawing itself, {degradation}"] = {
            name: (vectors * true[name]).sum(1).mean().item() for name, vectors in seen.items()
        }
        found[f"separation, one {degradation}"] = {
            name: separated(name, vectors) for name, vectors in seen.items()
        }
    return found
