"""A fusion in a sampler of ComfyUI or of its double equals the literal computation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.comfyui.literal import (
    error,
    flux_fusion,
    literally,
    observed,
    sd1_fusion,
    unchanged,
)
from support.handmade import hand_entry

from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Slot
from klora_runtime.errors import ConfigError, IncompatibleModelError

STEPS = 5


def middles(steps: list[int], whole: int = STEPS, start: int = 0) -> list[float]:
    return [(start + step + 0.5) / whole for step in steps]


@pytest.mark.parametrize("sampler", ["euler", "heun", "heunpp2", "dpm_2", "euler_cfg_pp"])
def test_flux_equals_the_literal_computation(kit: Any, acting: Any, sampler: str) -> None:
    if sampler not in kit.samplers:
        pytest.skip(f"the double has no {sampler}")
    patcher, fusion = kit.patcher(kit.flux()), flux_fusion()
    bare = kit.sample(patcher, sampler)
    weights = {"style": 0.7}
    with unchanged(patcher.model):
        found = kit.sample(acting.apply_to(patcher, acting.Applied(fusion, weights)), sampler)
    assert error(found, bare) > 0.05
    steps = observed(kit, patcher, sampler).steps
    assert steps[-1] == STEPS - 1
    places = kit.places("flux", patcher.model)
    expected = literally(kit, patcher, [(fusion, weights)], places, middles(steps), sampler)
    assert error(found, expected) < 1e-5
    assert torch.equal(kit.sample(patcher, sampler), bare)


def test_convolutions_equal_the_literal_computation(kit: Any, acting: Any) -> None:
    patcher, fusion = kit.patcher(kit.sd1()), sd1_fusion()
    bare = kit.sample(patcher)
    before = [parameter.clone() for parameter in patcher.model.parameters()]
    untouched = []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        untouched.append(all(map(torch.equal, before, patcher.model.parameters())))
        return executor(*args, **kwargs)

    own = acting.apply_to(patcher, acting.Applied(fusion))
    own.add_wrapper_with_key("predict_noise", "look", look)
    with unchanged(patcher.model):
        found = kit.sample(own)
    assert untouched == [True] * STEPS
    places = kit.places("sd1", patcher.model)
    steps = middles(list(range(STEPS)))
    expected = literally(kit, patcher, [(fusion, {})], places, steps)
    assert error(found, bare) > 1e-3
    assert error(found, expected) < 1e-5


def test_weights_may_be_cast_at_each_call(kit: Any, acting: Any) -> None:
    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    expected = kit.sample(own)
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    assert error(kit.sample(own), expected) < 1e-6


def test_other_loras_may_stand_before_and_after(kit: Any, acting: Any) -> None:
    patcher, fusion = kit.patcher(kit.flux()), flux_fusion()
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    delta = 0.3 * torch.randn(96, 32, generator=torch.Generator().manual_seed(7))
    lora = {name: delta if kit.name == "double" else ("diff", (delta,))}
    before = patcher.clone()
    before.add_patches(lora, 0.5)
    with unchanged(patcher.model):
        first = kit.sample(acting.apply_to(before, acting.Applied(fusion)))
        after = acting.apply_to(patcher, acting.Applied(fusion))
        after.add_patches(lora, 0.5)
        second = kit.sample(after)
        with_lora = kit.sample(before)
        kit.sample(patcher)
    assert torch.equal(first, second)
    assert error(first, with_lora) > 0.05
    alone = kit.sample(acting.apply_to(patcher, acting.Applied(fusion)))
    assert error(first, alone) > 0.01


def test_two_artifacts_on_one_model_add_up(kit: Any, acting: Any) -> None:
    patcher = kit.patcher(kit.flux())
    one, other = flux_fusion(), flux_fusion(seed=50)
    first = acting.apply_to(patcher, acting.Applied(one))
    both = acting.apply_to(first, acting.Applied(other, {"content": 0.5}))
    with unchanged(patcher.model):
        found = kit.sample(both)
    fusions = [(one, {}), (other, {"content": 0.5})]
    places = kit.places("flux", patcher.model)
    expected = literally(kit, patcher, fusions, places, middles(list(range(STEPS))))
    assert error(found, expected) < 1e-5
    alone = literally(kit, patcher, fusions[:1], places, middles(list(range(STEPS))))
    assert error(kit.sample(first), alone) < 1e-5


def test_a_slot_that_acts_always_stands_beside_the_schedule(kit: Any, acting: Any) -> None:
    fusion = with_an_accelerator(flux_fusion())
    patcher = kit.patcher(kit.flux())
    found = kit.sample(acting.apply_to(patcher, acting.Applied(fusion, {"lightning": 0.6})))
    places = kit.places("flux", patcher.model)
    expected = literally(
        kit, patcher, [(fusion, {"lightning": 0.6})], places, middles(list(range(STEPS)))
    )
    assert error(found, expected) < 1e-5


def with_an_accelerator(fusion: Fusion) -> Fusion:
    other = flux_fusion(seed=90)
    entries = []
    for entry, beside in zip(fusion.entries, other.entries, strict=True):
        timeline = replace(
            entry.timeline, coefficients={**entry.timeline.coefficients, "lightning": (1.0, 1.0)}
        )
        factors = {**entry.factors, "lightning": beside.factors["content"]}
        entries.append(replace(entry, timeline=timeline, factors=factors))
    slots = {**fusion.slots, "lightning": Slot("always", ())}
    return replace(fusion, entries=tuple(entries), slots=slots)


def test_several_samplers_of_one_graph_follow_their_own_steps(kit: Any, acting: Any) -> None:
    patcher, fusion = kit.patcher(kit.flux()), flux_fusion()
    own = acting.apply_to(patcher, acting.Applied(fusion))
    places = kit.places("flux", patcher.model)
    for steps in (3, 6, 3):
        expected = literally(
            kit, patcher, [(fusion, {})], places, middles(list(range(steps)), steps), steps=steps
        )
        assert error(kit.sample(own, steps=steps), expected) < 1e-5


@pytest.mark.parametrize(("part", "start"), [(slice(2, None), 2), (slice(0, 4), 0)])
def test_a_part_of_a_schedule_is_told_by_steps_and_start(
    kit: Any, acting: Any, clock: Any, part: slice, start: int
) -> None:
    patcher, fusion = kit.patcher(kit.flux()), flux_fusion()
    told = acting.Applied(fusion, stretch=clock.Stretch(STEPS, start))
    found = kit.sample(acting.apply_to(patcher, told), part=part)
    progress = middles([0, 1, 2], start=start)
    places = kit.places("flux", patcher.model)
    expected = literally(kit, patcher, [(fusion, {})], places, progress, part=part)
    assert error(found, expected) < 1e-5
    untold = kit.sample(acting.apply_to(patcher, acting.Applied(fusion)), part=part)
    assert error(untold, expected) > 1e-3


def test_the_clock_of_the_noise_needs_no_steps(kit: Any, acting: Any) -> None:
    fusion = replace(flux_fusion(), clock="noise")
    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(fusion))
    places = kit.places("flux", patcher.model)
    for part in (slice(None), slice(2, None)):
        events = observed(kit, patcher, "euler", part=part)
        levels = [*events.sigmas, 0.0]
        ends = itertools.pairwise(levels)
        progress = [1.0 - (before + after) / 2 for before, after in ends]
        found = kit.sample(own, part=part)
        expected = literally(kit, patcher, [(fusion, {})], places, progress, part=part)
        assert error(found, expected) < 1e-5


def test_an_error_in_the_middle_leaves_the_bare_model(kit: Any, acting: Any) -> None:
    patcher = kit.patcher(kit.flux())
    bare = kit.sample(patcher)
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    expected = kit.sample(own)
    calls = []

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return executor(*args, **kwargs)

    failing = own.clone()
    failing.add_wrapper_with_key("predict_noise", "failing", fail)
    with unchanged(patcher.model), pytest.raises(RuntimeError, match="out of memory"):
        kit.sample(failing)
    assert torch.equal(kit.sample(patcher), bare)
    assert torch.equal(kit.sample(own), expected)


def test_weights_may_change_in_the_middle_of_a_run(kit: Any, acting: Any) -> None:
    """ComfyUI ejects before it patches, and injects again."""
    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    expected = kit.sample(own)
    before = [parameter.clone() for parameter in patcher.model.parameters()]
    seen = []

    def patches(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with again.use_ejected():
            seen.append(all(map(torch.equal, before, patcher.model.parameters())))
            seen.append(
                not any("klora" in name for m in patcher.model.modules() for name in vars(m))
            )
        return executor(*args, **kwargs)

    again = own.clone()
    again.add_wrapper_with_key("predict_noise", "patches", patches)
    assert torch.equal(kit.sample(again), expected)
    assert seen == [True] * (2 * STEPS)


def test_a_sampler_without_steps_is_refused_by_name(kit: Any, acting: Any) -> None:
    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    with (
        unchanged(patcher.model),
        pytest.raises(IncompatibleModelError, match=r"dpm_adaptive: its evaluations depend"),
    ):
        kit.sample(own, "dpm_adaptive")


def test_more_steps_than_told_are_refused(kit: Any, acting: Any, clock: Any) -> None:
    patcher = kit.patcher(kit.flux())
    told = acting.Applied(flux_fusion(), stretch=clock.Stretch(6, 3))
    with pytest.raises(ConfigError, match=r"this run has 5 steps from step 3 on, and steps=6"):
        kit.sample(acting.apply_to(patcher, told))


def test_artifacts_of_two_clocks_or_of_two_runs_are_refused(
    kit: Any, acting: Any, clock: Any
) -> None:
    patcher = kit.patcher(kit.flux())
    own = acting.apply_to(patcher, acting.Applied(flux_fusion()))
    by_noise = replace(flux_fusion(), clock="noise")
    with pytest.raises(ConfigError, match="must follow one clock"):
        acting.apply_to(own, acting.Applied(by_noise))
    with pytest.raises(ConfigError, match="Set steps and start_at_step to the same numbers"):
        acting.apply_to(own, acting.Applied(flux_fusion(), stretch=clock.Stretch(9)))


def test_a_model_that_lacks_layers_is_refused(kit: Any, acting: Any) -> None:
    patcher = kit.patcher(kit.sd1())
    with pytest.raises(IncompatibleModelError, match=r"^9 of 9 layers .*FLUX\.1: load that") as e:
        acting.apply_to(patcher, acting.Applied(flux_fusion()))
    assert "transformer.x_embedder" in e.value.issues
    with pytest.raises(IncompatibleModelError, match="does not say which base model"):
        acting.apply_to(patcher, acting.Applied(replace(flux_fusion(), family=None)))


def test_a_graph_runs_in_inference_mode_with_biases_and_norms(kit: Any, acting: Any) -> None:
    """ComfyUI runs every node so, and loads models in it."""
    with torch.inference_mode():
        patcher = kit.patcher(kit.flux())
        norm = tuple(patcher.model.get_parameter(kit.flux_norm(patcher.model)).shape)
        small = [
            vector("transformer_blocks.0.attn.norm_q", "weight", norm),
            vector("transformer_blocks.0.attn.to_v", "bias", (32,)),
        ]
        fusion = replace(flux_fusion(), entries=(*flux_fusion().entries, *small))
        bare = kit.sample(patcher)
        without = kit.sample(acting.apply_to(patcher, acting.Applied(flux_fusion())))
        with unchanged(patcher.model):
            found = kit.sample(acting.apply_to(patcher, acting.Applied(fusion)))
        assert torch.equal(kit.sample(patcher), bare)
    assert error(found, without) > 1e-3
    plain = kit.patcher(kit.flux())
    again = kit.sample(acting.apply_to(plain, acting.Applied(fusion)))
    assert torch.equal(again, found)
    if kit.name == "ComfyUI":
        places = kit.places("flux", plain.model)
        progress = middles(list(range(STEPS)))
        expected = literally(kit, plain, [(fusion, {})], places, progress)
        assert error(found, expected) < 1e-5


def vector(module: str, parameter: str, shape: tuple[int, ...]) -> Entry:
    """A layer whose delta is no product of factors."""
    entry = hand_entry(f"transformer.{module}", (*shape, 1))
    ones = {slot: Stored(size, Dense(torch.ones(shape))) for slot, size in SIZES.items()}
    return replace(entry, parameter=parameter, shape=shape, factors=ones)


SIZES = {"content": 0.3, "style": -0.2}
