"""alpha / rank: from tensors, from PEFT's metadata, by default; compared with PEFT itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from support.generation import TWO_STEPS, Case, build
from support.lora_files import RawTensor, peft_keys, random_pair, write_lora, write_tensors

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.reading.scale.peft_config import MAX_ALPHA
from klora_compile.reading.scale.scale import MIN_ALPHA
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LINEAR = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "time_emb_proj", "linear_1"]
CONV = ["conv_in", "conv1", "conv_shortcut", "proj_in"]  # 3x3, 3x3, 1x1, 1x1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer with threads, which mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def delta_of(layer: Layer) -> torch.Tensor:
    return layer.scaling * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))


def assert_same_deltas(adapter: Adapter, pipe: Any) -> None:
    """Every layer that PEFT put into the pipeline has the delta that the adapter states."""
    found: dict[str, torch.Tensor] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, LoraLayer):
                (own,) = module.lora_A
                path = name.removeprefix("text_model.")
                found[f"{component}.{path}"] = module.get_delta_weight(own).detach()
    assert set(found) == set(adapter.layers)
    for name, layer in adapter.layers.items():
        mine, theirs = delta_of(layer), found[name].double()
        assert theirs.norm() > 0
        torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)


def saved_by_diffusers(folder: Path, family: Any, **configs: LoraConfig) -> Path:
    """A file as diffusers writes it, its metadata included; random factors."""
    pipe = build(Case(2, kind=family))
    parts: dict[str, Any] = {}
    torch.manual_seed(0)
    for component, config in configs.items():
        model = getattr(pipe, component)
        model.add_adapter(config)
        parts[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        parts[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        for name in ("task_type", "peft_type"):
            parts[f"{component}_lora_adapter_metadata"].pop(name, None)
        targets = parts[f"{component}_lora_adapter_metadata"]["target_modules"]
        parts[f"{component}_lora_adapter_metadata"]["target_modules"] = sorted(targets)
    type(pipe).save_lora_weights(str(folder), **parts)
    (path,) = folder.iterdir()
    return path


def config(targets: list[str], **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, init_lora_weights=False, **settings)


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is rank": {"r": 4, "lora_alpha": 4},
    "another alpha": {"r": 4, "lora_alpha": 6},
    "mixed ranks": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2, "conv1": 3}},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_q": 2}},
    "pattern of ends": {"r": 4, "lora_alpha": 3, "alpha_pattern": {"to_k": 5, "proj_in": 7}},
    "pattern of paths": {
        "r": 4,
        "lora_alpha": 3,
        "alpha_pattern": {f"{UNET}.to_k": 5, f"^{UNET}.to_q": 7, "^to_q": 9, "attn2.to_q": 11},
    },
    "pattern with escapes": {"r": 2, "lora_alpha": 3, "alpha_pattern": {r"attn1\.to_k$": 5}},
    "first pattern counts": {
        "r": 2,
        "lora_alpha": 3,
        "alpha_pattern": {"attn1.to_k": 5, "to_k": 7, "attn2.to_k": 11},
    },
    "half a name is none": {"r": 2, "lora_alpha": 3, "alpha_pattern": {"o_k": 5, "k": 7}},
    "pattern, ranks, rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"to_q": 2, "conv1": 3},
        "alpha_pattern": {"to_q": 5, "conv1": 7, "proj_in": 9},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_scales_of_the_unet_are_those_that_peft_applies(case: str, tmp_path: Path) -> None:
    path = saved_by_diffusers(tmp_path, "sd1", unet=config([*LINEAR, *CONV], **CONFIGS[case]))
    adapter = read_adapter(path)
    assert {layer.alpha_source for layer in adapter.layers.values()} == {"lora_adapter_metadata"}
    assert {len(layer.down.shape) for layer in adapter.layers.values()} == {2, 4}
    pipe = build(TWO_STEPS)
    pipe.load_lora_weights(str(path.parent))
    assert_same_deltas(adapter, pipe)


def test_scales_of_all_components_are_those_that_peft_applies(tmp_path: Path) -> None:
    """Each component has its own configuration in the metadata."""
    path = saved_by_diffusers(
        tmp_path,
        "sdxl",
        unet=config(["to_q"], r=2, lora_alpha=1),
        text_encoder=config(["q_proj", "fc1"], r=2, lora_alpha=6, alpha_pattern={"mlp.fc1": 5}),
        text_encoder_2=config(["v_proj"], r=3, lora_alpha=6, use_rslora=True),
    )
    adapter = read_adapter(path)
    pipe = build(Case(2, kind="sdxl"))
    pipe.load_lora_weights(str(path.parent))
    assert_same_deltas(adapter, pipe)
    assert {layer.component for layer in adapter.layers.values()} == {
        "unet",
        "text_encoder",
        "text_encoder_2",
    }


def test_mixed_ranks_without_metadata_scale_by_one(tmp_path: Path) -> None:
    pairs = {
        f"unet.{UNET}.to_{name}": random_pair(32, 32, rank, seed=rank)
        for name, rank in {"q": 1, "k": 2, "v": 5}.items()
    }
    path = write_lora(tmp_path / "a.safetensors", peft_keys(pairs))
    adapter = read_adapter(path)
    assert adapter.ranks == (1, 2, 5)
    assert {(v.scaling, v.alpha_source) for v in adapter.layers.values()} == {(1.0, "rank")}
    pipe = build(TWO_STEPS)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert_same_deltas(adapter, pipe)


def test_kohya_alphas_are_those_that_diffusers_applies(tmp_path: Path) -> None:
    """One alpha for all: with several, diffusers' own converter takes wrong ones."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in {"to_q": 2, "to_k": 4}.items():
        flat = f"lora_unet_{UNET.replace('.', '_')}_{name}"
        down, up = random_pair(32, 32, rank, seed=rank)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    assert sorted(layer.scaling for layer in adapter.layers.values()) == [0.75, 1.5]
    pipe = build(TWO_STEPS)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert_same_deltas(adapter, pipe)


