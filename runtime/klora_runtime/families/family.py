"""The record of a base model: everything that klora knows of it, in one place.

Whatever reads, names, shows or exports a LoRA asks the record, never for a family by name. What a
family does not have is None or empty, and :attr:`Family.missing` says why. Facts that a family
has from another one refer to that one's record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from klora_runtime.families.rows import Layout
from klora_runtime.families.text_encoders import TextModel

#: What a pipeline makes of what, in the Hub's words.
Task = Literal["text-to-image", "image-to-image", "text-to-video"]

#: What kohya's trainers write before a denoiser's modules.
DENOISER_PREFIX = "lora_unet_"

#: Trainers whose ``ss_network_module`` says what they train.
SD_SCRIPTS, MUSUBI_TUNER = "sd-scripts", "musubi-tuner"


@dataclass(frozen=True)
class Mark:
    """Layers that tell a family: of these names, no other model has them this wide."""

    pattern: str
    """Regular expression, searched for in a module path of diffusers."""
    widths: tuple[int, ...]
    """Input widths of the weight, one for each size in which the model was released."""
    component: str | None = None
    """Where the layers are, if not in a denoiser."""

    @cached_property
    def names(self) -> re.Pattern[str]:
        """The pattern, ready to search."""
        return re.compile(self.pattern)


@dataclass(frozen=True)
class Script:
    """The network module of kohya's trainers that makes LoRAs of a family."""

    module: str
    """``ss_network_module`` in a file's metadata."""
    trainer: str
    """:data:`SD_SCRIPTS` or :data:`MUSUBI_TUNER`."""


@dataclass(frozen=True)
class Kohya:
    """A family's files in kohya's spelling, where tools are known to read them."""

    layouts: tuple[Layout, ...]
    """Whose names the modules have that :data:`DENOISER_PREFIX` is before; one per component."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the trainer writes beside ``ss_network_module`` for every file of the family."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family's pipeline that trainers adapt."""

    component: str
    model: TextModel
    kohya: str | None = None
    """Prefix of its modules that kohya's trainers write."""
    others: tuple[str, ...] = ()
    """Prefixes of other trainers, also before underscores."""
    comfy: str | None = None
    """ComfyUI's name of the model, as in ``text_encoders.NAME.transformer.``."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All that may stand before its modules and say that they are its own."""
        dotted = None if self.comfy is None else f"text_encoders.{self.comfy}.transformer."
        return tuple(prefix for prefix in (self.kohya, *self.others, dotted) if prefix)


@dataclass(frozen=True)
class Family:
    """One base model, with all models that are trained from it and keep its layers.

    A new one is a file with a record and a line in the catalogue.
    """

    key: str
    """As artifacts state it."""
    title: str
    """As people call it."""
    pipeline: str
    """Class of diffusers that samples with it."""
    hub: str
    """Id on the Hub of a released model, as diffusers' own examples name it."""
    layouts: tuple[Layout, ...]
    """Names of its modules in files; the first of each component names every module."""
    blocks: Mapping[str, int]
    """Paths of its lists of blocks, in the order in which data flows -> how many the largest
    released model has."""
    denoisers: tuple[str, ...] = ("transformer",)
    """Components that are evaluated in the sampling loop. All have the names of the first."""
    task: Task = "text-to-image"
    is_modular: bool = False
    """Whether the pipeline is one of diffusers' modular ones, which load their parts when told."""
    marks: tuple[Mark, ...] = ()
    """Any of them tells the family."""
    stated: str | None = None
    """Regular expression for what trainers state as ``modelspec.architecture`` or as
    ``ss_base_model_version``, in lower case, with hyphens for dots, spaces and underscores. Behind
    what it matches is the end, a hyphen or a slash. Of all families the longest match decides."""
    tag: str | None = None
    """Tag on the Hub, as diffusers' trainers write it."""
    script: Script | None = None
    kohya: Kohya | None = None
    text_encoders: tuple[TextEncoder, ...] = ()
    trained_from: Family | None = None
    """Its models began as that one's: LoRAs of layers that both have are that one's."""
    named_after: Family | None = None
    """Whose names its blocks have in some tool: a file of these alone is that one's, where neither
    widths nor the number of blocks tell."""
    shares_marks_of: tuple[Family, ...] = ()
    """Families whose marks its layers carry too; its own marks tell it from them."""
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Last names of convolutions whose tensors may be matrices -> the kernel's size."""
    pointwise: tuple[str, ...] = ()
    """Last names of layers that are 1x1 convolutions in the model, and have factors so in files."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Name of a field that is None or empty -> why."""

    @property
    def components(self) -> tuple[str, ...]:
        """All parts of a pipeline that LoRAs of the family adapt."""
        named = (layout.component for layout in self.layouts)
        encoders = (encoder.component for encoder in self.text_encoders)
        return tuple(dict.fromkeys((*self.denoisers, *named, *encoders)))

    def encoder(self, prefix: str) -> TextEncoder | None:
        """The text encoder that a prefix stands for."""
        return next((e for e in self.text_encoders if prefix in e.prefixes), None)

    def kohya_names(self, component: str) -> tuple[str, Layout] | None:
        """Prefix and names of a component's modules in kohya's spelling; None for none."""
        first = self.denoisers[0] if component in self.denoisers else component
        for layout in () if self.kohya is None else self.kohya.layouts:
            if layout.component == first:
                return DENOISER_PREFIX, layout
        for encoder in self.text_encoders:
            if encoder.component == component and encoder.kohya is not None:
                return encoder.kohya, encoder.model.written
        return None
