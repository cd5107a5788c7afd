"""Slots that are no product, and parameters that are no matrix: written, read, applied, removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import torchao_int8
from support.generation import TWO_STEPS, generate
from support.handmade import ATTENTION, hand_fusion
from support.lora_files import Artifact, RawTensor
from tiny_pipeline import relative_difference, tiny_pipeline
from torch import nn

from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule, Slot, Source
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ArtifactError, IncompatibleModelError, InUseError

LINEAR = f"unet.{ATTENTION}.to_q"
WITH_BIAS = f"unet.{ATTENTION}.to_out.0"
NORM = "unet.conv_norm_out"
CONV = "unet.conv_in"
SWITCH = Timeline((0.0, 0.5), {"content": (1.0, 0.0), "style": (0.0, 2.0)})


def entry(
    layer: str,
    shape: tuple[int, ...],
    parameter: str = "weight",
    dtype: torch.dtype = torch.float32,
) -> Entry:
    """Dense content until progress 0.5, then twice the dense style."""
    generator = torch.Generator().manual_seed(len(layer) + len(parameter))
    deltas = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    component, _, module = layer.partition(".")
    pairs = zip(("content", "style"), deltas, strict=True)
    factors = {slot: Stored(0.01, Dense(delta)) for slot, delta in pairs}
    return Entry(component, module, parameter, shape, "switching", SWITCH, factors, {})


def fusion() -> Fusion:
    """Linear, convolution, bias, norm; one module with both parameters, one slot low rank."""
    conv = entry(CONV, (32, 4, 3, 3), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(2, 4, 3, 3, generator=generator)
    pair = Stored(0.1, LowRank(down, torch.randn(32, 2, 1, 1, generator=generator)))
    return hand_fusion(
        entry(LINEAR, (32, 32), dtype=torch.float16),
        entry(WITH_BIAS, (32, 32)),
        entry(WITH_BIAS, (32,), "bias"),
        entry(NORM, (32,)),
        entry(NORM, (32,), "bias", torch.bfloat16),
        replace(conv, factors={**conv.factors, "style": pair}),
    )


def ordered(fusion: Fusion) -> Fusion:
    def place(entry: Entry) -> tuple[str, str, str]:
        return entry.component, entry.module, entry.parameter

    return replace(fusion, entries=tuple(sorted(fusion.entries, key=place)))


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline("sd1")


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pipe.unet.named_parameters()}


def expected(fusion: Fusion, base: Mapping[str, torch.Tensor], at: float) -> dict[str, Any]:
    """base + scale * coefficient * delta by hand, float64."""
    values = {name: value.double() for name, value in base.items()}
    for each in fusion.entries:
        slot, coefficient = ("content", 1.0) if at < 0.5 else ("style", 2.0)
        stored = each.factors[slot]
        delta = stored.delta
        values_of = (
            delta.values.double()
            if isinstance(delta, Dense)
            else torch.einsum("or,rihw->oihw", delta.up[:, :, 0, 0].double(), delta.down.double())
        )
        name = f"{each.module}.{each.parameter}"
        values[name] = values[name] + stored.scale * coefficient * values_of
    return values


def assert_holds(pipe: Any, values: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    for name, value in pipe.unet.named_parameters():
        torch.testing.assert_close(value.double(), values[name], rtol=0, atol=tolerance)


def test_merge_adds_what_is_stored_and_gives_every_bit_back(pipe: Any) -> None:
    base = parameters(pipe)
    fused = ordered(fusion())
    handle = apply_fusion(pipe, fused, mode="merge")
    assert_holds(pipe, expected(fused, base, 0.0))
    pipe.scheduler.set_timesteps(4)
    for index, step in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler.scale_model_input(torch.zeros(1, 4, 8, 8), step)
        assert_holds(pipe, expected(fused, base, (index + 0.5) / 4))
    handle.enabled = False
    assert all(torch.equal(value, base[name]) for name, value in pipe.unet.named_parameters())
    handle.enabled = True
    handle.swap(ordered(hand_fusion(entry(NORM, (32,)))))
    handle.remove()
    assert all(torch.equal(value, base[name]) for name, value in pipe.unet.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_slots_at_once(dtype: torch.dtype, pipe: Any) -> None:
    """Each with its own coefficient, written straight (float32) and through the scratch."""
    pipe.unet.to(dtype)
    both = Timeline.constant({"content": 0.5, "style": -3.0})
    one = replace(entry(NORM, (32,)), timeline=both)
    base = parameters(pipe)["conv_norm_out.weight"].double()
    deltas = [each.scale * each.delta.values.double() for each in one.factors.values()]
    with apply_fusion(pipe, hand_fusion(one), mode="merge"):
        held = pipe.unet.conv_norm_out.weight.detach().double()
        expected = base + 0.5 * deltas[0] - 3.0 * deltas[1]
        tolerance = 1e-6 if dtype is torch.float32 else 0.01
        torch.testing.assert_close(held, expected, rtol=0, atol=tolerance)


def test_weights_of_the_user_and_half_precision(pipe: Any) -> None:
    pipe.unet.to(torch.bfloat16)
    base = parameters(pipe)
    fused = ordered(fusion())
    with apply_fusion(pipe, fused, mode="merge") as handle:
        assert_holds(pipe, expected(fused, base, 0.0), tolerance=0.02)
        assert 0 < handle.report().rounding < 0.5
        handle.set(content=0.0)
        assert all(torch.equal(value, base[name]) for name, value in pipe.unet.named_parameters())
    assert all(torch.equal(value, base[name]) for name, value in pipe.unet.named_parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_kernels_of_one_and_three_dimensions(rank: int, pipe: Any) -> None:
    """Low rank (rank 2) and dense (0)."""
    for kind, kernel in ((nn.Conv1d, (3,)), (nn.Conv3d, (1, 2, 2))):
        pipe.unet.extra = kind(4, 6, kernel)
        shape = (6, 4, *kernel)
        one = entry("unet.extra", shape)
        down, up = torch.randn(2, 4, *kernel), torch.randn(6, 2, *(1 for _ in kernel))
        if rank:
            pair = Stored(0.5, LowRank(down, up))
            one = replace(one, factors={"content": pair, "style": pair})
        stored = one.factors["content"]
        delta = (
            stored.delta.values
            if isinstance(stored.delta, Dense)
            else (up.flatten(1) @ down.flatten(1)).reshape(shape)
        )
        before = pipe.unet.extra.weight.detach().clone()
        with apply_fusion(pipe, hand_fusion(one), mode="merge"):
            after = before + stored.scale * delta
            torch.testing.assert_close(pipe.unet.extra.weight.detach(), after)
        assert torch.equal(pipe.unet.extra.weight, before)


def test_branch_multiplies_with_dense_deltas_and_writes_the_rest(pipe: Any) -> None:
    base, fused, bare = parameters(pipe), ordered(fusion()), generate(pipe, TWO_STEPS)
    with apply_fusion(pipe, fused, mode="merge"):
        expected = generate(pipe, TWO_STEPS)
    handle = apply_fusion(pipe, fused, mode="branch")
    held = parameters(pipe)
    changed = {name for name, value in held.items() if not torch.equal(value, base[name])}
    assert changed == {
        "conv_norm_out.bias",
        "conv_norm_out.weight",
        f"{ATTENTION}.to_out.0.bias",
    }
    assert relative_difference(generate(pipe, TWO_STEPS), expected) < 1e-5
    assert relative_difference(bare, expected) > 0.01
    report = handle.report()
    assert report.rounding < 1e-5
    assert {"deltas on cpu", "base weights on cpu"} <= report.nbytes.keys()

    handle.enabled = False
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    handle.enabled = True
    handle.set(content=0.0, style=0.0)
    assert relative_difference(generate(pipe, TWO_STEPS), bare) < 1e-6
    handle.set(content=1.0, style=1.0)
    handle.swap(ordered(hand_fusion(entry(NORM, (32,)))))
    handle.swap(fused)
    assert relative_difference(generate(pipe, TWO_STEPS), expected) < 1e-5
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)


def test_every_kind_of_delta_acts_on_a_quantised_base(pipe: Any) -> None:
    x = torch.randn(3, 32)
    torchao_int8(pipe.unet)
    layer = pipe.unet.get_submodule(f"{ATTENTION}.to_out.0")
    bare, norm = layer(x), pipe.unet.conv_norm_out.weight.detach().clone()
    linear, bias, gains = (
        entry(WITH_BIAS, (32, 32)),
        entry(WITH_BIAS, (32,), "bias"),
        entry(NORM, (32,)),
    )
    changes = [
        stored.scale * stored.delta.tensors[0]
        for stored in (each.factors["content"] for each in (linear, bias, gains))
    ]
    handle = apply_fusion(pipe, ordered(hand_fusion(linear, bias, gains)))
    assert handle.report().mode == "branch"
    torch.testing.assert_close(layer(x), bare + x @ changes[0].t() + changes[1])
    torch.testing.assert_close(pipe.unet.conv_norm_out.weight.data, norm + changes[2])
    handle.remove()
    assert torch.equal(layer(x), bare)
    assert torch.equal(pipe.unet.conv_norm_out.weight, norm)


def test_what_would_mix_with_written_parameters_is_refused_in_branch(pipe: Any) -> None:
    with apply_fusion(pipe, hand_fusion(entry(LINEAR, (32, 32))), mode="branch"):
        pipe.unet.load_state_dict(pipe.unet.state_dict())
    with apply_fusion(pipe, hand_fusion(entry(NORM, (32,))), mode="branch"):
        with pytest.raises(InUseError, match=r"Call \.remove\(\) on the handle first\.$"):
            pipe.unet.load_state_dict({})
        with pytest.raises(InUseError, match=r"set \.enabled = False first\.$"):
            pipe.unet.state_dict()


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_parameter_may_have_any_name_and_be_of_the_component(mode: str, pipe: Any) -> None:
    """Tables of modulation: of a block, and of the model."""
    block = pipe.unet.get_submodule(ATTENTION)
    tables = {"": pipe.unet, ATTENTION: block}
    for module in tables.values():
        module.scale_shift_table = nn.Parameter(torch.randn(1, 6, 8), requires_grad=False)
    base = {path: module.scale_shift_table.clone() for path, module in tables.items()}
    entries = [
        replace(entry("unet.", (1, 6, 8)), module=path, parameter="scale_shift_table")
        for path in tables
    ]
    assert [each.layer for each in entries] == [
        "unet.scale_shift_table",
        f"unet.{ATTENTION}.scale_shift_table",
    ]
    handle = apply_fusion(pipe, hand_fusion(*entries), mode=mode)
    for each in entries:
        stored = each.factors["content"]
        expected = base[each.module] + stored.scale * stored.delta.tensors[0]
        torch.testing.assert_close(tables[each.module].scale_shift_table.data, expected)
    generate(pipe, TWO_STEPS)
    handle.remove()
    for path, module in tables.items():
        assert torch.equal(module.scale_shift_table, base[path])


def test_auto_names_both_reasons_where_no_mode_can(pipe: Any) -> None:
    norm = pipe.unet.conv_norm_out
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(IncompatibleModelError, match="no mode can apply this fusion") as caught:
        apply_fusion(pipe, hand_fusion(entry(NORM, (32,))))
    why = f"{NORM}: its weight is torch.float8_e4m3fn, of a GroupNorm"
    assert caught.value.issues == (f"branch: {why}", f"merge: {why}")


def test_a_parameter_that_is_not_there_or_has_another_shape(pipe: Any) -> None:
    entries = (entry(LINEAR, (32,), "bias"), entry(NORM, (16,)))
    with pytest.raises(IncompatibleModelError) as caught:
        apply_fusion(pipe, hand_fusion(*entries), mode="merge")
    assert caught.value.issues == (
        f"{NORM}: weight has shape [32], expected [16]",
        f"{LINEAR}: has no parameter bias",
    )


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    source = Source("a", "0" * 64, 1, "peft", (2,), notes={"unused": [{"key": "k", "why": "w"}]})
    slots = {name: Slot(name, ("a",)) for name in ("content", "style")}
    rule = Rule("hand", {}, {})
    whole = replace(ordered(fusion()), sources={"a": source}, slots=slots, rule=rule)
    save_fusion(whole, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_file_gives_back_what_was_written(path: Path) -> None:
    loaded, written = load_fusion(path, check="full"), ordered(fusion())
    assert loaded.sources["a"].notes == {"unused": [{"key": "k", "why": "w"}]}
    assert loaded.nbytes == written.nbytes
    for one, other in zip(loaded.entries, written.entries, strict=True):
        assert (one.layer, one.parameter, one.shape) == (other.layer, other.parameter, other.shape)
        for slot, stored in other.factors.items():
            own = one.factors[slot].delta
            assert type(own) is type(stored.delta)
            for mine, theirs in zip(own.tensors, stored.delta.tensors, strict=True):
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)
    again = path.with_name("again.safetensors")
    save_fusion(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_notes_cannot_hide_what_is_stated(tmp_path: Path) -> None:
    source = Source("a", "0" * 64, 1, "peft", (2,), notes={"file": "other"})
    with pytest.raises(ArtifactError, match=r"notes of source a may not be called \['file'\]"):
        save_fusion(replace(fusion(), sources={"a": source}), tmp_path / "a.safetensors")


def dense_entry(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    index = next(i for i, e in enumerate(artifact.document["entries"]) if len(e["shape"]) == 1)
    each = artifact.document["entries"][index]
    return each, each["factors"]["content"]


def rename(artifact: Artifact, stored: dict[str, Any], tensor: RawTensor) -> None:
    artifact.tensors["f" * 32] = tensor
    artifact.tensors.pop(stored["delta"])
    stored["delta"] = "f" * 32


def break_file(artifact: Artifact, case: str) -> None:
    each, stored = dense_entry(artifact)
    if case == "shape":
        rename(artifact, stored, RawTensor.of(torch.ones(31, dtype=torch.bfloat16)))
    elif case == "dtype":
        rename(artifact, stored, RawTensor.of(torch.ones(32, dtype=torch.int32)))
    elif case == "encoding":
        stored["encoding"] = "q8"
    elif case == "kind":
        stored["kind"] = "rows"
    elif case == "tensor":
        stored["delta"] = "0" * 32
    elif case == "keys":
        stored["down"] = stored["delta"]
    elif case == "low rank of one dimension":
        each["factors"]["content"] = {
            **{key: stored[key] for key in ("encoding", "scale")},
            "kind": "lowrank",
            "down": stored["delta"],
            "up": stored["delta"],
        }


BROKEN = {
    "shape": "delta [31] does not make [32]",
    "dtype": ".delta: dtype I32, expected ('F32', 'F16', 'BF16')",
    "encoding": "unknown encoding q8; update klora",
    "kind": "unknown kind rows; update klora",
    "tensor": f".delta: no tensor {'0' * 32} in the file",
    "keys": "has unknown keys down; update klora",
    "low rank of one dimension": "down [32] and up [32] do not make [32]",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_factors_are_named(case: str, path: Path) -> None:
    artifact = Artifact.read(path)
    break_file(artifact, case)
    with pytest.raises(ArtifactError) as caught:
        load_fusion(artifact.write(path))
    assert any(BROKEN[case] in issue for issue in caught.value.issues), caught.value.issues
