"""An artifact with every form of factors: as they are, in few bits, and in another file."""

from __future__ import annotations

from dataclasses import replace

from support.golden_fusion import golden_fusion
from support.lora_files import random_pair

from klora_compile.storing.compress import compress
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import Reference


def fusion_of_every_form() -> Fusion:
    """The golden one; of the layer that switches, one slot is in few bits and one elsewhere, and
    after it comes a dense one in few bits."""
    golden = golden_fusion()
    index = next(i for i, e in enumerate(golden.entries) if e.fate == "switching")
    down, up = random_pair(70, 90, 3)
    delta = Stored(1.0, Dense(up @ down))
    pair = replace(
        golden.entries[index], shape=(70, 90), factors={"content": Stored(0.5, LowRank(down, up))}
    )
    dense = replace(pair, module=f"{pair.module}.x", factors={"content": delta, "style": delta})
    pair, dense = compress(replace(golden, entries=(pair, dense)), 0.01).entries
    elsewhere = Reference(0.5, "style", "a.down", "a.up", ((0, 30), (10, 50)))
    pair = replace(pair, references={"style": elsewhere})
    entries = (*golden.entries[:index], pair, dense, *golden.entries[index + 1 :])
    return replace(golden, entries=entries)
