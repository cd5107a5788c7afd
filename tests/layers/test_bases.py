"""Bases that cannot be merged into: mode branch works there, merge refuses, auto knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from support.bases import BASES, REFUSED, Base, Refused, denoiser, denoiser_name, torchao_int8
from support.families import (
    FLUX_PROMPT,
    POOLED,
    WIDTH,
    FamilyCase,
    assembled,
    flow_scheduler,
    lora_files,
    square,
)
from support.handmade import State, delta_of, hand_entry, hand_fusion
from support.pairs import slow, some_pairs
from support.sd_families import UNETS
from tiny_pipeline import relative_difference, tiny_lora
from torch import nn

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.choice import choose
from klora_runtime.layers.targets import find_targets


def wide_flux() -> Any:
    """Wide enough for blocks of 32 numbers."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    return assembled(FluxPipeline, transformer, scheduler, 2, vae=None)


_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in", "proj_out", "q_proj")

SD1 = replace(UNETS[0], modules=_LAYERS, arguments={**UNETS[0].arguments, "guidance_scale": 1.0})
FLUX = FamilyCase("FLUX.1", wide_flux, {**FLUX_PROMPT, **square(64)}, _LAYERS)


@pytest.fixture(scope="module")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fusion]:
    """By family: of linear layers and convolutions of the denoiser, and of text encoders."""
    found = {}
    for case in (SD1, FLUX):
        files = lora_files(case.pipeline(), case, tmp_path_factory.mktemp("loras"))
        found[case.name] = compile_fusion(*files, device="cpu")
    return found


@contextmanager
def literally_added(
    pipe: Any, fusion: Fusion, case: FamilyCase, components: Collection[str]
) -> Iterator[None]:
    """Let each layer add its low-rank output in float32, as its timeline says."""
    moments, now = iter(case.progress(denoiser_name(pipe))), [0.0]

    def before(module: Any, args: Any) -> None:
        now[0] = next(moments)

    def add_to(entry: Entry) -> Any:
        def after(module: Any, args: Any, result: torch.Tensor) -> torch.Tensor:
            x, total = args[0].float(), result.float()
            for slot, coefficient in entry.timeline.at(now[0]).items():
                if coefficient:
                    stored = entry.factors[slot]
                    size = coefficient * stored.scale
                    total = total + size * product(module, x, *stored.delta.tensors)
            return total.to(result.dtype)

        return after

    hooks = [denoiser(pipe).register_forward_pre_hook(before)]
    hooks += [
        getattr(pipe, entry.component)
        .get_submodule(entry.module)
        .register_forward_hook(add_to(entry))
        for entry in fusion.entries
        if entry.acts and entry.component in components
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def product(module: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, nn.Conv2d):
        return x @ down.flatten(1).T @ up.flatten(1).T
    down, up = (f if f.dim() == 4 else f[:, :, None, None] for f in (down, up))
    inner = nn.functional.conv2d(x, down, None, module.stride, module.padding)
    return nn.functional.conv2d(inner, up)


def in_dtype(case: FamilyCase, dtype: torch.dtype) -> FamilyCase:
    """A case whose embeddings have a dtype; where there are prompts, text encoders see to it."""
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments.items()
    }
    return replace(case, arguments=arguments)


def prepared(base: Base, case: FamilyCase) -> Any:
    pipe = case.pipeline().to(base.dtype)
    base.prepare(pipe)
    return pipe


def marks(base: Base) -> Any:
    return pytest.mark.slow if base.is_variant else ()


def each(bases: Iterable[Base]) -> list[Any]:
    """As parameters of a test."""
    return [pytest.param(base, marks=marks(base)) for base in bases]


def insides(pipe: Any) -> dict[str, Any]:
    """Class and attributes of all modules; of those that a fusion changes, each very object."""
    found: dict[str, Any] = {}
    for path, module in denoiser(pipe).named_modules():
        attributes: Any = sorted(vars(module))
        if isinstance(module, nn.Linear | nn.Conv2d):
            attributes = {name: id(value) for name, value in vars(module).items()}
        found[path] = type(module), attributes
    return found


def attention_of(fusion: Fusion, component: str) -> set[str]:
    return {
        entry.layer
        for entry in fusion.entries
        if entry.acts and entry.component == component and ".attn" in entry.module
    }


@pytest.mark.parametrize(
    ("base", "case"),
    [
        *(pytest.param(base, SD1, marks=marks(base)) for base in BASES),
        *some_pairs([base for base in BASES if base.on_flux], [FLUX]),
    ],
    ids=str,
)
def test_branch_adds_what_the_factors_say(
    base: Base, case: FamilyCase, fusions: dict[str, Fusion]
) -> None:
    case, fusion, pipe = in_dtype(case, base.dtype), fusions[case.name], prepared(base, case)
    components = [denoiser_name(pipe)]
    bare = case.generate(pipe)
    with literally_added(pipe, fusion, case, components):
        expected = case.generate(pipe)
    before = insides(pipe)

    handle = apply_fusion(pipe, fusion, mode="branch", components=components)
    found = case.generate(pipe)

    assert relative_difference(found, expected) <= base.tolerance
    assert relative_difference(bare, expected) >= 3 * base.tolerance
    assert torch.equal(case.generate(pipe), found)
    handle.remove()
    assert insides(pipe) == before
    assert torch.equal(case.generate(pipe), bare)


