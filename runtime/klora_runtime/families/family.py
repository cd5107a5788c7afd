"""The record of a base model: everything that klora knows about it, in one place.

Code that reads, names, shows or exports a LoRA asks the record and never names a family. A field
without a value is None or empty, and :attr:`Family.missing` says why. Facts that a family takes
from another family refer to that family's record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from klora_runtime.families.rows import Layout
from klora_runtime.families.text_encoders import TextModel

#: The task of a pipeline, as the Hub names it.
Task = Literal["text-to-image", "image-to-image", "text-to-video", "text-to-audio"]

#: Prefix of a denoiser's modules in files of kohya's trainers.
DENOISER_PREFIX = "lora_unet_"

#: Trainers whose ``ss_network_module`` identifies the family.
SD_SCRIPTS, MUSUBI_TUNER = "sd-scripts", "musubi-tuner"


@dataclass(frozen=True)
class Mark:
    """Layers that identify a family: no other model has layers of these names and widths."""

    pattern: str
    """Regular expression to search for in a module path of diffusers."""
    widths: tuple[int, ...]
    """Input widths of the weight, one per released size of the model."""
    component: str | None = None
    """Component of the layers, if it is not a denoiser."""

    @cached_property
    def names(self) -> re.Pattern[str]:
        """The compiled pattern."""
        return re.compile(self.pattern)


@dataclass(frozen=True)
class Script:
    """The network module of kohya's trainers that writes LoRAs of a family."""

    module: str
    """``ss_network_module`` in a file's metadata."""
    trainer: str
    """:data:`SD_SCRIPTS` or :data:`MUSUBI_TUNER`."""


@dataclass(frozen=True)
class Kohya:
    """The spelling of a family's files in kohya's names, if known tools read them.

    Not every such family is trained by kohya's trainers: ComfyUI reads the names of its own model
    under :data:`DENOISER_PREFIX`, whatever the model is.
    """

    layouts: tuple[Layout, ...]
    """Layouts of the modules with the prefix :data:`DENOISER_PREFIX`, one per component."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata besides ``ss_network_module`` that the trainer writes into every file."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family's pipeline that trainers adapt."""

    component: str
    model: TextModel
    kohya: str | None = None
    """Prefix of its modules in files of kohya's trainers."""
    others: tuple[str, ...] = ()
    """Prefixes of other trainers, also with underscores."""
    comfy: str | None = None
    """ComfyUI's name of the model, as in ``text_encoders.NAME.transformer.``."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes that identify its modules."""
        dotted = None if self.comfy is None else f"text_encoders.{self.comfy}.transformer."
        return tuple(prefix for prefix in (self.kohya, *self.others, dotted) if prefix)


@dataclass(frozen=True)
class Family:
    """A base model, together with all models that were trained from it and keep its layers.

    A new family is a file with a record and a line in the catalogue.
    """

    key: str
    """Key, as artifacts state it."""
    title: str
    """Name for people."""
    pipeline: str
    """Pipeline class of diffusers."""
    hub: str
    """Hub id of a released model, as diffusers' examples use it."""
    layouts: tuple[Layout, ...]
    """Module names in files; the first layout of each component names every module."""
    models: tuple[str, ...]
    """Classes of diffusers that its LoRAs are for; the first is the pipeline's denoiser."""
    blocks: Mapping[str, int]
    """Path of each list of blocks -> its length in the largest released model, in the order that
        data flows."""
    smaller: tuple[Mapping[str, int], ...] = ()
    """The same for its smaller released models."""
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Regular expression to search for in a module path of diffusers -> input widths of the weight,
        one per released size; layers by which the family cannot be identified, but excluded."""
    denoisers: tuple[str, ...] = ("transformer",)
    """Components that the sampling loop evaluates; all have the module names of the first."""
    task: Task = "text-to-image"
    is_modular: bool = False
    """Whether the pipeline is a modular one of diffusers, which loads its parts on request."""
    marks: tuple[Mark, ...] = ()
    """Each mark identifies the family, or one of the families that share the mark."""
    stated: str | None = None
    """Regular expression for ``modelspec.architecture`` or ``ss_base_model_version`` in lower case,
    with hyphens for dots, spaces and underscores. Only the end, a hyphen or a slash may follow the
    match. The longest match of all families decides."""
    tag: str | None = None
    """Hub tag that diffusers' trainers write."""
    script: Script | None = None
    kohya: Kohya | None = None
    text_encoders: tuple[TextEncoder, ...] = ()
    block_weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name of a table of weights by blocks -> its rows, as klora's compiler reads them: a role and
        a pattern of layers -> progress:weight."""
    named_after: Family | None = None
    """The family whose block names some tool uses for this one. A file that adapts only such blocks
        counts as that family's, unless widths or the number of blocks show otherwise."""
    shares_marks_of: tuple[Family, ...] = ()
    """Families whose marks its layers also carry; its own marks distinguish it from them."""
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Last name of a convolution whose tensors may be matrices -> the kernel's size."""
    pointwise: tuple[str, ...] = ()
    """Last names of 1x1 convolutions whose factors are also 1x1 convolutions in files."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Name of a field without a value -> the reason."""

    @property
    def components(self) -> tuple[str, ...]:
        """All components that LoRAs of the family adapt."""
        named = (layout.component for layout in self.layouts)
        encoders = (encoder.component for encoder in self.text_encoders)
        return tuple(dict.fromkeys((*self.denoisers, *named, *encoders)))

    def encoder(self, prefix: str) -> TextEncoder | None:
        """Return the text encoder of a prefix, or None."""
        return next((e for e in self.text_encoders if prefix in e.prefixes), None)

    def kohya_names(self, component: str) -> tuple[str, Layout] | None:
        """Return prefix and layout of a component in kohya's spelling, or None."""
        first = self.denoisers[0] if component in self.denoisers else component
        for layout in () if self.kohya is None else self.kohya.layouts:
            if layout.component == first:
                return DENOISER_PREFIX, layout
        for encoder in self.text_encoders:
            if encoder.component == component and encoder.kohya is not None:
                return encoder.kohya, encoder.model.written
        return None
