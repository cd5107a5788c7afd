"""Light and dark maps: the colours of everything but the LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_runtime.artifact.palette import Rgb


@dataclass(frozen=True)
class Theme:
    """Colours of a map."""

    paper: str
    ink: str
    line: str
    """Of lines that mark a value."""
    faint: str
    """Of lines between blocks."""
    band: str
    """Of the range in which layers switch."""
    blank: Rgb
    """Where no LoRA acts; the colour of the paper."""

    def apply(self, axes: Any) -> None:
        """Colour the frame, the ticks and the background of matplotlib axes."""
        axes.set_facecolor(self.paper)
        axes.tick_params(colors=self.ink)
        for side in axes.spines.values():
            side.set_color(self.line)


THEMES: Mapping[str, Theme] = {
    "light": Theme("#ffffff", "#222222", "#999999", "#dddddd", "#eeeeee", (255, 255, 255)),
    "dark": Theme("#16181d", "#e4e4e4", "#7a7a7a", "#3a3d44", "#2a2d34", (22, 24, 29)),
}
