"""What cannot be applied is refused in words that help, and not one bit or attribute moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from support.applying import Apply
from support.generation import TWO_STEPS, Case, build, generate
from support.handmade import ATTENTION, CROSS_ATTENTION, State, fusion_for, hand_entry, hand_fusion
from tiny_pipeline import tiny_lora
from torch import nn

from klora_runtime import apply_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, KloraError
from klora_runtime.pipeline.handle import FusionHandle

TO_Q, TO_K = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k"))
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
SQUARE = (32, 32)

NOT_MERGEABLE = (
    "these weights cannot be merged into; nothing was changed. Use mode='branch', or load the "
    "model unquantised in float32, float16 or bfloat16."
)


def refused(
    pipe: Any, kind: type[KloraError], apply: Callable[[], Any]
) -> tuple[str, tuple[str, ...]]:
    """The first line of the error and its issues; nothing may have changed."""
    before = State.of(pipe)
    with pytest.raises(kind) as error:
        apply()
    assert type(error.value) is kind
    assert State.of(pipe) == before
    headline, *listed = str(error.value).split("\n  - ")
    assert tuple(listed[:8]) == error.value.issues[:8]
    return headline, error.value.issues


# The fusion is of another model.


def test_a_missing_module(pipe: Any) -> None:
    fusion = hand_fusion(hand_entry(TO_Q, SQUARE), hand_entry("unet.down_blocks.7.to_q", SQUARE))

    headline, issues = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "1 of 2 layers of the fusion do not fit UNet2DConditionModel; nothing was changed. To "
        'apply the others, add missing="skip" (klora sample: --missing skip).'
    )
    assert issues == ("unet.down_blocks.7.to_q: there is no such module",)


def test_another_shape_and_another_kind_of_module(pipe: Any) -> None:
    fusion = hand_fusion(
        hand_entry(TO_Q, (48, 32)),
        hand_entry(TO_K, SQUARE),
        hand_entry("unet.conv_norm_out", SQUARE),
        hand_entry(TEXT, (32, 32, 3, 3)),
    )

    headline, issues = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "3 of 4 layers of the fusion do not fit CLIPTextModel, UNet2DConditionModel; nothing was "
        "changed."
    )
    assert issues == (
        f"{TEXT}: weight has shape [32, 32], expected [32, 32, 3, 3]",
        "unet.conv_norm_out: is a GroupNorm, expected one of Linear, Conv1d, Conv2d, Conv3d, "
        "Embedding",
        f"{TO_Q}: weight has shape [32, 32], expected [48, 32]",
    )


def test_no_match_at_all_and_a_long_list(pipe: Any) -> None:
    entries = [hand_entry(f"unet.block.{i}.to_q", SQUARE) for i in range(12)]

    headline, issues = refused(
        pipe, IncompatibleModelError, lambda: apply_fusion(pipe, hand_fusion(*entries))
    )

    assert headline == "no layer of the fusion fits UNet2DConditionModel; nothing was changed."
    assert len(issues) == 12
    with pytest.raises(IncompatibleModelError) as error:
        apply_fusion(pipe, hand_fusion(*entries))
    assert str(error.value).count("\n  - ") == 9
    assert str(error.value).endswith("\n  - … and 4 more")


@pytest.mark.parametrize(
    ("family", "width", "name"),
    [
        ("sd1", 768, "Stable Diffusion 1.x"),
        ("sd2", 1024, "Stable Diffusion 2.x"),
        ("sdxl", 2048, "Stable Diffusion XL"),
    ],
)
def test_another_family(family: str, width: int, name: str, pipe: Any) -> None:
    other_width, other_name = (2048, "Stable Diffusion XL")
    if family == "sdxl":
        other_width, other_name = (768, "Stable Diffusion 1.x")
    leaf = f"{CROSS_ATTENTION}.to_k"
    pipe.unet.get_submodule(CROSS_ATTENTION).to_k = nn.Linear(other_width, 32, bias=False)
    fusion = hand_fusion(
        hand_entry(TO_Q, SQUARE), hand_entry(f"unet.{leaf}", (32, width)), family=family
    )

    headline, issues = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "1 of 2 layers of the fusion do not fit UNet2DConditionModel; nothing was changed. It was "
        f"compiled for {name}, this is {other_name}: load a matching model, or compile LoRAs of "
        "this one."
    )
    assert issues == (f"unet.{leaf}: weight has shape [32, {other_width}], expected [32, {width}]",)


@pytest.mark.parametrize(
    ("families", "said"),
    [
        (("sd1", "sd2"), "one of Stable Diffusion 1.x, Stable Diffusion 2.x"),
        (("sd1", "sdxl"), None),
    ],
)
def test_a_fusion_of_several_families(
    families: tuple[str, ...], said: str | None, pipe: Any
) -> None:
    """On one of them, nothing more is said than which layers do not fit."""
    leaf = f"{CROSS_ATTENTION}.to_k"
    pipe.unet.get_submodule(CROSS_ATTENTION).to_k = nn.Linear(2048, 32, bias=False)
    fusion = replace(hand_fusion(hand_entry(f"unet.{leaf}", (32, 768))), families=families)

    headline, _ = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    told = f" It was compiled for {said}, this is Stable Diffusion XL: load a matching model"
    assert (told in headline) == (said is not None)
    assert ("compiled for" in headline) == (said is not None)


def test_a_component_that_the_pipeline_does_not_have(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q, TEXT])
    pipe.text_encoder = None

    headline, _ = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "this StableDiffusionPipeline has no text_encoder, but the fusion changes it. Leave it out "
        "with components=['unet'], or compile with --text-encoder none."
    )
    apply_fusion(pipe, fusion, components=["unet"]).remove()


def test_a_denoiser_that_the_pipeline_does_not_have(pipe: Any) -> None:
    fusion = hand_fusion(hand_entry("transformer.to_q", SQUARE))

    headline, _ = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "this StableDiffusionPipeline has no transformer, but the fusion changes it. Load the full "
        "pipeline."
    )


def test_a_pipeline_without_a_scheduler(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q])
    pipe.scheduler = None

    headline, _ = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "StableDiffusionPipeline has no pipe.scheduler, and the fusion switches layers by it; use "
        "a pipeline with one scheduler."
    )
    apply_fusion(pipe, fusion_for(pipe, [TO_Q], switch=None)).remove()  # this one does not


def test_a_scheduler_is_only_needed_by_components_that_switch(pipe: Any) -> None:
    text = hand_entry(TEXT, SQUARE, switch=None)
    fusion = hand_fusion(hand_entry(TO_Q, SQUARE), text)
    pipe.scheduler = None

    apply_fusion(pipe, fusion, components=["text_encoder"]).remove()


# Something else is on the model.


ALREADY = (
    "unet already carries a fusion; call .remove() on its handle, or "
    ".swap(other) to change what it carries. (The handle is this error's .handle.)"
)


def test_applying_twice(pipe: Any, fusion: Fusion) -> None:
    handle = apply_fusion(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)

    again = fusion_for(pipe, [TO_Q])
    headline, _ = refused(pipe, InUseError, lambda: apply_fusion(pipe, again))

    assert headline == ALREADY
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
    apply_fusion(pipe, fusion).remove()


def test_applying_to_a_pipeline_that_shares_the_denoiser(pipe: Any, fusion: Fusion) -> None:
    apply_fusion(pipe, fusion)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)

    again = fusion_for(pipe, [TO_Q])
    headline, _ = refused(other, InUseError, lambda: apply_fusion(other, again))

    assert headline == ALREADY


@pytest.mark.parametrize("active", [True, False])
def test_peft_adapters(active: bool, pipe: Any, fusion: Fusion, tmp_path: Path) -> None:
    lora = tiny_lora(pipe, tmp_path / "lora.safetensors", seed=9, modules=("to_q",))
    pipe.load_lora_weights(str(lora))
    if not active:
        pipe.disable_lora()

    headline, issues = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == (
        "unet carries PEFT adapters on 8 modules, active or not, and they would share "
        "these modules with the fusion. Call pipe.unload_lora_weights() first (after "
        "pipe.fuse_lora(), to keep their effect)."
    )
    assert issues[0] == TO_Q
    pipe.unload_lora_weights()
    apply_fusion(pipe, fusion).remove()


def test_a_lora_that_was_fused_before_stays(
    apply: Apply, pipe: Any, fusion: Fusion, tmp_path: Path
) -> None:
    """A distilled model's LoRA under the fusion."""
    lora = tiny_lora(pipe, tmp_path / "lora.safetensors", seed=9, modules=("to_q",))
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = generate(pipe, TWO_STEPS)

    handle = apply(pipe, fusion)
    found = generate(pipe, TWO_STEPS)

    handle.set(content=0, style=0)
    assert torch.equal(generate(pipe, TWO_STEPS), fused)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), fused)
    assert not torch.equal(found, fused)


