"""What people pass as a LoRA, opened or refused; no pickle of theirs is run."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from klora_compile.reading.files.lora_file import open_lora
from klora_compile.reading.files.whole_models import full_model, token_embedding
from klora_runtime.errors import LoraError

TENSORS = {"a.lora_A.weight": torch.arange(6.0).reshape(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
CONVERT = "Convert it to safetensors with the trainer that wrote it."


def message(path: Path) -> str:
    """Why a path is refused, after its name."""
    with pytest.raises(LoraError) as caught, open_lora(path):
        pass
    start = f"LoRA file {path}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_file_that_is_named_has_the_configuration_of_its_own_name_only(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "other.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with open_lora(tmp_path / "adapter_model.safetensors") as file:
        assert file.config == ("{}", "adapter_config.json")
    with open_lora(tmp_path / "other.safetensors") as file:
        assert file.config is None


def test_a_folder_with_two_loras_is_refused(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file(TENSORS, tmp_path / name)
    assert "is a folder with adapter_model.safetensors, pytorch_lora" in message(tmp_path)


def test_a_card_in_another_encoding_is_passed_over(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_bytes("---\ninstance_prompt: é\n---".encode("latin-1"))
    with open_lora(tmp_path) as file:
        assert file.prompt is None


def test_pickles_that_are_cut_inside_or_point_elsewhere(tmp_path: Path) -> None:
    """The standard library has another class of error for each."""
    good = saved(tmp_path / "good.pt", TENSORS).read_bytes()
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        names = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickled = next(name for name in names if name.endswith("data.pkl"))
    for length in range(1, len(names[pickled]) - 1):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in names.items():
                archive.writestr(name, content[:length] if name == pickled else content)
        assert message(path)
    for place in range(len(good) - 200, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with suppress(LoraError), open_lora(path) as file:
            assert set(file.tensors) == set(TENSORS)
    saved(path, {**TENSORS, "a.alpha": 10**400})
    assert "a.alpha: is a int, expected a tensor" in message(path)


@pytest.mark.parametrize(
    "names",
    [
        ["adapter_model.safetensors", "other.safetensors"],
        ["adapter_model.bin"],
        ["pytorch_lora_weights.safetensors"],
        ["pytorch_lora_weights.bin"],
        ["mine.safetensors"],
    ],
)
def test_folders(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write = save_file if name.endswith(".safetensors") else torch.save
        write(TENSORS, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text('---\ninstance_prompt: "a sks dog"\n---\ntext')
    with open_lora(tmp_path) as file:
        assert file.path.name == names[0]
        assert file.prompt == "a sks dog"
        assert file.config == ("{}", "adapter_config.json")
        assert len(file.sha256) == 64
        assert file.size == file.path.stat().st_size
        for name, tensor in TENSORS.items():
            assert (file.tensors[name].dtype, file.tensors[name].shape) == ("F32", tensor.shape)
            assert torch.equal(file.tensor(name), tensor)


def test_a_folder_without_one_file_is_refused(tmp_path: Path) -> None:
    expected = (
        "expected adapter_model.safetensors, pytorch_lora_weights.safetensors or exactly one "
        ".safetensors file. Name the file itself."
    )
    assert message(tmp_path) == f"is a folder with nothing; {expected}"
    for name in ("a.safetensors", "b.safetensors"):
        save_file(TENSORS, tmp_path / name)
    assert message(tmp_path) == f"is a folder with a.safetensors, b.safetensors; {expected}"


def test_a_config_is_bounded_text(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_bytes(b" " * (2**20 + 1))
    file = tmp_path / "adapter_model.safetensors"
    assert message(file) == "adapter_config.json takes more than the 1048576 bytes allowed."
    config.write_bytes(b"\xff")
    assert message(file).startswith("adapter_config.json cannot be read: 'utf-8' codec can't")


@pytest.mark.parametrize("key", ["state_dict", "lora", "module", None])
def test_torch_files(key: str | None, tmp_path: Path) -> None:
    content: dict[str, Any] = {**TENSORS, "a.alpha": 4}
    path = saved(tmp_path / "a.pt", content if key is None else {key: content, "epoch": 3})
    with open_lora(path) as file:
        assert torch.equal(file.tensor("a.lora_A.weight"), TENSORS["a.lora_A.weight"])
        assert file.tensor("a.alpha") == 4
        assert file.tensors["a.alpha"].shape == ()
        assert (file.metadata, file.config, file.prompt) == ({}, None, None)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = saved(tmp_path / "a.pt", {"a": Evil(ran)})
    assert message(path) == f"is not only tensors: it asks for posix.system. {CONVERT}"
    path.write_bytes(pickle.dumps({"a": Evil(ran)}))
    assert message(path).startswith("is a pickle checkpoint, which can run code when loaded. ")
    assert not ran.exists()


def test_a_module_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", nn.Linear(2, 2))
    assert message(path) == (
        f"is not only tensors: it asks for torch.nn.modules.linear.Linear. {CONVERT}"
    )


def test_other_values_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {**TENSORS, "rank\x1b": 3, 5: TENSORS["a.lora_A.weight"]})
    assert message(path) == (
        f"holds values that are not tensors. {CONVERT}\n  - rank\\x1b: is a int, expected a "
        "tensor\n  - 5: is a int, expected a name"
    )
    saved(path, [1])
    assert message(path) == "holds a list, expected names and tensors."


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**24))
    assert message(path) == "is a compressed zip, which torch.save never writes; unpack it first."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"x")
    raw = path.read_bytes()
    start = raw.index(b"PK\x01\x02") + 24  # the size in the central directory
    path.write_bytes(raw[:start] + (2**30).to_bytes(4, "little") + raw[start + 4 :])
    assert message(path) == f"declares {2**30} bytes and holds {len(raw)}; it is not loaded."
    saved(path, {"a": torch.zeros(1).expand(2**20, 2**10)})
    size = path.stat().st_size
    assert message(path) == f"its tensors take {2**32} bytes, and it holds {size}."


def test_broken_and_odd_torch_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", TENSORS)
    path.write_bytes(path.read_bytes()[:-100])
    assert message(path) == "is a truncated zip. Download it again."
    saved(path, {"a": torch.eye(2).to_sparse(), "b": torch.zeros(1, dtype=torch.complex64)})
    assert message(path) == (
        f"has tensors that cannot be read. {CONVERT}\n  - a: is not a dense tensor"
        "\n  - b: has the dtype torch.complex64, which is not supported"
    )
    path.write_bytes(b"<html>")
    assert message(path) == "is a web page, not a safetensors file. Download the file itself."
    assert re.fullmatch(r"cannot be read: No such file.*", message(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("emb_params", "a textual-inversion embedding"),
        ("clip_l", "a textual-inversion embedding"),
        ("string_to_param", "a textual-inversion embedding"),
        ("model.diffusion_model.out.2.weight", "a whole checkpoint"),
        ("first_stage_model.a", "a whole checkpoint"),
        ("conditioner.embedders.0.a", "a whole checkpoint"),
        ("double_blocks.0.img_attn.qkv.weight", "a whole denoiser"),
        ("input_blocks.1.0.in_layers.0.weight", "a whole denoiser"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a whole text encoder"),
        ("encoder.block.0.layer.0.layer_norm.weight", "a whole text encoder"),
        ("decoder.conv_in.weight", "a whole VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "a whole denoiser in diffusers' names"),
        ("image_proj.norm.weight", "an IP-Adapter"),
    ],
)
def test_whole_models_are_named(name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(1)}, path)
    assert message(path) == (
        f"is {words}, not a LoRA. Name the LoRA; a base model goes with --base."
    )
    beside = full_model([name, "unet.a.lora_A.weight"])
    assert beside == (words if words == "an IP-Adapter" else None)


def test_face_ids_loras_are_those_of_an_ip_adapter(tmp_path: Path) -> None:
    """They are for layers by their number, and beside them are keys and values of a picture."""
    path = tmp_path / "a.bin"
    tensors = {"0.to_q_lora.down.weight": torch.zeros(1), "1.to_k_ip.weight": torch.zeros(1)}
    saved(path, {"image_proj": {"norm.weight": torch.zeros(1)}, "ip_adapter": tensors})
    assert message(path).startswith("is an IP-Adapter, not a LoRA.")
    path = tmp_path / "a.safetensors"
    save_file({f"ip_adapter.{name}": tensor for name, tensor in tensors.items()}, path)
    assert message(path).startswith("is an IP-Adapter, not a LoRA.")


def test_token_embeddings() -> None:
    assert token_embedding("bundle_emb.sks.string_to_param.*")
    assert token_embedding("text_encoder.text_model.embeddings.token_embedding.weight")
    assert token_embedding("emb_params")
    assert not token_embedding("lora_te_text_model_embeddings_token_embedding.lora_up.weight")
    assert not token_embedding("unet.down_blocks.0.attn1.to_q.lora_A.weight")
