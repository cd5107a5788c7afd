"""The choice of the mode in which a fusion is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from klora_runtime.layers.branch import Branch
from klora_runtime.layers.hindrances import branch_hindrances, merge_hindrances
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.pristine.values import shortage
from klora_runtime.layers.rounding import rounding_share, weight_rounding
from klora_runtime.layers.targets import Target, refuse

#: Values of ``mode`` in ``apply_fusion``.
MODES = ("auto", "merge", "branch")

#: ``auto`` does not merge if the weights' dtype loses more than this share of the deltas.
MAX_ROUNDING = 0.1

#: Rows of each layer from which ``auto`` estimates that share.
_ROWS = 64


def choose(mode: str, targets: Sequence[Target], weights: Mapping[str, float]) -> tuple[Mode, str]:
    """Return the requested mode, or for ``auto`` the one that suits the weights; and the reason.

    ``auto`` merges if every weight can be merged into, the copies fit into memory, and the
    weights' dtype loses at most :data:`MAX_ROUNDING` of the deltas.

    Raises:
        IncompatibleModelError: that mode cannot change these layers; nothing was changed.
    """
    if mode != "auto":
        return {"merge": Merge, "branch": Branch}[mode](targets), "asked for"
    only_merge = next(iter(branch_hindrances(targets)), None)
    if only_merge is not None:
        return _merge_only(targets, only_merge)
    obstacle = _obstacle(targets)
    if obstacle is not None:
        return Branch(targets), obstacle
    return _by_rounding(targets, weights)


def _merge_only(targets: Sequence[Target], why: str) -> tuple[Mode, str]:
    hindrances = list(merge_hindrances(targets))
    refuse(
        [f"branch: {why}", *(f"merge: {each}" for each in hindrances)] if hindrances else (),
        "no mode can apply this fusion to these layers; nothing was changed. Load the model "
        "unquantised in float32, float16 or bfloat16 for mode merge.",
    )
    lack = shortage(targets)
    also = "" if lack is None else f"; {lack}"
    return Merge(targets), f"not every layer can be branched ({why}){also}"


def _obstacle(targets: Sequence[Target]) -> str | None:
    """Return why these targets should not be merged into; None if nothing prevents it."""
    first = next(iter(merge_hindrances(targets)), None)
    if first is not None:
        return f"not every weight can be merged into ({first})"
    return shortage(targets)


def _by_rounding(targets: Sequence[Target], weights: Mapping[str, float]) -> tuple[Mode, str]:
    halves = [target for target in targets if target.parameter.dtype != torch.float32]
    if not halves:
        return Merge(targets), "every weight is a plain float32 tensor"
    dtypes = " and ".join(sorted({str(t.parameter.dtype).removeprefix("torch.") for t in halves}))
    lost = rounding_share(
        weight_rounding(target, target.origin, weights, rows=_ROWS) for target in halves
    )
    if lost > MAX_ROUNDING:
        return Branch(targets), f"{dtypes} weights would lose {lost:.0%} of the deltas"
    return Merge(targets), f"{dtypes} weights hold the deltas to {lost:.1%}"
