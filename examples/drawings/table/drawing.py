"""A cell, drawn and judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drawings.base.flow import latents
from drawings.judges.fitted import Judges
from drawings.judges.paired import paired_flow_loss
from drawings.table.kept import Verdicts
from drawings.table.pictures import folder_of, keep
from drawings.table.rows import Cell, Row, files
from klora_compile.judging.own_pictures import harmonic_mean


@dataclass(frozen=True)
class Studio:
    """Draws cells with one base and judges them."""

    pipe: Any
    judges: Judges
    loras: Path
    """Folder of the LoRAs of one regime."""
    pictures: Path
    """Folder that keeps every picture, for sheets and the blind test."""
    seeds: int
    steps: int
    guidance: float

    @torch.no_grad()
    def verdicts(self, row: Row, cell: Cell, truth: Tensor) -> Verdicts:
        """Draw a cell with every seed, and judge it against the true drawing and its style.

        Args:
            truth: (3, height, width) in [-1, 1].
        """
        with row.act(self.pipe, files(self.loras, cell)):
            drawn = self.drawn(cell)
            clean = latents(self.pipe, truth[None])
            flow = paired_flow_loss(self.pipe, clean, cell.prompt)
        keep(drawn, folder_of(self.pictures, row.name) / f"{cell.subject}-{cell.style}.png")
        judged = self.judged(drawn, cell, truth)
        return [{**verdict, "flow": round(flow, 6)} for verdict in judged]

    @torch.no_grad()
    def drawn(self, cell: Cell) -> Tensor:
        """Draw a cell with every seed, with the LoRAs that act now: (seeds, 3, height, width)."""
        pictures: Tensor = self.pipe(
            [cell.prompt] * self.seeds,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(self.seeds)],
            output_type="pt",
        ).images.float()
        return pictures

    @torch.no_grad()
    def judged(self, drawn: Tensor, cell: Cell, truth: Tensor) -> Verdicts:
        """Judge pictures in [0, 1] against the true drawing, in [-1, 1], and its style."""
        true = truth[None] / 2 + 0.5
        subject = self.judges.subject(drawn) @ self.judges.subject(true)[0]
        style = self.judges.style(drawn) @ self.judges.looks[cell.style]
        distance = self.judges.distance(drawn, true.expand_as(drawn))
        return [
            {
                "subject": round(s, 5),
                "style": round(t, 5),
                "both": round(harmonic_mean(s, t), 5),
                "distance": round(d, 5),
            }
            for s, t, d in zip(subject.tolist(), style.tolist(), distance.tolist(), strict=True)
        ]
