"""A training's folder: checkpoints that a kill cannot tear, and a log of losses."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: An object with ``state_dict`` and ``load_state_dict``.
Keeper = Any


@dataclass
class Progress:
    """The state of a training, kept on disk.

    The state of the random numbers is kept too. So a training that was stopped ends in the same
    weights as one that was not.
    """

    folder: Path
    keepers: Mapping[str, Keeper]
    """The contents of a checkpoint: models, averages, the optimizer."""
    minutes: float
    """Between checkpoints."""
    update: int = 0
    """Updates made."""
    _losses: list[float] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)
    _worked: float = field(default_factory=time.process_time)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._checkpoint.is_file():
            return
        state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        for name, keeper in self.keepers.items():
            keeper.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        self.update = state["update"]

    def step(self, loss: float) -> None:
        """Count an update."""
        self.update += 1
        self._losses.append(loss)

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= 60 * self.minutes

    def save(self, facts: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint and a line of ``log.jsonl``: mean loss and seconds of processor.

        Args:
            facts: further numbers for the line.
        """
        state = {name: keeper.state_dict() for name, keeper in self.keepers.items()}
        new = self._checkpoint.with_suffix(".new")
        torch.save({**state, "random": torch.get_rng_state(), "update": self.update}, new)
        new.replace(self._checkpoint)
        count = max(1, len(self._losses))
        line = {
            "update": self.update,
            "loss": round(sum(self._losses) / count, 5),
            "processor_seconds_an_update": round((time.process_time() - self._worked) / count, 2),
            **(facts or {}),
        }
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
        self._losses.clear()
        self._saved, self._worked = time.monotonic(), time.process_time()
