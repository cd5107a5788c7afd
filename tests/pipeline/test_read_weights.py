"""Pipelines with layers whose weight their parent reads: merged right, and no branch is skipped.

HunyuanDiT pools its text so. FIR resampling has such a convolution, which none of diffusers'
UNets asks for: their FIR blocks take a branch on every layer that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_pipelines import noise
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    UNet2DModel,
)
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.upsampling import FirUpsample2D
from reference import KLora, sampling
from support.families import ATTENTION, STEPS, FamilyCase, assembled, lora_files, square
from support.generation import LEAST_EFFECT, TOLERANCE
from support.handmade import delta_of, hand_entry, hand_fusion
from support.pairs import slow
from tiny_pipeline import SD_BETAS, relative_difference
from torch import nn

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers.branch import Branch
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.targets import find_targets
from klora_runtime.pipeline.host import PipelineHost

POOLER = ("pooler.q_proj", "pooler.k_proj", "pooler.v_proj", "pooler.c_proj")
CLIP_TOKENS, T5_TOKENS, WIDTH = 77, 16, 16


def hunyuan_dit() -> Any:
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        text_len=CLIP_TOKENS,
        text_len_t5=T5_TOKENS,
    )
    return assembled(
        HunyuanDiTPipeline,
        transformer,
        DDIMScheduler(**SD_BETAS, prediction_type="v_prediction"),
        2,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text() -> dict[str, torch.Tensor]:
    embeddings = {}
    for seed, sign in enumerate(("", "negative_")):
        for end, tokens in (("", CLIP_TOKENS), ("_2", T5_TOKENS)):
            embeddings[f"{sign}prompt_embeds{end}"] = noise(1, tokens, WIDTH, seed=seed)
            mask = torch.ones(1, tokens, dtype=torch.long)
            embeddings[f"{sign}prompt_attention_mask{end}"] = mask
    return embeddings


HUNYUAN_DIT = FamilyCase(
    "HunyuanDiT",
    hunyuan_dit,
    {**text(), **square(64), "use_resolution_binning": False},
    (*ATTENTION, *POOLER),
)


def fir() -> Any:
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        attention_head_dim=8,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    return DDPMPipeline(unet, DDIMScheduler(**SD_BETAS))


def pictures(pipe: Any, **arguments: Any) -> Sequence[torch.Tensor]:
    return [torch.from_numpy(pipe(output_type="np", **arguments).images)]


FIR = FamilyCase(
    "FIR", fir, {}, ("to_q", "to_v", "conv1", "conv2"), {"unet": range(STEPS)}, call=pictures
)


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (HUNYUAN_DIT, "merge"),
        slow(HUNYUAN_DIT, "auto"),
        slow(replace(HUNYUAN_DIT, modules=ATTENTION), "branch"),
        slow(FIR, "branch"),
    ],
    ids=str,
)
def test_latents_equal_the_reference(case: FamilyCase, mode: str, tmp_path: Path) -> None:
    pipe = case.pipeline()
    files = lora_files(pipe, case, tmp_path)
    fusion = compile_fusion(*files, device="cpu")
    bare = case.generate(pipe)
    (denoiser,) = case.ran
    with sampling(pipe, KLora(*files), case.progress(denoiser)):
        expected = case.generate(pipe)
    with apply_fusion(pipe, fusion, mode=mode) as handle:
        assert handle.report().mode == ("merge" if mode == "auto" else mode)
        assert relative_difference(case.generate(pipe), expected) <= TOLERANCE
    assert torch.equal(case.generate(pipe), bare)
    assert relative_difference(expected, bare) >= LEAST_EFFECT


def test_a_branch_on_the_pooling_is_refused(tmp_path: Path) -> None:
    pipe = HUNYUAN_DIT.pipeline()
    fusion = compile_fusion(*lora_files(pipe, HUNYUAN_DIT, tmp_path), device="cpu")
    with pytest.raises(IncompatibleModelError, match="its parent module reads the weight") as e:
        apply_fusion(pipe, fusion, mode="branch")
    named = {issue.partition(":")[0].partition("pooler")[2] for issue in e.value.issues}
    assert named == {".q_proj", ".k_proj", ".v_proj", ".c_proj"}


@pytest.mark.parametrize("resample", [FirDownsample2D, FirUpsample2D])
def test_the_convolution_of_fir_resampling(resample: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"fir": resample(4, 4, use_conv=True)})
    entry = hand_entry("unet.fir.Conv2d_0", (4, 4, 3, 3), switch=None)
    targets = find_targets({"unet": model}, hand_fusion(entry), PipelineHost())
    with pytest.raises(IncompatibleModelError, match="its parent module reads the weight"):
        Branch(targets)

    x, fir = noise(1, 4, 8, 8), model["fir"]
    bare = fir(x)
    merge = Merge(targets)
    merge.write(0.0, {})
    found = fir(x)
    merge.release()
    assert torch.equal(fir(x), bare)
    fir.Conv2d_0.weight.data += delta_of(entry, "content").float()
    torch.testing.assert_close(found, fir(x))
    assert not torch.allclose(found, bare)
