"""LoRAs of two denoisers, in two files or one, are one entry of a catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.lora_files import peft_keys, random_pair, write_lora

from klora_compile import Settings, compile_fusion
from klora_compile.cataloguing.building import Selection, build, draft
from klora_compile.cataloguing.selecting import Filters, loras_of, matching
from klora_compile.cli import main
from klora_compile.halves import Halves
from klora_compile.profiles.gathering import gather
from klora_compile.profiles.store import Store
from klora_compile.rules import Klora
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import Catalogue, Fusion, save_fusion

LAYERS = [f"blocks.{block}.attn1.to_{letter}" for block in (0, 1) for letter in "qkv"]
GAMMAS = {"transformer", "transformer_2"}

#: A LoRA in two files, or in one.
Files = Path | Halves[Path]


def tensors(denoiser: str, rank: int, seed: int, size: float) -> dict[str, torch.Tensor]:
    """A LoRA of one denoiser; its second layer has zero deltas for odd seeds."""
    layers = {}
    for number, name in enumerate(LAYERS):
        down, up = random_pair(12, 10, rank, seed=100 * seed + number)
        zero = number == 1 and seed % 2
        layers[f"{denoiser}.{name}"] = down, up * (0.0 if zero else size)
    return peft_keys(layers)


def halves(folder: Path, name: str, rank: int, seed: int) -> Halves[Path]:
    """Two files with equal names of layers, and ranks and sizes of their own."""
    folder.mkdir(exist_ok=True)
    own = (("high", rank, 1.0), ("low", rank + 1, 0.3 + seed))
    return Halves(
        *(
            write_lora(
                folder / f"{name}_{half}_noise.safetensors",
                tensors("transformer", own_rank, seed + 50 * (half == "low"), size),
            )
            for half, own_rank, size in own
        )
    )


def together(folder: Path, name: str, rank: int, seed: int) -> Path:
    """One file with the layers of both denoisers."""
    folder.mkdir(exist_ok=True)
    own = tensors("transformer", rank, seed, 1.0) | tensors(
        "transformer_2", rank, seed + 9, 0.2 + seed
    )
    return write_lora(folder / f"{name}.safetensors", own)


class Shop:
    """Two subjects and two styles of two denoisers each, one of them in one file."""

    def __init__(self, folder: Path) -> None:
        self.folder, loras = folder, folder / "loras"
        self.contents: dict[str, Files] = {
            "fox": halves(loras, "fox", 2, 1),
            "owl": together(loras, "owl", 3, 2),
        }
        self.styles: dict[str, Files] = {
            "ink": halves(loras, "ink", 3, 3),
            "oil": together(loras, "oil", 2, 4),
        }
        self.store = Store(folder / "store")
        every = [*self.contents.values(), *self.styles.values()]
        done = gather(every, self.store, options=ReadOptions(), device="cpu", engine=None)
        assert [each.refused for each in done.results] == [None] * 4

    def catalogue(self, path: Path, settings: Settings | None = None) -> Catalogue:
        stored = loras_of(self.store.profiles())
        roles = [
            matching(stored, [f"{name}*" for name in names], Filters(), "--content")
            for names in (self.contents, self.styles)
        ]
        config = Config.of(Klora(), settings)
        assert build(draft(self.store, Selection(*roles, {}), config), path).linked == 4
        return Catalogue.open(path, loras=self.folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("denoisers"))


def written(fusion: Fusion, path: Path) -> bytes:
    save_fusion(fusion, path, overwrite=True)
    return path.read_bytes()


def named(names: Sequence[str], loras: Mapping[str, Files]) -> dict[str, Files]:
    """Name in the catalogue -> the files."""
    return {name: next(own for key, own in loras.items() if name.startswith(key)) for name in names}


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(weights={"style.low": 0.5}), Settings(clock="noise")],
    ids=["plain", "a weight of one denoiser", "noise"],
)
def test_every_pair_has_the_bytes_of_compile(
    settings: Settings, shop: Shop, tmp_path: Path
) -> None:
    catalogue = shop.catalogue(tmp_path / "all", settings)
    for content, own in named(catalogue.contents, shop.contents).items():
        for style, other in named(catalogue.styles, shop.styles).items():
            expected = compile_fusion(own, other, Klora(), settings, device="cpu")
            found = catalogue.fusion(content, style)
            assert found.rule.derived == expected.rule.derived
            assert written(found, tmp_path / "found") == written(expected, tmp_path / "expected")


def test_each_denoiser_has_its_own_gamma(shop: Shop, tmp_path: Path) -> None:
    catalogue = shop.catalogue(tmp_path / "all")
    for facts in catalogue.opened.pairs():
        assert facts.gamma.keys() == GAMMAS
        one, other = facts.gamma.values()
        assert one is not None
        assert other is not None
        assert abs(one - other) > 0.02 * one
        fusion = catalogue.fusion(facts.content, facts.style)
        assert fusion.rule.derived == {"gamma": facts.gamma}


def test_get_writes_both_halves(shop: Shop, tmp_path: Path) -> None:
    catalogue = shop.catalogue(tmp_path / "all")
    content, style = catalogue.contents[0], catalogue.styles[0]
    got = tmp_path / "got.klora.safetensors"
    words = ("catalogue", "get", tmp_path / "all", content, style, "--loras", shop.folder, "-o")
    result = CliRunner().invoke(main, [*map(str, words), str(got)])
    assert result.exit_code == 0, result.output
    expected = compile_fusion(shop.contents["fox"], shop.styles["ink"], Klora(), device="cpu")
    assert set(expected.sources) == {"content.high", "content.low", "style.high", "style.low"}
    assert got.read_bytes() == written(expected, tmp_path / "expected")