def test_fused_projections(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q, TO_K])
    pipe.fuse_qkv_projections()

    headline, issues = refused(pipe, IncompatibleModelError, lambda: apply_fusion(pipe, fusion))

    assert headline == ("no layer of the fusion fits UNet2DConditionModel; nothing was changed.")
    advice = (
        "is unused since fuse_qkv_projections(); call pipe.unfuse_qkv_projections(), apply the "
        "fusion, and leave the projections apart"
    )
    assert issues == (f"{TO_K}: {advice}", f"{TO_Q}: {advice}")
    pipe.unfuse_qkv_projections()
    apply_fusion(pipe, fusion).remove()


# Weights that cannot be written.


def merge(pipe: Any, fusion: Fusion) -> FusionHandle:
    return apply_fusion(pipe, fusion, mode="merge")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_an_unsuitable_dtype(dtype: torch.dtype, pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q, TO_K])
    pipe.unet.get_submodule(ATTENTION).to_q.to(dtype)

    headline, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert headline == NOT_MERGEABLE
    assert issues == (f"{TO_Q}: its weight is {dtype}",)


def test_the_meta_device(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q, TO_K])
    pipe.unet.get_submodule(ATTENTION).to_q.to("meta")

    headline, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert headline == NOT_MERGEABLE
    assert issues == (
        f"{TO_Q}: its weight has no memory (meta device): sequential offloading is on",
    )


