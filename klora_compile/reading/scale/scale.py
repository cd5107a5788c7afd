"""The source of a layer's alpha; alpha / rank multiplies its delta.

There is one rule. These sources may state an alpha, and the first one that does is used:

1. the layer's own alpha tensor (``tensor``);
2. the configuration that PEFT and diffusers write: ``lora_adapter_metadata``, finetrainers'
   ``lora_config``, or the JSON beside the file;
3. an entry of the metadata named ``alpha``, ``lora_alpha`` or ``network_alpha``, alone or after its
   last dot;
4. kohya's record of the whole training, ``ss_network_alpha``, or for convolutions larger than 1x1
   ``conv_alpha`` in ``ss_network_args``;
5. none: alpha equals the rank (``rank``), so the delta is up @ down.

If two of the first three state different numbers for one layer, an error names both, unless the
option asks for the first. A configuration or an entry means alpha / r. If no tensor states an alpha
and r is not the rank of the tensors, the file is refused, as in PEFT.

kohya's record often belongs to another file: converters, extractions, merges and DyLoRA keep or
copy it. So a tensor always overrides it. It applies only to layers in kohya's spelling, because
converters to other names fold alpha into the weights. It is ignored if the tensors of other layers
contradict it, if layers have their own settings (``block_alphas`` and the like), if they were
resized, or if it is 0, which means the rank. Forms without a rank have no alpha; LyCORIS writes a
meaningless one for a LoKr of two full matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from klora_compile.reading.forms.parts import Settings
from klora_compile.reading.scale.entries import entries_of
from klora_compile.reading.scale.peft_config import AdapterConfig
from klora_compile.reading.scale.training import (
    CONV_ALPHA,
    NETWORK_ALPHA,
    RS_LORA,
    SPLIT_QKV,
    Training,
    training_of,
)

#: Metadata keys with a configuration: diffusers', finetrainers'.
CONFIG_KEYS = ("lora_adapter_metadata", "lora_config")

#: The sources in kohya's record of the training.
RECORD = (NETWORK_ALPHA, CONV_ALPHA)

#: Least plausible alpha other than 0.
MIN_ALPHA = 1e-12

#: Relative distance at which numbers count as equal: bfloat16 has eight bits.
_SAME = 2.0**-8


class Alpha(NamedTuple):
    """An alpha and its source."""

    value: float
    source: str


class LayerScale(NamedTuple):
    """The facts about a layer that its scale depends on."""

    component: str
    module: str
    """Module path in the file."""
    rank: int
    """Declared rank."""
    kernel: bool
    """Whether it is a convolution larger than 1x1."""
    by_kohya: bool
    """Whether it is in kohya's spelling."""
    whole: bool
    """Whether it is a LoKr without a factored matrix."""
    root_is_folded: bool
    """See :attr:`~klora_compile.reading.forms.parts.Form.root_is_folded`."""
    tensor: float | None
    """Value of its alpha tensor, if there is one."""


