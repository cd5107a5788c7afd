"""A LoRA beside a fusion: what acts is the literal sum, compiled or added when applying."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.generation import LEAST_EFFECT, TOLERANCE, Case, LoraPair, build, generate
from support.shipped import Shipped, error_of, klora, pixels
from tiny_pipeline import Family, relative_difference, tiny_lora

from klora_compile import Fusion, compile_fusion, read_adapter, reschedule, thin
from klora_compile.rules import Klora, Phases
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.beside import beside
from klora_runtime.errors import ConfigError, IncompatibleModelError

CASE = Case(3)
WEIGHT = 0.6
MODULES = ("to_q", "to_out.0", "conv1", "q_proj", "fc1")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turbo") / "turbo.safetensors"
    return tiny_lora(build(CASE), path, seed=7, rank=3, strength=1.0, modules=MODULES)


@pytest.fixture(scope="module")
def pair(lora_pairs: dict[Family, LoraPair]) -> LoraPair:
    return lora_pairs["sd1"]


@pytest.fixture(scope="module")
def plain(pair: LoraPair) -> Fusion:
    return pair.fusion(CASE)


@pytest.fixture(scope="module")
def alone(turbo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the LoRA alone."""
    path = tmp_path_factory.mktemp("alone") / "turbo.klora.safetensors"
    save_fusion(compile_fusion(turbo, device="cpu"), path)
    return path


def changed(turbo: Path, weight: float = WEIGHT) -> Any:
    """A pipeline into whose weights the LoRA was added by hand."""
    pipe = build(CASE)
    parameters = {
        f"{component}.{name}": parameter
        for component in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, component).named_parameters()
    }
    layers = read_adapter(turbo).layers
    assert {layer.component for layer in layers.values()} == {"unet", "text_encoder"}
    with torch.no_grad():
        for layer in layers.values():
            path = f"{layer.component}.{layer.module}.weight"
            parameter = parameters[path]
            delta = weight * layer.scaling * layer.delta.matrix()
            parameter.add_(delta.reshape(parameter.shape).float())
    return pipe


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_pictures_are_those_of_a_base_with_it(
    mode: str, pair: LoraPair, plain: Fusion, turbo: Path, alone: Path
) -> None:
    base = changed(turbo)
    apply_fusion(base, plain, mode)
    expected = generate(base, CASE)
    together = compile_fusion(pair.content, pair.style, always={"turbo": turbo}, device="cpu")
    pipe = build(CASE)
    bare = generate(pipe, CASE)
    with apply_fusion(pipe, together, mode, weights={"turbo": WEIGHT}) as handle:
        found = generate(pipe, CASE)
        handle.set(turbo=0.0)
        without = generate(pipe, CASE)
    assert relative_difference(found, expected) < TOLERANCE
    assert relative_difference(found, without) > LEAST_EFFECT
    other = build(CASE)
    with apply_fusion(other, plain, mode) as handle:
        assert relative_difference(generate(other, CASE), without) < TOLERANCE
    with apply_fusion(
        other, plain, mode, always={"turbo": alone}, weights={"turbo": WEIGHT}
    ) as handle:
        assert torch.equal(generate(other, CASE), found)
        assert handle.fusion is plain
        assert handle.report().weights == {"content": 1.0, "style": 1.0, "turbo": WEIGHT}
        assert "turbo in " in repr(handle)
        assert "turbo" in handle._repr_html_()
        # A swap keeps it, with its weight.
        handle.swap(reschedule(handle.fusion, Klora(bias=1.0)))
        swapped = generate(other, CASE)
        assert relative_difference(swapped, found) > LEAST_EFFECT
        handle.swap(plain)
        assert torch.equal(generate(other, CASE), found)
    assert torch.equal(generate(other, CASE), bare)


