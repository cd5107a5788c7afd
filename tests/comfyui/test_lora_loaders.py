"""ComfyUI's own nodes that load LoRAs, beside *Load fusion* and *Apply fusion* in one graph."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, Comfy, pack
from support.comfyui.literal import error, flux_fusion, literally, storable

from klora_runtime import save_fusion

pytestmark = pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)

STEPS = 4
BYPASS = "comfy_extras.nodes_lora_debug"
#: Layers of the LoRA files; most of them are the fusion's too.
LAYERS = {
    "img_in": (32, 64),
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.proj": (32, 32),
    "single_blocks.0.linear1": (224, 32),
    "single_blocks.0.linear2": (32, 160),
}
#: File -> strength in the graph; the first is an accelerator.
STRENGTHS = {"turbo.safetensors": 1.0, "ink.safetensors": -0.6}


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    return Comfy()


@pytest.fixture
def folders(comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of models, with an artifact and two LoRAs."""
    import folder_paths

    fusion = storable(flux_fusion())
    named = {
        "klora": ([str(tmp_path / "klora")], {".safetensors"}),
        "loras": ([str(tmp_path / "loras")], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", named)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for name in named:
        (tmp_path / name).mkdir()
    save_fusion(fusion, tmp_path / "klora" / "fox.klora.safetensors")
    for seed, name in enumerate(STRENGTHS):
        save_file(lora(seed), tmp_path / "loras" / name)
    return tmp_path


def lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA in the names of kohya's trainers, of rank 4 and alpha 2."""
    generator = torch.Generator().manual_seed(seed)
    file = {}
    for module, (out, inner) in LAYERS.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        file[f"{name}.lora_down.weight"] = 0.4 * torch.randn(4, inner, generator=generator)
        file[f"{name}.lora_up.weight"] = 0.4 * torch.randn(out, 4, generator=generator)
        file[f"{name}.alpha"] = torch.tensor(2.0)
    return file


def with_loras(model: Any) -> Any:
    """The model with the numbers of both LoRAs in its weights."""
    for seed, strength in enumerate(STRENGTHS.values()):
        file = lora(seed)
        for module in LAYERS:
            name = f"lora_unet_{module.replace('.', '_')}"
            delta = file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
            weight = model.diffusion_model.get_parameter(f"{module}.weight")
            weight.data += strength * 0.5 * delta
    return model


def load_lora(kind: str, model: Any, file: str) -> Any:
    """Run a node of ComfyUI that loads a LoRA."""
    if kind.startswith("LoraLoaderBypass"):
        if importlib.util.find_spec(BYPASS) is None:
            pytest.skip("this version of ComfyUI has no Load LoRA (Bypass)")
        node = getattr(importlib.import_module(BYPASS), kind)()
    else:
        import nodes

        node = getattr(nodes, kind)()
    strength = STRENGTHS[file]
    if kind.endswith("ModelOnly"):
        return node.load_lora_model_only(model, file, strength)[0]
    return node.load_lora(model, None, file, strength, strength)[0]


def fused(model: Any) -> Any:
    """Run klora's nodes: load and apply."""
    listed = asyncio.run(asyncio.run(pack().comfy_entrypoint()).get_node_list())
    load, apply = listed[:2]
    (fusion,) = load.execute(artifact="fox.klora.safetensors").result
    return apply.execute(model=model, fusion=fusion, style=0.7).result[0]


def load_first(model: Any, kinds: tuple[str, str]) -> Any:
    return load_lora(kinds[0], model, "turbo.safetensors")


def load_second(model: Any, kinds: tuple[str, str]) -> Any:
    return load_lora(kinds[1], model, "ink.safetensors")


def fuse(model: Any, kinds: tuple[str, str]) -> Any:
    return fused(model)


ORDERS = {
    "LoRAs first": (load_first, load_second, fuse),
    "fusion between": (load_first, fuse, load_second),
    "fusion first": (fuse, load_first, load_second),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kinds",
    [
        ("LoraLoader", "LoraLoaderModelOnly"),
        ("LoraLoaderBypassModelOnly", "LoraLoader"),
        ("LoraLoader", "LoraLoaderBypass"),
    ],
    ids="-".join,
)
def test_a_fusion_stands_among_comfyui_s_own_loaders(
    comfy: Comfy, folders: Path, kinds: tuple[str, str], order: str
) -> None:
    """An accelerator and another LoRA by their loaders, before and after the fusion."""
    plain = comfy.patcher(comfy.flux())
    bare = comfy.sample(plain, steps=STEPS)
    model = plain
    for step in ORDERS[order]:
        model = step(model, kinds)
    found = comfy.sample(model, steps=STEPS)

    twin = comfy.patcher(with_loras(comfy.flux()))
    progress = [(step + 0.5) / STEPS for step in range(STEPS)]
    expected = literally(
        comfy,
        twin,
        [(flux_fusion(), {"style": 0.7})],
        comfy.places("flux", twin.model),
        progress,
        steps=STEPS,
    )
    alone = comfy.sample(twin, steps=STEPS)
    assert error(found, expected) < 1e-5
    assert error(alone, expected) > 1e-2
    assert error(bare, expected) > 1e-2
    assert torch.equal(comfy.sample(model, steps=STEPS), found)
    assert torch.equal(comfy.sample(plain, steps=STEPS), bare)
