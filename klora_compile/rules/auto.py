"""Auto: picks another rule for LoRAs by what is measured of them, without base model or picture.

The numbers are those of :class:`~klora_compile.rules.kit.picking.Together`. The first condition of
:data:`CONDITIONS` that holds decides; the artifact then states the picked rule, the numbers and the
reason. To change what is picked, change the table.

What is known, from klora's drawings and their judges: K-LoRA loses to the plain sum, NP-LoRA equals
it, and a stronger style beats it for subjects that were learnt in one look, but is not
told from it for others. So the sum is picked unless a number gives a reason against it. The limits
lie beyond what was judged, and are set from what the numbers mean:

* two LoRAs of one norm that are orthogonal make a sum of 1.41 times that norm, two equal ones make
  2. Pairs of a subject and a style of SD 1.5 and SD 2 made 1.00 to 1.30;
* on the same pairs, 0.1 to 4 % of the subject's energy was on inputs that the style uses, and 15 %
  between two styles. On 110 pairs of drawings it was 26 to 45 %, and there NP-LoRA did not gain
  more where more was shared. NP-LoRA takes effect on this share alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from klora_compile.rules.auto_strength import AutoStrength
from klora_compile.rules.direct import Direct
from klora_compile.rules.kit.picking import Pick, Picking, Together
from klora_compile.rules.np_lora import NpLora
from klora_compile.rules.rule import Rule
from klora_runtime.artifact.schedule import CONTENT, STYLE

#: A sum this many times as strong as the strongest LoRA alone may burn the picture.
_STRONG = 1.6

#: Share of the content's energy, beyond what chance gives, on inputs that the style uses.
_SHARED_INPUTS = 0.5


@dataclass(frozen=True)
class Condition:
    """A row of the table."""

    holds: Callable[[Together], bool]
    rule: Rule
    why: str
    """The reason as a part of a sentence, with the numbers in braces."""


#: The first one that holds decides; the last one always does.
CONDITIONS = (
    Condition(lambda m: len(m.slots) == 1, Direct(), "there is one LoRA"),
    Condition(lambda m: not m.layers, Direct(), "no two LoRAs change the same weight"),
    Condition(
        lambda m: m.growth > _STRONG,
        AutoStrength(),
        "the sum is {growth:.2f} times as strong as the strongest LoRA alone, which may burn the "
        "picture",
    ),
    Condition(
        lambda m: m.slots == (CONTENT, STYLE) and m.inputs - m.inputs_by_chance > _SHARED_INPUTS,
        NpLora(),
        "{inputs:.0%} of the content is on inputs that the style uses, {inputs_by_chance:.0%} "
        "would be by chance",
    ),
    Condition(
        lambda m: True,
        Direct(),
        "no number speaks against the plain sum",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Auto(Picking):
    """The plain sum, or another rule where numbers of the LoRAs give a reason."""

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "what the numbers of the LoRAs suggest"
    sentence: ClassVar[str] = (
        "Another rule is picked by what is measured of the LoRAs: nearly always their sum"
    )
    fates: ClassVar[Mapping[str, str]] = Direct.fates

    def pick(self, together: Together) -> Pick:
        found = next(each for each in CONDITIONS if each.holds(together))
        return Pick(found.rule, found.why.format_map(together.numbers()))

    def text(self) -> str:
        return "by what is measured"
