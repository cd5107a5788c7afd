"""The example workflow, executed by ComfyUI from the loaders to the picture."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, PACK, Comfy, pack
from support.comfyui.literal import Literal, constant, storable, unchanged, whole_delta
from support.handmade import hand_entry, hand_fusion

from klora_runtime import save_fusion

pytestmark = pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)

WORKFLOW = PACK / "example_workflows" / "fusion.json"
SIDE, STEPS = 64, 4
APPLY = "KloraApplyFusion"
#: Component -> ComfyUI's name of the encoder.
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    return Comfy()


def fusion() -> Any:
    """Some layers of the denoiser and of both text encoders."""
    shapes = {
        "conv_in": (32, 4, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
        "up_blocks.0.attentions.0.proj_in": (128, 128),
        "conv_out": (4, 32, 3, 3),
    }
    layers = [
        hand_entry(f"unet.{path}", shape, switch=0.2 + 0.2 * i, size=0.3, seed=i)
        for i, (path, shape) in enumerate(shapes.items())
    ]
    texts = [
        constant(hand_entry(f"{encoder}.encoder.layers.0.mlp.fc1", (24, 12), size=0.3, seed=9))
        for encoder in ("text_encoder", "text_encoder_2")
    ]
    return storable(hand_fusion(*layers, *texts, family="sdxl"))


@pytest.fixture
def prompt(
    comfy: Comfy, patcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The workflow on a tiny checkpoint, with its files, and pictures of 64 pixels."""
    import folder_paths
    import nodes
    from support.comfyui.checkpoint import loader
    from support.comfyui.workflow import prompt_of

    named = {
        name: ([str(tmp_path / name)], {".safetensors"})
        for name in ("klora", "loras", "checkpoints")
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", named)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for name in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    for name in (*named, "output", "temp"):
        (tmp_path / name).mkdir()
    save_fusion(fusion(), tmp_path / "klora" / "fox-in-ink.klora.safetensors")
    save_file(lora(), tmp_path / "loras" / "another.safetensors")
    listed = asyncio.run(asyncio.run(pack().comfy_entrypoint()).get_node_list())
    own = {node.GET_SCHEMA().node_id: node for node in listed}
    own["CheckpointLoaderSimple"] = loader(patcher, ["sd_xl_base_1.0.safetensors"])
    for name, node in own.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    made = prompt_of(json.loads(WORKFLOW.read_text()), nodes.NODE_CLASS_MAPPINGS)
    of_class(made, "EmptyLatentImage").update(width=SIDE, height=SIDE)
    of_class(made, "KSampler").update(steps=STEPS)
    return made


@pytest.fixture
def patcher(comfy: Comfy) -> Any:
    from support.comfyui.tiny import tiny_model

    return comfy.patcher(tiny_model("sdxl"))


def lora() -> dict[str, torch.Tensor]:
    name = "lora_unet_input_blocks_4_1_proj_in"
    return {f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": _up()}


def _up() -> torch.Tensor:
    return 0.02 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))


def of_class(prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """The inputs of the node of a class."""
    found: dict[str, Any] = next(
        node["inputs"] for node in prompt.values() if node["class_type"] == name
    )
    return found


def drawn(prompt: dict[str, Any], folder: Path) -> numpy.ndarray[Any, Any]:
    """Execute a prompt and return the picture that it saves."""
    from support.comfyui.workflow import run

    executor = run(prompt)
    assert executor.success, executor.status_messages[-1]
    *_, last = sorted(folder.glob("output/klora_*.png"))
    return numpy.asarray(Image.open(last)).astype(float)


class Literally:
    """A node in place of *Apply fusion*: every weight is computed anew before each evaluation."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "fusion": ("KLORA_FUSION",), "clip": ("CLIP",)}}

    def apply(self, model: Any, fusion: Any, clip: Any) -> tuple[Any, Any]:
        from support.comfyui.tiny import numbers_of

        progress = [(step + 0.5) / STEPS for step in range(STEPS)]
        literal = Literal(model.model, [(fusion, {})], numbers_of("sdxl"), progress)
        own, new_clip = model.clone(), clip.clone()
        own.add_wrapper_with_key("predict_noise", "literal", literal)
        for entry in fusion.entries:
            if entry.component in ENCODERS:
                row = entry.timeline.at(0.0)
                delta = sum(row[slot] * whole_delta(entry, slot) for slot in entry.factors)
                name = f"{ENCODERS[entry.component]}.transformer.text_model.{entry.module}.weight"
                assert new_clip.add_patches({name: ("diff", (delta.float(),))}, 1.0) == [name]
        return own, new_clip


def test_the_example_workflow_draws_a_picture(
    prompt: dict[str, Any], patcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nodes

    with unchanged(patcher.model):
        picture = drawn(prompt, tmp_path)
        of_class(prompt, APPLY).update(enabled=False)
        without = drawn(prompt, tmp_path)
        of_class(prompt, APPLY).update(enabled=True)
        again = drawn(prompt, tmp_path)
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, APPLY, Literally)
        expected = drawn(prompt, tmp_path)
        patcher.detach()
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 1
    assert numpy.array_equal(picture, again)
    assert abs(picture - without).mean() > 1
    assert abs(picture - expected).mean() < 0.05  # of 255
    drawn_map = Image.open(next(tmp_path.glob("temp/*.png")))
    assert drawn_map.size[0] > 700


def test_the_executor_tells_the_error_of_a_node(prompt: dict[str, Any], tmp_path: Path) -> None:
    from support.comfyui.workflow import run

    of_class(prompt, APPLY).update(weights="turbo=1")
    executor = run(prompt)
    event, told = executor.status_messages[-1]
    assert (executor.success, event) == (False, "execution_error")
    assert told["node_type"] == APPLY
    assert "there is no slot turbo; this fusion has content, style" in told["exception_message"]
    assert not list(tmp_path.glob("output/*"))
