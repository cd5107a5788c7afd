"""Commands that need headers and documents alone import no library of numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.every_form import fusion_of_every_form
from support.lora_files import GOLDEN, peft_keys, random_pair, run_python

from klora_compile.cli import COMMANDS
from klora_runtime import save_fusion

#: What takes long to import, and what else torch and diffusers bring along.
HEAVY = {
    *("torch", "numpy", "scipy", "sympy", "safetensors", "matplotlib", "PIL", "tqdm"),
    *("diffusers", "transformers", "peft", "accelerate", "huggingface_hub"),
}
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

CODE = """
import sys
from klora_compile.cli import main

try:
    main(sys.argv[1:], prog_name="klora")
except SystemExit as end:
    assert not end.code, end.code
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, and an artifact that is compressed in part."""
    found = tmp_path_factory.mktemp("quick")
    save_file(peft_keys({TO_Q: random_pair(6, 4, 2)}), str(found / "lora.safetensors"))
    save_fusion(fusion_of_every_form(), found / "small.klora.safetensors")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        *(f"{name} --help" for name in COMMANDS),
        f"inspect {GOLDEN}",
        f"inspect {GOLDEN} --json",
        "inspect small.klora.safetensors",
        "inspect small.klora.safetensors --json",
        "inspect lora.safetensors",
        "inspect lora.safetensors --json",
        f"verify {GOLDEN}",
        f"card {GOLDEN} -o -",
    ],
)
def test_no_library_of_numbers_is_imported(
    arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run_python(CODE, *arguments.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout
    imported = {name.partition(".")[0] for name in result.stderr.split()}
    assert "klora_compile" in imported
    assert not imported & HEAVY


def test_compiling_a_measured_pair_imports_none_either(tmp_path: Path) -> None:
    """Factors are copied as bytes, and the statistics are known."""
    pair = [tmp_path / "content.safetensors", tmp_path / "style.safetensors"]
    for seed, path in enumerate(pair):
        save_file(peft_keys({TO_Q: random_pair(6, 4, 2, seed=seed)}), str(path))
    arguments = ["compile", *pair, "--force", "--device", "cpu", "-o"]
    imported, made = [], []
    for name in ("first.klora.safetensors", "again.klora.safetensors"):
        result = run_python(CODE, *arguments, tmp_path / name, KLORA_CACHE=str(tmp_path))
        assert result.returncode == 0, result.stderr
        imported.append({name.partition(".")[0] for name in result.stderr.split()} & HEAVY)
        made.append((tmp_path / name).read_bytes())
    assert "torch" in imported[0]
    assert not imported[1]
    assert made[0] == made[1]


def test_a_command_imports_no_other_command() -> None:
    result = run_python(CODE, "inspect", GOLDEN)
    commands = {f"klora_compile.commands.{name}" for name in COMMANDS}
    assert commands & set(result.stderr.split()) == {"klora_compile.commands.inspect"}