#: One base of each reason against merging, and one without.
ONE_OF_EACH_REASON = {base.hindrance: base for base in reversed(BASES) if not base.is_variant}


@pytest.mark.parametrize(
    "base",
    [base if base in ONE_OF_EACH_REASON.values() else slow(base) for base in BASES],
    ids=str,
)
def test_merge_refuses_by_name_and_auto_branches(base: Base, fusions: dict[str, Fusion]) -> None:
    fusion, pipe = fusions["SD1"], prepared(base, SD1)
    if base.hindrance is None:
        bare = SD1.generate(pipe)
        with literally_added(pipe, fusion, SD1, ["unet"]):
            expected = SD1.generate(pipe)
        handle = apply_fusion(pipe, fusion, components=["unet"])
        assert handle.report().mode == "merge"
        assert relative_difference(SD1.generate(pipe), expected) <= base.tolerance
        handle.remove()
        assert torch.equal(SD1.generate(pipe), bare)
        return
    before = insides(pipe)

    with pytest.raises(IncompatibleModelError) as error:
        apply_fusion(pipe, fusion, mode="merge", components=["unet"])

    assert str(error.value).startswith(
        "these weights cannot be merged into; nothing was changed. Use mode='branch', or load the "
        "model unquantised in float32, float16 or bfloat16.\n"
    )
    problems = dict(issue.split(": ", 1) for issue in error.value.issues)
    assert len(problems) == len(error.value.issues)
    attention = attention_of(fusion, "unet")
    assert {layer: problems.get(layer) for layer in attention} == dict.fromkeys(
        attention, base.hindrance
    )
    assert insides(pipe) == before

    handle = apply_fusion(pipe, fusion, components=["unet"])
    report = handle.report()
    assert report.mode == "branch"
    assert report.why == f"not every weight can be merged into ({error.value.issues[0]})"
    handle.remove()
    assert insides(pipe) == before


@pytest.mark.parametrize("base", {base.hindrance: base for base in BASES}.values(), ids=str)
def test_shapes_are_checked_however_weights_are_kept(base: Base) -> None:
    """The width of a packed or absent weight is that of its layer."""
    pipe = prepared(base, SD1)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    before = insides(pipe)
    for shape in [(32, 48), (48, 32), (32, 32, 3, 3)]:
        fusion = hand_fusion(hand_entry(f"unet.{layer}", shape))
        with pytest.raises(IncompatibleModelError) as error:
            apply_fusion(pipe, fusion, mode="branch")
        assert error.value.issues == (
            f"unet.{layer}: weight has shape [32, 32], expected {list(shape)}",
        )
    assert insides(pipe) == before


@pytest.mark.parametrize("base", each(base for base in BASES if base.late), ids=str)
def test_what_comes_while_a_fusion_is_branched_is_followed(
    base: Base, fusions: dict[str, Fusion]
) -> None:
    fusion, first, pipe = fusions["SD1"], prepared(base, SD1), SD1.pipeline().to(base.dtype)
    bare = SD1.generate(first)
    apply_fusion(first, fusion, mode="branch", components=["unet"])
    handle = apply_fusion(pipe, fusion, mode="branch", components=["unet"])
    SD1.generate(pipe)

    base.prepare(pipe)

    assert torch.equal(SD1.generate(pipe), SD1.generate(first))
    handle.remove()
    assert torch.equal(SD1.generate(pipe), bare)


@pytest.mark.parametrize("base", each(base for base in BASES if base.late), ids=str)
def test_what_comes_while_a_fusion_is_merged_is_refused_or_works(
    base: Base, fusions: dict[str, Fusion]
) -> None:
    pipe = SD1.pipeline().to(base.dtype)
    apply_fusion(pipe, fusions["SD1"], mode="merge", components=["unet"])
    expected = SD1.generate(pipe)

    def prepare_and_generate() -> torch.Tensor:
        base.prepare(pipe)
        return SD1.generate(pipe)

    if base.hindrance is None:
        assert torch.equal(prepare_and_generate(), expected)
        return
    refused = r"is not possible while|changed by something else|state_dict would hold"
    with pytest.raises(InUseError, match=refused):
        prepare_and_generate()