# --- where an alpha comes from ----------------------------------------------------------------

LAYER = f"unet.{UNET}.to_q"


def scaling(
    folder: Path,
    metadata: dict[str, Any] | None = None,
    alpha: torch.Tensor | None = None,
    *,
    name: str = LAYER,
    rank: int = 4,
) -> tuple[float, str]:
    tensors = peft_keys({name: random_pair(6, 4, rank)})
    tensors |= {} if alpha is None else {f"{name}.alpha": alpha}
    (layer,) = read_adapter(write_lora(folder / "a.safetensors", tensors, metadata)).layers.values()
    return layer.scaling, layer.alpha_source


PEFT_KEY = "lora_adapter_metadata"
DISAGREE = "disagree"

#: (alpha tensor, PEFT's alpha, metadata of the training, kernel) -> (scaling at rank 4, source).
RULE: dict[str, tuple[float | None, float | None, dict[str, str], bool, tuple[Any, str]]] = {
    "nothing": (None, None, {}, False, (1.0, "rank")),
    "tensor": (2.0, None, {}, False, (0.5, "tensor")),
    "PEFT": (None, 8.0, {}, False, (2.0, PEFT_KEY)),
    "kohya": (None, None, {"ss_network_alpha": "8"}, False, (2.0, "ss_network_alpha")),
    "kin": (None, None, {"network_alpha": "2.0"}, False, (0.5, "network_alpha")),
    "other kin": (None, None, {"lora_alpha": "2"}, False, (0.5, "lora_alpha")),
    "tensor and kohya agree": (2.0, None, {"ss_network_alpha": "2.0"}, False, (0.5, "tensor")),
    "tensor and PEFT agree": (2.0, 2.0, {}, False, (0.5, "tensor")),
    "as bfloat16 holds it": (2.0, None, {"ss_network_alpha": "2.005"}, False, (0.5, "tensor")),
    "dynamic": (2.0, None, {"ss_network_alpha": "Dynamic"}, False, (0.5, "tensor")),
    "dynamic alone": (None, None, {"ss_network_alpha": "Dynamic"}, False, (1.0, "rank")),
    "None": (None, None, {"ss_network_alpha": "None"}, False, (1.0, "rank")),
    "convolution": (None, None, {"ss_network_alpha": "8"}, True, (1.0, "rank")),
    "conv_alpha": (
        None,
        None,
        {"ss_network_alpha": "8", "ss_network_args": '{"conv_alpha": "2"}'},
        True,
        (0.5, "conv_alpha of ss_network_args"),
    ),
    "alphas of blocks": (
        2.0,
        None,
        {"ss_network_alpha": "8", "ss_network_args": '{"block_alphas": "1,2"}'},
        False,
        (0.5, "tensor"),
    ),
    "rank-stabilised LyCORIS": (
        16.0,
        None,
        {"ss_network_alpha": "8", "ss_network_args": '{"rs_lora": "True"}'},
        False,
        (4.0, "tensor"),
    ),
    "0 is the rank": (4.0, None, {"ss_network_alpha": "0"}, False, (1.0, "tensor")),
    "resized, with the old conv_alpha": (
        0.5,
        None,
        {
            "ss_network_alpha": "2",
            "ss_network_args": '{"conv_alpha": 1}',
            "ss_training_comment": "dimension is resized from 8 to 4; ",
        },
        True,
        (0.125, "tensor"),
    ),
    "resized layer by layer": (
        0.5,
        None,
        {"ss_network_alpha": "Dynamic", "ss_network_args": '{"conv_alpha": 1}'},
        True,
        (0.125, "tensor"),
    ),
    "three layers joined into one": (
        6.0,
        None,
        {"ss_network_alpha": "3", "ss_network_dim": "2"},
        False,
        (1.5, "tensor"),
    ),
    "a rank of too many digits": (
        2.0,
        None,
        {"ss_network_alpha": "2", "ss_network_dim": "1" * 5000, "ss_network_args": "{}"},
        False,
        (0.5, "tensor"),
    ),
    "network_args are no JSON": (2.0, None, {"ss_network_args": "{"}, False, (0.5, "tensor")),
    "zero": (0.0, None, {}, False, (0.0, "tensor")),
    "tensor and PEFT": (
        2.0,
        8.0,
        {},
        False,
        (DISAGREE, f"alpha is 2 by tensor and 8 by {PEFT_KEY}"),
    ),
    "tensor and kohya": (2.0, None, {"ss_network_alpha": "8"}, False, (0.5, "tensor")),
    "PEFT and kohya": (
        None,
        2.0,
        {"ss_network_alpha": "8"},
        False,
        (DISAGREE, f"alpha is 2 by {PEFT_KEY} and 8 by ss_network_alpha"),
    ),
    "tensor and conv_alpha": (
        2.0,
        None,
        {"ss_network_args": '{"conv_alpha": 4}'},
        True,
        (0.5, "tensor"),
    ),
    "tensor and kin": (
        2.0,
        None,
        {"network_alpha": "8"},
        False,
        (DISAGREE, "alpha is 2 by tensor and 8 by network_alpha"),
    ),
    "tensor and a broken record": (2.0, None, {"ss_network_alpha": "four"}, False, (0.5, "tensor")),
}


