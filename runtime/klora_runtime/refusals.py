"""Methods that would come between a fusion and its layers, and why each is refused.

A row holds for the pipeline and for its components alike, wherever one has such a method. A new
method that must not be called is a new row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from klora_runtime.errors import InUseError


@dataclass(frozen=True)
class Refusal:
    """Why a method is refused while a fusion is applied."""

    reason: str
    only_in: str | None = None
    """The mode in which it is; None for all."""
    called: str | None = None
    """What people call it, where that is not the method's name."""


_LOST = Refusal("a LoRA on top of the fusion would be lost at the next switch")
_PROJECTIONS = Refusal("the projections that it fuses would not follow the fusion")
_COPY = Refusal("the copy would keep the fusion for ever", called="copying or pickling")

REFUSALS: Mapping[str, Refusal] = {
    "load_lora_weights": _LOST,
    "load_lora_adapter": _LOST,
    "load_adapter": _LOST,
    "add_adapter": _LOST,
    "fuse_lora": Refusal("what it fuses would be lost at the next switch"),
    "unfuse_lora": Refusal("it would subtract from weights that a switch has written anew"),
    "fuse_qkv_projections": _PROJECTIONS,
    "dequantize": Refusal("it puts new layers in the place of those that the fusion is on"),
    "__reduce_ex__": _COPY,
    "load_state_dict": Refusal("its weights would be mixed with the base's at a switch", "merge"),
    "enable_sequential_cpu_offload": Refusal("the weights would be out of reach", "merge"),
    "enable_group_offload": Refusal("it keeps its own copies of the weights", "merge"),
    "enable_layerwise_casting": Refusal("it would round the fused weights", "merge"),
}


def refuse_method(name: str, mode: str) -> None:
    """Raise where calling the method ``name`` is refused in ``mode``.

    Raises:
        InUseError: says why, and what to do.
    """
    refusal = REFUSALS[name]
    if refusal.only_in in (None, mode):
        instead = "" if refusal.only_in is None else ", or apply the fusion with mode='branch'"
        raise InUseError(
            f"{refusal.called or name} is not possible while a fusion is applied: "
            f"{refusal.reason}. Call .remove() on the handle first{instead}."
        )