class Scales:
    """The statements of a file about alphas.

    Args:
        metadata: the safetensors metadata.
        config: text and name of the PEFT configuration beside the file; None if there is none.
        where: name of the file in errors.

    Raises:
        LoraError: a statement cannot be read, an alpha is not a number, or a pattern is not a
            module name.
    """

    def __init__(
        self, metadata: Mapping[str, str], config: tuple[str, str] | None, where: str
    ) -> None:
        texts = [(metadata[key], key) for key in CONFIG_KEYS if key in metadata]
        texts += [] if config is None else [config]
        self._configs = [AdapterConfig(*text, where) for text in texts]
        self._entries = entries_of(metadata, where)
        self._metadata, self._where = metadata, where

    def alpha(
        self, layer: LayerScale, *, is_record_stale: bool = False
    ) -> tuple[Alpha, Alpha | None]:
        """Return the alpha of a layer, and a different one that another source states, if any.

        Args:
            is_record_stale: see :meth:`is_contradicted`.
        """
        stated = [] if layer.tensor is None else [self._of_tensor(layer, layer.tensor)]
        stated += self._of_configs(layer)
        stated += self._of_entries(layer)
        record = None if layer.tensor is not None or is_record_stale else self._of_record(layer)
        if not stated:
            return record or Alpha(float(layer.rank), "rank"), None
        first, *others = stated
        differing = [other for other in others if not _is_same(first.value, other.value)]
        if record is not None and not self._agrees(first.value, record, layer):
            differing.append(record)
        return first, next(iter(differing), None)

    def is_contradicted(self, layer: LayerScale) -> bool:
        """Return whether a layer's tensor contradicts kohya's record, which is then stale."""
        if layer.tensor is None:
            return False
        record = self._of_record(layer)
        alpha = self._of_tensor(layer, layer.tensor).value
        return record is not None and not self._agrees(alpha, record, layer)

    def rank_problem(self, layer: LayerScale) -> str | None:
        """Return the problem of a stated rank that divides alpha but is not the tensors' rank."""
        if layer.tensor is not None:
            return None
        ranks = [(c.rank(layer.component, layer.module), c.name) for c in self._configs]
        ranks += [(e.rank, e.key) for e in self._entries if e.is_for(layer.component, layer.module)]
        wrong = ((rank, name) for rank, name in ranks if rank not in (None, layer.rank))
        return next(
            (
                f"its rank is {layer.rank} by its tensors and {rank} by {name}; save it again with "
                "the trainer that wrote it"
                for rank, name in wrong
            ),
            None,
        )

    def hindrance(self, component: str) -> str | None:
        """Return why klora cannot read the file's layers, in one sentence; None if it can."""
        found = (config.hindrance(component) for config in self._configs)
        return next((hindrance for hindrance in found if hindrance is not None), None)

    def rank(self, component: str, module: str) -> int | None:
        """Return the rank that alpha is divided by if the tensors of a LoKr do not show it.

        PEFT states it; LyCORIS' scale is then 1, except with rank stabilisation.
        """
        ranks = (c.rank(component, module) for c in self._configs if c.is_lokr(component))
        stated = next((rank for rank in ranks if rank is not None), None)
        if stated is None and self._training.rank_stabilised:
            return self._training.rank
        return stated

    def settings(self, component: str) -> Settings:
        """Return PEFT's configuration of a component; empty if the file has none."""
        found: dict[str, Any] = {}
        for config in reversed(self._configs):
            found |= config.settings(component)
        return found

    def is_dora(self, component: str) -> bool:
        """Return whether the file says that its layers are DoRA's."""
        return any(config.is_dora(component) for config in self._configs)

    @cached_property
    def _training(self) -> Training:
        return training_of(self._metadata, self._where)

    def _of_tensor(self, layer: LayerScale, alpha: float) -> Alpha:
        args = self._metadata.get("ss_network_args", "") if layer.by_kohya else ""
        if not layer.root_is_folded and RS_LORA in args and self._training.rank_stabilised:
            return Alpha(
                alpha * math.sqrt(layer.rank), f"tensor, by the root of the rank ({RS_LORA})"
            )
        if SPLIT_QKV not in args:
            return Alpha(alpha, "tensor")  # a broken record does not matter
        pairs = self._training.pairs(layer.module, layer.rank, alpha)
        if pairs == 1:
            return Alpha(alpha, "tensor")
        return Alpha(pairs * alpha, f"tensor, times the {pairs} pairs of {SPLIT_QKV}")

    def _of_configs(self, layer: LayerScale) -> Iterator[Alpha]:
        for config in self._configs:
            value = config.alpha(layer.component, layer.module, layer.rank)
            if value is not None:
                yield Alpha(value, config.name)

    def _of_entries(self, layer: LayerScale) -> Iterator[Alpha]:
        for entry in () if layer.whole else self._entries:
            if entry.is_for(layer.component, layer.module):
                yield Alpha(entry.alpha * layer.rank / (entry.rank or layer.rank), entry.key)

    def _of_record(self, layer: LayerScale) -> Alpha | None:
        if layer.whole or not layer.by_kohya:
            return None
        value = self._training.stated(layer.rank, kernel=layer.kernel)
        if value is None:
            return None
        pairs = self._training.pairs(layer.module, layer.rank, value)
        name = CONV_ALPHA if layer.kernel else NETWORK_ALPHA
        return Alpha(pairs * value, name)

    def _agrees(self, alpha: float, record: Alpha, layer: LayerScale) -> bool:
        return _is_same(alpha, record.value) or self._training.is_same_scale(
            alpha, layer.rank, kernel=layer.kernel
        )


def _is_same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_SAME)