def kohya_key(ending: str) -> str:
    return "lora_unet_" + UNET.replace(".", "_") + "_to_q" + ending


@pytest.mark.parametrize("case", RULE)
def test_the_rule_of_scale(case: str, tmp_path: Path) -> None:
    """In kohya's spelling, for which kohya's metadata speaks."""
    alpha, peft, metadata, is_kernel, (scale, source) = RULE[case]
    down, up = random_pair(6, 4, 4, kernel=(3, 3) if is_kernel else ())
    tensors = {kohya_key(".lora_down.weight"): down, kohya_key(".lora_up.weight"): up}
    tensors |= {} if alpha is None else {kohya_key(".alpha"): torch.tensor(alpha)}
    if peft is not None:
        metadata = metadata | {PEFT_KEY: json.dumps({"unet.lora_alpha": peft})}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata)
    if scale != DISAGREE:
        layer = read_adapter(tmp_path / "a.safetensors").layers[LAYER]
        assert (layer.scaling, layer.alpha_source) == (scale, source)
        assert layer.alpha == scale * 4
        return
    with pytest.raises(LoraError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert caught.value.issues == (f"{LAYER}: {source}; --alpha-conflict first takes the first",)
    first = read_adapter(tmp_path / "a.safetensors", ReadOptions(alpha_conflict="first"))
    assert first.layers[LAYER].alpha == 2.0


@pytest.mark.parametrize("value", ["nan", "inf", "four", "1e13"])
@pytest.mark.parametrize("key", ["ss_network_alpha", "lora_alpha"])
def test_an_alpha_of_the_metadata_that_is_no_number(key: str, value: str, tmp_path: Path) -> None:
    down, up = random_pair(6, 4, 4)
    tensors = {kohya_key(".lora_down.weight"): down, kohya_key(".lora_up.weight"): up}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata={key: value})
    with pytest.raises(LoraError, match=f"gives {key} as {value}, expected a"):
        read_adapter(tmp_path / "a.safetensors")


