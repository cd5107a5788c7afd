"""Layers that quantise a plain weight at each forward: merge refuses them, branch adds to them."""

from __future__ import annotations

from collections.abc import Callable
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


KINDS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "optimum-quanto": (quanto, "QLinear"),
    "torchao": (torchao_qat, "FakeQuantizedLinear"),
    "torch": (torch_qat, "Linear"),
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
