"""Two LoRAs that both change a bias, and share no weight from which a gamma could follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.lora_files import write_lora

from klora_compile import PairingError, compile_fusion
from klora_compile.cli import main
from klora_compile.rules import Direct, Est, Klora, NpKlora, Rule, Soft

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"


def with_bias(path: Path, layer: str, seed: int, *, zero: bool = False) -> Path:
    """Write a LoRA of one weight, which may be zero, and of one bias."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(320, 2, generator=generator)
    return write_lora(
        path,
        {
            f"{BLOCK}{layer}.lora_down.weight": torch.randn(2, 320, generator=generator),
            f"{BLOCK}{layer}.lora_up.weight": 0 * up if zero else up,
            f"{BLOCK}{layer}.alpha": torch.tensor(2.0),
            f"{BLOCK}attn1_to_out_0.diff_b": torch.randn(320, generator=generator),
        },
    )


@pytest.fixture(params=["no weight is shared", "the content's is zero", "the style's is zero"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    other = "attn1_to_k" if request.param == "no weight is shared" else "attn1_to_q"
    return (
        with_bias(tmp_path / "a.safetensors", "attn1_to_q", 1, zero="content" in request.param),
        with_bias(tmp_path / "b.safetensors", other, 2, zero="style" in request.param),
    )


@pytest.mark.parametrize(
    "rule",
    [Klora(), Klora(semantics="authors"), Klora(pattern="s*"), NpKlora(), Soft()],
    ids=["paper", "authors", "s*", "np+klora", "soft"],
)
def test_an_undefined_gamma_is_one_error(pair: tuple[Path, Path], rule: Rule) -> None:
    with pytest.raises(PairingError, match="gamma is undefined in unet: the deltas of one LoRA"):
        compile_fusion(*pair, rule, device="cpu")


@pytest.mark.parametrize("rule", [lambda: Klora(gamma=1.0), Est, Direct])
def test_other_rules_and_a_stated_gamma_take_them(
    pair: tuple[Path, Path], rule: Callable[[], Rule]
) -> None:
    (bias,) = (
        e for e in compile_fusion(*pair, rule(), device="cpu").entries if e.parameter == "bias"
    )
    assert set(bias.factors) == {"content", "style"}


def test_a_catalogue_refuses_them_too_and_goes_on_refusing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    store, file = tmp_path / "store", tmp_path / "all.klora-catalogue.safetensors"
    words = ("catalogue", store, "--content", "a", "--style", "b", "-o", file, "--json")

    def klora(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    klora("profile", *pair, "--store", store)
    for more in ((), ("--add",)):
        told = klora(*words, *more)
        assert '"linked": 0, "kept": 0' in told
        assert "gamma is undefined" in told
