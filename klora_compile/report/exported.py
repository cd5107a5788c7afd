"""The result of an export and its loss, for a terminal."""

from __future__ import annotations

from klora_compile.export.averaging import Loss
from klora_compile.export.writing import Exported, ExportedPhases
from klora_compile.report.summary import bytes_text
from klora_runtime.errors import shown


def static_lines(lora: Exported) -> list[tuple[str, str]]:
    """Return rows of (label, text) for one LoRA."""
    rows = [("layers", f"{lora.layers}, rank {lora.rank}, {lora.dtype}")]
    rows.append(
        ("schedule", f"the average differs from the schedule by {loss_text(lora.schedule)}")
    )
    if lora.truncation is not None:
        rows.append(("rank", f"the cut loses {loss_text(lora.truncation)}"))
    return [*rows, ("bytes", bytes_text(lora.nbytes))]


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
    return [*rows, ("bytes", bytes_text(sum(lora.nbytes for lora in phases.loras)))]


def loss_text(loss: Loss) -> str:
    """Return a loss in percent, with the layer that loses most."""
    where = "" if loss.layer is None else f" (most, {loss.worst:.2%}, in {shown(loss.layer)})"
    return f"{loss.total:.2%}{where}"
