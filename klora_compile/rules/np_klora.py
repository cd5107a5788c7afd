"""NP-LoRA, then K-LoRA: a choice between the projected content and the style.

The content is projected as in :mod:`klora_compile.rules.np_lora`; the choice in each layer is that
of :mod:`klora_compile.rules.klora` with the numbers of the projected content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klora_compile.rules.kit.papers import Paper
from klora_compile.rules.klora import Klora
from klora_compile.rules.np_lora import NpLora, Projecting


@dataclass(frozen=True, kw_only=True)
class NpKlora(Projecting, Klora):
    """K-LoRA's choice between the projected content and the style, with both rules' settings."""

    name: ClassVar[str] = "np+klora"
    title: ClassVar[str] = f"{NpLora.title} and {Klora.title}"
    sentence: ClassVar[str] = (
        f"The subject keeps off the inputs that the style uses. {Klora.sentence}"
    )
    linkable: ClassVar[bool] = False
    papers: ClassVar[tuple[Paper, ...]] = (*NpLora.papers, *Klora.papers)

    def text(self) -> str:
        return f"mu {self.mu:g}, {super().text()}"
