"""Cells of each LoRA alone, with its own prompts: the plain sum with weight 0 on the others."""

from __future__ import annotations

from klora_compile.calibrating.pictures import turns
from klora_compile.searching.plan import Plan
from klora_compile.searching.space import Candidate, cell_of
from klora_compile.sweeping.grid import Cell
from klora_compile.trying.names import WEIGHT


def own_cells(plan: Plan) -> dict[str, list[Cell]]:
    """Return slot -> cells that show its LoRA alone.

    Args:
        plan: has the prompts; what they do not state is as in the other cells.
    """
    stated = {name: getattr(plan.own, name) for name in ("steps", "guidance", "height", "width")}
    call = {name: value for name, value in stated.items() if value is not None}
    found = {}
    for slot, prompts in plan.own_prompts.items():
        weights = {f"{WEIGHT}.{other}": float(other == slot) for other in plan.own_prompts}
        alone = Candidate(f"{slot} alone", {**plan.baseline.settings, **call, **weights})
        found[slot] = [cell_of(alone, case) for case in turns(plan.own, prompts)]
    return found
