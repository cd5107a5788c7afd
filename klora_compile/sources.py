"""The LoRAs of a fusion, read together: all headers are checked before any number is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

from klora_compile.planning.pairing import check_loras
from klora_compile.reading.adapter import Adapter, OnModule, open_adapter
from klora_compile.rules.rule import Rule
from klora_compile.settings.read_options import ReadOptions

#: A LoRA as a user names it: a file, a folder, or one that was read already.
Lora = str | os.PathLike[str] | Adapter


def read_sources(
    loras: Mapping[str, Lora],
    rule: Rule,
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
) -> dict[str, Adapter]:
    """Read LoRAs, once it is seen that each can be read and that they belong together.

    Args:
        loras: slot -> LoRA.
        rule: what fuses them.
        options: how to read files.
        on_module: called after each module.

    Returns:
        Slot -> adapter.

    Raises:
        LoraError: a file cannot be read completely.
        PairingError: see :func:`~klora_compile.planning.pairing.check_loras`.
    """
    with ExitStack() as stack:
        opened = {
            slot: lora
            if isinstance(lora, Adapter)
            else stack.enter_context(open_adapter(lora, options))
            for slot, lora in loras.items()
        }
        check_loras({slot: each.survey for slot, each in opened.items()}, rule)
        return {
            slot: each if isinstance(each, Adapter) else each.read(on_module)
            for slot, each in opened.items()
        }
