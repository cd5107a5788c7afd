"""The judge that comes with klora: similarity to each LoRA's own pictures. It needs no truth.

The subject of a picture is compared with pictures of each content LoRA alone, by features of
EfficientNet-Lite0; its style with pictures of each style LoRA alone, by Gram matrices of VGG16's
first stage and a histogram of colours. Such features are alike for any two pictures, so what counts
is the place on the line from the mean of the other LoRAs' own pictures (0) to the mean of the
LoRA's own (1). The score is the harmonic mean over the LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klora_compile.extras import missing_library
from klora_compile.judging.judge import OWN_PICTURES, About
from klora_compile.slots import role_of
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.errors import ConfigError

#: Pictures (pictures, 3, height, width) in [0, 1] -> features (pictures, features).
Features = Callable[[Tensor], Tensor]

#: Larger pictures are made smaller before the networks see them, which enlarge smaller ones.
_PIXELS = 224

#: Distance of two means of unit vectors, squared, from which a judge can tell LoRAs apart.
_LEAST_APART = 1e-4


@dataclass(frozen=True)
class Likeness:
    """The likeness of pictures to one LoRA's own: 0 like the others' pictures, 1 like its own."""

    features: Features
    others: Tensor
    """The mean of the other LoRAs' pictures, (features,)."""
    apart: Tensor
    """The mean of the LoRA's own pictures minus that of the others, (features,)."""

    def __call__(self, picture: Tensor) -> float:
        """Return the likeness of a picture, (1, 3, height, width); it may leave 0 to 1."""
        along = (_unit(self.features(picture))[0] - self.others) @ self.apart
        return float(along / self.apart.square().sum())


@dataclass
class OwnPicturesJudge:
    """Similarity to each LoRA's own pictures; ``About.own`` has pictures of two LoRAs or more.

    Raises:
        ConfigError: own pictures are missing, or those of two LoRAs look alike.
    """

    by_role: Mapping[str, Features]
    """What is looked at in pictures of a content LoRA, and in those of a style LoRA."""
    _made_of: Mapping[str, tuple[Image.Image, ...]] | None = field(default=None, init=False)
    _likenesses: dict[str, Likeness] = field(default_factory=dict, init=False)

    @classmethod
    def with_packages(cls) -> OwnPicturesJudge:
        """Return the judge with the networks of their packages.

        Raises:
            KloraError: a package is not installed.
        """
        from klora_compile.judging.features import Looks, StyleFeatures, SubjectFeatures
        from klora_compile.judging.networks import EfficientNetLite0, ShiftTolerantVGG

        try:
            subject = SubjectFeatures(EfficientNetLite0())
            style = Looks(StyleFeatures(ShiftTolerantVGG()))
        except ModuleNotFoundError as error:
            raise missing_library(f"the judge {OWN_PICTURES}", error, "evaluate") from error
        return cls({CONTENT: subject, STYLE: style})

    def __call__(self, picture: Image.Image, about: About) -> float:
        return harmonic_mean(*self.likenesses(picture, about).values())

    def likenesses(self, picture: Image.Image, about: About) -> dict[str, float]:
        """Return slot -> the likeness to that LoRA's own pictures."""
        if self._made_of is not about.own:
            self._likenesses = self._of(about.own)
            self._made_of = about.own
        seen = as_tensor([picture])
        return {slot: likeness(seen) for slot, likeness in self._likenesses.items()}

    def _of(self, own: Mapping[str, tuple[Image.Image, ...]]) -> dict[str, Likeness]:
        if len(own) < 2 or not all(own.values()):
            raise ConfigError(
                f"judge: {OWN_PICTURES} compares with pictures of each LoRA alone, and needs two "
                "LoRAs or more with a prompt each."
            )
        return {slot: self._likeness(slot, own) for slot in own}

    def _likeness(self, slot: str, own: Mapping[str, tuple[Image.Image, ...]]) -> Likeness:
        features = self.by_role[role_of(slot)]
        means = {
            name: torch.cat([_unit(features(as_tensor([each]))) for each in pictures]).mean(0)
            for name, pictures in own.items()
        }
        mine = means.pop(slot)
        others = torch.stack(list(means.values())).mean(0)
        apart = mine - others
        if float(apart.square().sum()) < _LEAST_APART:
            raise ConfigError(
                f"judge: {OWN_PICTURES} cannot tell the own pictures of {slot} from those of the "
                "other LoRAs. Name prompts that show each LoRA, with --own-prompt."
            )
        return Likeness(features, others, apart)


def harmonic_mean(*values: float) -> float:
    """Return the harmonic mean, high only if all are; 0 if one is 0 or below."""
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures of equal size as (pictures, 3, height, width) in [0, 1]."""
    found = []
    for picture in pictures:
        size = (min(picture.width, _PIXELS), min(picture.height, _PIXELS))
        small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255)
    return torch.stack(found)


def _unit(features: Tensor) -> Tensor:
    unit: Tensor = features / features.norm(dim=1, keepdim=True).clamp(min=1e-10)
    return unit
