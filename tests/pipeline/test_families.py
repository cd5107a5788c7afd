"""Every family samples as the literal reference does, with its real pipeline class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from reference import KLora, Level, progress_of_run, sampling
from safetensors.torch import load_file, save_file
from support.families import FLUX_BLOCKS, FLUX_PROMPT, IMAGES, FamilyCase, flux, lora_files, square
from support.generation import LEAST_EFFECT, TOLERANCE
from support.handmade import State
from support.pairs import some_pairs
from support.sd_families import UNETS
from support.video_families import VIDEOS
from tiny_pipeline import relative_difference
from torch import nn

from klora_compile import Settings, compile_fusion
from klora_compile.rules import Klora
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import apply_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError

MODES = ("merge", "branch")

#: As many blocks as FLUX.1 has: 19 of 14 linear layers, 38 of 6.
FULL_DEPTH = FamilyCase(
    "FLUX.1 of full depth",
    lambda: flux(num_layers=19, num_single_layers=38),
    {**FLUX_PROMPT, **square(64)},
    FLUX_BLOCKS,
)


@pytest.mark.parametrize(
    ("case", "mode"), some_pairs([*UNETS, *IMAGES, *VIDEOS], MODES, share=2), ids=str
)
def test_latents_equal_the_reference(case: FamilyCase, mode: str, tmp_path: Path) -> None:
    compare(case, mode, tmp_path)


#: Families that say how noisy a step is in a way of their own, or where several go by one clock.
BY_NOISE: dict[str, Level] = {
    "FLUX.1": "flow",  # shifted by the size of the picture
    "Qwen-Image": "flow",  # its last sigma before the end is given
    "Wan 2.2": "flow",  # two transformers
    "LTX2": "flow",  # a scheduler each for pictures and sound
    "CogVideoX": "training",
    "Cosmos": "sigma",  # two calls of its scheduler in each step
}


@pytest.mark.parametrize(("name", "mode"), some_pairs(BY_NOISE, MODES, share=2))
def test_latents_equal_the_reference_by_the_clock_of_the_noise(
    name: str, mode: str, tmp_path: Path
) -> None:
    (case,) = (case for case in (*IMAGES, *VIDEOS) if case.name == name)
    compare(case, mode, tmp_path, BY_NOISE[name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_all_layers_of_flux(pattern: Literal["s", "s*"], mode: str, tmp_path: Path) -> None:
    fusion = compare(replace(FULL_DEPTH, pattern=pattern), mode, tmp_path)

    in_blocks = {
        f"transformer.{path}"
        for path, module in FULL_DEPTH.pipeline().transformer.named_modules()
        if "transformer_blocks." in path and isinstance(module, nn.Linear)
    }
    assert {entry.layer for entry in fusion.entries if entry.acts} == in_blocks
    assert len(in_blocks) == 494


#: Families whose attention can be made to use one fused projection.
FUSIBLE = ("SD1", "SD2", "SDXL", "SD3", "FLUX.1", "FLUX.2", "Wan 2.2", "LTX", "CogVideoX")


@pytest.mark.parametrize(
    "case", [case for case in (*UNETS, *IMAGES, *VIDEOS) if case.name in FUSIBLE], ids=str
)
def test_fused_projections_are_refused(case: FamilyCase, tmp_path: Path) -> None:
    pipe = case.pipeline()
    fusion = compile_fusion(*lora_files(pipe, case, tmp_path), device="cpu")
    for denoiser in case.ran:
        getattr(pipe, denoiser).fuse_qkv_projections()
    before = State.of(pipe)

    for mode in ("auto", *MODES):
        with pytest.raises(IncompatibleModelError, match=r"call pipe\.unfuse_qkv_projections\(\)"):
            apply_fusion(pipe, fusion, mode=mode)

    assert State.of(pipe) == before


@pytest.mark.parametrize("mode", MODES)
def test_the_files_of_wan_2_2_one_for_each_transformer(mode: str, tmp_path: Path) -> None:
    """Both files of a LoRA have the same names; two artifacts act as the one of both together."""
    (case,) = (case for case in VIDEOS if case.name == "Wan 2.2")
    pipe = case.pipeline()
    fusions = []
    together = lora_files(pipe, case, tmp_path)
    for denoiser in ("transformer", "transformer_2"):
        files = []
        for path in together:
            own = {
                "transformer." + key.removeprefix(f"{denoiser}."): tensor
                for key, tensor in load_file(str(path)).items()
                if key.startswith(f"{denoiser}.")
            }
            files.append(tmp_path / f"{denoiser}-{path.name}")
            save_file(own, str(files[-1]))
        named = "transformer_2" if denoiser == "transformer_2" else None
        fusions.append(compile_fusion(*files, device="cpu", options=ReadOptions(denoiser=named)))
        assert fusions[-1].components == (denoiser,)
    with apply_fusion(pipe, compile_fusion(*together, device="cpu"), mode=mode):
        expected = case.generate(pipe)
    bare = case.generate(pipe)
    with apply_fusion(pipe, fusions[0], mode=mode), apply_fusion(pipe, fusions[1], mode=mode):
        assert torch.equal(case.generate(pipe), expected)
    assert torch.equal(case.generate(pipe), bare)
    assert not torch.allclose(bare, expected)


def compare(case: FamilyCase, mode: str, folder: Path, level: Level | None = None) -> Fusion:
    """Generate as the reference does and with a fusion, and leave the pipeline as it was.

    Args:
        level: how its scheduler tells its noise, for the clock of that; None for that of the steps.
    """
    pipe = case.pipeline()
    content, style = lora_files(pipe, case, folder)
    settings = Settings(clock="step" if level is None else "noise")
    rule = Klora(pattern=case.pattern)
    fusion = compile_fusion(content, style, rule, settings, device="cpu")
    save_fusion(fusion, folder / "a.klora.safetensors")
    assert switching(fusion, case) == set(case.ran)
    bare = case.generate(pipe)  # leaves attributes on pipelines and schedulers
    before = State.of(pipe)
    moments = [moment for denoiser in case.ran for moment in case.progress(denoiser)]
    if level is not None:
        whole = progress_of_run(pipe.scheduler, "noise", level)
        steps = [step for ran in case.ran.values() for step in ran]
        moments = [whole[step] for step in steps for _ in range(case.evaluations)]
    with sampling(pipe, KLora(content, style, case.pattern), moments):
        expected = case.generate(pipe)

    with (
        apply_fusion(pipe, folder / "a.klora.safetensors", mode=mode),
        counted(pipe, case) as evaluations,
    ):
        found = case.generate(pipe)

    assert relative_difference(found, expected) <= TOLERANCE
    assert relative_difference(expected, bare) >= LEAST_EFFECT
    assert evaluations == {denoiser: len(case.progress(denoiser)) for denoiser in case.ran}
    assert State.of(pipe) == before
    return fusion


def switching(fusion: Fusion, case: FamilyCase) -> set[str]:
    """The denoisers of which layers switch while they run."""
    found = set()
    for entry in fusion.entries:
        if entry.component in case.ran:
            first, *_, last = case.progress(entry.component)
            if any(first < moment <= last for moment in entry.timeline.starts):
                found.add(entry.component)
    return found


@contextmanager
def counted(pipe: Any, case: FamilyCase) -> Iterator[Counter[str]]:
    """How often each denoiser is evaluated."""
    counts: Counter[str] = Counter()

    def hook(denoiser: str) -> Any:
        return getattr(pipe, denoiser).register_forward_pre_hook(
            lambda *_: counts.update([denoiser])
        )

    hooks = [hook(denoiser) for denoiser in case.ran]
    yield counts
    for each in hooks:
        each.remove()