def test_mixed_ranks_and_alphas_are_exact_in_every_layer(tmp_path: Path) -> None:
    """As ``resize_lora --dynamic_method`` of sd-scripts writes them."""
    scales = {}
    tensors: dict[str, torch.Tensor] = {}
    for rank in range(1, 9):
        name = f"unet.up_blocks.1.attentions.{rank}.transformer_blocks.0.attn1.to_q"
        tensors |= peft_keys({name: random_pair(6, 4, rank, seed=rank)})
        tensors[f"{name}.alpha"] = torch.tensor(0.75 * rank + 0.1)
        scales[name] = float(tensors[f"{name}.alpha"]) / rank
    metadata = {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert {name: layer.scaling for name, layer in adapter.layers.items()} == scales


def test_kohyas_record_does_not_speak_for_other_spellings(tmp_path: Path) -> None:
    """Converters of sd-scripts and musubi-tuner fold alpha into the weights and keep the record."""
    tensors = peft_keys({LAYER: random_pair(6, 4, 16)})
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "16"}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata)
    layer = read_adapter(tmp_path / "a.safetensors").layers[LAYER]
    assert (layer.scaling, layer.alpha_source) == (1.0, "rank")
    save_file(tensors, str(tmp_path / "b.safetensors"), metadata={"network_alpha": "4"})
    layer = read_adapter(tmp_path / "b.safetensors").layers[LAYER]
    assert (layer.scaling, layer.alpha_source) == (0.25, "network_alpha")


def test_the_alpha_of_a_whole_lokr_means_nothing(tmp_path: Path) -> None:
    tensors = {
        kohya_key(".lokr_w1"): torch.ones(2, 2),
        kohya_key(".lokr_w2"): torch.ones(3, 2),
        kohya_key(".alpha"): torch.tensor(1e6),
    }
    for args in ("{}", '{"rs_lora": true}'):
        metadata = {"ss_network_alpha": "8", "ss_network_args": args}
        save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata)
        (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
        assert (layer.scaling, layer.alpha_source) == (1.0, "none")
    metadata |= {"ss_network_dim": "4"}  # then it is the tensor's by the stated rank, undisputed
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata)
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert (layer.scaling, layer.alpha_source) == (250000.0, "tensor")


def test_many_patterns_for_many_modules(tmp_path: Path) -> None:
    """The first that fits counts, also among hundreds."""
    names = [f"unet.down_blocks.{i}.attentions.0.proj{i}" for i in range(300)]
    tensors = peft_keys({name: random_pair(2, 2, 1) for name in names})
    patterns = {f"attentions.0.proj{i}": float(i + 1) for i in reversed(range(300))}
    patterns |= {f"proj{i}": 7.0 for i in range(300)}
    path = write_lora(tmp_path / "a.safetensors", tensors, {"unet.alpha_pattern": patterns})
    adapter = read_adapter(path)
    assert [adapter.layers[name].alpha for name in names] == [i + 1.0 for i in range(300)]


