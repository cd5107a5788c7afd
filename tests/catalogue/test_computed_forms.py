"""LoRAs whose factors are computed: linked as others are, and written with the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.form_files import LINEAR, Source, small_dora
from support.lora_files import peft_keys, random_pair, write_lora

from klora_compile.cli import main
from klora_runtime import Catalogue, KloraError

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{}"
OUT, IN = 40, 30


def klora(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


class Shop:
    """A folder with one LoRA of a computed form and one with plain factors, and their catalogue."""

    def __init__(self, folder: Path, computed: Path, *options: object, rank: int = 3) -> None:
        layers = {f"unet.{MODULE.format(x)}": random_pair(OUT, IN, rank, seed=7) for x in "qk"}
        self.folder, self.computed = folder, computed
        self.plain = write_lora(folder / "plain.safetensors", peft_keys(layers))
        self.options = options
        self.file = folder / "shop.klora-catalogue.safetensors"
        store = folder / "store"
        klora("profile", computed, *options, "--store", store)
        klora("profile", self.plain, "--store", store)
        every = [word for role in ("content", "style") for word in (f"--{role}", "*")]
        out = klora("catalogue", store, *every, "-o", self.file, "--json")
        self.built: dict[str, Any] = json.loads(out)

    def get(self, content: Path, style: Path, *more: object, code: int = 0) -> tuple[bytes, str]:
        """The artifact of a pair from the catalogue, and what the command says."""
        got = self.folder / "got.klora.safetensors"
        names = content.stem, style.stem
        said = klora("catalogue", "get", self.file, *names, *more, "-o", got, "--force", code=code)
        return (got.read_bytes() if code == 0 else b""), said

    def compiled(self, content: Path, style: Path, *more: object) -> bytes:
        path = self.folder / "compiled.klora.safetensors"
        klora("compile", content, style, *self.options, *more, "--no-cache", "--force", "-o", path)
        return path.read_bytes()


def of_form(folder: Path, form: str) -> Path:
    new, tensors = Source(3), {}
    for letter in "qk":
        name = f"lora_unet_{MODULE.format(letter).replace('.', '_')}"
        written = LINEAR[form](new, OUT, IN)
        tensors |= {f"{name}{ending}": value for ending, value in written.tensors.items()}
    return write_lora(folder / "computed.safetensors", tensors)


COMPUTED = [form for form in LINEAR if form.startswith(("LoHa", "LoKr", "LoRA with bias", "full"))]


@pytest.mark.parametrize("form", COMPUTED)
def test_an_artifact_has_the_bytes_of_compile(form: str, tmp_path: Path) -> None:
    shop = Shop(tmp_path, of_form(tmp_path, form))
    assert shop.built["linked"] == 2
    for pair in ((shop.computed, shop.plain), (shop.plain, shop.computed)):
        assert shop.get(*pair, "--loras", tmp_path)[0] == shop.compiled(*pair)


def test_dora_is_read_with_its_base_model(tmp_path: Path) -> None:
    path, base = small_dora(tmp_path)
    shop = Shop(tmp_path, path, "--base", base)
    pair = path, shop.plain
    named = ("--loras", tmp_path, "--base", base)
    assert shop.get(*pair, *named)[0] == shop.compiled(*pair)
    assert "Name the base model with --base" in shop.get(*pair, *named[:2], code=1)[1]


def test_the_runtime_says_that_factors_are_computed(tmp_path: Path) -> None:
    shop = Shop(tmp_path, of_form(tmp_path, "LoKr"))
    for loras in (None, tmp_path):
        with pytest.raises(KloraError, match="factors of computed are computed from its file"):
            Catalogue.open(shop.file, loras=loras).fusion("computed", "plain")
    _, said = shop.get(shop.computed, shop.plain, code=1)
    assert "--loras" in said


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    shop = Shop(tmp_path, of_form(tmp_path, "LoKr"))
    data = bytearray(shop.computed.read_bytes())
    data[-1] ^= 1
    shop.computed.write_bytes(data)
    _, said = shop.get(shop.computed, shop.plain, "--loras", tmp_path, code=1)
    assert "computed.safetensors is another file" in " ".join(said.split())
