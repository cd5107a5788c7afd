"""A flat table of a catalogue's choices for other programs: 16 bits for each layer of each pair.

It is an approximation, because a breakpoint is rounded to a 65,000th of the progress; the catalogue
itself stays exact. A number says from which progress on the style acts alone:

    0                the style at every step
    1 to 65000       the content before n / 65000, then the style
    65001            the content at every step
    65535            no duel: one LoRA alone, zero deltas, a bias, or a layer without steps
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.tensor_file import write_tensors
from klora_runtime.catalogue.opened import OpenCatalogue
from klora_runtime.errors import ConfigError
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.crossings import NEVER
from klora_runtime.linking.entries import Pair

#: Parts of the progress.
PARTS = 65_000
ALWAYS, NO_DUEL = PARTS + 1, 65_535


def write_steps(catalogue: OpenCatalogue, path: Path, *, overwrite: bool) -> int:
    """Write the table as a safetensors file; return its size in bytes.

    Its tensor ``steps`` (pairs, layers) holds unsigned numbers of 16 bits, in the bytes of I16. Its
    metadata ``klora_steps`` names the pairs and the layers.

    Raises:
        ConfigError: the rule has no such choices, or switches more than once in a layer.
        KloraError: the file cannot be written.
    """
    terms = catalogue.document.terms
    if (
        terms.duel is None
        or terms.duel.inequality.pattern != "s"
        or terms.duel.inequality.alpha < 0
    ):
        raise ConfigError(
            "steps: expected a rule whose layers switch once, from content to style, such as klora "
            "with pattern s. Read the timelines of other rules from Catalogue.fusion."
        )
    names = [
        (facts.content, facts.style) for facts in catalogue.pairs() if facts.kind.refused is None
    ]
    layers = sorted({p.path for lora in catalogue.document.loras for p in lora.table.places})
    columns = {layer: number for number, layer in enumerate(layers)}
    steps = torch.full((len(names), len(layers)), NO_DUEL, dtype=torch.int32)
    for row, (content, style) in enumerate(names):
        for layer, value in _of_pair(catalogue.link(content, style)):
            steps[row, columns[layer]] = value
    data = torch.where(steps > 32_767, steps - 65_536, steps).to(torch.int16)
    facts = {"pairs": names, "layers": [".".join(layer) for layer in layers], "parts": PARTS}
    with replacing(path, overwrite=overwrite) as new:
        write_tensors(new, {"steps": data}, {"klora_steps": canonical_json(facts)})
        return new.stat().st_size


def _of_pair(pair: Pair) -> Iterator[tuple[tuple[str, str, str], int]]:
    """Yield each layer with a duel, and its number."""
    assert pair.fought is not None
    rows = zip(
        pair.meeting.shared,
        pair.fought.fought[0].tolist(),
        pair.fought.begins[0].tolist(),
        pair.fought.switches[0, :, 0].tolist(),
        strict=True,
    )
    for number, is_fought, begins, switch in rows:
        if is_fought and pair.meeting.weight_of[number] is None:
            value = 0
            if begins:
                value = ALWAYS if switch >= NEVER else min(max(round(switch * PARTS), 1), PARTS)
            yield pair.meeting.places[number].path, value
