"""Factors as the bytes of a file: the same deltas, files and names as those that torch reads."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import peft_keys, random_pair

from klora_compile import compile_fusion, read_adapter
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.tensor_file import bytes_of, dtype_of, identity, name_in_files
from klora_runtime.errors import LoraError

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv_shortcut"


def stored(tensor: torch.Tensor) -> FileTensor:
    dtype = name_in_files(tensor.dtype)
    assert dtype is not None
    return FileTensor(dtype, tuple(tensor.shape), bytearray(bytes_of(tensor)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_delta_is_the_loaded_one(dtype: torch.dtype) -> None:
    down, up = (tensor.to(dtype) for tensor in random_pair(6, 4, 2))
    plain, lazy = LowRank(down, up), LowRank.of_file(stored(down), stored(up))
    assert (lazy.rank, lazy.shape, lazy.nbytes) == (plain.rank, plain.shape, plain.nbytes)
    assert list(map(identity, lazy.parts)) == list(map(identity, plain.parts))
    assert [dtype_of(part) for part in lazy.parts] == [dtype_of(part) for part in plain.parts]
    assert "down" not in vars(lazy)  # none of these needed torch
    assert torch.equal(lazy.down, down)
    assert torch.equal(lazy.up, up)
    assert lazy.down is lazy.down
    assert lazy.norm() == plain.norm()
    for copied in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert torch.equal(copied.matrix(), plain.matrix())
    with pytest.raises(AttributeError, match="'LowRank' object has no attribute 'middle'"):
        _ = lazy.middle


def test_an_empty_tensor_is_loaded() -> None:
    assert FileTensor("F16", (0, 3), bytearray()).loaded().shape == (0, 3)


def test_a_pair_of_a_file_stays_bytes_until_it_is_needed(tmp_path: Path) -> None:
    down, up = random_pair(6, 4, 2)
    path = tmp_path / "lora.safetensors"
    wide = {CONV: (down[..., None, None].clone(), up[..., None, None].clone())}
    save_file(peft_keys({TO_Q: (down, up), **wide}), str(path))
    layers = read_adapter(path).layers
    for layer in layers.values():
        assert "down" not in vars(layer.delta)
        assert torch.equal(layer.down, down)  # a 1x1 convolution is a linear layer
        assert torch.equal(layer.up, up)


def test_nan_and_infinity_are_found_in_the_bytes(tmp_path: Path) -> None:
    down, up = random_pair(6, 4, 2)
    up[3, 1] = float("inf")
    path = tmp_path / "lora.safetensors"
    save_file(peft_keys({TO_Q: (down, up)}), str(path))
    with pytest.raises(LoraError, match="holds NaN or infinity"):
        read_adapter(path)


def test_a_fusion_of_files_is_written_as_one_of_tensors(tmp_path: Path) -> None:
    """Writing, counting bytes and applying need not know where the factors come from."""
    pair = []
    for seed, name in enumerate(("content", "style")):
        pair.append(tmp_path / f"{name}.safetensors")
        save_file(peft_keys({TO_Q: random_pair(6, 4, 2, seed=seed)}), str(pair[-1]))
    fusion, other = compile_fusion(*pair, device="cpu"), compile_fusion(*pair, device="cpu")
    for entry in other.entries:
        for held in entry.factors.values():
            down, up = held.delta.tensors
            vars(held)["delta"] = LowRank(down.clone(), up.clone())
    first, second = tmp_path / "a.klora.safetensors", tmp_path / "b.klora.safetensors"
    save_fusion(fusion, first)
    save_fusion(other, second)
    assert first.read_bytes() == second.read_bytes()
    assert fusion.nbytes == other.nbytes == load_fusion(first).nbytes
