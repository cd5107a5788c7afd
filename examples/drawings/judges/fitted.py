"""The judges, fitted on training subjects: true drawings, degraded ones, and the base's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from drawings.judges.degraded import degraded
from drawings.judges.features import Distance, Judge
from drawings.judges.scores import Discriminant
from drawings.material import Gallery
from klora_compile.judging.features import Looks, StyleFeatures, SubjectFeatures
from klora_compile.judging.networks import EfficientNetLite0, ShiftTolerantVGG

_BATCH = 32
#: Of the judge of styles: principal components, and the share of their covariance that is replaced.
#: With 240 subjects, 92.8 % of comparisons were right, and 92.0 % with 600 components and 0.1.
_COMPONENTS, _SHRINK = 1200, 0.05


@dataclass(frozen=True)
class Judges:
    """A judge of subjects, one of styles, and a distance between pictures."""

    subject: Callable[[Tensor], Tensor]
    style: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    looks: Mapping[str, Tensor]
    """Style -> the mean vector of its drawings by the judge of styles, of length 1.

    A picture's style is compared with these. Single drawings of one style differ too much: with
    80 subjects and nine styles, 89 % of comparisons with means were right, and 74 % of comparisons
    with drawings.
    """

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
        features = Looks(StyleFeatures(vgg))
        seen = torch.cat([features(some) for some in pictures.split(_BATCH)])
        discriminant = Discriminant.fit(seen, styles, components=_COMPONENTS, shrink=_SHRINK)
        return cls(
            Judge.train(SubjectFeatures(EfficientNetLite0()), pictures, subjects),
            Judge(features, discriminant),
            Distance(vgg),
            _means(discriminant(seen), styles),
        )

    def save(self, path: Path) -> None:
        """Write the two discriminants; the networks come from their packages."""
        judges = {"subject": self.subject, "style": self.style}
        state: dict[str, object] = {
            name: asdict(judge.discriminant)
            for name, judge in judges.items()
            if isinstance(judge, Judge)
        }
        state["looks"] = dict(self.looks)
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
            Judge(Looks(StyleFeatures(vgg)), Discriminant(**state["style"])),
            Distance(vgg),
            state["looks"],
        )


def _means(vectors: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean vector of each group, of length 1."""
    found = {}
    for group in sorted(set(groups)):
        mean = vectors[torch.tensor([each == group for each in groups])].mean(0)
        found[group] = mean / mean.norm()
    return found
