"""What lies beside a LoRA or under it, changed at random: the package's own error, or a result.

``make mutate`` makes 20,000 changes of each kind instead of a few.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import peft_keys, random_pair

from klora_compile import read_adapter
from klora_compile.reading.files.base import BaseModel
from klora_runtime.errors import KloraError

CHANGES = int(os.environ.get("KLORA_MUTATIONS", "30"))

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_, _, MODULE = TO_Q.partition(".")
LORA = peft_keys({TO_Q: random_pair(8, 8, 2)})
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"to_q": 3},
    "target_modules": ["to_q"],
    "auto_mapping": {"base_model_class": "UNet2DConditionModel"},
}
VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    10**400,
    "",
    "LOHA",
    "\x1b[2J",
    "(a+)+$",
    [],
    [[]],
    {},
    {"": {}},
)


def scribbled(data: bytes, random: Random) -> bytes:
    """Some bytes changed, cut out, doubled or put in between."""
    place, length = random.randrange(len(data) + 1), random.choice((1, 1, 4, 40))
    piece = data[place : place + length]
    new = random.choice((b"", piece * 2, random.randbytes(len(piece)), b"\x00" * 4, b"[" * 2000))
    return data[:place] + new + data[place + length :]


def changed_json(data: bytes, random: Random) -> bytes:
    """One value replaced, or one that is gone."""
    value = json.loads(data)
    target = value
    while isinstance(target, dict) and target:
        key = random.choice(list(target))
        if isinstance(target[key], dict) and target[key] and random.random() < 0.7:
            target = target[key]
            continue
        if random.random() < 0.2:
            del target[key]
        else:
            target[key] = random.choice(VALUES)
        break
    return json.dumps(value).encode()


def changed_header(data: bytes, random: Random) -> bytes:
    """The header of a safetensors file with one value replaced."""
    length = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def with_config(folder: Path) -> Path:
    save_file(LORA, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder / "adapter_config.json"


def pickled(folder: Path) -> Path:
    torch.save({"state_dict": LORA, "epoch": 3}, folder / "a.pt")
    return folder / "a.pt"


def base_file(folder: Path) -> Path:
    weights = {f"{MODULE}.weight": torch.ones(8, 8), "conv_in.bias": torch.ones(4)}
    save_file(weights, str(folder / "base.safetensors"))
    return folder / "base.safetensors"


def base_folder(folder: Path, changed: str) -> Path:
    """Two parts and their index, as a large model lies in its folder."""
    stem = "diffusion_pytorch_model"
    name = f"{stem}-00001-of-00001.safetensors"
    save_file({f"{MODULE}.weight": torch.ones(8, 8)}, str(folder / name))
    index = {"metadata": {"total_size": 256}, "weight_map": {f"{MODULE}.weight": name}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder / changed


def read_lora(path: Path) -> None:
    adapter = read_adapter(path.parent if path.name == "adapter_config.json" else path)
    assert all(layer.delta.is_finite() for layer in adapter.layers.values())


def read_base(path: Path) -> None:
    with BaseModel(path if path.name == "base.safetensors" else path.parent) as base:
        base.weight("unet", MODULE, "weight")


#: What is written, how it is read, and what is done to it in between.
Kind = tuple[
    Callable[[Path], Path], Callable[[Path], None], Sequence[Callable[[bytes, Random], bytes]]
]
KINDS: Mapping[str, Kind] = {
    "adapter_config.json": (with_config, read_lora, (scribbled, changed_json)),
    "a pickle": (pickled, read_lora, (scribbled,)),
    "a base file": (base_file, read_base, (scribbled, changed_header)),
    "the index of a base": (
        lambda folder: base_folder(folder, "diffusion_pytorch_model.safetensors.index.json"),
        read_base,
        (scribbled, changed_json),
    ),
    "the config of a base": (
        lambda folder: base_folder(folder, "config.json"),
        read_base,
        (scribbled, changed_json),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_gives_an_error_or_a_result(kind: str, tmp_path: Path) -> None:
    write, read, changes = KINDS[kind]
    path = write(tmp_path)
    good = path.read_bytes()
    read(path)
    for number in range(CHANGES):
        random = Random(number)
        path.write_bytes(random.choice(changes)(good, random))
        try:
            message = outcome(read, path)
        except BaseException as error:
            error.add_note(f"change {number} of {kind}")
            raise
        assert all(c.isprintable() or c == "\n" for c in message), number


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """The text of the package's own error, or nothing where the file can be read."""
    try:
        read(path)
    except KloraError as error:
        return str(error)
    return ""
