"""The result of an export and its loss, for a terminal."""

from __future__ import annotations

from klora_compile.export.averaging import Loss
from klora_compile.export.settings import Keys
from klora_compile.export.writing import Exported, ExportedPhases
from klora_compile.report.summary import bytes_text
from klora_runtime.errors import shown

#: Keys -> who reads them. In PEFT's keys ComfyUI 0.28 took half of a UNet, and of some models none.
_READERS: dict[Keys, str] = {
    "kohya": "kohya's, for ComfyUI; for Forge and A1111 where they know the base model",
    "peft": "PEFT's, for diffusers alone; ComfyUI, Forge and A1111 leave out many layers or all",
}
_WHEN = (
    "schedule.json: in ComfyUI take its ksampler_advanced; start_percent is a step late under "
    "sgm_uniform on flow models, and wrong under beta and karras"
)


def static_lines(lora: Exported) -> list[tuple[str, str]]:
    """Return rows of (label, text) for one LoRA."""
    rows = [("layers", f"{lora.layers}, rank {lora.rank}, {lora.dtype}")]
    rows.append(
        ("schedule", f"the average differs from the schedule by {loss_text(lora.schedule)}")
    )
    if lora.truncation is not None:
        rows.append(("rank", f"the cut loses {loss_text(lora.truncation)}"))
    return [*rows, _readers(lora), ("bytes", bytes_text(lora.nbytes))]


def phase_lines(phases: ExportedPhases) -> list[tuple[str, str]]:
    """Return rows of (label, text) for the LoRAs of all phases."""
    first = phases.loras[0]
    rows = [("layers", f"{first.layers}, rank {first.rank}, {first.dtype}, in {first.file}")]
    rows.append(
        ("schedule", f"the averages differ from the schedule by {loss_text(phases.schedule)}")
    )
    for position, lora in enumerate(phases.loras):
        where = f"{lora.window.start:.4g} to {lora.window.stop:.4g}"
        text = f"{where}: differs by {loss_text(lora.schedule)}"
        if lora.truncation is not None:
            text += f"; cut off: {lora.truncation.total:.2%}"
        rows.append(("progress" if position == 0 else "", text))
    nbytes = sum(lora.nbytes for lora in phases.loras)
    return [*rows, _readers(first), ("when", _WHEN), ("bytes", bytes_text(nbytes))]


def _readers(lora: Exported) -> tuple[str, str]:
    """Return the row that says which tools read the keys."""
    return ("keys", _READERS[lora.keys])


def loss_text(loss: Loss) -> str:
    """Return a loss in percent, with the layer that loses most."""
    where = "" if loss.layer is None else f" (most, {loss.worst:.2%}, in {shown(loss.layer)})"
    return f"{loss.total:.2%}{where}"
