"""Valid artifacts of every kind, changed at random with all digests right: an error, or a fusion.

``make mutate`` makes 20,000 changes of each kind instead of a few.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from support.compiling import compiled, rescheduled
from support.every_form import fusion_of_every_form
from support.golden_fusion import golden_fusion
from support.lora_files import DTYPES, Artifact, RawTensor, peft_keys, random_pair, write_lora

from klora_compile import read_adapter
from klora_compile.report.card import CardFacts, model_card
from klora_compile.report.inspection import inspection
from klora_compile.report.summary import summarise, summary_lines
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.lookup import RULES
from klora_compile.storing.compress import compress
from klora_compile.storing.thin import thin
from klora_runtime import Fusion, load_fusion, save_fusion
from klora_runtime.artifact.assembly import tensor_name
from klora_runtime.errors import KloraError

CHANGES = int(os.environ.get("KLORA_MUTATIONS", "12"))

#: Bytes that the values of a fusion may take, beside so many times the file's.
GROWTH, SLACK = 64, 2**20

LAYERS: Mapping[str, tuple[int, ...]] = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (12, 8),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (8, 8),
    "unet.down_blocks.0.resnets.0.conv1": (6, 8, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
}
WORDS = "content style weight bias lowrank dense rows plain q unet zero switching"
STRINGS = (*WORDS.split(), "", "0" * 32, "..", "/etc/passwd", "\x1b[2J\u202e", "\ud800", "9" * 400)
#: What rules have no default for that fits these layers.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "switch": {"steps": 20},
    "groups": {"table": {"style *.to_k": "0:0.5,0.5:1"}},
}
#: Rules that need no base model.
UNCALIBRATED = [name for name, kind in RULES.items() if not issubclass(kind, Calibrated)]
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**53, 2**63, 2**64, 10**30)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """An artifact of every kind, and of every rule."""
    folder = tmp_path_factory.mktemp("artifacts")
    files = []
    for seed in range(3):
        pairs = {
            name: random_pair(shape[0], shape[1], 2 + seed, seed=seed, kernel=shape[2:])
            for name, shape in LAYERS.items()
        }
        files.append(write_lora(folder / f"{seed}.safetensors", peft_keys(pairs)))
    first, second, third = files
    plain = compiled(first, second)
    adapters = {"content": read_adapter(first), "style": read_adapter(second)}
    fusions: dict[str, Fusion] = {
        "golden": golden_fusion(),
        "every form": fusion_of_every_form(),
        "few bits": compress(plain, 0.05),
        "thin": thin(plain, adapters),
        "many": compiled([first, third], second),
        "noise": replace(plain, family=None, families=("sd1", "sd2"), clock="noise"),
        **{rule: compiled(first, second, rule, **OPTIONS.get(rule, {})) for rule in UNCALIBRATED},
    }
    taken = {}
    for kind, fusion in fusions.items():
        path = folder / f"{kind}.klora.safetensors"
        save_fusion(fusion, path)
        taken[kind] = Artifact.read(path)
    return taken


KINDS = ("golden", "every form", "few bits", "thin", "many", "noise", *UNCALIBRATED)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def anything(random: Random, depth: int = 0) -> Any:
    """A JSON value."""
    match random.randrange(8 if depth < 2 else 5):
        case 0:
            return None
        case 1:
            return random.random() < 0.5
        case 2:
            return random.choice(NUMBERS)
        case 3:
            return random.choice(STRINGS)
        case 4:
            return random.randint(-300, 300) / random.choice((1, 7))
        case 5:
            return [anything(random, depth + 1) for _ in range(random.randrange(4))]
        case 6:
            return {random.choice(STRINGS): anything(random, depth + 1) for _ in range(2)}
        case _:
            return [[]] * random.randrange(50)


def change_document(artifact: Artifact, random: Random) -> None:
    """One part gets another value, another part's value, a neighbour, or goes."""
    paths = list(places(artifact.document))
    *parents, last = random.choice(paths)
    target = held(artifact.document, parents)
    match random.randrange(6):
        case 0:
            del target[last]
        case 1:
            target[last] = copy.deepcopy(held(artifact.document, random.choice(paths)))
        case 2 if isinstance(target, list):
            target.insert(last, copy.deepcopy(target[last]))
        case 2:
            target[random.choice(STRINGS)] = target[last]
        case 3 if isinstance(target[last], int | float):
            target[last] += random.choice((1, -1, 1e-9, -1e-9, 2**31))
        case 4 if isinstance(target[last], str) and target[last]:
            place = random.randrange(len(target[last]))
            target[last] = (
                target[last][:place] + chr(random.randrange(0x250)) + target[last][place:]
            )
        case _:
            target[last] = anything(random)


