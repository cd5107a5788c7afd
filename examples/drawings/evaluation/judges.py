"""Two judges of pictures, one for subjects and one for styles.

Each is a pretrained network followed by Fisher's discriminant, learnt from the true drawings of the
*training* subjects: no judge has seen a subject that it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from drawings.evaluation.gallery import Gallery, Name
from drawings.evaluation.networks import EfficientNetLite0, ShiftTolerantVGG
from drawings.evaluation.scores import Discriminant, gram, harmonic_mean, nearest

#: Sizes in pixels to which drawings are enlarged for the networks.
_SUBJECT_PIXELS, _STYLE_PIXELS, _DISTANCE_PIXELS = 224, 96, 64
_BATCH = 32


@dataclass(frozen=True)
class Verdict:
    """The judges' verdict on one picture against the true drawing."""

    subject: float
    """Cosine, -1 to 1: about 0 for another subject, 1 for the drawing itself."""
    style: float
    """Cosine, -1 to 1: about 0 for another style, 1 for the drawing itself."""
    both: float
    """Harmonic mean of the two, 0 to 1."""
    distance: float
    """ST-LPIPS to the true drawing, 0 for the drawing itself."""
    right_subject: bool
    """Whether the most similar of all drawings shows this subject."""
    right_style: bool
    """Whether the most similar drawing is in this style."""
    right_both: bool
    """Whether the most similar drawing is the true one."""

    def json(self) -> dict[str, float]:
        """Return the fields as JSON numbers."""
        return {name: round(float(value), 5) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class SubjectFeatures:
    """Features of a picture's subject, by EfficientNet-Lite0."""

    network: EfficientNetLite0

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, 1280)."""
        return self.network(enlarged(pictures, _SUBJECT_PIXELS))


@dataclass(frozen=True)
class StyleFeatures:
    """Features of a picture's style: the Gram matrix of VGG's first stage (colours and edges)."""

    network: ShiftTolerantVGG

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return (pictures, 2080): square roots, so that a few large products do not dominate."""
        return gram(self.network.stages(enlarged(pictures, _STYLE_PIXELS), 1)[0]).sqrt()


@dataclass(frozen=True)
class Judge:
    """A judge that maps pictures to unit vectors, whose products are similarities."""

    features: Callable[[Tensor], Tensor]
    discriminant: Discriminant

    @classmethod
    def train(
        cls, features: Callable[[Tensor], Tensor], pictures: Tensor, groups: Sequence[str]
    ) -> Judge:
        """Train a judge to distinguish ``groups``."""
        return cls(features, Discriminant.fit(_batched(features, pictures), groups))

    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, dimensions)."""
        return self.discriminant(_batched(self.features, pictures))


@dataclass(frozen=True)
class Distance:
    """ST-LPIPS."""

    network: ShiftTolerantVGG

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """(pictures,)."""
        pair = (enlarged(pictures, _DISTANCE_PIXELS) for pictures in (one, other))
        return self.network.distance(*pair)


@dataclass(frozen=True)
class Judges:
    """Both judges and the drawings that pictures are compared with."""

    subject: Callable[[Tensor], Tensor]
    style: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    gallery: Gallery
    """Candidates for the most similar drawing: every held-out subject in every style."""

    @classmethod
    def train(cls, training: Gallery, gallery: Gallery) -> Judges:
        """Train judges on ``training`` that compare with ``gallery``."""
        subjects, styles = zip(*training.names, strict=True)
        vgg = ShiftTolerantVGG()
        return cls(
            Judge.train(SubjectFeatures(EfficientNetLite0()), training.pictures, subjects),
            Judge.train(StyleFeatures(vgg), training.pictures, styles),
            Distance(vgg),
            gallery,
        )

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        """The gallery's vectors by both judges."""
        return self.subject(self.gallery.pictures), self.style(self.gallery.pictures)

    def judge(self, pictures: Tensor, names: Sequence[Name]) -> list[Verdict]:
        """Return a verdict on each picture.

        Args:
            pictures: (pictures, 3, 48, 48) in [0, 1].
            names: what each should show; drawings of the gallery.
        """
        known = list(self.gallery.names)
        truth = torch.tensor([known.index(name) for name in names])
        gallery_subjects, gallery_styles = self._seen
        subjects = self.subject(pictures) @ gallery_subjects.T
        styles = self.style(pictures) @ gallery_styles.T
        distances = self.distance(pictures, self.gallery.pictures[truth])
        verdicts = []
        for index, (name, true) in enumerate(zip(names, truth.tolist(), strict=True)):
            found = nearest((subjects + styles)[index].tolist(), known)
            subject, style = subjects[index, true].item(), styles[index, true].item()
            verdicts.append(
                Verdict(
                    subject=subject,
                    style=style,
                    both=harmonic_mean(subject, style),
                    distance=distances[index].item(),
                    right_subject=found[0] == name[0],
                    right_style=found[1] == name[1],
                    right_both=found == name,
                )
            )
        return verdicts


def enlarged(pictures: Tensor, pixels: int) -> Tensor:
    """Resize pictures smoothly."""
    size = (pixels, pixels)
    return interpolate(pictures, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def _batched(features: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    return torch.cat([features(some) for some in pictures.split(_BATCH)])
