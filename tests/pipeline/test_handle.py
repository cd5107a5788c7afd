"""The handle: swapping, weights, on and off, the report; and writes that fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.applying import Apply
from support.generation import TWO_STEPS, generate
from support.handmade import (
    ATTENTION,
    State,
    delta_of,
    fusion_for,
    hand_entry,
    hand_fusion,
    weight_of,
)

from klora_compile import drop_unused
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers import leaves
from klora_runtime.layers.merge import Merge

TO_Q, TO_K, TO_V = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def test_a_removed_handle_is_of_no_use(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    handle = apply(pipe, fusion)
    handle.remove()
    before = State.of(pipe)

    for use in (
        lambda: handle.swap(fusion),
        lambda: handle.set(content=0.5),
        lambda: setattr(handle, "enabled", False),
        handle.report,
    ):
        with pytest.raises(InUseError) as error:
            use()
        assert str(error.value) == "this fusion was removed from its pipeline; apply it again."
    assert State.of(pipe) == before


def test_the_handle_is_a_context_manager(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    before = State.of(pipe)

    with apply(pipe, fusion) as handle:
        assert handle.fusion is fusion
        assert State.of(pipe) != before
    assert State.of(pipe) == before

    with pytest.raises(ZeroDivisionError), apply(pipe, fusion):
        generate(pipe, TWO_STEPS, callback_on_step_end=lambda *_: 1 / 0)
    assert State.of(pipe) == before


def test_swap_puts_another_fusion_in_its_place(
    apply: Apply, pipe: Any, fusion: Fusion, other_fusion: Fusion
) -> None:
    before = State.of(pipe)
    with apply(pipe, other_fusion):
        expected, weights = generate(pipe, TWO_STEPS), State.of(pipe).bits
        generate(pipe, TWO_STEPS)

    handle = apply(pipe, fusion)
    generate(pipe, TWO_STEPS)
    handle.swap(other_fusion)
    found = generate(pipe, TWO_STEPS)

    assert handle.fusion is other_fusion
    assert torch.equal(found, expected)
    assert State.of(pipe).bits == weights
    handle.remove()
    assert State.of(pipe) == before


def test_swap_to_a_fusion_of_fewer_components_frees_the_others(
    apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    handle = apply(pipe, fusion)
    handle.swap(fusion_for(pipe, [TO_Q]))

    second = apply(pipe, fusion_for(pipe, [TEXT]))

    second.remove()
    handle.remove()


def test_a_swap_that_does_not_fit_changes_nothing(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    handle = apply(pipe, fusion)
    expected, before = generate(pipe, TWO_STEPS), State.of(pipe)

    with pytest.raises(IncompatibleModelError):
        handle.swap(hand_fusion(hand_entry(TO_Q, (5, 5)), hand_entry(TO_K, (32, 32))))

    assert State.of(pipe) == before
    assert handle.fusion is fusion
    assert torch.equal(generate(pipe, TWO_STEPS), expected)


def test_weights_of_nothing_are_the_bare_model(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    bare, before = generate(pipe, TWO_STEPS), State.of(pipe)
    handle = apply(pipe, fusion)
    full = generate(pipe, TWO_STEPS)

    handle.set(content=0, style=0)

    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    assert State.of(pipe).bits == before.bits
    handle.set({"content": 1.0, "style": 1.0})
    assert torch.equal(generate(pipe, TWO_STEPS), full)


def test_weights_act_at_once_and_from_the_base(pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q], switch=None)
    base, delta = weight_of(pipe, TO_Q).clone(), delta_of(fusion.entries[0], "content")
    handle = apply_fusion(pipe, fusion, weights={"content": 3.0})
    torch.testing.assert_close(weight_of(pipe, TO_Q).double(), base + 3 * delta)

    for weight in (0.5, -1, 0.25):
        handle.set(content=weight)
        torch.testing.assert_close(weight_of(pipe, TO_Q).double(), base + weight * delta)
        assert handle.report().weights == {"content": weight, "style": 1.0}


def test_off_and_on(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    bare, before = generate(pipe, TWO_STEPS), State.of(pipe)
    handle = apply(pipe, fusion)
    full = generate(pipe, TWO_STEPS)

    handle.enabled = False
    assert State.of(pipe).bits == before.bits
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    handle.set(content=0.5)
    handle.swap(fusion)
    assert State.of(pipe).bits == before.bits
    assert handle.report().enabled is False

    handle.set(content=1)
    handle.enabled = True
    assert handle.enabled
    assert torch.equal(generate(pipe, TWO_STEPS), full)


def test_a_write_that_fails_leaves_the_base(
    pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = State.of(pipe)
    with monkeypatch.context() as patch:
        fail_after(patch, 7)
        with pytest.raises(MemoryError):
            apply_fusion(pipe, fusion)
    assert State.of(pipe) == before

    handle = apply_fusion(pipe, fusion)
    full = generate(pipe, TWO_STEPS)
    with monkeypatch.context() as patch:
        fail_after(patch, 7)
        with pytest.raises(MemoryError):
            handle.set(content=0.5)
    assert State.of(pipe).bits == before.bits
    assert not handle.enabled  # neither the denoiser nor the text encoder
    handle.enabled = True
    assert torch.equal(generate(pipe, TWO_STEPS), full)


def test_weights_that_could_not_be_set_stay_as_they_were(
    pipe: Any, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = apply_fusion(pipe, fusion, weights={"style": 0.5})
    generate(pipe, TWO_STEPS)
    before, report = State.of(pipe), handle.report()
    with monkeypatch.context() as patch:
        fail_after(patch, 7, times=1)
        with pytest.raises(MemoryError):
            handle.set(content=0.5)

    assert State.of(pipe) == before
    assert handle.report() == report


def test_an_allocation_that_fails_changes_nothing(
    pipe: Any, fusion: Fusion, other_fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Merge, numel: int, device: torch.device) -> torch.Tensor:
        raise MemoryError

    pipe.to(torch.bfloat16)
    original = State.of(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(Merge, "_scratch_for", fail)
        with pytest.raises(MemoryError):
            apply_fusion(pipe, fusion)
    assert State.of(pipe) == original

    handle = apply_fusion(pipe, fusion)
    before, report = State.of(pipe), handle.report()
    with monkeypatch.context() as patch:
        patch.setattr(Merge, "_scratch_for", fail)
        with pytest.raises(MemoryError):
            handle.swap(other_fusion)
    assert State.of(pipe) == before
    assert handle.report() == report


def test_a_swap_whose_write_fails_keeps_the_fusion_that_was_there(
    pipe: Any, fusion: Fusion, other_fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = State.of(pipe)
    handle = apply_fusion(pipe, fusion)
    before = State.of(pipe)
    with monkeypatch.context() as patch:
        fail_after(patch, 7, times=1)
        with pytest.raises(MemoryError):
            handle.swap(other_fusion)

    assert State.of(pipe).bits == before.bits
    assert handle.fusion is fusion
    handle.remove()
    assert State.of(pipe) == original


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_swap_that_fails_gives_back_what_only_the_other_fusion_has(
    mode: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are bare again, and the components that only the first one has are still held."""
    handle = apply_fusion(pipe, fusion_for(pipe, [TO_Q, TEXT]), mode)
    before = State.of(pipe)
    with monkeypatch.context() as patch:
        if mode == "merge":
            fail_after(patch, 1, times=1)
        else:
            patch.setattr(leaves, "attach", failing_once(leaves.attach, 1))
        with pytest.raises(MemoryError):
            handle.swap(fusion_for(pipe, [TO_K, TO_Q]))

    assert State.of(pipe) == before
    with pytest.raises(InUseError, match="text_encoder already carries a fusion"):
        apply_fusion(pipe, fusion_for(pipe, [TEXT]))


