"""Checks of a catalogue: its numbers, its pairs linked again, and the files of its LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klora_compile.cataloguing.bulk import OnPairs, Wanted, link_all
from klora_compile.engines import Engine
from klora_runtime.catalogue.folder import LoraFolder
from klora_runtime.catalogue.opened import OpenCatalogue
from klora_runtime.errors import KloraError, shown


@dataclass(frozen=True)
class Checked:
    """What was checked."""

    loras: int
    pairs: int
    """Pairs that were linked again."""
    files: int
    """Files that were compared with their digests."""
    problems: tuple[str, ...]


def check(
    catalogue: OpenCatalogue,
    *,
    every: bool,
    folder: LoraFolder | None = None,
    engine: Engine | None = None,
    on_pairs: OnPairs | None = None,
) -> Checked:
    """Check a catalogue.

    Args:
        catalogue: an open catalogue, whose file breaks no rule of the format.
        every: link all pairs again, instead of some of each content.
        folder: where the files of its LoRAs are; None to leave them out.
        engine: where to link; None for this process.
        on_pairs: called after each content.
    """
    document = catalogue.document
    problems = []
    numbers = [catalogue.file.numbers(number) for number in range(len(document.loras))]
    wanted = list(_wanted(catalogue, every))
    stated = {(c, s): row for row, (c, s, _) in enumerate(catalogue.file.pairs.pairs.tolist())}
    held = catalogue.file.pairs
    for linked in link_all(
        document.terms, wanted, numbers, document.components, engine=engine, on_pairs=on_pairs
    ):
        own = zip(linked.styles, linked.gamma, linked.choices, strict=True)
        for style, gamma, choices in own:
            row = stated[linked.content, style]
            if bytes(held.choices[row].tolist()) != choices or held.gamma[row].tolist() != gamma:
                names = (shown(document.loras[i].name) for i in (linked.content, style))
                problems.append(f"{' in '.join(names)}: its choices differ when linked again")
    files = 0
    for lora in document.loras if folder is not None else ():
        for source in lora.sources.values():
            files += 1
            try:
                assert folder is not None
                folder.file(source)
            except KloraError as error:
                problems.append(str(error))
    pairs = sum(len(each.styles) for each in wanted)
    return Checked(len(numbers), pairs, files, tuple(problems))


def _wanted(catalogue: OpenCatalogue, every: bool) -> Iterator[Wanted]:
    """Yield the pairs to link again."""
    kinds = catalogue.document.kinds
    styles: dict[int, list[int]] = {}
    for content, style, kind in catalogue.file.pairs.pairs.tolist():
        if kinds[kind].refused is None:
            styles.setdefault(content, []).append(style)
    for place, (content, own) in enumerate(styles.items()):
        some = own if every else own[place % 7 :: 7][:8]
        if some:
            yield Wanted(content, tuple(some))
