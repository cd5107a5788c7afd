"""The fusion of a pair whose factors are computed, which takes the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from klora_compile.compiler import compile_sources
from klora_compile.measuring.places import place_of
from klora_compile.reading.adapter import read_adapter
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.catalogue.document import CataloguedLora
from klora_runtime.catalogue.folder import LoraFolder
from klora_runtime.catalogue.fusing import source_name
from klora_runtime.linking.terms import Terms


def compiled(
    terms: Terms,
    loras: Mapping[str, CataloguedLora],
    folder: Path,
    base: str | PathLike[str] | None = None,
) -> Fusion:
    """Compile the LoRAs of a pair from their files.

    Args:
        terms: the terms of the catalogue.
        loras: slot -> LoRA.
        folder: where their files are.
        base: the base model, if a form needs its weights; see
            :attr:`~klora_compile.settings.read_options.ReadOptions.base`.

    Raises:
        KloraError: a file is missing, or cannot be read as it was profiled.
    """
    held = LoraFolder(folder)
    adapters = {
        source_name(slot, half): read_adapter(
            held.file(source), ReadOptions.from_notes(source.notes, base)
        )
        for slot, lora in loras.items()
        for half, source in lora.sources.items()
    }
    config = Config.from_parameters(terms.rule, terms.parameters)
    return compile_sources(adapters, config, device=place_of("auto"))
