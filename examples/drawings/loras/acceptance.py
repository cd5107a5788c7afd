"""Training until a LoRA draws what it was trained on, and the record of how often that took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from drawings.loras.files import lora_path
from drawings.loras.recipes import Recipe
from drawings.loras.training import Plan, remove, save, train

#: Pictures in [0, 1] -> unit vectors, whose products are similarities.
Judge = Callable[[Tensor], Tensor]

#: What a subject's LoRA must reach on its own training drawings.
ENOUGH = 0.6
#: A training that was not enough is followed by one with so many times the updates.
_LONGER = 1.6
_SEEDS, _STEPS, _GUIDANCE = 2, 10, 3.0


@dataclass(frozen=True)
class Entry:
    """The record of one LoRA."""

    attempts: int
    """Trainings that it took."""
    updates: int
    """Of the training that is kept."""
    loss: float
    similarity: float | None
    """By the subject judge, to the drawings that it was trained on; None if no judge asks."""
    sha256: str
    """Of the file."""

    @property
    def accepted(self) -> bool:
        """Whether rules may be judged with it."""
        return self.similarity is None or self.similarity >= ENOUGH

    def settled(self, attempts: int) -> bool:
        """Whether so many trainings leave nothing to do."""
        return self.accepted or self.attempts >= attempts


@dataclass(frozen=True)
class Ledger:
    """The records of a folder of LoRAs: one file beside each, so processes can share a folder."""

    folder: Path

    def read(self) -> dict[str, Entry]:
        """Return file stem -> record."""
        paths = sorted(self.folder.glob("*.json"))
        return {path.stem: Entry(**json.loads(path.read_text(encoding="utf-8"))) for path in paths}

    def add(self, stem: str, entry: Entry) -> None:
        """Record a LoRA."""
        new = self.folder / f"{stem}.new"
        new.write_text(json.dumps(asdict(entry), indent=1) + "\n", encoding="utf-8")
        new.replace(new.with_suffix(".json"))


def train_until_accepted(
    pipe: StableDiffusionPipeline,
    recipe: Recipe,
    pictures: Tensor,
    plan: Plan,
    folder: Path,
    judge: Judge | None,
    attempts: int,
) -> Entry:
    """Train a LoRA, longer and from another seed while it does not reach ``ENOUGH``, and record it.

    A LoRA that the folder has with fewer trainings goes on with the next one.

    Args:
        pictures: those of the recipe, (drawings, 3, height, width) in [-1, 1].
        plan: of the first training.
        folder: holds the best LoRA of all trainings, and the ledger.
        judge: of subjects; None accepts the first training.
        attempts: trainings at most, with those of before.
    """
    path = lora_path(folder, recipe.kind, recipe.name)
    best = Ledger(folder).read().get(recipe.stem) if path.is_file() else None
    while best is None or not best.settled(attempts):
        attempt = 1 if best is None else best.attempts + 1
        updates = round(plan.updates * _LONGER ** (attempt - 1))
        now = replace(plan, updates=updates, seed=plan.seed + attempt - 1)
        try:
            loss = train(pipe, pictures, recipe.prompts, now)
            found = None if judge is None else similarity(pipe, recipe, pictures, judge)
            better = best is None or found is None or found > (best.similarity or -1.0)
            if better:
                save(pipe, path)
        finally:
            remove(pipe)
        if better:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            best = Entry(attempt, updates, round(loss, 5), found, digest)
        assert best is not None
        best = replace(best, attempts=attempt)
        Ledger(folder).add(recipe.stem, best)
    return best


@torch.no_grad()
def similarity(
    pipe: StableDiffusionPipeline, recipe: Recipe, pictures: Tensor, judge: Judge
) -> float:
    """Draw with the recipe's own prompts, and return the mean similarity to its drawings."""
    seen = judge(pictures / 2 + 0.5)
    total = 0.0
    for seed in range(_SEEDS):
        drawn = pipe(
            list(recipe.prompts),
            num_inference_steps=_STEPS,
            guidance_scale=_GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _ in recipe.prompts],
            output_type="pt",
        ).images
        total += (judge(drawn.cpu().float()) * seen).sum(1).mean().item()
    return round(total / _SEEDS, 5)


def summary(entries: dict[str, Entry]) -> str:
    """Say how many subject LoRAs were accepted at once, after more training, and not at all."""
    subjects = {stem: e for stem, e in entries.items() if e.similarity is not None}
    refused = [stem for stem, e in subjects.items() if not e.accepted]
    again = sum(e.accepted and e.attempts > 1 for e in subjects.values())
    first = len(subjects) - again - len(refused)
    names = f" and take no part: {', '.join(refused)}" if refused else ""
    return (
        f"{len(subjects)} subject LoRAs: {first} reached {ENOUGH} at once, {again} after they were "
        f"trained again, {len(refused)} did not{names}."
    )
