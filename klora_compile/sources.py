"""The LoRAs of a fusion, opened together: all headers are checked before any number is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from klora_compile.planning.pairing import check_loras
from klora_compile.reading.adapter import Adapter, OnModule, open_adapter
from klora_compile.reading.ahead import ReadAhead
from klora_compile.rules.rule import Rule
from klora_compile.settings.read_options import ReadOptions

#: A LoRA as a user names it: a file, a folder, or one that was read already.
Lora = str | os.PathLike[str] | Adapter


@contextmanager
def open_sources(
    loras: Mapping[str, Lora],
    rule: Rule,
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
) -> Iterator[dict[str, Adapter]]:
    """Open LoRAs and see that each can be read and that they belong together.

    Those that lie as they are in their files are read ahead of whoever uses them, while the context
    is open; the others are computed before it begins.

    Args:
        loras: slot -> LoRA.
        rule: what fuses them.
        options: how to read files.
        on_module: called after each module that is computed.

    Yields:
        Slot -> adapter; see :class:`~klora_compile.reading.arriving.ArrivingLayers`.

    Raises:
        LoraError: a file cannot be read completely; what its numbers show is raised where they are
            asked for.
        PairingError: see :func:`~klora_compile.planning.pairing.check_loras`.
    """
    with ExitStack() as stack:
        opened = {
            slot: lora
            if isinstance(lora, Adapter)
            else stack.enter_context(open_adapter(lora, options))
            for slot, lora in loras.items()
        }
        check_loras(opened, rule)
        ahead = stack.enter_context(ReadAhead())
        adapters = {}
        for slot, each in opened.items():
            if isinstance(each, Adapter):
                adapters[slot] = each
            elif each.lies_as_it_is:
                adapters[slot] = ahead.adapter(each)
            else:
                adapters[slot] = each.read(on_module)
        yield adapters
