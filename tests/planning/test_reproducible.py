"""The same two files give the same artifact: in every process, for every number of threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.lora_files import (
    needs_real_loras,
    peft_keys,
    random_pair,
    real_lora,
    run_python,
    write_lora,
)
from support.pairs import slow

from klora_compile import compile_fusion, read_adapter
from klora_compile.measuring.norms import frobenius_norms
from klora_compile.reading.layers import Layer
from klora_compile.rules import Klora
from klora_compile.rules.lookup import RULES
from klora_runtime import load_fusion, save_fusion
from klora_runtime.linking.inequality import Inequality

COMPILE = """
import sys, torch
from klora_compile import compile_fusion
from klora_compile.rules.lookup import RULES
from klora_runtime import save_fusion
content, style, out, threads, *rules = sys.argv[1:]
torch.set_num_threads(int(threads))
for rule in rules:
    fusion = compile_fusion(content, style, RULES[rule](pattern="s*"), device="cpu")
    save_fusion(fusion, f"{out}.{rule}")
"""
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
#: Module -> (out, in, kernel); some shapes for which threads would round differently.
LAYERS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    f"unet.{BLOCK}.attn1.to_q": (320, 320, ()),
    f"unet.{BLOCK}.attn1.to_k": (2, 320, ()),
    f"unet.{BLOCK}.attn1.to_v": (2, 4097, ()),
    f"unet.{BLOCK}.attn2.to_k": (3, 4097, ()),
    f"unet.{BLOCK}.attn2.to_v": (640, 3, ()),
    f"unet.{BLOCK}.ff.net.0.proj": (257, 640, ()),
    "unet.down_blocks.0.resnets.0.conv1": (32, 16, (3, 3)),
    "text_encoder.encoder.layers.0.mlp.fc1": (64, 16, ()),
}


def lora(path: Path, *, seed: int, rank: int, dtype: torch.dtype) -> Path:
    pairs = {
        name: random_pair(out, width, rank, seed=seed + i, kernel=kernel, dtype=dtype)
        for i, (name, (out, width, kernel)) in enumerate(LAYERS.items())
    }
    return write_lora(path, peft_keys(pairs), {"unet.lora_alpha": 3, "text_encoder.lora_alpha": 1})


#: Of the other process; here is one thread.
THREADS = pytest.mark.parametrize("threads", [4, slow(1), slow(2)])


def assert_same_bytes(content: Path, style: Path, folder: Path, threads: int, *rules: str) -> None:
    """Compile here and in a process with another hash seed and another number of threads."""
    for rule in rules:
        fusion = compile_fusion(content, style, RULES[rule](pattern="s*"), device="cpu")
        assert any(entry.timeline.switches for entry in fusion.entries)
        save_fusion(fusion, folder / f"here.{rule}")
    result = run_python(
        COMPILE,
        *(content, style, folder / "there", threads, *rules),
        OMP_NUM_THREADS=str(threads),
        PYTHONHASHSEED=str(threads),
    )
    assert result.returncode == 0, result.stderr
    for rule in rules:
        found, wanted = (folder / f"{name}.{rule}" for name in ("there", "here"))
        assert found.read_bytes() == wanted.read_bytes(), rule


@THREADS
def test_bytes_are_the_same_in_every_process_and_for_every_number_of_threads(
    threads: int, tmp_path: Path
) -> None:
    content = lora(tmp_path / "content.safetensors", seed=1, rank=16, dtype=torch.float32)
    style = lora(tmp_path / "style.safetensors", seed=50, rank=8, dtype=torch.float16)
    assert_same_bytes(content, style, tmp_path, threads, "klora", "np+klora")


@pytest.mark.slow
@needs_real_loras
@THREADS
def test_bytes_are_the_same_for_a_real_pair(threads: int, tmp_path: Path) -> None:
    pair = real_lora("sd2_character.peft"), real_lora("sd2_illustration.peft")
    assert_same_bytes(*pair, tmp_path, threads, "klora")


def test_the_folder_of_the_inputs_does_not_reach_the_bytes(tmp_path: Path) -> None:
    artifacts = []
    for name in ("one", "another place"):
        folder = tmp_path / name
        folder.mkdir()
        content = lora(folder / "content.safetensors", seed=1, rank=2, dtype=torch.float32)
        style = lora(folder / "style.safetensors", seed=9, rank=2, dtype=torch.float32)
        save_fusion(compile_fusion(content, style, device="cpu"), folder / "a.klora.safetensors")
        artifacts.append((folder / "a.klora.safetensors").read_bytes())
    assert artifacts[0] == artifacts[1]
    assert b"another place" not in artifacts[1]


def test_factors_are_the_bytes_of_the_sources(tmp_path: Path) -> None:
    """Lossless, in the dtype of each file, also of a slot that never acts."""
    content = lora(tmp_path / "content.safetensors", seed=1, rank=5, dtype=torch.float32)
    style = lora(tmp_path / "style.safetensors", seed=50, rank=4, dtype=torch.bfloat16)
    fusion = compile_fusion(content, style, Klora(gamma=1e-9), device="cpu")
    save_fusion(fusion, tmp_path / "a.klora.safetensors")
    read = load_fusion(tmp_path / "a.klora.safetensors", check="full")
    adapters = {"content": read_adapter(content), "style": read_adapter(style)}
    for entry in read.entries:
        used = {slot for slot in adapters if entry.timeline.uses(slot)}
        assert set(entry.factors) == set(adapters)
        assert used == ({"content"} if entry.component == "unet" else {"content", "style"})
        for slot, stored in entry.factors.items():
            layer = adapters[slot].layers[entry.layer]
            assert stored.delta.down.dtype == layer.down.dtype
            assert torch.equal(stored.delta.down, layer.down)
            assert torch.equal(stored.delta.up, layer.up)
            assert stored.scale == layer.alpha / layer.rank


@pytest.mark.parametrize("ignored", [False, True])
def test_scores_are_enough_to_choose_again_without_the_sources(
    ignored: bool, tmp_path: Path
) -> None:
    """Also of slots that were dropped: another schedule needs no second measurement."""
    content = lora(tmp_path / "content.safetensors", seed=1, rank=5, dtype=torch.float32)
    style = lora(tmp_path / "style.safetensors", seed=50, rank=4, dtype=torch.float32)
    first = Klora(semantics="authors" if ignored else "paper")
    other = replace(first, pattern="s*")
    fusion = compile_fusion(content, style, first, device="cpu")
    wanted = compile_fusion(content, style, other, device="cpu")
    parameters = other.parameters()
    rule = Inequality("s*", parameters["alpha"], parameters["beta"], parameters["tie"])
    gamma = fusion.rule.derived["gamma"]["unet"]
    for entry, expected in zip(fusion.entries, wanted.entries, strict=True):
        if entry.component != "unet":
            continue
        scores = entry.scores["klora"]
        again = rule.timeline(scores["content"]["top_k"], scores["style"]["top_k"], gamma)
        assert tuple(start for start, _ in again) == expected.timeline.starts
        chosen = tuple(float(content) for _, content in again)
        assert chosen == expected.timeline.coefficients["content"]


def test_norms_do_not_depend_on_the_number_of_threads() -> None:
    """At this size a product that is split among threads rounds differently."""
    layer = Layer.lora("unet", "conv_in", *random_pair(640, 2048, 16, seed=1), alpha=16.0)
    norms = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            norms |= set(frobenius_norms([layer]).values())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1