def failing_once(act: Callable[..., None], times: int) -> Callable[..., None]:
    """``act``, which fails once after it was done some times."""
    outcomes = iter([False] * times + [True])

    def acting(*args: Any) -> None:
        if next(outcomes, False):
            raise MemoryError
        act(*args)

    return acting


def fail_after(patch: pytest.MonkeyPatch, writes: int, times: int = 1000) -> None:
    """Let writing a layer fail after some layers, so many times."""
    original, count, failures = Merge._write_alone, iter(range(writes)), iter(range(times))

    def write(self: Merge, *args: Any) -> None:
        if next(count, None) is None and next(failures, None) is not None:
            raise MemoryError
        original(self, *args)

    patch.setattr(Merge, "_write_alone", write)


# The report.


def test_the_report_says_what_is_there(pipe: Any, fusion: Fusion) -> None:
    handle = apply_fusion(pipe, fusion)
    report = handle.report()

    assert (report.mode, report.why) == ("merge", "every weight is a plain float32 tensor")
    assert report.progress is None
    assert report.components == ("text_encoder", "unet")
    assert sum(report.layers.values()) == sum(entry.acts for entry in fusion.entries)
    assert report.layers["switching"] == report.switches > 20
    kept = sum(weight_of(pipe, e.layer).nbytes for e in fusion.entries if e.acts)
    assert report.nbytes["base weights on cpu"] == kept
    assert report.nbytes["factors on cpu"] == drop_unused(fusion).nbytes
    generate(pipe, TWO_STEPS)
    assert handle.report().progress == 0.75


