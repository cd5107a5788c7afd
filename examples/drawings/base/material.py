"""The training material: every drawing of the training subjects in the training styles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from drawings.base.subjects import TRAINING_STYLES, training_subjects
from drawings.material import drawing

#: Most pixels that a drawing is moved by.
_REACH = 2


@dataclass(frozen=True)
class Material:
    """Drawings with their names."""

    pictures: torch.Tensor
    """(drawings, 3, 48, 48), uint8."""
    names: Sequence[tuple[str, str]]
    """Subject and style of each."""

    def of(self, subjects: Iterable[str]) -> Material:
        """Return the drawings of some subjects."""
        known = set(subjects)
        chosen = [index for index, (subject, _) in enumerate(self.names) if subject in known]
        return Material(self.pictures[chosen], [self.names[index] for index in chosen])

    def scaled(self) -> torch.Tensor:
        """Return all pictures in [-1, 1], float32."""
        return self.pictures.float() / 127.5 - 1

    def sample(self, count: int) -> tuple[torch.Tensor, list[tuple[str, str]]]:
        """Draw at random, (count, 3, 48, 48) in [-1, 1], each moved by up to two pixels."""
        chosen = torch.randint(len(self.names), (count,)).tolist()
        pictures = self.pictures[chosen].float() / 127.5 - 1
        return moved(pictures), [self.names[index] for index in chosen]


def material(packages: Path, run: Path) -> Material:
    """Render the drawings, or read them where an earlier call for this run has.

    Args:
        packages: the folder with the packages, as ``drawings.material`` says.
        run: the folder of the training, which keeps them in ``drawings.pt``.
    """
    kept = run / "drawings.pt"
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        return Material(state["pictures"], [(subject, style) for subject, style in state["names"]])
    pictures, names = [], []
    for subject in training_subjects(packages):
        for style, package in TRAINING_STYLES.items():
            picture = drawing(packages, package, subject)
            if picture is not None:
                pictures.append(((picture + 1) * 127.5).round().byte())
                names.append((subject, style))
    found = Material(torch.stack(pictures), names)
    run.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix(".new")
    torch.save({"pictures": found.pictures, "names": names}, new)
    new.replace(kept)
    return found


def moved(pictures: torch.Tensor) -> torch.Tensor:
    """Move each picture by up to two pixels; white comes in."""
    height, width = pictures.shape[-2:]
    padded = pad(pictures, (_REACH,) * 4, value=1.0)
    tops, lefts = torch.randint(0, 2 * _REACH + 1, (2, len(pictures))).tolist()
    return torch.stack(
        [p[:, y : y + height, x : x + width] for p, y, x in zip(padded, tops, lefts, strict=True)]
    )


def recoloured(pictures: torch.Tensor) -> torch.Tensor:
    """Give drawings other colours, on white as before: channels swapped, darker, or grey.

    The autoencoder learns from these to draw styles that it never sees.
    """
    count = len(pictures)
    orders = torch.stack([torch.randperm(3) for _ in range(count)])
    pictures = pictures.gather(1, orders[:, :, None, None].expand_as(pictures))
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    pictures = torch.where(torch.rand(count, 1, 1, 1) < 0.2, grey, pictures)
    strength = 1 + 1.5 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3)
    return (1 + (pictures - 1) * strength).clamp(-1, 1)
