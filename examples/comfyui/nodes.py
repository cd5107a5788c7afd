"""The nodes: *Load fusion*, *Apply fusion* and *Fusion info*, in ComfyUI's V3 schema."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import ComfyExtension, io

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import summary
from klora_runtime.errors import shown
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.layers.live_fusion import MAX_WEIGHT

from .acting import Applied, apply_to
from .clock import Stretch
from .names import denoisers_of
from .picture import schedule_picture
from .settings import artifact_names, fingerprint, loaded, register_folder, weights_of
from .text_encoders import apply_to_clip, layers_of

_LOG = logging.getLogger("klora")

_CATEGORY = "klora"
#: The type of the wire between klora's nodes.
FUSION = io.Custom("KLORA_FUSION")

#: Denoisers of base models that have two.
_OF_SEVERAL = tuple(
    dict.fromkeys(name for f in FAMILIES.values() if len(f.denoisers) > 1 for name in f.denoisers)
)
_MOST_STEPS = 10_000


class LoadFusion(io.ComfyNode):
    """Read an artifact."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="KloraLoadFusion",
            display_name="Load fusion",
            category=_CATEGORY,
            description="Reads a .klora.safetensors file from the folder models/klora.",
            inputs=[io.Combo.Input("artifact", options=artifact_names())],
            outputs=[FUSION.Output(display_name="fusion")],
        )

    @classmethod
    def execute(cls, artifact: str) -> Any:
        return io.NodeOutput(loaded(artifact))

    @classmethod
    def fingerprint_inputs(cls, artifact: str) -> Any:
        return str(fingerprint(artifact))


class ApplyFusion(io.ComfyNode):
    """Let a fusion act on a model whenever a sampler runs."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="KloraApplyFusion",
            display_name="Apply fusion",
            category=_CATEGORY,
            description=(
                "Lets the fused LoRAs act on the model, each in its layers at its steps. LoRA "
                "loaders may stand before and after it."
            ),
            inputs=[
                io.Model.Input("model"),
                FUSION.Input("fusion"),
                io.Clip.Input(
                    "clip", optional=True, tooltip="For artifacts that change text encoders."
                ),
                _weight("content"),
                _weight("style"),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="Weights of other slots, such as content.1=0.8 lightning=1.",
                ),
                io.Boolean.Input("enabled", default=True),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=_MOST_STEPS,
                    tooltip=(
                        "Steps of the whole schedule where the sampler runs a part of it: image to "
                        "image, an advanced sampler, two models in turn. 0: the run is the whole."
                    ),
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=_MOST_STEPS,
                    tooltip="The step of the whole schedule that this sampler begins with.",
                ),
                io.Combo.Input(
                    "denoiser",
                    options=["auto", *_OF_SEVERAL],
                    default="auto",
                    tooltip="For artifacts of two models: the one that this model is.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        fusion: Fusion,
        clip: Any = None,
        content: float = 1.0,
        style: float = 1.0,
        weights: str = "",
        enabled: bool = True,
        steps: int = 0,
        start_at_step: int = 0,
        denoiser: str = "auto",
    ) -> Any:
        if not enabled:
            return io.NodeOutput(model, clip)
        factors = weights_of(fusion, content, style, weights)
        stretch = Stretch(steps, start_at_step)
        new_model = apply_to(model, Applied(fusion, factors, stretch, denoiser))
        if clip is None and layers_of(fusion):
            _LOG.warning(
                "klora: the artifact also changes %d layers of text encoders. Connect clip to apply"
                " them; without it they are left out.",
                len(layers_of(fusion)),
            )
        new_clip = None if clip is None else apply_to_clip(clip, fusion, factors)
        return io.NodeOutput(new_model, new_clip)


class FusionInfo(io.ComfyNode):
    """Show the schedule of a fusion."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="KloraFusionInfo",
            display_name="Fusion info",
            category=_CATEGORY,
            description="Draws which LoRA acts in which layer over the progress of sampling.",
            inputs=[FUSION.Input("fusion")],
            outputs=[io.Image.Output(display_name="map"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, fusion: Fusion) -> Any:
        return io.NodeOutput(schedule_picture(fusion), _text(fusion))


class KloraExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def on_load(self) -> None:
        register_folder()

    async def get_node_list(self) -> list[Any]:
        register_folder()  # ComfyUI 0.8 does not call on_load of a folder of nodes
        return [LoadFusion, ApplyFusion, FusionInfo]


def _weight(slot: str) -> Any:
    return io.Float.Input(
        slot,
        default=1.0,
        min=-MAX_WEIGHT,
        max=MAX_WEIGHT,
        step=0.05,
        tooltip=f"How strongly the {slot} LoRA acts.",
    )


def _text(fusion: Fusion) -> str:
    """Return what a fusion is: its size, sources, slots and trigger words."""
    lines = list(summary(fusion))
    lines.append(f"models: {', '.join(denoisers_of(fusion)) or 'none'}; clock: {fusion.clock}")
    lines += [f"slot {shown(name)}: {slot.role}" for name, slot in fusion.slots.items()]
    for source in fusion.sources.values():
        words = ", ".join(map(shown, source.trigger_words)) or "not stated"
        licence = shown(source.license or "not stated")
        lines.append(f"{shown(source.file)}: trigger words: {words}; licence: {licence}")
    return "\n".join(lines)
