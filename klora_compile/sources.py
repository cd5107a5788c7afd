"""The LoRAs of a fusion by slot: read together for compiling, or again for comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from klora_compile.planning.pairing import check_loras, check_slots
from klora_compile.reading.adapter import Adapter, OnModule, open_adapter, read_adapter
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.slots import in_order, role_of, slot_names
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import ALWAYS
from klora_runtime.errors import ConfigError, shown

#: A LoRA as a user gives it: a file, a folder, or an adapter.
Lora = str | os.PathLike[str] | Adapter


def by_slot(
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    always: Mapping[str, Lora] | None = None,
) -> dict[str, Lora]:
    """Return slot -> LoRA: contents first, each role in the given order.

    Args:
        always: slot -> LoRA, for those that always act.

    Raises:
        ConfigError: one of these has the name of a content or a style.
    """
    contents, styles = (
        [given] if isinstance(given, str | os.PathLike | Adapter) else list(given)
        for given in (content, style)
    )
    slots = slot_names(len(contents), len(styles))
    for name in always or {}:
        if role_of(name) != ALWAYS:
            raise ConfigError(
                f"always: {shown(name)} is the name of a LoRA that a rule schedules; take another "
                "one, such as turbo."
            )
    return {**dict(zip(slots, [*contents, *styles], strict=True)), **(always or {})}


def read_sources(
    loras: Mapping[str, Lora],
    config: Config,
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
) -> dict[str, Adapter]:
    """Read LoRAs after checking that each is readable and that they match each other.

    All headers are checked before any values are read.

    Args:
        loras: slot -> LoRA, see :func:`by_slot`.
        config: the rule and the shared settings.
        options: how to read files.
        on_module: called after each module.

    Returns:
        Slot -> adapter.

    Raises:
        ConfigError: see :func:`~klora_compile.planning.pairing.check_slots`.
        LoraError: a file cannot be read completely.
        PairingError: see :func:`~klora_compile.planning.pairing.check_loras`.
    """
    check_slots(tuple(loras), config.rule, config.settings)
    with ExitStack() as stack:
        opened = {
            slot: lora
            if isinstance(lora, Adapter)
            else stack.enter_context(open_adapter(lora, options))
            for slot, lora in loras.items()
        }
        check_loras({slot: each.survey for slot, each in opened.items()}, config.rule)
        return {
            slot: each if isinstance(each, Adapter) else each.read(on_module)
            for slot, each in opened.items()
        }


def read_again(
    fusion: Fusion, loras: Mapping[str, Lora], base: Path | None = None
) -> dict[str, Adapter]:
    """Read the LoRAs of a fusion with the options that it was compiled with.

    Args:
        fusion: a fusion, whose sources state the options.
        loras: slot -> LoRA.
        base: the base model, for LoRAs that need its weights.

    Returns:
        Slot -> adapter, in the order of the compilation.

    Raises:
        ConfigError: the fusion states reading options that are out of range.
        LoraError: a file cannot be read completely.
    """
    adapters = {}
    for slot in in_order(loras):
        lora, source = loras[slot], fusion.sources.get(slot)
        if not isinstance(lora, Adapter):
            notes = {} if source is None else source.notes
            lora = read_adapter(lora, ReadOptions.from_notes(notes, base))
        adapters[slot] = lora
    return adapters


def other_sources(fusion: Fusion, adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Yield one sentence for each LoRA that differs from the fusion's source."""
    for name in sorted(fusion.sources.keys() - adapters.keys()):
        yield f"sources.{name}: no LoRA was given for it"
    for name, adapter in adapters.items():
        source = fusion.sources.get(name)
        if source is None:
            yield f"sources: the artifact has no source {name}"
        elif source.sha256 != adapter.sha256:
            yield (
                f"sources.{name}: it was compiled from {shown(source.file)} with sha256 "
                f"{source.sha256}, {shown(adapter.survey.path)} has {adapter.sha256}"
            )
