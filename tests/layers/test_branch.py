"""Mode branch: the base is untouched, and each layer adds what its factors say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.generation import TOLERANCE, TWO_STEPS, LoraPair, build, generate
from support.handmade import (
    ATTENTION,
    CROSS_ATTENTION,
    State,
    delta_of,
    fusion_for,
    hand_entry,
    hand_fusion,
    weight_of,
)
from support.pairs import some_pairs
from tiny_pipeline import Family, relative_difference, tiny_pipeline
from torch import nn
from torch.nn.utils import parametrize

from klora_runtime import apply_fusion
from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers import leaves as leaves_module
from klora_runtime.layers.gates import Gates
from klora_runtime.layers.pristine import copies
from klora_runtime.pipeline.handle import FusionHandle

TO_Q, TO_K = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k"))
TO_OUT = f"unet.{CROSS_ATTENTION}.to_out.0"
CONV = "unet.down_blocks.0.resnets.0.conv1"
STRIDED = "unet.down_blocks.0.downsamplers.0.conv"
POINTWISE = "unet.down_blocks.0.attentions.0.proj_in"
LAYERS = (TO_Q, TO_K, TO_OUT, CONV, STRIDED, POINTWISE)
HALVES = (torch.float16, torch.bfloat16)


def branch(pipe: Any, fusion: Fusion, **options: Any) -> FusionHandle:
    return apply_fusion(pipe, fusion, mode="branch", **options)


def module_of(pipe: Any, layer: str) -> Any:
    component, _, path = layer.partition(".")
    return getattr(pipe, component).get_submodule(path)


def inputs_for(module: Any, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight = module.weight
    shape = (count, weight.shape[1], 6, 6) if weight.dim() == 4 else (count, 5, weight.shape[1])
    return torch.randn(shape, generator=generator).to(weight.dtype)


@pytest.mark.parametrize("progress", [0.25, 0.75])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_computes_with_base_and_delta(layer: str, progress: float, pipe: Any) -> None:
    """Linear layers and convolutions: 3x3, strided, 1x1."""
    fusion = fusion_for(pipe, [layer], rank=3)
    module = module_of(pipe, layer)
    x = inputs_for(module)
    handle = branch(pipe, fusion, weights={"style": 0.5})
    pipe.scheduler.set_timesteps(2)
    if progress > 0.5:
        pipe.scheduler.scale_model_input(x, pipe.scheduler.timesteps[-1])
    found = module(x)
    assert torch.equal(module(input=x), found)
    handle.remove()

    (entry,) = fusion.entries
    delta = delta_of(entry, "content") if progress < 0.5 else 0.5 * delta_of(entry, "style")
    module.double()
    module.weight.data += delta
    assert relative_difference(found, module(x.double())) < 1e-6


@pytest.mark.parametrize("shape", ["batch", "channels_last", "one image", "strides"])
@pytest.mark.parametrize("layer", [CONV, STRIDED, POINTWISE])
def test_a_convolution_keeps_its_layout(layer: str, shape: str, pipe: Any) -> None:
    fusion = fusion_for(pipe, [layer], rank=3)
    module = module_of(pipe, layer)
    x = inputs_for(module)
    x = {
        "batch": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "one image": x[0],
        "strides": x.transpose(2, 3),
    }[shape]
    bare = module(x)
    with branch(pipe, fusion):
        found = module(x)

    module.double()
    module.weight.data += delta_of(fusion.entries[0], "content")
    assert relative_difference(found, module(x.double())) < 1e-6
    assert found.stride() == bare.stride()


def test_the_base_is_untouched_and_only_leaves_differ(pipe: Any, fusion: Fusion) -> None:
    before = State.of(pipe)
    layers = {entry.layer for entry in fusion.entries if entry.acts}

    branch(pipe, fusion)

    after = State.of(pipe)
    assert after.bits == before.bits
    changed = {path for path, own in after.modules.items() if own != before.modules[path]}
    assert changed == layers | {"unet.", "text_encoder."}
    for layer in layers:
        kind, names, hooks = after.modules[layer]
        old, old_names, old_hooks = before.modules[layer]
        assert kind.__bases__ == (old,)
        assert (kind.__name__, kind.__module__) == (old.__name__, old.__module__)
        added = {"calls", "dense", "down", "gate", "kept", "up"}
        assert set(names) - set(old_names) == {f"_klora_{name}" for name in added}
        assert hooks == old_hooks


def test_layers_of_one_class_share_one_branched_class(pipe: Any) -> None:
    """Compiled code asks for the class: one for all."""
    branch(pipe, fusion_for(pipe, [TO_Q, TO_K, CONV, STRIDED]))

    assert type(module_of(pipe, TO_Q)) is type(module_of(pipe, TO_K)) is not nn.Linear
    assert type(module_of(pipe, CONV)) is type(module_of(pipe, STRIDED))


def test_blocks_that_share_compiled_code_have_branches_of_one_rank(pipe: Any) -> None:
    other = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    entries = [
        hand_entry(TO_Q, (32, 32), rank=3),
        hand_entry(other, (32, 32), rank=9),
        hand_entry(TO_K, (32, 32), rank=3),
        hand_entry(CONV, (32, 32, 3, 3), rank=3),
    ]

    branch(pipe, hand_fusion(*entries))

    ranks = {layer: len(module_of(pipe, layer)._klora_down) for layer in (TO_Q, other, TO_K, CONV)}
    assert ranks == {TO_Q: 16, other: 16, TO_K: 8, CONV: 8}


def test_a_swap_writes_into_the_same_buffers(pipe: Any) -> None:
    one, other = (fusion_for(pipe, LAYERS, size=size, rank=2) for size in (0.1, 0.3))
    expected = build(TWO_STEPS)
    branch(expected, other)
    handle = branch(pipe, one)
    before = {layer: pointers(pipe, layer) for layer in LAYERS}

    handle.swap(other)

    assert {layer: pointers(pipe, layer) for layer in LAYERS} == before
    assert torch.equal(generate(pipe, TWO_STEPS), generate(expected, TWO_STEPS))


def pointers(pipe: Any, layer: str) -> list[int]:
    module = module_of(pipe, layer)
    names = ("_klora_down", "_klora_up", "_klora_gate")
    return [getattr(module, name).data_ptr() for name in names]


@pytest.mark.parametrize("rank", [1, 40])
def test_a_swap_to_another_rank_leaves_nothing_behind(rank: int, pipe: Any) -> None:
    other = fusion_for(pipe, LAYERS[1:], size=0.3, rank=rank)
    expected = build(TWO_STEPS)
    branch(expected, other)
    handle = branch(pipe, fusion_for(pipe, LAYERS[:-1], rank=4))
    generate(pipe, TWO_STEPS)

    handle.swap(other)

    found = generate(pipe, TWO_STEPS)
    assert relative_difference(found, generate(expected, TWO_STEPS)) <= TOLERANCE


def test_factors_and_gates_are_what_the_report_counts(pipe: Any) -> None:
    report = branch(pipe, fusion_for(pipe, [TO_Q])).report()

    buffers, waiting = 2 * 8 * 32 * 4, 2 * 2 * 2 * 32 * 4
    assert report.nbytes["factors on cpu"] == buffers + waiting
    assert set(report.nbytes) == {"factors on cpu", "gates on cpu"}
    assert report.rounding < 1e-7


@pytest.mark.parametrize("change", [torch.float16, torch.float64])
def test_a_model_that_is_converted_is_followed(
    change: torch.dtype, pipe: Any, fusion: Fusion
) -> None:
    handle = branch(pipe, fusion)
    generate(pipe, TWO_STEPS)
    pipe.to(change)
    fresh = build(TWO_STEPS).to(change)
    branch(fresh, fusion)

    found = generate(pipe, TWO_STEPS)

    assert torch.equal(found, generate(fresh, TWO_STEPS))
    wanted = torch.float16 if change is torch.float16 else torch.float32
    assert module_of(pipe, TO_Q)._klora_down.dtype == wanted
    handle.remove()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_deltas_do_not_drown(dtype: torch.dtype, pipe: Any) -> None:
    """The map that a layer computes, found from its outputs, is nearer than the merged one."""
    pipe.to(dtype)
    module = module_of(pipe, TO_Q)
    base = module.weight.data.double()
    share = 0.003 if dtype is torch.bfloat16 else 0.0003
    fusion = fusion_for(pipe, [TO_Q], size=share * float(base.std()))
    (entry,) = fusion.entries
    exact = delta_of(entry, "content")
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    errors, reported = {}, {}

    for mode in ("merge", "branch"):
        with apply_fusion(pipe, fusion, mode=mode) as handle:
            held = torch.linalg.lstsq(x.double(), module(x).double()).solution.T - base
            errors[mode] = relative_difference(held, exact)
            reported[mode] = handle.report().rounding

    assert reported["merge"] > 0.2
    assert errors["merge"] > 0.2
    assert reported["branch"] < 0.005
    assert errors["branch"] < 0.3 * errors["merge"]


# What auto chooses, and what it says.


def test_auto_merges_where_nothing_speaks_against_it(pipe: Any) -> None:
    report = apply_fusion(pipe, fusion_for(pipe, [TO_Q])).report()

    assert (report.mode, report.why) == ("merge", "every weight is a plain float32 tensor")


@pytest.mark.parametrize(
    ("share", "mode", "why"),
    [
        (0.3, "merge", r"bfloat16 weights hold the deltas to 0\.\d%"),
        (0.003, "branch", r"bfloat16 weights would lose [34]\d% of the deltas"),
    ],
)
def test_auto_measures_the_rounding(share: float, mode: str, why: str, pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    size = share * float(weight_of(pipe, TO_Q).float().std())

    report = apply_fusion(pipe, fusion_for(pipe, [TO_Q], size=size)).report()

    assert report.mode == mode
    assert re.fullmatch(why, report.why)


def test_auto_branches_where_a_weight_cannot_be_merged_into(pipe: Any) -> None:
    attention = pipe.unet.get_submodule(ATTENTION)
    attention.to_k.weight = attention.to_q.weight

    handle = apply_fusion(pipe, fusion_for(pipe, [TO_Q]))

    report = handle.report()
    assert report.mode == "branch"
    assert report.why == (
        f"not every weight can be merged into ({TO_Q}: it shares its weight's memory with another "
        "layer)"
    )


def test_auto_branches_where_the_copies_do_not_fit(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "free_host_memory", lambda: 4000.0)

    report = apply_fusion(pipe, fusion_for(pipe, [TO_Q])).report()

    assert report.mode == "branch"
    assert report.why == ("copies of the weights need 4.1e-06 GB, and 4e-06 GB are free")


def test_the_free_memory_is_read(pipe: Any) -> None:
    assert copies.free_host_memory() > 2**20


# What cannot be branched.


def refusal(pipe: Any, fusion: Fusion) -> str:
    before = State.of(pipe)
    with pytest.raises(IncompatibleModelError) as error:
        branch(pipe, fusion)
    assert State.of(pipe) == before
    headline, _, _ = str(error.value).partition("\n")
    assert headline == "these layers cannot be branched; nothing was changed."
    (issue,) = error.value.issues
    return issue


def test_a_weight_without_memory_is_refused(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q])
    module_of(pipe, TO_Q).to("meta")

    assert refusal(pipe, fusion) == (
        f"{TO_Q}: its weight has no memory (meta device), and nothing loads it"
    )


def test_a_projection_that_is_never_called_is_refused(pipe: Any) -> None:
    attention = pipe.unet.get_submodule(ATTENTION)
    attention.to_q = nn.MultiheadAttention(32, 4)

    assert refusal(pipe, fusion_for(pipe, [f"{TO_Q}.out_proj"])) == (
        f"{TO_Q}.out_proj: its parent module reads the weight directly, so a branch on it "
        "would be skipped"
    )


def test_a_layer_of_a_block_that_reads_its_weights_is_refused(pipe: Any) -> None:
    """Torch's own block of a transformer has a fast path that calls none of its layers."""
    pipe.unet.block = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    fusion = fusion_for(pipe, ["unet.block.linear1"])
    with pytest.raises(IncompatibleModelError, match="linear1: its parent module reads the weight"):
        branch(pipe, fusion)
    apply_fusion(pipe, fusion, mode="auto")


