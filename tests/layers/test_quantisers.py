"""Layers that quantise a plain weight at each forward: merge refuses them, branch adds to them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.handmade import delta_of, hand_entry, hand_fusion
from tiny_pipeline import relative_difference
from torch import nn

from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers.branch import Branch
from klora_runtime.layers.choice import choose
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.quantisers import quantiser_of
from klora_runtime.layers.targets import find_targets


def quanto(leaf: nn.Linear) -> Any:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = nn.Sequential(leaf)
    library.quantize(model, weights=library.qint8)
    return model[0]


def torchao_qat(leaf: nn.Linear) -> Any:
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    return qat.FakeQuantizedLinear.from_linear(leaf, weight_config=config)


def torch_qat(leaf: nn.Linear) -> Any:
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import default_qat_qconfig

    leaf.qconfig = default_qat_qconfig  # type: ignore[assignment]
    return Linear.from_float(leaf)


def modelopt(leaf: nn.Linear) -> Any:
    library = pytest.importorskip("modelopt.torch.quantization", reason="modelopt is not installed")
    model = nn.Sequential(leaf)
    x = torch.randn(5, leaf.in_features)
    library.quantize(model, deepcopy(library.INT8_WEIGHT_ONLY_CFG), lambda own: own(x))
    return model[0]


class Rounding(nn.Module):
    is_enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x * 64) / 64


class QuantLinear(nn.Linear):
    """Made like ModelOpt's, which needs libraries of its own: its weight is what asking gives."""

    quantises = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight_quantizer = Rounding()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self.weight_quantizer(found) if name == "weight" and self.quantises else found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.quantises = True
        try:
            return super().forward(x)
        finally:
            self.quantises = False


def like_modelopt(leaf: nn.Linear) -> Any:
    made = QuantLinear(leaf.in_features, leaf.out_features)
    made.load_state_dict(leaf.state_dict())
    assert not torch.equal(made(torch.eye(64)), leaf(torch.eye(64)))
    return made


KINDS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "optimum-quanto": (quanto, "QLinear"),
    "torchao": (torchao_qat, "FakeQuantizedLinear"),
    "torch": (torch_qat, "Linear"),
    "modelopt": (modelopt, "QuantLinear"),
    "like modelopt": (like_modelopt, "QuantLinear"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_quantises_at_each_forward_is_branched(kind: str) -> None:
    make, name = KINDS[kind]
    torch.manual_seed(0)
    model = nn.ModuleDict({"leaf": make(nn.Linear(64, 64))})
    entry = hand_entry("unet.leaf", (64, 64), switch=None)
    targets = find_targets({"unet": model}, hand_fusion(entry))
    x = torch.randn(5, 64)
    bare = model["leaf"](x).detach()

    with pytest.raises(IncompatibleModelError) as error:
        Merge(targets)
    why = f"unet.leaf: {name} quantises its weight at each forward, so a merged delta would be lost"
    assert error.value.issues == (why,)
    mode, reason = choose("auto", targets, {})
    assert isinstance(mode, Branch)
    assert reason == f"not every weight can be merged into ({why})"
    mode.write(0.0, {})

    expected = bare + x @ delta_of(entry, "content").float().t()
    assert relative_difference(model["leaf"](x).detach(), expected) < 1e-6
    mode.release()
    assert torch.equal(model["leaf"](x).detach(), bare)


def test_layers_of_torch_and_frozen_ones_do_not() -> None:
    assert quantiser_of(nn.Linear(2, 2)) is None
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = nn.Sequential(nn.Linear(32, 32))
    library.quantize(model, weights=library.qint8)
    assert quantiser_of(model[0]) == "QLinear"
    library.freeze(model)
    assert quantiser_of(model[0]) is None


def test_a_layer_that_makes_its_weight_when_asked_keeps_doing_so() -> None:
    """In a branch the base computes what it does alone: here with a weight that is rounded."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"leaf": like_modelopt(nn.Linear(64, 64))})
    model["leaf"].weight_quantizer.is_enabled = False  # it is no reason against merging then
    entry = hand_entry("unet.leaf", (64, 64), switch=None, size=0.0)
    x, bare = torch.randn(5, 64), model["leaf"]
    expected = bare(x).detach()
    mode = Branch(find_targets({"unet": model}, hand_fusion(entry)))
    mode.write(0.0, {})
    assert torch.equal(model["leaf"](x).detach(), expected)
    mode.release()


def test_compressed_layers_of_modelopt_are_branched() -> None:
    library = pytest.importorskip("modelopt.torch.quantization", reason="modelopt is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(modelopt(nn.Linear(64, 64)))
    library.compress(model)
    entry, x = hand_entry("unet.0", (64, 64), switch=None), torch.randn(5, 64)
    bare = model(x).detach()
    mode, reason = choose("auto", find_targets({"unet": model}, hand_fusion(entry)), {})
    issue = "unet.0: its weight is torch.int8, of a RealQuantQuantLinear"
    assert reason == f"not every weight can be merged into ({issue})"
    mode.write(0.0, {})
    expected = bare + x @ delta_of(entry, "content").float().t()
    assert relative_difference(model(x).detach(), expected) < 1e-6
    mode.release()
    assert torch.equal(model(x).detach(), bare)