def held(value: Any, path: Any) -> Any:
    for key in path:
        value = value[key]
    return value


def change_tensor(artifact: Artifact, random: Random) -> None:
    """Other bytes, another shape or dtype, under the name that is right for them; or none."""
    if not artifact.tensors:
        return
    old = random.choice(list(artifact.tensors))
    tensor = artifact.tensors.pop(old)
    data, shape, dtype = bytearray(tensor.payload), list(tensor.shape), tensor.dtype
    match random.randrange(6):
        case 0 | 1 if data:
            for _ in range(random.choice((1, 1, 2, 8))):
                data[random.randrange(len(data))] = random.choice(
                    (0, 1, 127, 128, 255, 0xFF ^ data[0])
                )
        case 2:
            size = random.randrange(len(data) + 1)
            unit = max(1, len(data) // max(1, torch.Size(shape).numel()))
            data, shape = data[: size // unit * unit], [size // unit]
        case 3:
            shape = random.choice((shape[::-1], [*shape, 1], [torch.Size(shape).numel()]))
        case 4:
            dtype = random.choice(list(DTYPES.values()))
        case _ if random.random() < 0.2:
            return
        case _:
            data = bytearray(random.randbytes(len(data)))
    artifact.tensors[renamed(artifact, old, bytes(data), shape, dtype)] = RawTensor(
        dtype, shape, bytes(data)
    )


def renamed(artifact: Artifact, old: str, data: bytes, shape: list[int], dtype: str) -> str:
    """The name of the changed tensor, in the document too; the old one where there is none."""
    of_torch = next(key for key, word in DTYPES.items() if word == dtype)
    try:
        flat = (
            torch.frombuffer(bytearray(data), dtype=of_torch)
            if data
            else torch.empty(0, dtype=of_torch)
        )
        new = tensor_name(flat.reshape(shape))
    except (RuntimeError, ValueError):
        return old
    artifact.document = json.loads(json.dumps(artifact.document).replace(old, new))
    return new


STEPS: tuple[Callable[[Artifact, Random], None], ...] = (
    change_document,
    change_document,
    change_tensor,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_artifact_gives_an_error_or_a_fusion(
    kind: str, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    path, again = tmp_path / "x.klora.safetensors", tmp_path / "again"
    for number in range(CHANGES):
        random = Random(number)
        artifact = copy.deepcopy(artifacts[kind])
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            random.choice(STEPS)(artifact, random)
        artifact.write(path)
        try:
            message = outcome(path, again)
        except BaseException as error:
            error.add_note(f"change {number} of {kind}")
            raise
        assert all(c.isprintable() or c == "\n" for c in message), number


def outcome(path: Path, again: Path) -> str:
    """The text of the package's own error, or nothing where the file can be read."""
    try:
        see(path, again)
    except KloraError as error:
        return str(error)
    return ""


def see(path: Path, again: Path) -> None:
    """All that is made of a file without a model; what can be read can be written, and is equal."""
    fusion = load_fusion(path, check="full")
    numbers = sum(
        tensor.nbytes
        for entry in fusion.entries
        for stored in entry.factors.values()
        for tensor in stored.delta.tensors
    )
    assert numbers <= GROWTH * path.stat().st_size + SLACK
    lines = [text for line in summary_lines(summarise(fusion)) for text in line]
    json.dumps(inspection(fusion), allow_nan=False)
    with suppress(KloraError):
        rescheduled(fusion, alpha=1.25)
    texts = [*lines, repr(fusion), fusion._repr_html_(), model_card(fusion, CardFacts.of(path))]
    assert all(c.isprintable() or c == "\n" for c in "".join(texts))
    save_fusion(fusion, again, overwrite=True)
    once = again.read_bytes()
    save_fusion(load_fusion(again), again, overwrite=True)
    assert again.read_bytes() == once
