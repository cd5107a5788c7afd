"""Compilation of LoRA files to a fusion with a rule that a base model calibrates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from klora_compile.calibrating.calibrate import OnPart, compile_calibrated
from klora_compile.calibrating.pictures import OwnPictures
from klora_compile.measuring.statistics import OnLayer
from klora_compile.rules.lookup import RULE_OF_A_MODEL, RULES
from klora_compile.rules.rule import Rule
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_compile.settings.shared import Settings
from klora_compile.sources import Lora, by_source, read_sources
from klora_runtime.artifact.fusion import Fusion


def calibrate_fusion(
    pipe: Any,
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    rule: Rule | None = None,
    settings: Settings | None = None,
    *,
    own: OwnPictures | None = None,
    always: Mapping[str, Lora] | None = None,
    options: ReadOptions | None = None,
    checkpoint: Path | None = None,
    on_part: OnPart | None = None,
    on_layer: OnLayer | None = None,
    weight_names: Mapping[str, str] | None = None,
) -> Fusion:
    """Compile LoRAs with a rule that a base model calibrates.

    The pipeline draws a few pictures with each LoRA alone, which are never decoded, and is as
    before at the end. The artifact states prompts, seeds, device, version of torch and number of
    threads; the same ones give the same fusion, to the bit.

    Args:
        pipe: a diffusers pipeline of the base model, without a fusion or adapters.
        content: the LoRA of a subject, or several; this and all that is not said here as
            :func:`~klora_compile.compiler.compile_fusion` takes it.
        style: the LoRA of a style, or several.
        rule: a rule that a base model calibrates, by default SSR-Merge.
        settings: the settings that all rules share.
        own: prompts and settings of the pictures; by default the LoRAs' trigger words.
        always: name -> a LoRA that acts beside the others, also in the pictures of each.
        options: how to read files.
        checkpoint: a file that keeps the state, so that a calibration that was stopped goes on. It
            is removed at the end.
        on_part: called after each picture and each update with what was done, the number of parts
            so far and their total.
        on_layer: called after each layer that is measured.
        weight_names: slot -> the file in a repository of the Hub that has several.

    Raises:
        ConfigError: the rule needs no base model, a LoRA has neither prompt nor trigger words, or
            see :func:`~klora_compile.compiler.compile_fusion`.
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models, or share no denoiser layer.
        KloraError: the LoRAs do not fit the pipeline, it carries a fusion, it failed, or the
            checkpoint cannot be written.
    """
    loras = by_source(content, style, always)
    config = Config.of(RULES[RULE_OF_A_MODEL]() if rule is None else rule, settings)
    return compile_calibrated(
        pipe,
        read_sources(loras, config, options, weight_names=weight_names),
        config,
        own or OwnPictures(),
        checkpoint=checkpoint,
        on_part=on_part,
        on_layer=on_layer,
    )
