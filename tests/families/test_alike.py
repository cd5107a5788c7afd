"""Base models with layers of the same names and widths: a LoRA is told to be for one of them.

Every released model of every record is built without weights, and LoRAs of some of its layers are
told. What is told must hold the model's own family, and every other that has these very layers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from support.layout_models import COSMOS_2B, DENOISERS, OTHERS
from torch import nn

from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.telling import families_of_layers
from klora_runtime.families.catalogue import FAMILIES

Shapes = Mapping[str, tuple[int, ...]]

pytestmark = pytest.mark.slow

#: Further released models of a family, with what differs from the class's defaults.
RELEASED: list[tuple[str, str, dict[str, Any]]] = [
    ("wan", "WanTransformer3DModel", {}),
    ("wan", "WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30}),
    ("wan", "WanTransformer3DModel", {"num_attention_heads": 24, "num_layers": 30}),
    ("sd3", "SD3Transformer2DModel", {"num_attention_heads": 24, "num_layers": 24}),
    ("sd3", "SD3Transformer2DModel", {"num_attention_heads": 38, "num_layers": 38}),
    ("cogvideox", "CogVideoXTransformer3DModel", {}),
    ("cogvideox", "ConsisIDTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
    ("kandinsky-5", "Kandinsky5Transformer3DModel", {}),
    ("cosmos-predict", "CosmosTransformer3DModel", COSMOS_2B),
]

#: Kind of LoRA -> pattern of its layers.
KINDS = {
    "attention": r"\.(to_[qkv]|to_out\.0|to_query|to_key|to_value)$",
    "one block": r"(blocks|layers)\.0\..*\.to_[qkv]$",
    "blocks": r"(blocks|layers)\.\d+\.",
    "everything": r"",
}
_BLOCK = re.compile(r"([A-Za-z_.]+?)\.(\d+)\.")


@functools.cache
def models() -> Mapping[tuple[str, str], Shapes]:
    """(family, name) -> the layers of a model."""
    classes = [(key, kind.__name__, own) for key, (kind, own) in DENOISERS.items()]
    classes += [(key, DENOISERS[key][0].__name__, o) for key, own in OTHERS.items() for o in own]
    found = {}
    for position, (key, name, settings) in enumerate([*classes, *RELEASED]):
        with torch.device("meta"):
            network = getattr(diffusers, name)(**settings)
        found[key, f"{name} {position}"] = {
            path: tuple(module.weight.shape)
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
    return found


def told(family: str, layers: Shapes) -> set[str]:
    component = FAMILIES[family].denoisers[0]
    facts = [
        LayerFacts(component, path, "weight", "lora", 4, 4.0, "none", shape)
        for path, shape in layers.items()
    ]
    return set(families_of_layers(facts, ()))


def depths(layers: Shapes) -> dict[str, int]:
    found: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.match, layers)):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def having(family: str, layers: Shapes) -> set[str]:
    """Families with a model that has these layers; with as many blocks, if there are such."""
    component = FAMILIES[family].denoisers[0]
    inner = {_BLOCK.sub("", path, count=1) for path in layers}
    able = {
        (key, name): {p: s for p, s in own.items() if _BLOCK.sub("", p, count=1) in inner}
        for (key, name), own in models().items()
        if FAMILIES[key].denoisers[0] == component
        and all(own.get(path) == shape for path, shape in layers.items())
    }
    whole = {place for place, own in able.items() if depths(own) == depths(layers)}
    return {key for key, _ in whole or able}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_may_be_for_each_base_model_that_has_its_layers(kind: str) -> None:
    wrong = []
    for (family, name), every in models().items():
        layers = {p: s for p, s in every.items() if re.search(KINDS[kind], p)}
        if layers and not {family, *having(family, layers)} <= (found := told(family, layers)):
            wrong.append((name, sorted(found), sorted(having(family, layers))))
    assert wrong == []


@pytest.mark.parametrize("kind", ["blocks", "everything"])
def test_a_lora_of_all_layers_is_for_its_own_base_model(kind: str) -> None:
    for family in ("flux.1", "chroma", "bria", "fibo", "wan", "wan-vace", "qwen-image", "mochi-1"):
        shapes = next(own for (key, _), own in models().items() if key == family)
        layers = {p: s for p, s in shapes.items() if re.search(KINDS[kind], p)}
        assert told(family, layers) == {family}
