"""Each denoiser of diffusers that can load LoRAs has a record, or a reason why it has none."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping

import diffusers
import diffusers.models
import pytest
from diffusers.loaders import PeftAdapterMixin
from support.layout_models import DENOISERS, on_meta
from support.page_table import PageTable, as_text
from torch import nn

from klora_compile.families.tables import WHOLE
from klora_compile.reading.names.account import account_for
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family

#: Classes with a LoRA mixin that are no denoisers, as a pattern.
OTHER_PARTS = re.compile(r"Autoencoder|ControlNet")

_OWN = "no author's names are known; files have diffusers' own paths"
#: Denoisers without a record, and why.
WITHOUT: Mapping[str, str] = {
    "BriaFibo2Transformer2DModel": _OWN,
    "Cosmos3OmniTransformer": _OWN,
    "DreamLiteUNetModel": _OWN,
    "Kandinsky6SRTransformer3DModel": _OWN,
    "Kandinsky6Transformer3DModel": _OWN,
    "LongCatImageTransformer2DModel": _OWN,
    "MotifVideoTransformer3DModel": _OWN,
    "NucleusMoEImageTransformer2DModel": _OWN,
    "OvisImageTransformer2DModel": _OWN,
    "PriorTransformer": "makes embeddings of pictures; its pipelines load no LoRAs",
    "RFD4ProteinaTransformer": "makes proteins, no pictures",
    "SanaWMLTX2RefinerTransformer3DModel": "a second model of a pipeline that loads no LoRAs",
    "UVit2DModel": "its pipeline (aMUSEd) has no timesteps that progress could follow",
    "WanAnimate2Transformer3DModel": _OWN,
}


@functools.cache
def with_lora_mixin() -> Mapping[str, type[nn.Module]]:
    """Name -> class of every model of the installed diffusers that loads LoRAs."""
    found = {}
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            own = kind.__module__ == info.name and issubclass(kind, nn.Module)
            if own and issubclass(kind, PeftAdapterMixin) and not OTHER_PARTS.search(name):
                found[name] = kind
    return found


def test_each_denoiser_has_a_record_or_a_reason() -> None:
    """A new diffusers fails here: write a record, or say why there is none."""
    recorded = {name for family in FAMILIES.values() for name in family.models}
    assert set(with_lora_mixin()) - recorded == set(WITHOUT)
    assert not recorded & set(WITHOUT)
    for name in recorded:
        assert hasattr(diffusers, name) or name in with_lora_mixin(), name


#: Class -> modules that the record of its family does not name, as a pattern; they are beside the
#: layers that LoRAs are for, and are read by their own paths.
BESIDE: Mapping[str, str] = {
    "WanAnimateTransformer3DModel": r"(pose_patch_embedding|motion_encoder|face_\w+)\b.*",
    "AnyFlowTransformer3DModel": r"condition_embedder\.delta_embedder\..*",
    "AnyFlowFARTransformer3DModel": r"condition_embedder\.delta_embedder\..*|far_patch_embedding",
    "HeliosTransformer3DModel": r"patch_(short|mid|long)|norm_out\.scale_shift_table",
    "CosmosTransformer3DModel": r"learnable_pos_embed\..*",
}
SHARED = [
    (family, name)
    for family in FAMILIES.values()
    for name in family.models
    if name != "AnimaTextConditioner" and family.denoisers[0] != "unet"
    if name != family.models[0] or name in BESIDE
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), SHARED, ids=lambda v: getattr(v, "key", v))
def test_further_classes_have_the_layers_of_the_record(family: Family, name: str) -> None:
    model = on_meta(getattr(diffusers, name))
    tables = [t.in_diffusers_names() for t in WHOLE if t.family == family.key]
    beside = re.compile(BESIDE.get(name, "(?!)"))
    for path, _ in model.named_parameters():
        module = re.sub(r"\.(weight|bias)$", "", path)
        named = any(table.match(module, flat=False) for table in tables)
        assert named != bool(beside.fullmatch(module)), module


#: What classes need that have no defaults.
SETTINGS: Mapping[str, dict[str, int]] = {
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "num_layers": 4},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "sample_size": 64,
        "patch_size": 2,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
    },
}


def paths_of(name: str) -> list[str]:
    model = on_meta(getattr(diffusers, name), **SETTINGS.get(name, {}))
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]


#: Denoisers of no record, those without a LoRA mixin too, and what their pipelines call them.
BY_OWN_PATHS = [
    ("Kandinsky3UNet", "unet"),
    ("StableCascadeUNet", "prior"),
    ("StableCascadeUNet", "decoder"),
    ("HunyuanDiT2DModel", "transformer"),
    ("AllegroTransformer3DModel", "transformer"),
    ("PRXTransformer2DModel", "transformer"),
    ("LatteTransformer3DModel", "transformer"),
    ("StableAudioDiTModel", "transformer"),
    ("LongCatImageTransformer2DModel", "transformer"),
    ("OvisImageTransformer2DModel", "transformer"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "component"), BY_OWN_PATHS)
def test_any_denoiser_is_read_by_its_own_paths(name: str, component: str) -> None:
    """Every layer where the file has it, in whatever component it names."""
    keys = {
        f"{component}.{path}.{part}.weight": (4, 4)
        for path in paths_of(name)
        for part in ("lora_A", "lora_B")
    }
    account = account_for(keys)
    assert not account.unused
    assert not account.problems
    found = {".".join(account.place(module)) for module in account.modules}
    expected = {f"{component}.{path}" for path in paths_of(name)}
    assert found == expected


def test_a_component_of_any_name_is_read_by_own_paths() -> None:
    """As a quick example: one that no record knows, with a path that no record has."""
    keys = {
        f"decoder.down_blocks.0.3.mapper.{part}.weight": (4, 4) for part in ("lora_A", "lora_B")
    }
    account = account_for(keys)
    assert not account.unused
    assert [account.place(module) for module in account.modules] == [
        ("decoder", "down_blocks.0.3.mapper")
    ]


def test_layouts_are_proven_on_the_classes_of_the_records() -> None:
    for key, family in FAMILIES.items():
        assert DENOISERS[key][0].__name__ in family.models, key


# --- the table in the docs ------------------------------------------------------------------

TABLE = PageTable("models")


def rows_of_the_table() -> Iterator[str]:
    yield "| base model | denoisers of diffusers | a pipeline |"
    yield "|---|---|---|"
    for family in FAMILIES.values():
        models = ", ".join(f"`{name}`" for name in family.models)
        yield f"| {family.title} | {models} | `{family.pipeline}` |"
    for name, why in sorted(WITHOUT.items()):
        yield f"| none: {why} | `{name}` | |"


def test_the_table_in_the_docs_is_that_of_the_records() -> None:
    """Run this file as a program to write it anew."""
    assert TABLE.read() == as_text(rows_of_the_table())


if __name__ == "__main__":
    TABLE.write(rows_of_the_table())
