"""The judges, fitted on training subjects: true drawings, degraded ones, and the base's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from drawings.evaluation.gallery import Gallery
from drawings.evaluation.judges import Distance, Judge, SubjectFeatures, enlarged
from drawings.evaluation.networks import EfficientNetLite0, ShiftTolerantVGG
from drawings.evaluation.scores import Discriminant, gram
from drawings.judges.degraded import degraded

#: Size in pixels to which drawings are enlarged for the style's network.
_STYLE_PIXELS = 96


@dataclass(frozen=True)
class StyleFeatures:
    """Features of a picture's style: Gram matrices of VGG's first two stages."""

    network: ShiftTolerantVGG

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return (pictures, 10336): square roots, so that a few large products do not dominate."""
        stages = self.network.stages(enlarged(pictures, _STYLE_PIXELS), 2)
        return torch.cat([gram(stage).sqrt() for stage in stages], 1)


@dataclass(frozen=True)
class Judges:
    """A judge of subjects, one of styles, and a distance between pictures."""

    subject: Callable[[Tensor], Tensor]
    style: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def fit(cls, training: Gallery, drawn: Sequence[Gallery] = ()) -> Judges:
        """Fit judges to which a drawing and its degraded copy are the same.

        Args:
            training: true drawings of training subjects. Each is seen again, degraded.
            drawn: pictures of the same subjects and styles by models: the autoencoder's
                reconstructions, the base's samples.
        """
        worse = degraded(training.pictures, torch.Generator().manual_seed(0))
        pictures = torch.cat([training.pictures, worse, *(each.pictures for each in drawn)])
        names = [*training.names * 2, *(name for each in drawn for name in each.names)]
        subjects, styles = zip(*names, strict=True)
        vgg = ShiftTolerantVGG()
        return cls(
            Judge.train(SubjectFeatures(EfficientNetLite0()), pictures, subjects),
            Judge.train(StyleFeatures(vgg), pictures, styles),
            Distance(vgg),
        )

    def save(self, path: Path) -> None:
        """Write the two discriminants; the networks come from their packages."""
        judges = {"subject": self.subject, "style": self.style}
        state = {
            name: asdict(judge.discriminant)
            for name, judge in judges.items()
            if isinstance(judge, Judge)
        }
        new = path.with_suffix(".new")
        torch.save(state, new)
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Judges:
        """Read judges that ``save`` wrote."""
        state = torch.load(path, weights_only=True)
        vgg = ShiftTolerantVGG()
        return cls(
            Judge(SubjectFeatures(EfficientNetLite0()), Discriminant(**state["subject"])),
            Judge(StyleFeatures(vgg), Discriminant(**state["style"])),
            Distance(vgg),
        )