def test_metadata_of_components(tmp_path: Path) -> None:
    assert scaling(tmp_path, {"text_encoder.lora_alpha": 8}) == (1.0, "rank")
    assert scaling(tmp_path, {"lora_alpha": 8}) == (2.0, PEFT_KEY)
    assert scaling(tmp_path, {"unet.lora_alpha": None, "unet.alpha_pattern": None})[1] == "rank"


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]).half(), torch.tensor(2)],
)
def test_an_alpha_tensor_may_have_any_shape_of_one_and_any_dtype(
    alpha: torch.Tensor, tmp_path: Path
) -> None:
    assert scaling(tmp_path, alpha=alpha) == (0.5, "tensor")


@pytest.mark.parametrize("alpha", [0.0, -2.0, MIN_ALPHA, MAX_ALPHA, -MAX_ALPHA])
def test_zero_and_negative_alphas_are_alphas(alpha: float, tmp_path: Path) -> None:
    value = torch.tensor(alpha, dtype=torch.float64)
    assert scaling(tmp_path, alpha=value) == (alpha / 4, "tensor")


@pytest.mark.parametrize(
    ("alpha", "problem"),
    [
        (torch.tensor([1.0, 2.0]), "alpha is not one number"),
        (torch.ones(0), "alpha is not one number"),
        (torch.tensor(torch.nan), "alpha is nan, expected 0 or 1e-12 to 1e+12"),
        (torch.tensor(torch.inf), "alpha is inf, expected 0 or"),
        (torch.tensor(1e13), "expected 0 or 1e-12 to 1e+12"),
        (torch.tensor(-1e-13), "expected 0 or 1e-12 to 1e+12"),
        (torch.tensor(5e-324, dtype=torch.float64), "alpha is 5e-324, expected 0 or"),
    ],
)
def test_an_impossible_alpha_tensor_is_named(
    alpha: torch.Tensor, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match="as it is, for 1 reason") as caught:
        scaling(tmp_path, alpha=alpha)
    assert caught.value.issues[0].startswith(f"{LAYER}: alpha is ")
    assert problem in caught.value.issues[0]


