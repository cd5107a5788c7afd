"""Valid LoRA files of every form, changed at random: the package's own errors, or an adapter.

``make mutate`` runs 20,000 of these instead of a few.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.form_files import CONVOLUTIONS, LINEAR, NORMS, Source, Writer
from support.lora_files import METADATA, read_raw, write_raw

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter, look_into
from klora_compile.reading.forms.catalogue import ENDINGS
from klora_compile.reading.names.spelling import REFUSED_FORMS
from klora_compile.report.lora import lora_json
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import KloraError

EXAMPLES = int(os.environ.get("KLORA_MUTATIONS", "200"))

#: Bytes that the values of an adapter may take, beside so many times the file's.
GROWTH, SLACK = 64, 2**20

FORMS: Mapping[str, Writer] = {**LINEAR, **CONVOLUTIONS, **NORMS}
STEMS = {
    "flux": "lora_unet_double_blocks_0_img_attn_proj",
    "fused": "diffusion_model.double_blocks.3.txt_attn.qkv",
    "unet": "unet.down_blocks.0.resnets.1.conv1",
    "kohya": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    "text": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
}
SPICE = ["\x1b[2J", "..", "/", "\n", "\u202e", "\x00", " ", "é", "9" * 40, "lora_unet_", ".weight"]


def valid(form: str, stems: list[str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for seed, stem in enumerate(stems):
        out, inner = (48, 16) if "qkv" in stem else (16, 16)
        written = FORMS[form](Source(seed), out, inner)
        tensors |= {STEMS.get(stem, stem) + ending: t for ending, t in written.tensors.items()}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


Header = dict[str, Any]
Change = Callable[[Header, bytearray, Any], None]


def drop(header: Header, data: bytearray, draw: Any) -> None:
    header.pop(draw(st.sampled_from(sorted(header))))


def rename(header: Header, data: bytearray, draw: Any) -> None:
    """Another ending, another prefix, or a character where none should be."""
    old = draw(st.sampled_from(sorted(header)))
    place = draw(st.integers(0, len(old)))
    ending = draw(st.sampled_from([*ENDINGS, *REFUSED_FORMS]))
    spice = draw(st.sampled_from(SPICE))
    new = draw(
        st.sampled_from(
            [
                old[:place] + spice + old[place:],
                old[:place] + old[place + 1 :],
                old.rpartition(".")[0] + ending,
                old.partition("_")[2],
                "base_model.model." + old,
            ]
        )
    )
    header[new] = header.pop(old)


def reshape(header: Header, data: bytearray, draw: Any) -> None:
    info = header[draw(st.sampled_from(sorted(header)))]
    count = math.prod(info["shape"])
    whole = [[count], [count, 1], [1, count], [2, count // 2], [1, 1, count], [*info["shape"], 1]]
    info["shape"] = draw(st.sampled_from([*whole, [0, 4], info["shape"][::-1], [2**40, 2**40]]))


def retype(header: Header, data: bytearray, draw: Any) -> None:
    """Another dtype of the same size, or of another one."""
    info = header[draw(st.sampled_from(sorted(header)))]
    info["dtype"] = draw(
        st.sampled_from(["I32", "F16", "BF16", "F8_E4M3", "U8", "BOOL", "F64", "X"])
    )


def poison(header: Header, data: bytearray, draw: Any) -> None:
    """NaN, infinity, or the largest number, in one value."""
    place = 4 * draw(st.integers(0, max(0, len(data) // 4 - 1)))
    value = draw(st.sampled_from([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"]))
    data[place : place + 4] = value


def restate(header: Header, data: bytearray, draw: Any) -> None:
    """Metadata that may decide a scale."""
    key, value = draw(
        st.sampled_from(
            [
                ("ss_network_alpha", "8"),
                ("ss_network_alpha", "-1e400"),
                ("ss_network_args", '{"conv_alpha": []}'),
                ("lora_adapter_metadata", '{"lora_alpha": 4, "peft_type": "LOKR", "r": 2}'),
                ("lora_adapter_metadata", '{"alpha_pattern": {"(a+)+$": 1}}'),
                ("lora_adapter_metadata", "["),
                ("ss_tag_frequency", '{"\\u001b": {"\\u001b[2J": 3}}'),
                ("klora", "{}"),
                ("lora_adapter_metadata", '{"peft_type": ["x"]}'),
                ("lora_adapter_metadata", '{"peft_type": "LOKR", "r": 1' + "0" * 400 + "}"),
                ("ss_network_dim", "1" * 5000),
            ]
        )
    )
    header[METADATA] = {key: value}


def scribble(header: Header, data: bytearray, draw: Any) -> None:
    place = draw(st.integers(0, len(data)))
    data[place : place + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))


CHANGES: list[Change] = [drop, rename, reshape, retype, poison, restate, scribble]


def held(adapter: Adapter) -> int:
    """Bytes of all values."""
    return sum(part.nbytes for layer in adapter.layers.values() for part in layer.delta.parts)


def outcome(path: Path, options: ReadOptions) -> Adapter | str:
    """The adapter, or the error's text; other errors than the package's pass through."""
    try:
        return read_adapter(path, options)
    except KloraError as error:
        return str(error)


def seen(path: Path, options: ReadOptions) -> str | None:
    """What ``klora inspect --json`` shows of a file that cannot be read, if it can be opened."""
    try:
        found, _ = look_into(path, options)
    except KloraError:
        return None
    return json.dumps(lora_json(found, None), allow_nan=False)


@pytest.mark.parametrize("ignore_unknown", [False, True])
@settings(
    max_examples=EXAMPLES // 2,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(draw=st.data())
def test_a_changed_file_gives_an_error_or_an_adapter(
    draw: st.DataObject, ignore_unknown: bool, tmp_path: Path
) -> None:
    form = draw.draw(st.sampled_from(sorted(FORMS)))
    stems = draw.draw(st.lists(st.sampled_from(sorted(STEMS)), min_size=1, max_size=3, unique=True))
    path = tmp_path / "a.safetensors"
    save_file(valid(form, stems), str(path))
    header, raw = read_raw(path)
    data = bytearray(raw)
    for change in draw.draw(st.lists(st.sampled_from(CHANGES), min_size=0, max_size=3)):
        if set(header) - {METADATA}:
            metadata = header.pop(METADATA, None)
            change(header, data, draw.draw)
            if metadata is not None:
                header.setdefault(METADATA, metadata)
    write_raw(path, json.dumps(header).encode(), bytes(data))
    options = ReadOptions(ignore_unknown=ignore_unknown)
    adapter = outcome(path, options)
    if isinstance(adapter, str):
        assert all(c.isprintable() or c == "\n" for c in adapter), adapter
        assert "LoRA file " in adapter
        shown = seen(path, options)
        assert shown is None or "NaN" not in shown
        return
    assert (
        adapter.survey.used + len(adapter.survey.unused)
        == adapter.survey.keys
        == len(set(header) - {METADATA})
    )
    assert ignore_unknown or not adapter.survey.unused
    assert held(adapter) <= GROWTH * path.stat().st_size + SLACK
    for layer in adapter.layers.values():
        assert math.isfinite(layer.scaling)
        assert layer.delta.is_finite()
        assert layer.rank > 0
    found, again = look_into(path, options)
    assert isinstance(again, Adapter)
    assert [layer.name for layer in found.layers] == list(adapter.layers)
    json.dumps(lora_json(found, adapter), allow_nan=False)
