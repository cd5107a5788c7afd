"""Every form from a file to the layers: compiled, verified and applied in both modes.

Two files of different forms are summed; each parameter and each layer is then what the libraries
that trained the files make of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.lycoris_kinds import LAYERS, TRAINED, lycoris_file
from support.pairs import slow
from support.peft_kinds import CASES, saved
from support.peft_models import layers
from torch import nn

from klora_compile.cli import main
from klora_runtime import apply_fusion


class Pipe:
    """A pipeline is what has a denoiser."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


def in_pairs(names: Sequence[str], share: int) -> list[object]:
    """Each name with the next one; all but one of ``share`` are slow."""
    pairs = list(zip(names, [*names[1:], names[0]], strict=True))[::2]
    return [pair if i % share == 0 else slow(*pair) for i, pair in enumerate(pairs)]


def klora(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output


def compiled(folder: Path, files: Sequence[Path], base: Path) -> Path:
    """An artifact of the sum of two files, which verifies against them."""
    out = folder / "sum.klora.safetensors"
    klora("compile", *files, "-o", out, "--rule", "direct", "--base", base)
    klora("verify", out, *files, "--against", "--base", base)
    return out


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have parameters."""
    return {name: each for name, each in model.named_modules() if len([*each.parameters(False)])}


def an_input(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 6, 6)
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.normalized_shape[0]
    return torch.randn(2, width)


def assert_acts(artifact: Path, bare: nn.Module, added: dict[str, torch.Tensor]) -> None:
    """In both modes, and the bare model is back to the bit behind it.

    Args:
        bare: what the fusion is applied to.
        added: parameter -> its change.
    """
    expected = copy.deepcopy(bare)
    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for name, change in added.items():
            parameters[name] += change
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    for mode in ("merge", "branch"):
        handle = apply_fusion(Pipe(bare), artifact, mode=mode)
        if mode == "merge":
            for name, value in bare.named_parameters():
                torch.testing.assert_close(value, parameters[name], rtol=2e-5, atol=1e-4, msg=name)
        for name, layer in leaves(expected).items():
            x = an_input(layer)
            found, wanted = bare.get_submodule(name)(x), layer(x)
            atol = 1e-5 * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol, msg=f"{mode}: {name}")
        handle.remove()
        assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


@pytest.mark.parametrize(("one", "other"), in_pairs(list(CASES), share=5))
def test_what_peft_trained(one: str, other: str, tmp_path: Path) -> None:
    files, added = [], {}
    for name in (one, other):
        (tmp_path / name).mkdir()
        file, changes = saved(CASES[name][1], tmp_path / name)
        files.append(file)
        for parameter, change in changes.items():
            added[parameter] = added.get(parameter, 0.0) + change
    artifact = compiled(tmp_path, files, tmp_path / one / "base")
    assert_acts(artifact, layers().requires_grad_(False), added)


@pytest.mark.parametrize(("one", "other"), in_pairs(list(TRAINED), share=3))
@pytest.mark.parametrize("kind", ["linear", slow("3x3"), slow("1x1")])
def test_what_lycoris_trained(kind: str, one: str, other: str, tmp_path: Path) -> None:
    files, added = [], []
    for name in (one, other):
        (tmp_path / name).mkdir()
        file, base, change = lycoris_file(tmp_path / name, name, kind)
        files.append(file)
        added.append(change)
    path, make = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    *outer, last = path.split(".")
    model = inner = nn.Module()
    for name in outer:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(last, layer.requires_grad_(False))
    artifact = compiled(tmp_path, files, base)
    assert_acts(artifact, model, {f"{path}.weight": added[0] + added[1]})
