"""DARE: each LoRA's numbers are dropped at random, the rest is rescaled, and the results are added.

Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
Free Lunch", ICML 2024, arXiv 2311.03099, section 3.2, with task arithmetic as the merge. For each
number of a layer and LoRAs t with deltas delta_t:

    m_t ~ Bernoulli(p),  merged = scale * sum over t of (1 - m_t) * delta_t / (1 - p)

The mean of many draws is the direct sum. A draw is noise of full rank around it, and the rank of
the slot cuts most of that noise off again; what the slot loses by that is recorded. The numbers m_t
come from the seed and the names of layer and slot alone, so they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from klora_compile.fields import Number, Whole, setting
from klora_compile.rules.kit.merging import Merging
from klora_compile.rules.kit.papers import Paper, preprint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Dropping(Merging):
    """The base of rules that drop numbers at random."""

    seed: int = field(
        default=0,
        metadata=setting("Seed of what is dropped.", Whole(0, 2**63 - 1)),
    )

    def drop_at_random(
        self, layer: str, slot: str, delta: torch.Tensor, probability: float | torch.Tensor
    ) -> torch.Tensor:
        """Return a delta with some numbers dropped, and the others over 1 - probability.

        Args:
            layer: name of the layer.
            slot: name of the LoRA.
            delta: (out, inner), float32.
            probability: that a number is dropped, in [0, 1): one for all, or a tensor like delta.
        """
        import torch

        from klora_compile.rules.kit.chance import chances

        kept = chances(self.seed, layer, slot, delta.shape) >= probability
        return torch.where(kept, delta / (1.0 - probability), 0.0).float()


@dataclass(frozen=True, kw_only=True)
class Dare(Dropping):
    """DARE (arXiv 2311.03099): the sum of deltas with dropped and rescaled numbers, in one slot."""

    name: ClassVar[str] = "dare"
    title: ClassVar[str] = "DARE"
    sentence: ClassVar[str] = (
        "All are merged to one: numbers of each are dropped at random, the others rescaled and "
        "added"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2311.03099",
            "yu2024dare",
            "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
            "Free Lunch",
            "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin",
        ),
    )

    drop: float = field(
        default=0.5,
        metadata=setting("Probability that a number is dropped.", Number(0.0, 0.999)),
    )

    def merge(self, layer: str, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        kept = [
            self.drop_at_random(layer, slot, delta, self.drop) for slot, delta in deltas.items()
        ]
        return sum(kept[1:], kept[0])