def test_a_weight_that_is_no_plain_tensor(pipe: Any) -> None:
    class Packed(torch.Tensor):
        pass

    fusion = fusion_for(pipe, [TO_Q])
    module = pipe.unet.get_submodule(ATTENTION).to_q
    packed = module.weight.data.as_subclass(Packed)
    module.weight = nn.Parameter(packed, requires_grad=False)

    headline, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert headline == NOT_MERGEABLE
    assert issues == (f"{TO_Q}: its weight is a Packed, not a plain tensor",)


def test_a_weight_with_holes(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q])
    module = pipe.unet.get_submodule(ATTENTION).to_q
    module.weight.data = torch.randn(32, 64)[:, ::2]

    _, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert issues == (f"{TO_Q}: its weight is not a dense strided tensor",)


@pytest.mark.parametrize("both_adapted", [True, False])
@pytest.mark.parametrize("how", ["one parameter", "one storage"])
def test_a_weight_that_shares_its_memory(how: str, both_adapted: bool, pipe: Any) -> None:
    """Writing one layer would change the other."""
    fusion = fusion_for(pipe, [TO_Q, TO_K] if both_adapted else [TO_Q])
    attention = pipe.unet.get_submodule(ATTENTION)
    if how == "one parameter":
        attention.to_k.weight = attention.to_q.weight
    else:
        attention.to_k.weight.data = attention.to_q.weight.data

    headline, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert headline == NOT_MERGEABLE
    assert issues[-1] == f"{TO_Q}: it shares its weight's memory with another layer"
    assert len(issues) == 1 + both_adapted


def test_group_offloading(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q])
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )

    _, issues = refused(pipe, IncompatibleModelError, lambda: merge(pipe, fusion))

    assert issues == (
        f"{TO_Q}: group offloading keeps its own copy of the weight; switch it off first",
    )


# Arguments.


