"""Which names mean a place on the Hub, and which file of a repository is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from klora_runtime.errors import ConfigError
from klora_runtime.hub.address import Address, address_of
from klora_runtime.hub.choosing import ARTIFACT, EITHER, LORA, choose

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("fox/ink", Address("fox/ink")),
        ("fox/ink-v1.5", Address("fox/ink-v1.5")),
        ("fox/ink@v2", Address("fox/ink", None, "v2")),
        (f"fox/ink@{COMMIT}", Address("fox/ink", None, COMMIT)),
        ("fox/ink/a.safetensors", Address("fox/ink", "a.safetensors")),
        ("fox/ink/sub/a.SAFETENSORS", Address("fox/ink", "sub/a.SAFETENSORS")),
        ("fox/ink@v2/sub/a.bin", Address("fox/ink", "sub/a.bin", "v2")),
        ("hf://fox/ink", Address("fox/ink")),
        ("hf://models/fox/ink", Address("fox/ink")),
        ("hf://fox/ink@main/a.safetensors", Address("fox/ink", "a.safetensors", "main")),
        ("https://huggingface.co/fox/ink", Address("fox/ink")),
        ("https://huggingface.co/fox/ink/tree/v2", Address("fox/ink", None, "v2")),
        (
            "https://huggingface.co/fox/ink/resolve/main/a%20b.safetensors?download=true",
            Address("fox/ink", "a b.safetensors", "main"),
        ),
        ("https://hf.co/fox/ink/blob/main/s/a.pt", Address("fox/ink", "s/a.pt", "main")),
    ],
)
def test_names_of_the_hub(name: str, address: Address) -> None:
    assert address_of(name) == address
    assert address_of(str(address)) == address


@pytest.mark.parametrize(
    "name",
    [
        *("fox", "fox.safetensors", "loras/fox.safetensors", "./fox/ink", "/fox/ink", "~/fox"),
        *("../fox/ink", "a/b/c", "a/b/c/d", "fox ink/a", "fox/", "a\\b", "", "x" * 5000, "a/b\0c"),
    ],
)
def test_other_names_are_paths(name: str) -> None:
    assert address_of(name) is None


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox" / "ink").mkdir(parents=True)
    assert address_of("fox/ink") is None
    assert address_of("fox/oil") == Address("fox/oil")
    assert address_of(Path("fox/oil")) is None


@pytest.mark.parametrize(
    "name",
    [
        *("hf://fox", "hf://datasets/fox/ink", "hf://spaces/fox/ink", "hf://fox/ink/../../a.pt"),
        *("https://huggingface.co/datasets/fox/ink", "https://huggingface.co/fox"),
        *("https://huggingface.co/fox/ink/commits/main", "https://huggingface.co/fox/ink/resolve"),
        "https://huggingface.co/fox/ink/resolve/main/..%2F..%2Fa.pt",
    ],
)
def test_what_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="names no model on the Hub; write it as OWNER/NAME"):
        address_of(name)


def test_another_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"is not on the Hub \(https://huggingface.co\); download"
    ):
        address_of("https://civitai.com/api/download/models/1")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org/")
    assert address_of("https://hub.example.org/fox/ink") == Address("fox/ink")
    assert address_of("https://huggingface.co/fox/ink") == Address("fox/ink")


def test_the_usual_file_is_chosen() -> None:
    files = ["README.md", "checkpoint-1/pytorch_lora_weights.safetensors", "other.safetensors"]
    assert choose("a/b", [*files, "pytorch_lora_weights.safetensors"], LORA) == (
        "pytorch_lora_weights.safetensors"
    )
    assert choose("a/b", files, LORA) == files[1]
    assert choose("a/b", ["a.bin", "b.safetensors"], LORA) == "b.safetensors"
    assert choose("a/b", ["fox.pt"], LORA) == "fox.pt"
    mixed = ["fox.safetensors", "fused.klora.safetensors"]
    assert choose("a/b", mixed, LORA) == mixed[0]
    assert choose("a/b", mixed, ARTIFACT) == mixed[1]
    assert choose("a/b", mixed, EITHER) == mixed[1]
    assert choose("a/b", ["fused.safetensors"], ARTIFACT) == "fused.safetensors"


def test_several_files_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        choose("a/b", ["fox.safetensors", "ink.safetensors", "README.md"], LORA)
    assert str(error.value) == (
        "a/b has 2 files that may be the LoRA: fox.safetensors, ink.safetensors. Name one with "
        "--weight-name (weight_name= in Python)."
    )
    many = [f"{number}.safetensors" for number in range(15)]
    with pytest.raises(ConfigError, match=r"11\.safetensors and 3 more\. Name one"):
        choose("a/b", many, LORA)
    with pytest.raises(ConfigError, match=r"a/b has no artifact; found README\.md\. Name another"):
        choose("a/b", ["README.md"], ARTIFACT)
