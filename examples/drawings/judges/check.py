"""How good judges are: measured on drawings for which the answer is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from drawings.judges.degraded import MEASURED
from drawings.judges.scores import separation
from drawings.material import Gallery

#: Pictures in [0, 1] -> unit vectors.
_Judge = Callable[[Tensor], Tensor]

#: Similarities by the kind of pair, and separations.
Check = dict[str, dict[str, float]]


def check(subject: _Judge, style: _Judge, looks: Mapping[str, Tensor], gallery: Gallery) -> Check:
    """Measure judges on true drawings of subjects that they were not fitted on.

    Args:
        looks: style -> its mean vector by the judge of styles.

    Returns:
        Kind of pair -> judge -> mean similarity. Degraded drawings are compared with the drawing
        itself. Under ``separation``, the chance that a right pair is above a wrong one, and for
        each degradation the same where one drawing of each pair is degraded. For subjects, a right
        pair is the same subject in another style, and a wrong pair another subject in the same
        style; for styles, the reverse. Under ``right looks``, how often a drawing is nearer to the
        mean of its style than to that of another style, over all other styles.
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
    found["right looks"] = {"style": _right_looks(true["style"], looks, gallery)}
    for degradation, worse in MEASURED.items():
        seen = {name: judge(worse(gallery.pictures)) for name, judge in judges.items()}
        found[f"the drawing itself, {degradation}"] = {
            name: (vectors * true[name]).sum(1).mean().item() for name, vectors in seen.items()
        }
        found[f"separation, one {degradation}"] = {
            name: separated(name, vectors) for name, vectors in seen.items()
        }
        found[f"right looks, {degradation}"] = {
            "style": _right_looks(seen["style"], looks, gallery)
        }
    return found


def _right_looks(vectors: Tensor, looks: Mapping[str, Tensor], gallery: Gallery) -> float:
    """Return the share of comparisons in which a picture's own style is nearer than another."""
    names = list(looks)
    near = vectors @ torch.stack(list(looks.values())).T
    own = torch.tensor([names.index(style) for _, style in gallery.names])
    mine = near.gather(1, own[:, None])
    right = (mine > near).sum().item() / (len(vectors) * (len(names) - 1))
    return float(right)