def test_an_unknown_mode(pipe: Any, fusion: Fusion) -> None:
    headline, _ = refused(pipe, ConfigError, lambda: apply_fusion(pipe, fusion, mode="fuse"))

    assert headline == "mode='fuse': expected one of auto, merge, branch."


def test_unknown_components(pipe: Any, fusion: Fusion) -> None:
    def apply(*components: str) -> str:
        with_them = lambda: apply_fusion(pipe, fusion, components=components)  # noqa: E731
        return refused(pipe, ConfigError, with_them)[0]

    assert apply("unet", "vae") == (
        "components=['unet', 'vae']: the fusion changes text_encoder, unet, not vae."
    )
    with pytest.raises(ConfigError, match=r"components='unet': expected a list, \['unet'\]\."):
        apply_fusion(pipe, fusion, components="unet")
    assert apply() == "components=[]: the fusion changes text_encoder, unet; name at least one."


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 101, "0.5", None, 1j])
def test_a_weight_that_is_out_of_range(weight: Any, pipe: Any, fusion: Fusion) -> None:
    expected = f"weight of style: expected a number from -100 to 100, found {weight!r}."

    headline, _ = refused(
        pipe, ConfigError, lambda: apply_fusion(pipe, fusion, weights={"style": weight})
    )
    assert headline == expected
    handle = apply_fusion(pipe, fusion)
    headline, _ = refused(pipe, ConfigError, lambda: handle.set(content=0.5, style=weight))
    assert headline == expected
    assert handle.report().weights == {"content": 1.0, "style": 1.0}


def test_arguments_of_another_kind(pipe: Any, fusion: Fusion) -> None:
    with pytest.raises(ConfigError, match=r"weights=\[1\]: expected slot names"):
        apply_fusion(pipe, fusion, weights=[1])  # type: ignore[arg-type]
    handle = apply_fusion(pipe, fusion)
    with pytest.raises(ConfigError, match=r"weights=0\.5: expected slot names"):
        handle.set(0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"enabled='no': expected True or False\."):
        handle.enabled = "no"  # type: ignore[assignment]
    assert handle.enabled


@pytest.mark.parametrize("applied", [False, True])
def test_a_device_is_for_a_path(applied: bool, pipe: Any, fusion: Fusion, tmp_path: Path) -> None:
    path = tmp_path / "a.klora.safetensors"
    save_fusion(fusion, path)
    use: Callable[..., Any] = functools.partial(apply_fusion, pipe)
    if applied:
        use = apply_fusion(pipe, path, device="cpu").swap

    headline, _ = refused(pipe, ConfigError, lambda: use(path, device="meta"))
    assert headline.startswith("device meta: holds no numbers; expected auto, cpu, cuda")
    headline, _ = refused(pipe, ConfigError, lambda: use(fusion, device=torch.device("cpu")))
    assert headline == (
        "device='cpu' is for a path, and this fusion is loaded already; leave it out, or load the "
        "file with load_fusion(path, device=...)."
    )


def test_an_unknown_slot(pipe: Any, fusion: Fusion) -> None:
    expected = "there is no slot object; this fusion has content, style."

    headline, _ = refused(
        pipe, ConfigError, lambda: apply_fusion(pipe, fusion, weights={"object": 1.0})
    )
    assert headline == expected
    handle = apply_fusion(pipe, fusion)
    headline, _ = refused(pipe, ConfigError, lambda: handle.set(content=0.5, object=1.0))
    assert headline == expected
    assert handle.report().weights == {"content": 1.0, "style": 1.0}


# The pipeline while a fusion is on it.


def test_replacing_the_denoiser(pipe: Any, fusion: Fusion) -> None:
    handle = apply_fusion(pipe, fusion)
    unet, other = pipe.unet, build(Case(2)).unet

    def replace() -> None:
        pipe.unet = other

    headline, _ = refused(pipe, InUseError, replace)

    assert headline == (
        "pipe.unet carries a fusion and cannot be replaced; call .remove() on the handle first, "
        "then apply the fusion to the new one."
    )
    assert pipe.unet is unet
    pipe.vae = pipe.vae  # what carries nothing may be assigned
    pipe.unet = unet
    handle.remove()
    replace()
    assert pipe.unet is other
