"""``klora export --static``: the average of the schedule, as diffusers and klora read it back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from support.exports import (
    Exportable,
    as_diffusers_reads,
    as_klora_reads,
    average,
    error,
    exportable_fusion,
    exportable_pipeline,
    lost_over_time,
)
from support.golden_fusion import golden_fusion
from support.handmade import hand_entry, hand_fusion
from support.lora_files import run_python
from support.pairs import slow

from klora_compile import read_adapter
from klora_compile.export.settings import ExportSettings, Keys, Precision
from klora_compile.export.writing import Exported, export_static
from klora_runtime import __version__, load_fusion, save_fusion
from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.schedule import STEPLESS

FAMILIES: tuple[Exportable, ...] = ("sd1", "sdxl", "flux.1")


@dataclass(frozen=True)
class Case:
    family: Exportable
    pipe: Any
    fusion: Fusion

    @property
    def acting(self) -> list[Entry]:
        return [entry for entry in self.fusion.entries if entry.acts]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    pipe = exportable_pipeline(request.param)
    fusion = exportable_fusion(request.param, pipe, tmp_path_factory.mktemp("loras"))
    return Case(request.param, pipe, fusion)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Fusion:
    pipe = exportable_pipeline("sdxl")
    return exportable_fusion("sdxl", pipe, tmp_path_factory.mktemp("sdxl"))


def exported(fusion: Fusion, folder: Path, **settings: Any) -> tuple[Path, Exported]:
    path = folder / "static.safetensors"
    return path, export_static(fusion, path, ExportSettings(**settings), overwrite=True)


@pytest.mark.parametrize("keys", ["kohya", "peft"])
def test_klora_reads_the_average_of_every_layer(case: Case, keys: Keys, tmp_path: Path) -> None:
    path, _ = exported(case.fusion, tmp_path, keys=keys)
    assert_average(as_klora_reads(path), case)


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("sd1", "peft"),
        ("sdxl", "kohya"),
        ("flux.1", "peft"),
        slow("sd1", "kohya"),
        slow("sdxl", "peft"),
    ],
    indirect=["case"],
)
def test_diffusers_reads_the_average_of_every_layer(case: Case, keys: Keys, tmp_path: Path) -> None:
    path, _ = exported(case.fusion, tmp_path, keys=keys)
    assert_average(as_diffusers_reads(case.pipe, path), case)


def assert_average(found: dict[str, torch.Tensor], case: Case) -> None:
    assert set(found) == {entry.layer for entry in case.acting}
    for entry in case.acting:
        assert error(found[entry.layer], average(entry)) < 1e-6, entry.layer


def test_diffusers_reads_fused_modules_of_flux_at_its_own_width(tmp_path: Path) -> None:
    """It knows no other: its converter has the released model's rows in its text."""
    wide = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = {f"single_transformer_blocks.3.{name}": rows for name, rows in wide.items()}
    layers |= {f"transformer_blocks.2.attn.{name}": 3072 for name in ("to_q", "to_k", "to_v")}
    fusion = hand_fusion(
        *(
            hand_entry(f"transformer.{name}", (rows, 3072), seed=seed, switch=(seed + 1) / 10)
            for seed, (name, rows) in enumerate(layers.items())
        ),
        family="flux.1",
    )
    path, lora = exported(fusion, tmp_path)
    assert lora.rank == 16  # of linear1, which is four modules with two slots of rank 2 each
    read = FluxPipeline.lora_state_dict(path)
    assert len(read) == 2 * len(layers)
    probe = torch.randn(3072, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for entry in fusion.entries:
        down, up = (read[f"{entry.layer}.lora_{part}.weight"].double() for part in "AB")
        assert error(up @ (down @ probe), applied(entry, probe)) < 1e-6, entry.layer


def applied(entry: Entry, probe: torch.Tensor) -> torch.Tensor:
    """The average of a layer that switches once, times something; never made as a whole."""
    content, style = (entry.factors[slot] for slot in ("content", "style"))
    share = entry.timeline.starts[1]
    return sum(
        weight * each.scale * (each.delta.up.double() @ (each.delta.down.double() @ probe))
        for weight, each in ((share, content), (1 - share, style))
    )


@pytest.mark.parametrize("keys", ["kohya", "peft"])
def test_every_layer_has_one_rank_and_alpha_equal_to_it(
    case: Case, keys: Keys, tmp_path: Path
) -> None:
    path, lora = exported(case.fusion, tmp_path, keys=keys)
    tensors = load_file(path)
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k or "lora_down" in k} == {
        lora.rank
    }
    assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k or "lora_up" in k} == {
        lora.rank
    }
    alphas = {float(t) for k, t in tensors.items() if k.endswith(".alpha")}
    assert alphas == ({lora.rank} if keys == "kohya" else set())
    assert lora.rank == (5 if keys == "peft" or case.family != "flux.1" else 20)


