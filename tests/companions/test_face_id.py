"""An IP-Adapter that brings LoRAs of its own, as FaceID does: refused by name, or fused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bare_pipelines import noise
from reference import KLora, sampling
from support.companions import COMPANIONS
from support.companions.ip_adapters import EMBEDDINGS, weights_for_unet
from support.families import lora_files
from support.generation import TOLERANCE
from tiny_pipeline import relative_difference

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError, InUseError

pytest.importorskip("peft", reason="peft is not installed")

IP_ADAPTER = next(each for each in COMPANIONS if each.name == "IP-Adapter")


def face_id(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    weights = weights_for_unet(unet)
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        layers = {part: getattr(attention, f"to_{part}") for part in ("q", "k", "v")}
        for part, layer in {**layers, "out": attention.to_out[0]}.items():
            down, up = noise(2, layer.in_features, seed=index), noise(layer.out_features, 2)
            weights["ip_adapter"][f"{index}.to_{part}_lora.down.weight"] = 0.1 * down
            weights["ip_adapter"][f"{index}.to_{part}_lora.up.weight"] = 0.1 * up
    return weights


def load(pipe: Any) -> None:
    pipe.load_ip_adapter(face_id(pipe.unet), None, "", image_encoder_folder=None)


def with_faces(pipe: Any) -> torch.Tensor:
    arguments = {**IP_ADAPTER.case.arguments, "ip_adapter_image_embeds": [EMBEDDINGS]}
    generator = torch.Generator().manual_seed(7)
    return pipe(  # type: ignore[no-any-return]
        num_inference_steps=4, output_type="latent", generator=generator, **arguments
    ).images


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return lora_files(IP_ADAPTER.case.pipeline(), IP_ADAPTER.case, tmp_path)


@pytest.fixture
def fusion(files: tuple[Path, Path]) -> Fusion:
    return compile_fusion(*files, device="cpu")


def test_after_a_fusion_it_is_refused(fusion: Fusion) -> None:
    pipe = IP_ADAPTER.case.pipeline()
    with apply_fusion(pipe, fusion):
        fused = IP_ADAPTER.generate(pipe)
        with pytest.raises(InUseError, match="load_lora_weights is not possible"):
            load(pipe)
        pipe.unload_ip_adapter()
        assert torch.equal(IP_ADAPTER.generate(pipe), fused)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_its_loras_may_be_fused_first(mode: str, fusion: Fusion, files: tuple[Path, Path]) -> None:
    pipe = IP_ADAPTER.case.pipeline()
    load(pipe)
    with pytest.raises(IncompatibleModelError, match=r"after pipe\.fuse_lora\(\)"):
        apply_fusion(pipe, fusion, mode=mode)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    alone = with_faces(pipe)
    with sampling(pipe, KLora(*files), [(step + 0.5) / 4 for step in range(4)]):
        expected = with_faces(pipe)
    with apply_fusion(pipe, fusion, mode=mode):
        assert relative_difference(with_faces(pipe), expected) <= TOLERANCE
    assert torch.equal(with_faces(pipe), alone)
