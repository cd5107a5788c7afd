"""Fit: a coefficient per layer, phase and LoRA, fitted so that each LoRA keeps its own pictures.

After ZipLoRA (Shah et al., arXiv 2311.13600), which fits a coefficient per column of each LoRA so
that the fusion predicts, for each LoRA's prompt, what that LoRA predicts alone. Differences: the
pictures are the LoRAs' own, made by the base model while it is compiled; a coefficient is per layer
and phase of the sampling, so the fusion costs nothing more while sampling; and instead of the
penalty on the overlap of columns, ``hold`` keeps coefficients near 1, the plain sum.

With f the denoiser's prediction, over calls of it in the sampling with LoRA i alone:

    loss = sum over i of mean |f_fused - f_i|^2 / mean |f_base - f_i|^2 + hold * mean (c - 1)^2

The content's own pictures show its own look too, which the style shall replace. ``content_until``
says up to which progress they are matched: the shape of a picture is made early, its look late.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from klora_compile.fields import Number, Whole, setting
from klora_compile.rules.groups import Groups
from klora_compile.rules.kit.calibrated import Coefficients, Descent, Fitting
from klora_compile.rules.kit.papers import Paper, preprint
from klora_compile.rules.rule import Rule
from klora_runtime.artifact.schedule import CONTENT

#: Digits of a coefficient that an artifact states.
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Fitted(Fitting):
    """Coefficients by layer and phase that keep each LoRA's own pictures (after ZipLoRA)."""

    name: ClassVar[str] = "fit"
    title: ClassVar[str] = "fitted weights"
    sentence: ClassVar[str] = (
        "Each has its own weight by layer and phase, fitted so that a base model predicts with all "
        "of them what it predicts with each alone"
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        preprint(
            "2311.13600",
            "shah2023ziplora",
            "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs",
            "Shah, Viraj and Ruiz, Nataniel and Cole, Forrester and Lu, Erika and "
            "Lazebnik, Svetlana and Li, Yuanzhen and Jampani, Varun",
        ),
    )
    fates = Groups.fates

    phases: int = field(
        default=3,
        metadata=setting("Equal parts of the sampling with their own weights.", Whole(1, 16)),
    )
    updates: int = field(
        default=120, metadata=setting("Updates of the weights of each phase.", Whole(1, 100_000))
    )
    rate: float = field(
        default=0.05,
        metadata=setting("Learning rate at the start; it falls to 0.", Number(1e-6, 10)),
    )
    hold: float = field(
        default=0.1, metadata=setting("How strongly weights are held near 1.", Number(0, 1e6))
    )
    content_until: float = field(
        default=1.0,
        metadata=setting(
            "Progress up to which the content's own pictures are matched; from there on only those "
            "of the style.",
            Number(0, 1),
        ),
    )

    @property
    def descent(self) -> Descent:
        until = {CONTENT: self.content_until}
        return Descent(self.phases, self.updates, self.rate, self.hold, until)

    def scheduled(self, coefficients: Coefficients) -> Rule:
        """Return the rule with a row per LoRA and layer; rows at 1 are left out."""
        table = {}
        for slot, layers in coefficients.items():
            for layer, values in layers.items():
                stated = [round(float(value), _DIGITS) for value in values]
                if any(value != 1.0 for value in stated):
                    points = tuple((i / len(stated), value) for i, value in enumerate(stated))
                    table[f"{slot} {layer}"] = points
        return Groups(table=table)

    def text(self) -> str:
        return f"{self.phases} phases, {self.updates} updates"
