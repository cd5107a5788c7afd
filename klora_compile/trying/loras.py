"""Reading of the LoRAs that are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from klora_compile.measured import MeasuredLoras
from klora_compile.measuring.places import place_of
from klora_compile.profiles.store import CACHE_BYTES, Store
from klora_compile.reading.adapter import OnModule
from klora_compile.rules.lookup import RULE_OF_ONE, RULES
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.sources import Lora, by_source, read_sources

#: The rule that every trial is compared with: the plain sum, which takes any LoRAs.
PLAIN_SUM = RULE_OF_ONE


def loras_to_try(
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    *,
    always: Mapping[str, Lora] | None = None,
    options: ReadOptions | None = None,
    device: str = "auto",
    cache: Path | None = None,
    on_module: OnModule | None = None,
) -> MeasuredLoras:
    """Read the LoRAs of a fusion whose settings are still open.

    Args:
        content: see :func:`~klora_compile.compiler.compile_fusion`.
        style: see there.
        always: see there.
        options: how to read files.
        device: where to measure.
        cache: a folder that keeps statistics; None to keep nothing on disk.
        on_module: called after each module that was read.

    Raises:
        ConfigError: the device is unknown.
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models.
        KloraError: the Hub does not give a file.
    """
    sources, where = by_source(content, style, always), place_of(device)
    adapters = read_sources(sources, Config(RULES[PLAIN_SUM]()), options, on_module=on_module)
    store = None if cache is None else Store(cache, limit=CACHE_BYTES)
    return MeasuredLoras(adapters, device=where, store=store)
