"""NP-LoRA, then K-LoRA: the choice between the projected content and the style.

The content is projected as :mod:`klora_compile.rules.np_lora` says, and the choice in each layer is
that of :mod:`klora_compile.rules.klora`, with the projected content's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klora_compile.rules.kit.papers import Paper
from klora_compile.rules.klora import Klora
from klora_compile.rules.np_lora import NpLora, Projecting


@dataclass(frozen=True, kw_only=True)
class NpKlora(Projecting, Klora):
    """K-LoRA's choice between the projected content and the style; settings of both rules."""

    name: ClassVar[str] = "np+klora"
    title: ClassVar[str] = f"{NpLora.title} and {Klora.title}"
    sentence: ClassVar[str] = (
        f"The subject keeps off the inputs that the style uses. {Klora.sentence}"
    )
    papers: ClassVar[tuple[Paper, ...]] = (*NpLora.papers, *Klora.papers)

    def text(self) -> str:
        return f"mu {self.mu:g}, {super().text()}"
