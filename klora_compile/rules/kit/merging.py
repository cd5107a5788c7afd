"""Rules that merge LoRAs number by number to one slot, ``merged``, which acts instead of them.

The merged delta of a layer has no low rank. It is cut to the sum of the ranks of its LoRAs, or to
another rank, and the artifact records what that loses. Where only one LoRA has a layer, and in
biases, norms and text encoders, all act as in the direct sum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from klora_compile.fields import Number, Whole, setting
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import SUM, Choice, total
from klora_compile.rules.rule import Derived, LayerOfSlot, Rule
from klora_runtime.artifact.schedule import MERGED, STEPLESS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Merging(Rule):
    """The base of rules that merge LoRAs to one slot."""

    fates: ClassVar[Mapping[str, str]] = {"merged": "what its LoRAs were merged to", **SUM}
    whole: ClassVar[bool] = True

    scale: float = field(
        default=1.0,
        metadata=setting("Factor on the merged deltas (lambda).", Number(-100.0, 100.0)),
    )
    rank: int | None = field(
        default=None,
        metadata=setting(
            "Rank of the merged deltas.", Whole(1), default="the sum of the LoRAs' ranks"
        ),
    )

    @abstractmethod
    def merge(self, layer: str, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the merged delta, without :attr:`scale`.

        Args:
            layer: name of the layer.
            deltas: slot -> delta with its scaling and weight, (out, inner), float32; two or more,
                each not zero.
        """

    def derives(self, slots: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        return {MERGED: tuple(slots)}

    def derivation(self, slot: str) -> str | None:
        if slot != MERGED:
            return None
        return f"denoiser merged by {self.title}: {self._words('as the LoRAs together')}"

    def derive(self, slot: str, layers: Mapping[str, LayerOfSlot]) -> Derived | None:
        import torch

        from klora_compile.rules.kit.truncating import truncated
        from klora_runtime.artifact.delta import LowRank

        first = next(iter(layers.values()))
        if first.parameter != "weight" or len(first.shape) < 2 or first.component in STEPLESS:
            return None
        deltas, rank, inputs = {}, 0, []
        for name, layer in layers.items():
            if not layer.scaling * layer.delta.norm():
                continue
            deltas[name] = layer.scaling * layer.delta.matrix(torch.float32)
            if isinstance(layer.delta, LowRank):
                inputs.append(layer.delta.flattened().down.float())
                rank += layer.delta.rank
            else:
                rank += layer.rank
        if len(deltas) < 2:
            return None
        merged = self.scale * self.merge(first.name, deltas)
        start = torch.cat(inputs) if inputs else merged[:0]
        return Derived(*truncated(merged, self.rank or rank, start, first.shape))

    def choose(self, layer: LayerNumbers, derived: Mapping[str, Any]) -> Choice:
        merged = layer.made.get(MERGED)
        if merged is None:
            return total(layer.present)
        acting = {} if merged.is_zero else {MERGED: 1.0}
        return Choice("merged", ((0.0, acting),))

    def text(self) -> str:
        return self._words("of all together")

    def _words(self, sum_of_ranks: str) -> str:
        words = {name: value for name, value in self.parameters().items() if name != "rank"}
        rank = sum_of_ranks if self.rank is None else str(self.rank)
        return ", ".join([*(f"{name} {value!r}" for name, value in words.items()), f"rank {rank}"])


def elected(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of those numbers, place by place, that have the sign of their sum.

    Zeros do not count; without a number of that sign the mean is 0.

    Args:
        deltas: two or more of one shape.
    """
    import torch

    sign = sum(deltas[1:], deltas[0]).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in deltas:
        size = (sign * delta).clamp_min(0.0)  # 0 where the sign is another one
        total += size
        count += size > 0.0
    return sign * total / count.clamp_min(1.0)
