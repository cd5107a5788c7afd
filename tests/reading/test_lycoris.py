"""Layers that LyCORIS itself made and saved: each delta is what LyCORIS trains with.

Its ``get_merged_weight`` of LoHa and LoKr multiplies by the scale twice (4.1); what acts in
training and sampling is ``get_weight``, times the scalar that ``state_dict`` folds into a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file
from support.form_files import base_model
from support.lora_files import write_lora
from torch import nn

from klora_compile import read_adapter
from klora_compile.settings.read_options import ReadOptions

RANK, ALPHA = 4, 2.0
IN, OUT = 96, 128

#: Module path in diffusers' names, and what is there.
LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "linear": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        lambda: nn.Linear(IN, OUT),
    ),
    "3x3": ("down_blocks.0.resnets.0.conv1", lambda: nn.Conv2d(IN, OUT, 3, padding=1)),
    "1x1": ("down_blocks.0.attentions.0.proj_in", lambda: nn.Conv2d(IN, OUT, 1)),
}
FORMS: dict[str, type[Any]] = {"LoCon": LoConModule, "LoHa": LohaModule, "LoKr": LokrModule}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "Tucker": {"use_tucker": True},
    "DoRA on rows": {"weight_decompose": True},
    "DoRA on columns": {"weight_decompose": True, "wd_on_out": False},
    "trained scalar": {"use_scalar": True},
    "rank-stabilised": {"rs_lora": True},
    "both factored": {"decompose_both": True},
    "factor 4": {"factor": 4},
    "whole": {"full_matrix": True},
    "unbalanced": {"unbalanced_factorization": True},
}


def trained(kind: type[Any], layer: nn.Module, path: str, **settings: Any) -> Any:
    """A module of LyCORIS with random parameters."""
    torch.manual_seed(0)
    name = "lora_unet_" + path.replace(".", "_")
    module = kind(name, layer, 1.0, RANK, ALPHA, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def saved(module: Any, folder: Path) -> Path:
    tensors = {
        f"{module.lora_name}.{key}": value.detach().clone().contiguous()
        for key, value in module.state_dict().items()
    }
    return write_lora(folder / "lora.safetensors", tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("setting", ["as it is", "whole", "DoRA on rows"])
def test_a_pointwise_convolution_is_a_matrix(form: str, setting: str, tmp_path: Path) -> None:
    """In every form, so that any two of them can be fused."""
    path, make = LAYERS["1x1"]
    layer = make()
    file = saved(trained(FORMS[form], layer, path, **SETTINGS[setting]), tmp_path)
    base = base_model(tmp_path / "base", {("unet", path): layer.weight.detach().numpy()})
    (read,) = read_adapter(file, ReadOptions(base=base)).layers.values()
    assert read.shape == (OUT, IN)


def acting(module: Any, base: torch.Tensor) -> torch.Tensor:
    """What the module adds to its layer's weight."""
    if isinstance(module, LoConModule):
        merged, _ = module.get_merged_weight(multiplier=1.0)
        return merged - base
    delta = module.get_weight(base.shape) * module.scalar
    return module.apply_weight_decompose(base + delta, 1.0) - base if module.wd else delta


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_deltas_are_those_that_lycoris_trains(
    kind: str, form: str, setting: str, tmp_path: Path
) -> None:
    path, make = LAYERS[kind]
    layer = make()
    module = trained(FORMS[form], layer, path, **SETTINGS[setting])
    base = layer.weight.detach()
    assert isinstance(base, torch.Tensor)
    folder = base_model(tmp_path / "base", {("unet", path): base.double().numpy()})
    adapter = read_adapter(saved(module, tmp_path), ReadOptions(base=folder))
    (read,) = adapter.layers.values()
    expected = acting(module, base).detach().double()
    mine = (read.scaling * read.delta.matrix()).reshape(expected.shape)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert read.form == ("dora" if "DoRA" in setting else {"LoCon": "lora"}.get(form, form.lower()))


def test_differences_are_read_as_they_are(tmp_path: Path) -> None:
    path, make = LAYERS["3x3"]
    module = trained(FullModule, make(), path)
    adapter = read_adapter(saved(module, tmp_path))
    state = module.state_dict()
    weight, bias = adapter.layers[f"unet.{path}"], adapter.layers[f"unet.{path}.bias"]
    np.testing.assert_array_equal(weight.delta.matrix(), state["diff"].double().flatten(1))
    np.testing.assert_array_equal(bias.delta.matrix()[:, 0], state["diff_b"].double())
    norm = NormModule("lora_unet_conv_norm_out", nn.GroupNorm(4, 32), 1.0)
    adapter = read_adapter(saved(norm, tmp_path))
    assert set(adapter.layers) == {"unet.conv_norm_out", "unet.conv_norm_out.bias"}


def test_a_whole_lokr_that_is_rank_stabilised_needs_the_stated_rank(tmp_path: Path) -> None:
    """Its scale is the root of a rank that no tensor shows; kohya's metadata states it."""
    path = LAYERS["linear"][0]
    module = trained(LokrModule, nn.Linear(24, 32), path, rs_lora=True)
    assert {"lokr_w1", "lokr_w2"} < set(module.state_dict())
    file = saved(module, tmp_path)
    metadata = {"ss_network_args": '{"rs_lora": "True"}', "ss_network_dim": str(RANK)}
    save_file(load_file(file), file, metadata=metadata)
    (read,) = read_adapter(file).layers.values()
    expected = module.get_weight((32, 24)).detach().double()
    torch.testing.assert_close(read.scaling * read.delta.matrix(), expected, rtol=1e-5, atol=1e-5)
