"""Bases that cannot be merged into: mode branch works there, merge refuses, auto knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from bases import BASES, Base
from generation import Case as Case
from generation import LoraPair, build, generate, progress
from tiny_pipeline import Family, relative_difference

from klora_runtime import apply_fusion
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.fusion import Entry, Fusion

CASE = Case(4, "DDIM", "off")


@pytest.fixture
def linear_fusion(lora_pairs: dict[Family, LoraPair]) -> Fusion:
    """Of linear layers and convolutions of the denoiser only."""
    fusion = lora_pairs["sd1"].fusion(CASE)
    entries = tuple(entry for entry in fusion.entries if entry.component == "unet")
    return replace(fusion, entries=entries)


@contextmanager
def literally_added(pipe: Any, fusion: Fusion) -> Iterator[None]:
    """Let each layer add its low-rank output in float32, as its timeline says."""
    moments, now = iter(progress(CASE)), [0.0]

    def before(module: Any, args: Any) -> None:
        now[0] = next(moments)

    def add_to(entry: Entry) -> Any:
        def after(module: Any, args: Any, result: torch.Tensor) -> torch.Tensor:
            x, total = args[0].float(), result.float()
            for slot, coefficient in entry.timeline.at(now[0]).items():
                if coefficient:
                    factors = entry.factors[slot]
                    size = coefficient * factors.scale
                    total = total + size * product(module, x, factors.down, factors.up)
            return total.to(result.dtype)

        return after

    hooks = [pipe.unet.register_forward_pre_hook(before)]
    hooks += [
        pipe.unet.get_submodule(entry.module).register_forward_hook(add_to(entry))
        for entry in fusion.entries
        if entry.acts
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def product(module: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, torch.nn.Conv2d):
        return x @ down.T @ up.T
    down, up = (f if f.dim() == 4 else f[:, :, None, None] for f in (down, up))
    inner = torch.nn.functional.conv2d(x, down, None, module.stride, module.padding)
    return torch.nn.functional.conv2d(inner, up)


def prepared(base: Base) -> Any:
    pipe = build(CASE)
    base.prepare(pipe)
    return pipe


def classes(pipe: Any) -> dict[str, Any]:
    return {path: (type(m), sorted(vars(m))) for path, m in pipe.unet.named_modules()}


@pytest.mark.parametrize("base", BASES, ids=str)
def test_branch_adds_what_the_factors_say(base: Base, linear_fusion: Fusion) -> None:
    pipe = prepared(base)
    before = classes(pipe)
    bare = generate(pipe, CASE)
    with literally_added(pipe, linear_fusion):
        expected = generate(pipe, CASE)

    handle = apply_fusion(pipe, linear_fusion, mode="branch")
    found = generate(pipe, CASE)

    assert relative_difference(found, expected) <= base.tolerance
    assert relative_difference(bare, expected) >= 3 * base.tolerance
    handle.remove()
    assert torch.equal(generate(pipe, CASE), bare)
    assert classes(pipe) == before


@pytest.mark.parametrize("base", BASES, ids=str)
def test_merge_refuses_by_name_and_auto_branches(base: Base, linear_fusion: Fusion) -> None:
    pipe = prepared(base)
    if base.hindrance is None:
        assert apply_fusion(pipe, linear_fusion).report().mode == "merge"
        return

    with pytest.raises(IncompatibleModelError) as error:
        apply_fusion(pipe, linear_fusion, mode="merge")
    attention = [issue for issue in error.value.issues if ".attn" in issue]
    assert attention
    assert all(issue.endswith(f": {base.hindrance}") for issue in attention)

    report = apply_fusion(pipe, linear_fusion).report()
    assert report.mode == "branch"
    assert report.why.startswith("not every weight can be merged into (unet.")


@pytest.mark.parametrize("base", [base for base in BASES if base.late], ids=str)
def test_what_comes_while_a_fusion_is_branched_is_followed(
    base: Base, linear_fusion: Fusion
) -> None:
    first, pipe = prepared(base), build(CASE)
    apply_fusion(first, linear_fusion, mode="branch")
    handle = apply_fusion(pipe, linear_fusion, mode="branch")
    generate(pipe, CASE)

    base.prepare(pipe)

    assert torch.equal(generate(pipe, CASE), generate(first, CASE))
    handle.remove()


@pytest.mark.parametrize("base", [base for base in BASES if base.late], ids=str)
def test_what_comes_while_a_fusion_is_merged_is_refused_or_works(
    base: Base, linear_fusion: Fusion
) -> None:
    pipe = build(CASE)
    apply_fusion(pipe, linear_fusion, mode="merge")
    expected = generate(pipe, CASE)

    def prepare_and_generate() -> torch.Tensor:
        base.prepare(pipe)
        return generate(pipe, CASE)

    if base.hindrance is None:
        assert torch.equal(prepare_and_generate(), expected)
        return
    with pytest.raises(InUseError, match=r"is not possible while|changed by something else"):
        prepare_and_generate()