def test_a_module_that_two_layers_share_is_refused(pipe: Any) -> None:
    attention = pipe.unet.get_submodule(ATTENTION)
    fusion = fusion_for(pipe, [TO_Q, TO_K])
    attention.to_k = attention.to_q

    with pytest.raises(IncompatibleModelError) as error:
        branch(pipe, fusion)

    assert error.value.issues == tuple(
        f"{layer}: the fusion changes its module more than once" for layer in (TO_K, TO_Q)
    )


def test_sdxl_in_half_precision(lora_pairs: dict[Family, LoraPair]) -> None:
    """Two text encoders and blocks of several depths: as near to float32 as the bare model is."""
    case = type(TWO_STEPS)(4, kind="sdxl", guidance="off")
    fusion = lora_pairs["sdxl"].fusion(case)
    exact, half = build(case), tiny_pipeline("sdxl")
    half.scheduler = exact.scheduler.from_config(exact.scheduler.config)
    half.to(torch.bfloat16)
    noise = relative_difference(generate(half, case), generate(exact, case))
    branch(exact, fusion)
    branch(half, fusion)

    assert relative_difference(generate(half, case), generate(exact, case)) < 2 * noise


# What happens when something fails on the way.


@pytest.mark.parametrize("place", ["attach", "fill", "show"])
def test_a_failure_leaves_what_was_there(
    place: str, pipe: Any, fusion: Fusion, other_fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = State.of(pipe)
    with monkeypatch.context() as patch:
        fail_once(patch, place)
        with pytest.raises(MemoryError):
            branch(pipe, fusion)
    assert State.of(pipe) == original

    handle = branch(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    for other in (other_fusion, hand_fusion(*fusion.entries)):
        with monkeypatch.context() as patch:
            fail_once(patch, place)
            with pytest.raises(MemoryError):
                handle.swap(other)
        assert handle.fusion is fusion
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
    assert State.of(pipe) == original


def test_a_switch_that_fails_is_made_good(
    pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = branch(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    with monkeypatch.context() as patch:
        fail_once(patch, "show")
        with pytest.raises(MemoryError):
            generate(pipe, TWO_STEPS)

    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()


def fail_once(patch: pytest.MonkeyPatch, place: str) -> None:
    owner, name = {
        "attach": (leaves_module, "attach"),
        "fill": (leaves_module.Leaves, "_fill"),
        "show": (Gates, "show"),
    }[place]
    original, calls = getattr(owner, name), iter(range(3 if place == "attach" else 0))
    failures = iter(range(1))

    def failing(*args: Any) -> None:
        if next(calls, None) is None and next(failures, None) is not None:
            raise MemoryError
        original(*args)

    patch.setattr(owner, name, failing)


# A model that changes under it.


@pytest.mark.parametrize(
    ("first", "mode"), some_pairs(["convert", "disable"], ["merge", "branch"], share=2)
)
def test_a_converted_model_can_be_made_bare(
    first: str, mode: str, pipe: Any, fusion: Fusion
) -> None:
    bare = build(TWO_STEPS).to(torch.bfloat16)
    handle = apply_fusion(pipe, fusion, mode=mode)
    generate(pipe, TWO_STEPS)
    if first == "disable":
        handle.enabled = False
    pipe.to(torch.bfloat16)
    handle.enabled = False

    assert torch.equal(generate(pipe, TWO_STEPS), generate(bare, TWO_STEPS))
    handle.enabled = True
    fresh = build(TWO_STEPS).to(torch.bfloat16)
    apply_fusion(fresh, fusion, mode=mode)
    assert torch.equal(generate(pipe, TWO_STEPS), generate(fresh, TWO_STEPS))
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), generate(bare, TWO_STEPS))


def test_a_merged_model_that_is_converted_is_written_anew(pipe: Any, fusion: Fusion) -> None:
    apply_fusion(pipe, fusion, mode="merge")
    pipe.to(torch.bfloat16)
    fresh = build(TWO_STEPS).to(torch.bfloat16)
    apply_fusion(fresh, fusion, mode="merge")

    assert torch.equal(generate(pipe, TWO_STEPS), generate(fresh, TWO_STEPS))


@pytest.mark.parametrize("powers", [(14, 14), (14, -14)], ids=["the pair", "each rank"])
def test_factors_of_unequal_size_lose_nothing_in_float16(
    powers: tuple[int, int], pipe: Any
) -> None:
    """Neither by overflow of the large ones nor by underflow of small ones beside them."""
    pipe.to(torch.float16)
    skew = 2.0 ** torch.tensor(powers)
    fusion = fusion_for(pipe, [TO_Q], size=0.1)
    (entry,) = fusion.entries
    factors = {
        slot: Stored(each.scale, LowRank(each.delta.down * skew[:, None], each.delta.up / skew))
        for slot, each in entry.factors.items()
    }
    skewed = hand_fusion(type(entry)(**{**vars(entry), "factors": factors}))
    x = inputs_for(module_of(pipe, TO_Q))
    with branch(pipe, fusion):
        expected = module_of(pipe, TO_Q)(x)

    handle = branch(pipe, skewed)

    assert torch.equal(module_of(pipe, TO_Q)(x), expected)
    assert handle.report().rounding < 1e-3


def test_a_class_that_was_changed_on_top_is_noticed(pipe: Any) -> None:
    handle = branch(pipe, fusion_for(pipe, [TO_Q]))
    module = module_of(pipe, TO_Q)
    parametrize.register_parametrization(module, "weight", nn.Identity())

    with pytest.raises(InUseError, match=r"has no parameter weight any more"):
        handle.remove()

    parametrize.remove_parametrizations(module, "weight")
    handle.remove()
    assert type(module) is nn.Linear


def test_a_release_that_is_interrupted_is_not_half_of_a_fusion(
    pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = branch(pipe, fusion)
    expected = generate(pipe, TWO_STEPS)
    calls = iter(range(3))
    original = leaves_module.detach

    def failing(module: Any) -> None:
        if next(calls, None) is None:
            raise MemoryError
        original(module)

    with monkeypatch.context() as patch:
        patch.setattr(leaves_module, "detach", failing)
        with pytest.raises(MemoryError):
            handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
