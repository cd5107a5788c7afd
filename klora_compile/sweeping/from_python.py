"""Sweeps from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klora_compile.rules.lookup import usual_rule
from klora_compile.slots import scheduled, slots_of
from klora_compile.sources import Lora
from klora_compile.sweeping.axes import axes_of
from klora_compile.sweeping.grid import grid_of
from klora_compile.sweeping.result import OnPicture, Sweep
from klora_compile.trying.names import RULE


def sweep(
    pipe: Any,
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    axes: Mapping[str, Iterable[Any]] | None = None,
    *,
    prompt: str | None = None,
    settings: Mapping[str, Any] | None = None,
    always: Mapping[str, Lora] | None = None,
    folder: str | Path | None = None,
    mode: str = "auto",
    device: str = "auto",
    on_picture: OnPicture | None = None,
) -> Sweep:
    """Make a picture for each combination of settings, and the plain sum's beside them.

    LoRAs are read and measured once. Between cells the pipeline's fusion is swapped; at the end the
    pipeline is bare again. A cell that fails says why, and the others go on.

    Args:
        pipe: a diffusers pipeline.
        content: the LoRA of a subject, or several; see :func:`~klora_compile.compile_fusion`.
        style: the LoRA of a style, or several.
        axes: one to three settings with their values, such as ``{"bias": [0, 0.3], "weight.style":
            [0.6, 1], "steps": [4, 20]}``: columns, rows, sheets. ``cells`` is a list of mappings
            with settings each. Names are those of the options of ``klora sweep``, with the LoRA
            behind a dot.
        prompt: what all cells show, unless ``prompt`` is an axis.
        settings: settings of all cells, by name.
        always: name -> a LoRA that acts beside the others at every step.
        folder: keeps each picture as it comes; a later sweep takes over those that it shares.
        mode: see :func:`~klora_runtime.apply_fusion`.
        device: where to measure.
        on_picture: called before each picture that is made, with its name and how many remain.

    Returns:
        The sweep, with pictures and settings of all cells.

    Raises:
        ConfigError: a setting is unknown, out of its range, or acts in no cell.
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models.
        KloraError: the folder holds pictures of other inputs, or every cell failed.
    """
    from klora_compile.sweeping.run import How, swept
    from klora_compile.trying.loras import loras_to_try

    common = {**(settings or {}), **({} if prompt is None else {"prompt": prompt})}
    loras = loras_to_try(content, style, always=always, device=device)
    count = len(scheduled(slots_of(loras.adapters)))
    grid = grid_of(axes_of(axes or {}), {RULE: usual_rule(count), **common})
    how = How(None if folder is None else Path(folder), mode)
    return swept(pipe, loras, grid, how, on_picture)