def test_gain_is_on_the_denoiser_and_not_on_text_encoders(sdxl: Fusion, tmp_path: Path) -> None:
    path, _ = exported(sdxl, tmp_path, gain=1.75)
    found = as_klora_reads(path)
    for entry in (entry for entry in sdxl.entries if entry.acts):
        gain = 1.0 if entry.component in STEPLESS else 1.75
        assert error(found[entry.layer], gain * average(entry)) < 1e-6, entry.layer


@pytest.mark.parametrize(
    ("dtype", "worst"), [("float32", 1e-6), ("float16", 6e-4), ("bfloat16", 5e-3)]
)
def test_a_dtype_costs_its_rounding_only(
    sdxl: Fusion, dtype: Precision, worst: float, tmp_path: Path
) -> None:
    """Scales that would underflow in float16 are shared between the two factors."""
    small = replace(sdxl, entries=tuple(scaled(entry, 1e-5) for entry in sdxl.entries))
    path, lora = exported(small, tmp_path, dtype=dtype)
    assert lora.dtype == dtype
    with safe_open(path, "pt") as file:
        name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight"
        assert file.get_tensor(name).dtype == getattr(torch, dtype)
    found = as_klora_reads(path)
    errors = [error(found[e.layer], average(e)) for e in small.entries if e.acts]
    assert max(errors) < worst


def scaled(entry: Entry, factor: float) -> Entry:
    factors = {slot: replace(f, scale=factor * f.scale) for slot, f in entry.factors.items()}
    return replace(entry, factors=factors)


