"""A base model's record is whole, and true of diffusers' own classes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from typing import Any

import diffusers
import pytest
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from support.layout_models import DENOISERS, on_meta, weights
from support.lora_files import ROOT, run_python
from torch import nn

from klora_compile.families.convolutions import folded_kernel, is_pointwise
from klora_compile.reading.names.spelling import COMPONENTS
from klora_runtime.artifact.schedule import STEPLESS, TEXT_ENCODERS
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family

#: Classes of diffusers that are evaluated in each step.
DENOISER = re.compile(r"\.(unets|transformers)\.|UNet\b|WuerstchenPrior")

#: What a record may be without, and has to say why.
EXPLAINED = ("marks", "stated", "tag", "script", "kohya", "text_encoders")

#: What says all there is to say where it is empty.
MAY_BE_EMPTY = (
    "named_after",
    "shares_marks_of",
    "block_weights",
    "smaller",
    "widths",
    "kernels",
    "pointwise",
    "missing",
    "is_modular",
)

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.key)


@ALL
def test_no_record_is_incomplete(family: Family) -> None:
    fields = {field.name for field in dataclasses.fields(Family)}
    empty = {name for name in fields - set(MAY_BE_EMPTY) if not getattr(family, name)}
    assert empty == set(family.missing)
    assert empty <= set(EXPLAINED)
    for why in family.missing.values():
        assert re.fullmatch(r"[a-zA-Z].*[^.]", why)


@ALL
def test_a_record_speaks_of_itself(family: Family) -> None:
    assert FAMILIES[family.key] is family
    assert {layout.family for layout in family.layouts} == {family.key}
    whole = [layout.component for layout in family.layouts if layout.is_whole]
    assert set(whole) == {layout.component for layout in family.layouts}
    assert family.denoisers[0] == whole[0]
    if family.kohya is not None:
        unwritten = {e.component for e in family.text_encoders if e.kohya is None}
        written = [c for c in family.components if c not in unwritten]
        assert all(family.kohya_names(component) for component in written)


def pipeline(family: Family) -> Any:
    return getattr(diffusers, family.pipeline)


@ALL
def test_the_pipeline_is_one_of_diffusers(family: Family) -> None:
    kind = pipeline(family)
    assert family.is_modular == issubclass(kind, diffusers.ModularPipeline)
    if not family.is_modular:
        assert set(family.components) <= set(inspect.signature(kind.__init__).parameters)
        called = set(inspect.signature(kind.__call__).parameters)
        assert {"prompt", "num_inference_steps"} <= called
        assert ("image" in called) >= (family.task == "image-to-image")
    result = kind.__call__.__doc__ or ""
    assert ("frames" in result) == (family.task == "text-to-video") or family.is_modular


#: Ids that only documentation has.
DOCUMENTED = {
    "circlestone-labs/Anima-Base-v1.0-Diffusers",
    "baidu/ERNIE-Image",
    "black-forest-labs/FLUX-3-Image-Klein-Base",
}


@ALL
def test_diffusers_knows_the_model_on_the_hub(family: Family) -> None:
    known = {
        place["pretrained_model_name_or_path"]
        for place in DIFFUSERS_DEFAULT_PIPELINE_PATHS.values()
    }
    example = inspect.getsource(sys.modules[pipeline(family).__module__])
    assert family.hub in known | DOCUMENTED or f'"{family.hub}"' in example


@ALL
def test_the_text_encoders_are_those_of_the_pipeline(family: Family) -> None:
    if family.is_modular:
        pytest.skip("a modular pipeline does not say what its parts are")
    annotations = pipeline(family).__init__.__annotations__
    for encoder in family.text_encoders:
        kind = str(annotations[encoder.component])
        title, name = (re.sub("[^a-z0-9]", "", t.lower()) for t in (encoder.model.title, kind))
        assert title in name, (encoder.component, kind)


#: Family -> depths that differ from those of the model that the layouts are proven on.
LARGER = {"sd3": {"transformer_blocks": 38}, "sana": {"transformer_blocks": 60}}


@ALL
def test_the_blocks_are_those_of_the_model(family: Family) -> None:
    """All lists of blocks that have weights, and how many each has."""
    found: dict[str, int] = {}
    for component in dict.fromkeys(layout.component for layout in family.layouts):
        for path in weights(family.key, component):
            match = re.match(r"(?:(mid_block)|([A-Za-z_.]+?)\.(\d+))\.", path)
            if match is not None:
                name, count = match[1] or match[2], int(match[3] or 0) + 1
                found[name] = max(found.get(name, 0), count)
    # Sequences of single layers, which are no blocks.
    single = (
        *("t_embedder", "cap_embedder", "time_caption_embed", "condition_embedder"),
        *("caption_projection", "glyph_projector", "prior_projector"),
    )
    found = {name: count for name, count in found.items() if not name.startswith(single)}
    assert {**found, **LARGER.get(family.key, {})} == dict(family.blocks)


UNETS = [key for key, family in FAMILIES.items() if family.denoisers == ("unet",)]


@pytest.mark.parametrize("key", UNETS)
def test_convolutions_are_those_of_the_model(key: str) -> None:
    kind, options = DENOISERS[key]
    model = on_meta(kind, **options)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            size = getattr(module, "kernel_size", ())
            assert folded_kernel("unet", path) == (size if size == (3, 3) else ()), path
            assert is_pointwise(key, "unet", path) == (size == (1, 1)), path


def test_what_all_unets_say_holds_for_an_unknown_one() -> None:
    for family in (None, "a family of tomorrow"):
        assert is_pointwise(family, "unet", "up_blocks.0.resnets.0.conv_shortcut")
        assert not is_pointwise(family, "unet", "down_blocks.0.attentions.0.proj_in")
        assert not is_pointwise(family, "transformer", "conv_shortcut")
        assert not is_pointwise(family, "text_encoder", "conv_shortcut")


def test_text_encoders_have_no_steps() -> None:
    components = {e.component for family in FAMILIES.values() for e in family.text_encoders}
    assert components <= set(TEXT_ENCODERS)
    denoisers = {name for family in FAMILIES.values() for name in family.denoisers}
    assert not denoisers & set(TEXT_ENCODERS)


@ALL
def test_what_is_no_denoiser_has_no_steps(family: Family) -> None:
    """It runs before the first step, so that nothing of it can be switched."""
    assert set(family.components) - set(family.denoisers) <= set(STEPLESS)
    assert not set(family.denoisers) & set(STEPLESS)


def test_records_need_nothing_but_each_other() -> None:
    for path in (ROOT / "runtime/klora_runtime/families").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                top = (node.module or "").partition(".")[0]
                own = (node.module or "").startswith("klora_runtime.families")
                assert own or top in sys.stdlib_module_names, (path.name, node.module)


def test_prefixes_stand_for_one_text_encoder_of_a_family() -> None:
    for family in FAMILIES.values():
        prefixes = [prefix for encoder in family.text_encoders for prefix in encoder.prefixes]
        assert len(prefixes) == len(set(prefixes))
        for encoder in family.text_encoders:
            assert encoder.prefixes, (family.key, encoder.component)
            assert all(family.encoder(prefix) is encoder for prefix in encoder.prefixes)


def test_what_the_records_say_is_known_without_torch() -> None:
    code = "import sys, klora_runtime.families.catalogue; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


@pytest.mark.slow
def test_every_denoiser_of_diffusers_may_be_named() -> None:
    """What its pipelines call their transformers and UNets."""
    named: set[str] = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            parts = getattr(kind.__init__, "__annotations__", {})
            named |= {part for part, of in parts.items() if DENOISER.search(str(of))}
    assert named >= {"unet", "transformer", "prior", "decoder"}
    assert named <= {*COMPONENTS, "motion_adapter"}  # which becomes a part of the UNet