def test_what_does_not_act_beside_is_refused(
    pair: LoraPair, plain: Fusion, turbo: Path, alone: Path, tmp_path: Path
) -> None:
    pipe = build(CASE)
    bare = generate(pipe, CASE)
    single = load_fusion(alone)
    phases = compile_fusion(turbo, rule=Phases(content_phases="0:1,0.5:0"), device="cpu")
    flux = replace(single, family="flux.1")
    common = {entry.path for entry in plain.entries} & {entry.path for entry in single.entries}
    larger = [
        replace(e, shape=(e.shape[0] + 1, *e.shape[1:])) for e in single.entries if e.path in common
    ]
    refused: tuple[tuple[Any, type[Exception], str], ...] = (
        (["turbo"], ConfigError, r"always=\['turbo'\]: expected names with an artifact each"),
        ({"style": single}, ConfigError, "always: style is no name for a LoRA that always acts"),
        ({1: single}, ConfigError, "always: 1 is no name for a LoRA that always acts"),
        ({"turbo": thin(single, {"content": turbo})}, ConfigError, "always: turbo is thin, so its"),
        ({"turbo": plain}, ConfigError, "turbo is a fusion of content and style, expected one"),
        ({"turbo": phases}, ConfigError, "the weight of turbo changes over the steps"),
        ({"turbo": flux}, IncompatibleModelError, "turbo is for flux.1, and the fusion for sd1"),
        (
            {"turbo": replace(single, entries=tuple(larger))},
            IncompatibleModelError,
            "always: turbo changes .* of shape .* and the fusion one of",
        ),
    )
    for always, error, text in refused:
        with pytest.raises(error, match=text):
            apply_fusion(pipe, replace(plain, family="sd1"), always=always)
    together = compile_fusion(pair.content, pair.style, always={"turbo": turbo}, device="cpu")
    with pytest.raises(ConfigError, match="the fusion has a slot turbo already"):
        apply_fusion(pipe, together, always={"turbo": single})
    with apply_fusion(pipe, plain, always={"turbo": single}) as handle:
        acting = generate(pipe, CASE)
        with pytest.raises(ConfigError, match="the fusion has a slot turbo already"):
            handle.swap(together)
        assert torch.equal(generate(pipe, CASE), acting)
    assert torch.equal(generate(pipe, CASE), bare)


def test_it_keeps_what_its_sources_state(plain: Fusion, alone: Path) -> None:
    """As another writer may name them; sources of no slot are not its own."""
    single = load_fusion(alone)
    names = ("content", "content.low", "contentish", "fox")
    sources = {
        name: replace(single.sources["content"], file=name) for name in (*names, "of no slot")
    }
    slots = {"content": replace(single.slots["content"], sources=names)}
    found = beside(plain, {"turbo": replace(single, sources=sources, slots=slots)})
    wanted = ("turbo", "turbo.low", "turbo.contentish", "turbo.fox")
    assert found.slots["turbo"].sources == wanted
    assert tuple(found.sources[name].file for name in wanted) == names
    assert set(found.sources) == {*plain.sources, *wanted}


def test_sample_takes_it(tmp_path: Path) -> None:
    shipped = Shipped.into(tmp_path)
    lora = tiny_lora(build(CASE), tmp_path / "turbo.safetensors", seed=7, strength=1.0)
    artifact = tmp_path / "turbo.klora.safetensors"
    save_fusion(compile_fusion(lora, device="cpu"), artifact)
    output = tmp_path / "a.png"
    command = (
        "sample", shipped.artifact, "--model", shipped.model, "--prompt", "a fox", "--steps", 2,
        "--device", "cpu", "-o", output,
    )  # fmt: skip
    assert klora(*command).exit_code == 0
    plain = pixels(output)
    made = klora(*command, "--force", "--always", f"turbo={artifact}:0.5")
    assert made.exit_code == 0, made.stderr
    half = pixels(output)
    assert klora(*command, "--force", "--always", f"turbo={artifact}:0").exit_code == 0
    assert pixels(output) == plain != half
    refused = klora(*command, "--force", "--always", f"turbo={lora}")
    assert "is not a klora artifact" in error_of(refused, 1)
    refused = klora(*command, "--force", "--always", f"turbo={artifact},{shipped.artifact}")
    assert "turbo names two artifacts; compile both files of the LoRA to one" in refused.stderr
