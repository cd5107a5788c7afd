"""Rotations and gains of the base model's weight, as kohya and LyCORIS train them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lycoris.modules.glora import GLoRAModule, _glora_weight
from safetensors.torch import save_file
from support.form_files import Array, base_model
from support.lora_files import write_lora
from support.lycoris_kinds import IN, LAYERS, LINEAR, OUT, TRAINED, lycoris_file

from klora_compile import compile_fusion, read_adapter, verify_fusion
from klora_compile.cli import main
from klora_compile.reading.adapter import Adapter
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.file import load_fusion, save_fusion
from klora_runtime.errors import LoraError


def assert_is(adapter: Adapter, expected: torch.Tensor | Array, form: str) -> None:
    (layer,) = adapter.layers.values()
    expected = torch.as_tensor(expected).double()
    mine = (layer.scaling * layer.delta.matrix()).reshape(expected.shape)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert layer.form == form


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_change_is_what_lycoris_trains(kind: str, case: str, tmp_path: Path) -> None:
    file, base, added = lycoris_file(tmp_path, case, kind)
    assert_is(read_adapter(file, ReadOptions(base=base)), added, TRAINED[case][0])


def test_a_glora_with_a_core_is_as_lycoris_computes_it(tmp_path: Path) -> None:
    path, make = LAYERS["3x3"]
    torch.manual_seed(0)
    weight = make().weight.detach()
    a1, a2, b1, b2 = (torch.randn(*s, 1, 1) for s in ((IN, 4), (4, IN), (OUT, 4), (4, IN)))
    core = torch.randn(4, 4, 3, 3)
    names = zip(("a1", "a2", "b1", "b2", "bm"), (a1, a2, b1, b2, core), strict=True)
    tensors = {f"unet.{path}.{name}.weight": value for name, value in names}
    base = base_model(tmp_path / "base", {("unet", path): weight.double().numpy()})
    file = write_lora(tmp_path / "a.safetensors", tensors)
    expected = _glora_weight(weight, a1, a2, b1, b2, core, 1.0)
    assert_is(read_adapter(file, ReadOptions(base=base)), expected, "glora")


@pytest.mark.parametrize("stated", [True, False])
def test_a_rank_stabilised_glora_is_scaled_as_its_training_says(
    stated: bool, tmp_path: Path
) -> None:
    """LyCORIS writes its alpha as it is, so that the tensors alone do not tell."""
    path, make = LAYERS["linear"]
    torch.manual_seed(0)
    layer = make()
    name = f"lora_unet_{path.replace('.', '_')}"
    trained = GLoRAModule(name, layer, 1.0, 4, alpha=2.0, rs_lora=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    values = {f"{name}.{key}": value.detach() for key, value in trained.state_dict().items()}
    args = json.dumps({"algo": "glora", "rs_lora": "True"})
    save_file(values, tmp_path / "a.safetensors", {"ss_network_args": args} if stated else None)
    base = base_model(tmp_path / "base", {("unet", path): layer.weight.detach().double().numpy()})
    adapter = read_adapter(tmp_path / "a.safetensors", ReadOptions(base=base))
    added = trained.get_diff_weight(1.0)[0].detach()
    assert_is(adapter, added if stated else added / 2, "glora")


def kohya(weight: Array, blocks: list[Array], alpha: float) -> Array:
    """Its OFT by loops: rows are turned block by block, spans of rows after each other."""
    changed, start = weight.copy(), 0
    for own in blocks:
        skew = own - own.transpose(0, 2, 1)
        norm = np.sqrt((skew**2).sum())
        skew = skew * (min(norm, alpha * own.shape[0] * own.shape[1]) / norm)
        for block in skew:
            size = len(block)
            turn = (np.eye(size) + block) @ np.linalg.inv(np.eye(size) - block)
            rows = slice(start, start + size)
            changed[rows] = np.tensordot(turn.T, weight[rows], 1)
            start += size
    return changed - weight


@pytest.mark.parametrize("alpha", [1.0, 0.01])
@pytest.mark.parametrize("kind", LAYERS)
def test_kohyas_oft(kind: str, alpha: float, tmp_path: Path) -> None:
    path, make = LAYERS[kind]
    weight = make().weight.detach().double().numpy()
    blocks = torch.randn(4, OUT // 4, OUT // 4)
    name = f"oft_unet_{path.replace('.', '_')}"
    tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}
    file = write_lora(tmp_path / "a.safetensors", tensors)
    base = base_model(tmp_path / "base", {("unet", path): weight})
    expected = kohya(weight, [blocks.double().numpy()], alpha)
    assert_is(read_adapter(file, ReadOptions(base=base)), expected, "oft")


def test_kohyas_oft_of_flux_turns_query_key_and_value_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)) for name in "qkv"}
    names = {name: f"transformer_blocks.0.attn.to_{name}" for name in "qkv"}
    blocks = [torch.randn(2, 4, 4) for _ in weights]
    name = "oft_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.oft_blocks.{i}": own for i, own in enumerate(blocks)}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    base = {("transformer", names[name]): weight for name, weight in weights.items()}
    adapter = read_adapter(
        write_lora(tmp_path / "a.safetensors", tensors),
        ReadOptions(base=base_model(tmp_path / "base", base)),
    )
    assert len(adapter.layers) == 3
    for (name, weight), own in zip(weights.items(), blocks, strict=True):
        layer = adapter.layers[f"transformer.{names[name]}"]
        expected = torch.as_tensor(kohya(weight, [own.double().numpy()], 1.0))
        torch.testing.assert_close(layer.delta.matrix(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", TRAINED)
def test_a_file_is_compiled_verified_and_shown(case: str, tmp_path: Path) -> None:
    file, base, _ = lycoris_file(tmp_path, case, "linear")
    adapter = read_adapter(file, ReadOptions(base=base))
    fusion = compile_fusion(adapter, adapter)
    save_fusion(fusion, tmp_path / "a.klora.safetensors")
    loaded = load_fusion(tmp_path / "a.klora.safetensors")
    assert verify_fusion(loaded, {"content": adapter, "style": adapter}) == []
    shown = CliRunner().invoke(main, ["inspect", str(file), "--base", str(base), "--json"])
    assert json.loads(shown.stdout)["layers"][0]["form"] == TRAINED[case][0]


def test_without_a_base_model_a_file_is_shown_and_not_compiled(tmp_path: Path) -> None:
    file, _, _ = lycoris_file(tmp_path, "diag-oft", "linear")
    with pytest.raises(LoraError) as caught:
        read_adapter(file)
    assert str(caught.value).partition("\n")[0] == (
        f"LoRA file {file}: the base model's weights are needed for 1 module of the form oft. Name "
        "the base model with --base PATH (a diffusers folder or one safetensors file)."
    )
    shown = CliRunner().invoke(main, ["inspect", str(file), "--json"])
    assert shown.exit_code == 1
    (layer,) = json.loads(shown.stdout)["layers"]
    assert (layer["name"], layer["form"], layer["shape"]) == (f"unet.{LINEAR}", "oft", None)
    text = CliRunner().invoke(main, ["inspect", str(file)]).stdout
    assert "oft, shape as in the base model" in text


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"oft_blocks": (4, 8, 7)}, r"oft_blocks \[4, 8, 7\] make no OFT: expected oft_blocks"),
        ({"oft_blocks": (4, 9, 9)}, r"its blocks turn 36 rows, and the base .* is \[32, 24\]"),
        ({"oft_blocks": (2, 4, 7, 7)}, "make no BOFT: its stages do not fit its blocks"),
        ({"oft_blocks": (4, 8, 8), "rescale": (31, 1)}, "expected rescale of 32 rows"),
        ({"rescale": (32, 1)}, "make no OFT"),
        ({"oft_blocks.1": (4, 8, 8)}, "make no OFT"),
        ({"a1.weight": (24, 4), "a2.weight": (4, 24)}, "has no b1 and no b2"),
        (
            {
                "a1.weight": (4, 24),
                "a2.weight": (24, 4),
                "b1.weight": (32, 4),
                "b2.weight": (4, 24),
            },
            "make no GLoRA: expected a1",
        ),
        ({"ia3_l": (31, 1)}, "its 31 numbers are neither the rows nor the columns"),
        ({"ia3_l": (1, 32)}, "its 32 numbers are neither the rows nor the columns"),
        ({"oft_R.weight": (4, 28)}, "PEFT's configuration says how its blocks are meant"),
        ({"oft_R.weight": (4, 27)}, r"oft_R \[4, 27\] are not triangles of square blocks"),
        ({"boft_R": (1, 3, 8, 8)}, "has no boft_s"),
        ({"boft_R": (1, 4, 8, 8), "boft_s": (32, 1)}, "do not fit the base model's weight"),
        ({"vera_lambda_b": (32,)}, "has no vera_lambda_d"),
        ({"vera_lambda_b": (32,), "vera_lambda_d": (3,)}, "neither vera_A and vera_B nor their"),
        ({"miss_block": (4, 32)}, "PEFT's configuration says how its block is meant"),
        ({"fourierft_spectrum": (20,)}, "PEFT's configuration says where its fourierft_spectrum"),
        ({"randlora_lambda": (3, 8), "randlora_gamma": (8, 24)}, "save it with save_projection"),
        ({"hira_A": (3, 24), "hira_B": (32, 4)}, "are not a low-rank pair"),
        (
            {"hira_A": (3, 23), "hira_B": (32, 3)},
            r"its factors make \[32, 23\], and the base",
        ),
        ({"c3a_kernel": (4, 3)}, "is not \\(rows, columns, size\\) of blocks"),
        ({"gralora_A": (2, 12, 3), "gralora_B": (2, 3, 16)}, "do not fit each other"),
        ({"delora_A": (3, 24), "delora_B": (32, 3)}, "has no delora_lambda and no delora_w_norm"),
        ({"lora_A": (3, 24), "lora_B": (32, 3)}, "has no lora_E"),
        ({"lora_A": (3, 24), "lora_B": (32, 3), "lora_E": (3,)}, "do not fit each other"),
        ({"lora_A": (3, 24), "lora_B": (32, 3), "lora_E": (3, 1)}, "its lora_alpha and init_r"),
        ({"hra_u": (24,)}, "is not \\(columns, rank\\)"),
        ({"hra_u": (24, 3)}, "says how its directions are meant"),
        ({"road_theta": (16,)}, "has no road_alpha"),
        ({"road_theta": (16,), "road_alpha": (16,)}, "its group_size and variant; keep"),
        ({"vblora_logits_A": (3, 6, 5)}, "has no vblora_logits_B and no vblora_vector_bank"),
        ({"unilora_scales_A": (3, 24)}, "has no unilora_indices_A"),
        ({"tinylora_A": (3, 24), "tinylora_B": (32, 3)}, "save it with save_projection=True"),
        ({"pvera_lambda_b": (32,), "pvera_lambda_d": (3,)}, "has no two halves"),
        ({"osf_svd_params.U_low": (32, 3)}, "has no osf_svd_params.S_low"),
        ({"supertuning_values": (5,)}, "save it with save_precomputed_indices=True"),
        ({"deft_P": (32, 3)}, "says how its deft_P is meant; keep"),
        ({"peanut_A.weight": (3, 32), "peanut_B.weight": (32, 3)}, "its act_fn and scaling; keep"),
        (
            {"frod_lambda_l": (24,), "frod_lambda_s_values": (3,)},
            "the file has no frod_V.attn1_to_q; save it with save_projection=True",
        ),
        ({"ln_tuning_layers.bias": (32,)}, "has no value"),
        ({"ln_tuning_layers.bias": (32,), "scale": (31,)}, "are not a weight and its bias"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tensors: dict[str, tuple[int, ...]], problem: str, tmp_path: Path
) -> None:
    keys = {f"unet.{LINEAR}.{ending}": torch.ones(*shape) for ending, shape in tensors.items()}
    base = base_model(tmp_path / "base", {("unet", LINEAR): np.ones((OUT, IN))})
    with pytest.raises(LoraError, match=problem) as caught:
        read_adapter(write_lora(tmp_path / "a.safetensors", keys), ReadOptions(base=base))
    assert len(caught.value.issues) == 1


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (
            {"weight": torch.ones(OUT), "on_input": torch.tensor(1)},
            "its 32 numbers are of the input by on_input, and the base model's weight is",
        ),
        (
            {"shira_weight": torch.ones(1), "shira_indices": torch.tensor([[OUT], [0]])},
            "its shira_indices are outside of the base model's weight",
        ),
    ],
)
def test_numbers_that_contradict_the_shapes_are_named(
    tensors: dict[str, torch.Tensor], problem: str, tmp_path: Path
) -> None:
    keys = {f"unet.{LINEAR}.{ending}": value for ending, value in tensors.items()}
    base = base_model(tmp_path / "base", {("unet", LINEAR): np.ones((OUT, IN))})
    with pytest.raises(LoraError, match=problem):
        read_adapter(write_lora(tmp_path / "a.safetensors", keys), ReadOptions(base=base))


def test_a_layer_that_the_base_model_has_not_is_named(tmp_path: Path) -> None:
    file, _, _ = lycoris_file(tmp_path, "diag-oft", "linear")
    base = base_model(tmp_path / "other", {("unet", "conv_in"): np.ones((4, 4))})
    with pytest.raises(LoraError, match=f"the base model has no unet.{LINEAR}.weight"):
        read_adapter(file, ReadOptions(base=base))


def test_a_weight_without_a_form_is_no_ia3(tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.safetensors", {f"unet.{LINEAR}.weight": torch.ones(4)})
    with pytest.raises(LoraError, match="its ending belongs to no known form of LoRA"):
        read_adapter(file)