def test_the_report_as_text(pipe: Any) -> None:
    handle = apply_fusion(pipe, fusion_for(pipe, [TO_Q, TO_V, CONV]))

    lines = str(handle.report()).splitlines()
    handle.enabled = False

    assert lines[0] == "mode merge: every weight is a plain float32 tensor"
    assert lines[1] == "layers: 3 switching in unet; 3 switches a run"
    assert lines[2] == "clock: step, no step yet"
    small = r"\d\.\de-08"
    assert re.fullmatch(rf"rounding: {small} of the delta, at most {small} \(unet\..*\)", lines[3])
    assert lines[4] == "memory: 0.05 MB base weights on cpu, 0.01 MB factors on cpu"
    assert str(handle.report()).startswith("mode merge (disabled): ")


def test_the_clock_of_the_noise_is_shown(pipe: Any) -> None:
    """With the progress of the run at hand, which depends on its scheduler."""
    fusion = replace(fusion_for(pipe, [TO_Q]), clock="noise")
    handle = apply_fusion(pipe, fusion)
    assert str(handle.report()).splitlines()[2] == "clock: noise, no step yet"
    assert "acting before the first step" in repr(handle)
    generate(pipe, TWO_STEPS)
    last = handle.report().progress
    assert last == 1 - (1 / 1000 + 0) / 2  # the last timestep of two, leading, is 1
    assert str(handle.report()).splitlines()[2] == "clock: noise, at progress 1 by noise"
    assert "acting at progress 1 by noise: " in repr(handle)
    assert "acting at progress 1 by noise: " in repr(handle.report())
    assert "progress of sampling by noise" in handle._repr_html_()
    handle.swap(replace(fusion, clock="step"))
    assert str(handle.report()).splitlines()[2].startswith("clock: step, ")
    generate(pipe, TWO_STEPS)
    assert handle.report().progress == 0.75


# In three lines.


def test_the_handle_in_three_lines(apply: Apply, pipe: Any) -> None:
    """What it is, how large, and what acts now."""
    fusion = fusion_for(pipe, [TO_Q, TO_V, CONV, TEXT], switch=0.6)
    handle = apply(pipe, fusion, components=["unet"])

    def lines() -> list[str]:
        return repr(handle).splitlines()

    what, how_large, acting = lines()
    assert what == "FusionHandle on StableDiffusionPipeline: Fusion of no files by rule by hand"
    mode = handle.report().mode
    size = sum(handle.report().nbytes.values()) / 1e6
    assert how_large == f"3 layers in unet; mode {mode}, 3 switches a run, {size:.2f} MB kept"
    both = "acting {}: content in {} layers, weight {}; style in {} layers, weight 1"
    assert acting == both.format("before the first step", 3, 1, 0)

    seen: list[str] = []

    def look(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(lines()[2])
        return values

    handle.set(content=0.8)
    generate(pipe, TWO_STEPS, callback_on_step_end=look)
    assert seen[0] == both.format("at progress 0.75", 0, 0.8, 3)
    assert lines()[2] == both.format("at progress 0.75", 0, 0.8, 3)
    handle.enabled = False
    assert lines()[2] == "disabled: the bare model acts"
    handle.remove()
    assert lines() == [
        "FusionHandle, removed: Fusion of no files by rule by hand",
        *repr(fusion).splitlines()[1:2],
        "nothing acts",
    ]


def test_the_handle_in_a_notebook(apply: Apply, pipe: Any) -> None:
    """The lines, the layers that are applied, the weights, and where sampling is."""
    fusion = fusion_for(pipe, [TO_Q, TEXT])
    handle = apply(pipe, fusion, components=["text_encoder"])
    assert repr(handle) in handle._repr_html_()
    assert "No layer of the denoiser acts." in handle._repr_html_()
    handle.remove()
    assert "No layer" not in handle._repr_html_()

    handle = apply(pipe, fusion, weights={"style": 0.0})
    assert "progress now" not in handle._repr_html_()
    generate(pipe, TWO_STEPS)
    html = handle._repr_html_()
    assert "progress now: 0.75" in html
    drawn = re.findall(r'<path fill="(\S+)" d="(\S+ \S+)"', html)
    assert drawn == [("#2667a8", "M0 0h240v1h-240z")]


def test_the_report_in_three_lines(pipe: Any) -> None:
    handle = apply_fusion(pipe, fusion_for(pipe, [TO_Q, TO_V, CONV]), weights={"style": 0.5})
    size = sum(handle.report().nbytes.values()) / 1e6
    assert repr(handle.report()).splitlines()[:2] == [
        "Report: mode merge, every weight is a plain float32 tensor",
        f"3 layers in unet; 3 switches a run; {size:.2f} MB kept",
    ]
    lost = r"rounding \d\.\de-08 of the delta"
    generate(pipe, TWO_STEPS)
    last = repr(handle.report()).splitlines()[2]
    assert re.fullmatch(rf"acting at progress 0\.75: content 1, style 0\.5; {lost}", last)
    handle.enabled = False
    last = repr(handle.report()).splitlines()[2]
    assert re.fullmatch(rf"disabled: the bare model acts; {lost}", last)
