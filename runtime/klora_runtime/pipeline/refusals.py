"""Methods that would break an applied fusion, and the reason why each is refused.

A row applies to the pipeline and to its components, if they have the method. Another method to
refuse is a new row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from klora_runtime.errors import ConfigError, InUseError
from klora_runtime.layers.mode import Mode


@dataclass(frozen=True)
class Refusal:
    """The reason why a method is refused while a fusion is applied."""

    reason: str
    only_where_written: bool = False
    """Whether it is refused only in modes that write into the model's parameters."""
    called: str | None = None
    """What errors call the method; None for its name."""


_LOST = Refusal("the next switch would overwrite a LoRA on top of the fusion")
_PROJECTIONS = Refusal("fused projections would not follow the fusion")
_COPY = Refusal("the copy would keep the fusion forever", called="copying or pickling")

REFUSALS: Mapping[str, Refusal] = {
    "load_lora_weights": _LOST,
    "load_lora_adapter": _LOST,
    "load_adapter": _LOST,
    "add_adapter": _LOST,
    "fuse_lora": Refusal("the next switch would overwrite the fused weights"),
    "unfuse_lora": Refusal("it would subtract from weights that a switch has written since"),
    "fuse_qkv_projections": _PROJECTIONS,
    "dequantize": Refusal("it would replace the layers that carry the fusion"),
    "__reduce_ex__": _COPY,
    "load_state_dict": Refusal("a switch would mix these weights with the old base", True),
    "enable_sequential_cpu_offload": Refusal("the weights would be out of reach", True),
    "enable_group_offload": Refusal("it keeps its own copies of the weights", True),
    "enable_layerwise_casting": Refusal("it would round the fused weights", True),
}


def refuse_method(name: str, mode: Mode) -> None:
    """Raise if the method ``name`` is refused in ``mode``.

    Raises:
        InUseError: the method is refused; the message says why and what to do.
    """
    refusal = REFUSALS[name]
    if mode.writes or not refusal.only_where_written:
        branch = refusal.only_where_written and mode.name != "branch"
        instead = ", or apply the fusion with mode='branch'" if branch else ""
        raise InUseError(
            f"{refusal.called or name} is not possible while a fusion is applied: "
            f"{refusal.reason}. Call .remove() on the handle first{instead}."
        )


def refusing(method: Callable[..., Any], name: str, mode: Callable[..., Mode | None]) -> Any:
    """Wrap ``method`` so that it is refused according to its row.

    Args:
        mode: called with the same arguments; returns the mode of the applied fusion, or None.
    """

    @functools.wraps(method)
    def refused(*args: Any, **kwargs: Any) -> Any:
        applied = mode(*args, **kwargs)
        if applied is not None:
            refuse_method(name, applied)
        return method(*args, **kwargs)

    return refused


def saving(save: Callable[..., Any], bare: Callable[..., AbstractContextManager[None]]) -> Any:
    """Wrap ``save`` so that it runs while the model is bare.

    Args:
        bare: called with the same arguments; returns the context.
    """

    @functools.wraps(save)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        with bare(*args, **kwargs):
            return save(*args, **kwargs)

    return save_pretrained


#: Arguments of pipelines whose ``scale`` weighs the LoRAs that PEFT has loaded.
_LORA_SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def refuse_lora_scale(arguments: Mapping[str, Any]) -> None:
    """Refuse a LoRA scale in a pipeline's call, because it would have no effect.

    Raises:
        ConfigError: there is a scale other than 1; the message names the method to call instead.
    """
    for name in _LORA_SCALES:
        given = arguments.get(name)
        scale = given.get("scale", 1.0) if isinstance(given, Mapping) else 1.0
        if scale != 1.0:
            raise ConfigError(
                f"{name}={{'scale': {scale}}} acts on LoRAs that PEFT has loaded, not on a fusion; "
                "call handle.set(content=..., style=...) instead."
            )