def test_a_quantised_text_encoder(fusions: dict[str, Fusion]) -> None:
    fusion, pipe = fusions["SD1"], SD1.pipeline()
    torchao_int8(pipe.text_encoder)
    bare = SD1.generate(pipe)
    with literally_added(pipe, fusion, SD1, ["text_encoder", "unet"]):
        expected = SD1.generate(pipe)
    with literally_added(pipe, fusion, SD1, ["unet"]):
        without = SD1.generate(pipe)
    assert relative_difference(without, expected) >= 1e-4

    handle = apply_fusion(pipe, fusion)

    report = handle.report()
    assert report.mode == "branch"
    assert "(text_encoder." in report.why
    assert relative_difference(SD1.generate(pipe), expected) <= 1e-5
    handle.remove()
    assert torch.equal(SD1.generate(pipe), bare)


@pytest.mark.parametrize("name", [slow("gguf-q8_0-loaded-bfloat16"), "gguf-q4_0-loaded"])
def test_dequantizing_is_refused_while_a_fusion_is_applied(
    name: str, fusions: dict[str, Fusion]
) -> None:
    """It would replace the layers that carry the fusion."""
    base = next(base for base in BASES if base.name == name)
    pipe = prepared(base, SD1)
    bare = SD1.generate(pipe)
    handle = apply_fusion(pipe, fusions["SD1"], components=["unet"])
    expected = SD1.generate(pipe)

    with pytest.raises(InUseError, match="dequantize is not possible while a fusion is applied"):
        pipe.unet.dequantize()

    assert torch.equal(SD1.generate(pipe), expected)
    handle.remove()
    assert torch.equal(SD1.generate(pipe), bare)


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_what_no_mode_works_with_is_refused_by_name(
    refused: Refused, fusions: dict[str, Fusion], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    fusion, pipe = fusions["SD1"], SD1.pipeline()
    bare = SD1.generate(pipe)
    if refused.lora:
        lora = tiny_lora(pipe, tmp_path / "lora.safetensors", seed=9, modules=("to_q",))
        pipe.load_lora_weights(str(lora), adapter_name="lora")
    refused.prepare(pipe)
    assert relative_difference(SD1.generate(pipe), bare) <= 1e-5  # it does nothing
    before = State.of(pipe)

    for mode in ("auto", "merge", "branch"):
        with pytest.raises(IncompatibleModelError, match=refused.message):
            apply_fusion(pipe, fusion, mode=mode, components=["unet"])

    assert State.of(pipe) == before
    refused.undo(pipe)
    handle = apply_fusion(pipe, fusion, components=["unet"])
    assert relative_difference(SD1.generate(pipe), bare) >= 1e-2
    handle.remove()
    assert torch.equal(SD1.generate(pipe), bare)


class SVDQW4A4Linear(nn.Module):
    """Named and made like Nunchaku's in diffusers, whose products need an NVIDIA GPU."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.torch_dtype = torch.float32
        self.qweight = nn.Parameter(plain.weight.to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        return x @ self.qweight.float().t()


def test_a_linear_layer_whose_packed_weight_has_another_name() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"leaf": SVDQW4A4Linear(nn.Linear(6, 4)).bfloat16()})
    entry, x = hand_entry("unet.leaf", (4, 6), switch=None), torch.randn(5, 6)
    bare = model["leaf"](x)
    targets = find_targets({"unet": model}, hand_fusion(entry))

    mode, why = choose("auto", targets, {})

    issue = "unet.leaf: its weight is torch.int8, of a SVDQW4A4Linear"
    assert why == f"not every weight can be merged into ({issue})"
    mode.write(0.0, {})
    expected = bare + x @ delta_of(entry, "content").float().t()
    assert relative_difference(model["leaf"](x), expected) < 1e-6
    mode.release()
    assert torch.equal(model["leaf"](x), bare)
    with pytest.raises(IncompatibleModelError, match=r"weight has shape \[4, 6\], expected"):
        find_targets({"unet": model}, hand_fusion(hand_entry("unet.leaf", (4, 8))))


def test_wide_layers_that_optimum_quanto_packs_for_tinygemm() -> None:
    """Layers of 4 bits in bfloat16, of more columns than tiny pipelines have."""
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 64)).bfloat16()
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    assert type(model[0].weight).__name__ == "TinyGemmWeightQBitsTensor"
    entry, x = hand_entry("unet.0", (64, 512), switch=None), torch.randn(5, 512).bfloat16()
    bare = model(x)

    mode, why = choose("auto", find_targets({"unet": model}, hand_fusion(entry)), {})

    issue = "unet.0: its weight is a TinyGemmWeightQBitsTensor, not a plain tensor"
    assert why == f"not every weight can be merged into ({issue})"
    mode.write(0.0, {})
    expected = bare.double() + x.double() @ delta_of(entry, "content").t()
    assert relative_difference(model(x).double(), expected) < 1e-2
    assert relative_difference(bare.double(), expected) > 0.1
    mode.release()
    assert torch.equal(model(x), bare)