@pytest.mark.parametrize(
    ("content", "style", "expected"),
    [
        (torch.float16, torch.float16, "float16"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        (torch.float16, torch.bfloat16, "float32"),
        (torch.float16, torch.float32, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_sources(
    content: torch.dtype, style: torch.dtype, expected: str, tmp_path: Path
) -> None:
    entry = hand_entry("unet.mid_block.attentions.0.proj_in", (6, 4))
    dtypes = {"content": content, "style": style}
    stored = {
        slot: replace(f, delta=f.delta.to(dtype=dtypes[slot])) for slot, f in entry.factors.items()
    }
    fusion = hand_fusion(replace(entry, factors=stored), family="sd2")
    assert exported(fusion, tmp_path)[1].dtype == expected


@pytest.mark.parametrize("rank", [1, 3, 4, 64])
def test_the_error_of_a_rank_is_true_and_the_least_possible(
    sdxl: Fusion, rank: int, tmp_path: Path
) -> None:
    path, lora = exported(sdxl, tmp_path, rank=rank)
    assert lora.rank == min(rank, 5)
    found = as_klora_reads(path)
    lost, all_of_it, worst = 0.0, 0.0, 0.0
    for entry in (entry for entry in sdxl.entries if entry.acts):
        mean = average(entry).flatten(1)
        best = float(torch.linalg.svdvals(mean)[rank:].square().sum())
        gone = float((found[entry.layer].flatten(1) - mean).square().sum())
        assert gone == pytest.approx(best, rel=1e-3, abs=1e-10 * float(mean.square().sum()))
        lost, all_of_it = lost + best, all_of_it + float(mean.square().sum())
        worst = max(worst, (best / float(mean.square().sum())) ** 0.5)
    assert lora.truncation is not None
    assert lora.truncation.total == pytest.approx((lost / all_of_it) ** 0.5, rel=1e-6, abs=1e-7)
    assert lora.truncation.worst == pytest.approx(worst, rel=1e-6, abs=1e-7)
    assert (lora.truncation.layer is None) == (rank >= 5)


@pytest.mark.parametrize("gain", [1.0, 1.4])
def test_the_loss_of_the_schedule_is_that_over_progress(
    sdxl: Fusion, gain: float, tmp_path: Path
) -> None:
    _, lora = exported(sdxl, tmp_path, gain=gain)
    total, worst, layer = lost_over_time(sdxl, gain=gain)
    assert lora.schedule.total == pytest.approx(total, rel=1e-6)
    assert lora.schedule.worst == pytest.approx(worst, rel=1e-6)
    assert lora.schedule.layer == layer
    assert 0.1 < total < 0.8


def test_metadata_say_what_tools_look_for_and_where_it_is_from(
    stated_artifact: Path, tmp_path: Path
) -> None:
    fusion = replace(load_fusion(stated_artifact), family="sd1")
    fusion = replace(fusion, entries=tuple(e for e in fusion.entries if "mid_block" in e.module))
    path, lora = exported(fusion, tmp_path, gain=1.5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    origin = metadata.pop("klora_export")
    assert metadata == {
        "format": "pt",
        "software": f'{{"name":"klora","version":"{__version__}"}}',
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.rank}.0",
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "sks fox, in ink_wash style",
    }
    for text in ('"gain":1.5', '"progress":[0.0,1.0]', '"rank":null', '"name":"klora"'):
        assert text in origin
    for source in fusion.sources.values():
        assert f'"sha256":"{source.sha256}"' in origin
    assert str(tmp_path.parent) not in origin
    assert read_adapter(path).survey.origin.trigger_words == ("sks fox, in ink_wash style",)


EXPORT = """
import sys, torch
from klora_compile.export.settings import ExportSettings
from klora_compile.export.writing import export_static
from klora_runtime import load_fusion
artifact, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
export_static(load_fusion(artifact), out, ExportSettings(rank=60))
assert torch.get_num_threads() == int(threads)
"""


def test_bytes_are_the_same_in_every_process_and_for_every_number_of_threads(
    tmp_path: Path,
) -> None:
    """So wide that QR and SVD round differently with two threads."""
    layer = hand_entry("transformer.transformer_blocks.0.attn.to_out.0", (3072, 3072), rank=32)
    artifact = tmp_path / "a.klora.safetensors"
    save_fusion(sourced(hand_fusion(layer, family="flux.1")), artifact)
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    assert torch.get_num_threads() == 1
    export_static(load_fusion(artifact), here, ExportSettings(rank=60))
    result = run_python(EXPORT, artifact, there, 4, OMP_NUM_THREADS="4", PYTHONHASHSEED="4")
    assert result.returncode == 0, result.stderr
    assert there.read_bytes() == here.read_bytes()


def test_the_header_and_every_tensor_are_aligned(tmp_path: Path) -> None:
    entries = (hand_entry(f"unet.{name}", (4, 3)) for name in ("conv_in", "conv_out"))
    path, _ = exported(hand_fusion(*entries, family="sd1"), tmp_path, dtype="float16", rank=1)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    with SafetensorsFile(path, "export") as file:
        sizes = {info.dtype for info in file.tensors.values()}
        places = [info.start % DTYPES[info.dtype].nbytes for info in file.tensors.values()]
    assert sizes == {"F16", "F32"}
    assert places == [0] * 6


def sourced(fusion: Fusion) -> Fusion:
    """With sources and a rule, which the format wants."""
    return replace(golden_fusion(), family=fusion.family, entries=fusion.entries)