def test_patterns_find_clip_layers_under_either_spelling(tmp_path: Path) -> None:
    name = "text_encoder.encoder.layers.0.mlp.fc1"
    for pattern in ("text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1", "fc1"):
        metadata = {"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {pattern: 2}}
        assert scaling(tmp_path, metadata, name=name) == (0.5, "lora_adapter_metadata")


def test_a_pattern_may_have_a_hyphen(tmp_path: Path) -> None:
    metadata = {"transformer.alpha_pattern": {"all_x_embedder.2-1": 2}}
    name = "transformer.all_x_embedder.2-1"
    assert scaling(tmp_path, metadata, name=name) == (0.5, "lora_adapter_metadata")


def test_rank_stabilised_scaling_is_alpha_over_root_rank(tmp_path: Path) -> None:
    metadata = {"unet.lora_alpha": 3, "unet.use_rslora": True}
    value, _ = scaling(tmp_path, metadata, rank=3)
    assert math.isclose(value, 3 / math.sqrt(3), rel_tol=1e-15)


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "alpha a string": ({"unet.lora_alpha": "4"}, "unet.lora_alpha: expected a number, found 4"),
    "alpha true": ({"unet.lora_alpha": True}, "unet.lora_alpha: expected a number, found True"),
    "alpha giant": ({"unet.lora_alpha": 10**400}, "unet.lora_alpha: expected a number, found 1000"),
    "patterns a list": ({"unet.alpha_pattern": ["to_q"]}, "unet.alpha_pattern: expected an object"),
    "pattern's alpha": (
        {"unet.alpha_pattern": {"to_q": [4]}},
        "unet.alpha_pattern.to_q: expected a number, found [4]",
    ),
    "regular expression": (
        {"unet.alpha_pattern": {".*attn1.*": 4}},
        ".*attn1.* is a regular expression; write the names of the modules out",
    ),
    "endless regular expression": (
        {"unet.alpha_pattern": {"(([a-z_]+)+)+!": 4}},
        "(([a-z_]+)+)+! is a regular expression; write the names of the modules out",
    ),
    "rslora a number": ({"unet.use_rslora": 1}, "unet.use_rslora: expected true or false, found 1"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_followed_is_named(case: str, tmp_path: Path) -> None:
    metadata, problem = METADATA[case]
    with pytest.raises(LoraError, match="lora_adapter_metadata cannot be followed") as caught:
        scaling(tmp_path, metadata)
    assert len(caught.value.issues) == 1
    assert problem in caught.value.issues[0]


@pytest.mark.parametrize(
    ("key", "value", "form"),
    [
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("kasa_config", {}, None),
        ("use_dora", False, None),
        ("init_lora_weights", "gaussian", None),
        (
            "init_lora_weights",
            "pissa_niter_16",
            "was initialised with init_lora_weights=pissa_niter_16, which may also change "
            "the base weights; those changes are not in this file",
        ),
        (
            "init_lora_weights",
            "lora_ga",
            "was initialised with init_lora_weights=lora_ga, which may also change the "
            "base weights; those changes are not in this file",
        ),
        ("init_lora_weights", True, None),
        ("velora_config", {"rank": 1}, "VeLoRA"),
    ],
)
def test_other_forms_are_refused_by_their_metadata(
    key: str, value: Any, form: str | None, tmp_path: Path
) -> None:
    metadata = {f"unet.{key}": value}
    if form is None:
        assert scaling(tmp_path, metadata) == (1.0, "rank")
        return
    with pytest.raises(LoraError) as caught:
        scaling(tmp_path, metadata)
    named = f"its metadata says {form}, which klora does not support"
    said = form if form.startswith("was") else named
    assert caught.value.issues == (f"{LAYER}: {said}",)


def test_dora_by_its_metadata_needs_a_magnitude(tmp_path: Path) -> None:
    with pytest.raises(LoraError) as caught:
        scaling(tmp_path, {"unet.use_dora": True})
    assert caught.value.issues == (f"{LAYER}: its metadata says DoRA, but it has no magnitude",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "lora_adapter_metadata is not valid JSON: Expecting"),
        ("[]", "lora_adapter_metadata is not a JSON object"),
        ('{"unet.lora_alpha":NaN}', "is not valid JSON: NaN is not a JSON number"),
        ('{"unet.lora_alpha":1,"unet.lora_alpha":2}', "the key unet.lora_alpha appears twice"),
        ("[" * 100_000, "is not valid JSON: maximum recursion depth"),
        ('{"unet.lora_alpha":1e400}', "unet.lora_alpha: expected a number, found inf"),
    ],
)
def test_metadata_that_is_no_good_json_is_named(text: str, message: str, tmp_path: Path) -> None:
    tensors = {n: RawTensor.of(t) for n, t in peft_keys({LAYER: random_pair(6, 4, 2)}).items()}
    write_tensors(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})
    with pytest.raises(LoraError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert message in str(caught.value)


def test_an_adapter_folder_as_peft_saves_it(tmp_path: Path) -> None:
    """PEFT's own ``save_pretrained`` keeps lora_alpha in a file beside the tensors."""
    model = build(Case(2, kind="sd2")).unet
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["to_q"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(str(tmp_path))
    layers = read_adapter(tmp_path / "adapter_model.safetensors").layers
    assert len(layers) == 8
    assert {layer.scaling for layer in layers.values()} == {8.0}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.scaling["default"] == layers[f"unet.{name}"].scaling
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LoraError, match=r"adapter_config\.json is not valid JSON"):
        read_adapter(tmp_path / "adapter_model.safetensors")
