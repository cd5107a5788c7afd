"""Where a layer's alpha comes from; alpha / rank is what multiplies its delta.

One rule. These sources may state an alpha, and the first that does is taken:

1. the layer's own alpha tensor (``tensor``);
2. the configuration that PEFT and diffusers write: ``lora_adapter_metadata``, or
   ``adapter_config.json`` of an adapter folder;
3. the setting of the whole training, ``ss_network_alpha`` or its kin in the metadata; for
   convolutions above 1x1 ``conv_alpha`` of ``ss_network_args``;
4. none: alpha is the rank (``rank``), so that the delta is up @ down.

Two sources that state different numbers for one layer are an error that names both, unless the
first is asked for. kohya's setting of a training speaks for layers in kohya's spelling only: the
converters of sd-scripts and musubi-tuner fold alpha into the weights, write other names, and keep
the metadata. It states nothing where layers have settings of their own (``block_alphas`` and the
like) or were resized, nor where it is 0, which means the rank. Forms without a rank have no alpha,
and LyCORIS gives a LoKr of two whole matrices one that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from klora_compile.reading.scale.peft_config import AdapterConfig
from klora_compile.reading.scale.training import CONV_ALPHA, training_of

METADATA_KEY = "lora_adapter_metadata"

#: An alpha below this is no setting that anybody trained with; 0 is one.
MIN_ALPHA = 1e-12

#: Numbers this near are one: bfloat16 has eight bits.
_SAME = 2.0**-8


@dataclass(frozen=True)
class Alpha:
    """An alpha and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class LayerScale:
    """What a layer's scale depends on."""

    component: str
    module: str
    """Its path as the file names it."""
    rank: int
    """As declared."""
    kernel: bool
    """Whether it is a convolution above 1x1."""
    by_kohya: bool
    """Whether it is in kohya's spelling."""
    whole: bool
    """Whether it is a LoKr without a factored matrix."""
    tensor: float | None
    """The value of its alpha tensor."""


class Scales:
    """What a file says about alphas.

    Args:
        metadata: the safetensors metadata.
        config: text and name of the PEFT configuration beside the file; None where there is none.
        where: how to name the file in errors.

    Raises:
        LoraError: a statement cannot be read, or an alpha in it is not a number or is for a pattern
            that is not a module name.
    """

    def __init__(
        self, metadata: Mapping[str, str], config: tuple[str, str] | None, where: str
    ) -> None:
        stated = (metadata[METADATA_KEY], METADATA_KEY) if METADATA_KEY in metadata else config
        self._config = None if stated is None else AdapterConfig(*stated, where)
        self._training = training_of(metadata, where)

    def alpha(self, layer: LayerScale) -> tuple[Alpha, Alpha | None]:
        """The alpha of a layer, and another that is stated for it and differs."""
        stated = [] if layer.tensor is None else [Alpha(layer.tensor, "tensor")]
        if self._config is not None:
            value = self._config.alpha(layer.component, layer.module, layer.rank)
            stated += [] if value is None else [Alpha(value, self._config.name)]
        training = self._of_training(layer)
        if training is not None:
            stated.append(training)
        if not stated:
            return Alpha(float(layer.rank), "rank"), None
        first, *others = stated
        return first, next((o for o in others if not self._agree(first, o, layer)), None)

    def hindrance(self, component: str) -> str | None:
        """Why the file says that its layers are none that klora reads, in one sentence."""
        return None if self._config is None else self._config.hindrance(component)

    def rank(self, component: str, module: str) -> int | None:
        """The rank that alpha is divided by where the tensors of a LoKr do not say it.

        PEFT states it; LyCORIS' scale is 1 there, but for rank-stabilised ones.
        """
        stated = None if self._config is None else self._config.rank(component, module)
        if stated is None and self._training.rank_stabilised:
            return self._training.rank
        return stated

    def is_dora(self, component: str) -> bool:
        """Whether the file says that its layers are DoRA's."""
        return self._config is not None and self._config.is_dora(component)

    def _of_training(self, layer: LayerScale) -> Alpha | None:
        if layer.whole or (self._training.by_kohya and not layer.by_kohya):
            return None
        value = self._training.stated(layer.rank, kernel=layer.kernel)
        name = CONV_ALPHA if layer.kernel else self._training.name
        return None if value is None else Alpha(value, name)

    def _agree(self, first: Alpha, other: Alpha, layer: LayerScale) -> bool:
        if math.isclose(first.value, other.value, rel_tol=_SAME):
            return True
        of_training = other.source == self._training.name
        return of_training and self._training.is_same_scale(
            first.value, layer.rank, kernel=layer.kernel
        )
