"""Reading LoRA files: every key layout by table, every key used or named in an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import needs_real_loras, peft_keys, random_pair, real_lora, write_lora
from support.pairs import slow

from klora_compile import compile_fusion, read_adapter
from klora_compile.reading.forms.catalogue import ENDINGS, FORMS
from klora_compile.reading.forms.lokr import W2_B
from klora_compile.reading.forms.lora import DOWN
from klora_compile.reading.forms.parts import Part
from klora_compile.reading.names import keys, spelling
from klora_compile.reading.names.account import account_for
from klora_compile.reading.names.keys import ParsedKey, PlacedModule, parse_key
from klora_compile.reading.names.spelling import REFUSED_FORMS
from klora_compile.rules import Klora
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
LAYER = f"unet.{ATTENTION}.to_q"
#: A module path of a UNet, of a CLIP text encoder, of a transformer.
UNET, CLIP, T5, DIT = (
    f"{ATTENTION}.to_out.0",
    "encoder.layers.3.mlp.fc1",
    "encoder.block.0.layer.0.SelfAttention.q",
    "transformer_blocks.0.attn.to_q",
)

#: What stands before a module path, with the component and path it makes of it.
FLAT_UNET = UNET.replace(".", "_")
DOTTED: dict[str, tuple[str, str]] = {
    "unet.": ("unet", UNET),
    "unet.base_model.model.": ("unet", UNET),
    "base_model.model.unet.": ("unet", UNET),
    "base_model.model.": ("unet", UNET),
    "": ("unet", UNET),
    "transformer.": ("transformer", DIT),
    "transformer_2.": ("transformer_2", DIT),
    "transformer.base_model.model.": ("transformer", DIT),
    "text_encoder.": ("text_encoder", CLIP),
    "text_encoder.text_model.": ("text_encoder", CLIP),
    "text_encoder.base_model.model.text_model.": ("text_encoder", CLIP),
    "text_encoder_2.": ("text_encoder_2", CLIP),
    "text_encoder_2.text_model.": ("text_encoder_2", CLIP),
    "text_encoder_3.": ("text_encoder_3", T5),
    "text_conditioner.": ("text_conditioner", "blocks.0.self_attn.q_proj"),
    **{
        f"{component}.": (component, "blocks.0.self_attn.q_proj")
        for component in (
            *(
                "connectors",
                "prior",
                "prior_prior",
                "decoder",
                "unconditional_transformer",
                "transformer_ref",
            ),
            *("image_unet", "text_unet", "super_res_first", "super_res_last"),
        )
    },
    "text_encoders.clip_l.transformer.text_model.": ("text_encoder", CLIP),
    "text_encoders.clip_g.transformer.text_model.": ("text_encoder_2", CLIP),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", T5),
    "text_model.": ("text_encoder", CLIP),
    "base_model.model.text_model.": ("text_encoder", CLIP),
}
FLAT: dict[str, tuple[str, str]] = {
    "lora_unet_": ("unet", UNET),
    "lycoris_": ("unet", UNET),
    "oft_unet_": ("unet", UNET),
    "lora_te_": ("text_encoder", CLIP),
    "lora_te_text_model_": ("text_encoder", CLIP),
    "lora_te1_": ("text_encoder", CLIP),
    "lora_te1_text_model_": ("text_encoder", CLIP),
    "lora_te2_": ("text_encoder_2", CLIP),
    "lora_te2_text_model_": ("text_encoder_2", CLIP),
    "lora_te3_": ("text_encoder_3", T5),
}


#: What a suffix says, written down a second time.
SUFFIXES: dict[str, str] = {
    "alpha": ".alpha",
    "down": ".lora_A.weight .lora.down.weight .lora_down.weight .down.weight "
    ".lora_linear_layer.down.weight",
    "up": ".lora_B.weight .lora.up.weight .lora_up.weight .up.weight .lora_linear_layer.up.weight",
    "mid": ".lora_mid.weight",
    "bias of up": ".lora_B.bias .lora_up.bias",
    "hada_w1_a": ".hada_w1_a",
    "hada_w1_b": ".hada_w1_b",
    "hada_w2_a": ".hada_w2_a",
    "hada_w2_b": ".hada_w2_b",
    "hada_t1": ".hada_t1",
    "hada_t2": ".hada_t2",
    "lokr_w1": ".lokr_w1",
    "lokr_w1_a": ".lokr_w1_a",
    "lokr_w1_b": ".lokr_w1_b",
    "lokr_w2": ".lokr_w2",
    "lokr_w2_a": ".lokr_w2_a",
    "lokr_w2_b": ".lokr_w2_b",
    "lokr_t2": ".lokr_t2",
    "diff": ".diff",
    "diff_b": ".diff_b",
    "w_norm": ".w_norm",
    "b_norm": ".b_norm",
    "value": ".scale .set_weight .ln_tuning_layers.weight",
    "dora_scale": ".dora_scale",
    "magnitude vector": ".lora_magnitude_vector .lora_magnitude_vector.weight .magnitude",
    "oft_blocks": ".oft_blocks",
    **{f"oft_blocks.{i}": f".oft_blocks.{i}" for i in range(4)},
    "rescale": ".rescale",
    "oft_R": ".oft_R.weight",
    "boft_R": ".boft_R",
    "boft_s": ".boft_s",
    **{name: f".{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    **{
        f"glora_{letter}.{name}": f".glora_{letter}.{name}"
        for letter in "ABCDE"
        for name in ("Xd", "Xu", "X", "zeros")
    },
    "weight": ".weight",
    "on_input": ".on_input",
    "ia3_l": ".ia3_l",
    "vera_lambda_b": ".vera_lambda_b",
    "vera_lambda_d": ".vera_lambda_d",
    "hira_A": ".hira_A",
    "hira_B": ".hira_B",
    "miss_block": ".miss_block",
    "shira_weight": ".shira_weight",
    "shira_indices": ".shira_indices",
    "fourierft_spectrum": ".fourierft_spectrum",
    "waveft_spectrum": ".waveft_spectrum",
    **{f"delora_{name}": f".delora_{name}" for name in ("A", "B", "lambda", "w_norm")},
    "c3a_kernel": ".c3a_kernel",
    "gralora_A": ".gralora_A",
    "gralora_B": ".gralora_B",
    "gralora_A_general": ".gralora_A_general.weight",
    "gralora_B_general": ".gralora_B_general.weight",
    **{f"randlora_{name}": f".randlora_{name}" for name in ("lambda", "gamma", "A", "B")},
    **{name: f".{name}" for name in ("lora_A", "lora_B", "lora_E", "hra_u", "beft_bias")},
    **{name: f".{name}" for name in ("road_theta", "road_alpha", "deft_P", "deft_R")},
    **{
        f"vblora_logits_{side}{tail}": f".vblora_logits_{side}{tail}"
        for side in "AB"
        for tail in ("", "_topk_indices", "_topk_weights")
    },
    **{
        f"unilora_{name}_{side}": f".unilora_{name}_{side}"
        for name in ("indices", "scales")
        for side in "AB"
    },
    **{f"tinylora_{name}": f".tinylora_{name}" for name in "ABP"},
    **{f"pvera_lambda_{name}": f".pvera_lambda_{name}" for name in "bd"},
    **{f"osf_svd_params.{name}_low": f".osf_svd_params.{name}_low" for name in "USV"},
    **{f"supertuning_{name}": f".supertuning_{name}" for name in ("values", "indices")},
    **{f"supertuning_lora_{name}": f".supertuning_lora_{name}.weight" for name in "AB"},
    **{f"peanut_{name}": f".peanut_{name}.weight" for name in "AB"},
    **{
        f"peanut_{kind}.{stage}": f".peanut_{kind}.{stage}.weight"
        for kind in ("encoders", "decoders")
        for stage in range(16)
    },
    **{f"frod_lambda_{name}": f".frod_lambda_{name}" for name in ("l", "s_values")},
    **{n: f".{n}" for n in ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")},
    "bias' value": ".ln_tuning_layers.bias",
    "bias_indices": ".bias_indices",
    "bias_values": ".bias_values",
    "bias_size": ".bias_size",
}


@pytest.mark.parametrize("prefix", [*DOTTED, *FLAT])
def test_every_prefix(prefix: str) -> None:
    component, module = (DOTTED | FLAT)[prefix]
    path = module if prefix in DOTTED else module.replace(".", "_")
    layout = "peft" if prefix in DOTTED else "kohya"
    for suffix, part in ((".lora_A.weight", DOWN), (".lokr_w2_b", W2_B)):
        expected = ParsedKey(PlacedModule(layout, component, module), part)
        assert parse_key(f"{prefix}{path}{suffix}") == expected


@pytest.mark.parametrize("part", sorted(set(ENDINGS.values()), key=lambda part: part.name), ids=str)
def test_every_suffix(part: Part) -> None:
    for suffix in SUFFIXES[part.name].split():
        dotted, flat = (
            parse_key(f"unet.{UNET}{suffix}", [f"unet.{UNET}{part.beside}"]),
            parse_key(f"lora_unet_{FLAT_UNET}{suffix}", [f"lora_unet_{FLAT_UNET}{part.beside}"]),
        )
        assert dotted == ParsedKey(PlacedModule("peft", "unet", UNET), part)
        assert flat == ParsedKey(PlacedModule("kohya", "unet", UNET), part)


def test_the_suffixes_above_are_all_there_are() -> None:
    assert {suffix for row in SUFFIXES.values() for suffix in row.split()} == set(ENDINGS)


def test_no_part_belongs_to_two_forms() -> None:
    """So one look-up of a part gives its form."""
    parts = [part for form in FORMS for part in form.parts]
    assert len(set(parts)) == len(parts)


def test_the_keys_of_a_module_are_placed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    place = keys._place

    def counted(raw: str) -> object:
        placed.append(raw)
        return place(raw)

    monkeypatch.setattr(keys, "_place", counted)
    for root in (f"lora_unet_{FLAT_UNET}", f"unet.{UNET}"):
        endings = (".lora_down.weight", ".lora_up.weight", ".alpha")
        account = account_for({f"{root}{ending}": (4, 4) for ending in endings})
        assert len(account.modules) == 1
    assert placed == [f"lora_unet_{FLAT_UNET}", f"unet.{UNET}"]


def test_the_prefixes_above_are_all_there_are() -> None:
    assert {component for component, _ in DOTTED.values()} == set(spelling.COMPONENTS)
    alone = {row.prefix for row in spelling.FLAT_PREFIXES if row.vocabularies}
    assert alone <= set(FLAT)
    assert set(spelling.ROOTS.values()) == {"unet", "text_encoder", "transformer"}


@pytest.mark.parametrize("root", spelling.ROOTS)
def test_a_path_without_a_component_is_known_by_its_first_name(root: str) -> None:
    parsed = parse_key(f"base_model.model.{root}.layer.lora_A.weight")
    assert isinstance(parsed, ParsedKey)
    assert isinstance(parsed.module, PlacedModule)
    assert parsed.module.component == spelling.ROOTS[root]


def test_a_module_name_may_have_a_hyphen() -> None:
    """Z-Image names its first and last layers by their patch sizes."""
    parsed = parse_key("transformer.all_x_embedder.2-1.lora_A.weight")
    assert parsed == ParsedKey(PlacedModule("peft", "transformer", "all_x_embedder.2-1"), DOWN)


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.lora_A.default.weight",
        f"{LAYER}.lora_A.my-adapter.weight",
        f"{LAYER}.lora_magnitude_vector.default",
        f"{LAYER}.lora_magnitude_vector.default.weight",
        f"{LAYER}.lora_B.default.bias",
    ],
)
def test_pefts_name_of_an_adapter_is_left_out(key: str) -> None:
    plain = key.replace(".default", "").replace(".my-adapter", "")
    parsed = parse_key(key)
    assert isinstance(parsed, ParsedKey)
    assert parsed == parse_key(plain)
    assert parsed.module.layer == LAYER


DOWN_SUFFIXES = [suffix for suffix, part in ENDINGS.items() if part == DOWN]


def up_suffix(down: str) -> str:
    return down.replace("lora_A", "lora_B").replace("down", "up")


@pytest.mark.parametrize("suffix", DOWN_SUFFIXES)
def test_a_file_of_each_spelling_is_read(suffix: str, tmp_path: Path) -> None:
    down, up = random_pair(6, 4, 2)
    assert up_suffix(suffix) in ENDINGS
    file = {LAYER + suffix: down, LAYER + up_suffix(suffix): up}
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", file))
    layer = adapter.layers[LAYER]
    assert list(adapter.layers) == [LAYER]
    assert torch.equal(layer.down, down)
    assert torch.equal(layer.up, up)
    assert (layer.shape, layer.rank, layer.scaling, adapter.survey.keys) == ((6, 4), 2, 1.0, 2)


def test_dtypes_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    pairs = {
        f"unet.{ATTENTION}.to_{name}": random_pair(6, 4, 2, seed=i, dtype=dtype)
        for i, (name, dtype) in enumerate(
            {"q": torch.float32, "k": torch.float16, "v": torch.bfloat16}.items()
        )
    }
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", peft_keys(pairs)))
    for name, (down, up) in pairs.items():
        layer = adapter.layers[name]
        assert layer.down.dtype == down.dtype
        assert torch.equal(layer.down, down)
        assert torch.equal(layer.up, up)


@pytest.mark.parametrize(
    ("kernel", "shape", "dimensions"), [((1, 1), (6, 4), 2), ((3, 3), (6, 4, 3, 3), 4)]
)
def test_convolutions_are_read_and_1x1_ones_are_linear_layers(
    kernel: tuple[int, int], shape: tuple[int, ...], dimensions: int, tmp_path: Path
) -> None:
    """One trainer writes a 1x1 convolution as such, another as a linear layer: they must meet."""
    down, up = random_pair(6, 4, 2, kernel=kernel)
    path = write_lora(tmp_path / "a.safetensors", peft_keys({LAYER: (down, up)}))
    layer = read_adapter(path).layers[LAYER]
    assert (layer.shape, layer.numel) == (shape, down[0].numel() * 6)
    assert layer.down.dim() == layer.up.dim() == dimensions
    assert torch.equal(layer.down.flatten(), down.flatten())
    assert torch.equal(layer.up.flatten(), up.flatten())


def test_trigger_words_licence_and_size_are_carried(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"modelspec.trigger_phrase": "a sks fox", "modelspec.license": "CC0"}
    save_file(peft_keys({LAYER: random_pair(6, 4, 2)}), str(path), metadata=metadata)
    adapter = read_adapter(path)
    assert (adapter.survey.origin.trigger_words, adapter.survey.origin.license) == (
        ("a sks fox",),
        "CC0",
    )
    assert adapter.survey.nbytes == path.stat().st_size
    assert adapter.survey.path == path


# --- what cannot be used is named -------------------------------------------------------------


def issues(folder: Path, tensors: Mapping[str, torch.Tensor], message: str) -> tuple[str, ...]:
    with pytest.raises(LoraError, match=message) as caught:
        read_adapter(write_lora(folder / "a.safetensors", tensors))
    return caught.value.issues


@pytest.mark.parametrize("suffix", REFUSED_FORMS)
def test_other_forms_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    """With all that belongs to the same module: without the rest it would mean something else."""
    good = peft_keys({LAYER: random_pair(6, 4, 2), f"{LAYER}x": random_pair(6, 4, 2)})
    found = issues(tmp_path, good | {LAYER + suffix: torch.ones(2)}, "3 of 5 keys cannot be used")
    why = f"is part of {REFUSED_FORMS[suffix]}, which klora does not read"
    parts = sorted([suffix, ".lora_A.weight", ".lora_B.weight"])
    assert found == tuple(f"{LAYER}{part}: {why}" for part in parts)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("unet.x.weight", "its ending belongs to no known form of LoRA"),
        ("state_step", "its ending belongs to no known form of LoRA"),
        ("vae.encoder.lora_A.weight", "klora knows no model with a module of this name"),
        (".lora_A.weight", "is not a module path"),
        ("unet.lora_A.weight", "is not a module path"),
        ("unet..conv.lora_A.weight", "is not a module path"),
        ("unet.a/b.lora_A.weight", "is not a module path"),
        ("unet.a b.lora_A.weight", "is not a module path"),
        (
            "lora_unet_.lora_down.weight",
            "no known unet has a module of this name in kohya's spelling",
        ),
        ("lora_unet_input_blocks_1.lora_down.weight", "klora knows no model with a module of this"),
        ("lora_transformer_.lora_down.weight", "no known transformer has a module of this name in"),
        ("lora_unet_conv_in_.lora_down.weight", "no known unet has a module of this name in"),
        ("lora_te_mystery.lora_down.weight", "no known text_encoder has a module of this name in"),
    ],
)
def test_an_unknown_key_is_named(key: str, problem: str, tmp_path: Path) -> None:
    good = peft_keys({LAYER: random_pair(6, 4, 2)})
    (issue,) = issues(tmp_path, good | {key: torch.ones(2, 4)}, "1 of 3 keys cannot be used")
    assert issue.startswith(f"{key}: {problem}")


@pytest.mark.parametrize(
    ("kept", "missing"),
    [("lora_A.weight", "up"), ("lora_B.weight", "down"), ("alpha", "down and no up")],
)
def test_half_a_pair_is_named(kept: str, missing: str, tmp_path: Path) -> None:
    good = peft_keys({LAYER: random_pair(6, 4, 2)})
    other = f"unet.{ATTENTION}.to_k"
    value = torch.ones(2, 2) if kept != "alpha" else torch.tensor(1.0)
    found = issues(tmp_path, good | {f"{other}.{kept}": value}, "as it is, for 1 reason")
    assert found == (f"{other}: has no {missing}",)


@pytest.mark.parametrize(
    "second",
    [
        f"{LAYER}.lora.down.weight",
        f"base_model.model.{LAYER}.lora_A.weight",
        f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_down.weight",
    ],
)
def test_two_spellings_of_one_tensor_are_named(second: str, tmp_path: Path) -> None:
    good = peft_keys({LAYER: random_pair(6, 4, 2)})
    (issue,) = issues(tmp_path, good | {second: torch.ones(2, 4)}, "as it is, for 1 reason")
    assert f"is a second down of {LAYER}, beside " in issue
    assert second in issue


def test_text_model_prefix_is_one_layer_with_or_without(tmp_path: Path) -> None:
    down, up = random_pair(6, 4, 2)
    plain, prefixed = f"text_encoder.{CLIP}", f"text_encoder.text_model.{CLIP}"
    one = peft_keys({plain: (down, up)}) | {f"{prefixed}.lora_A.weight": down.clone()}
    (issue,) = issues(tmp_path, one, "as it is, for 1 reason")
    assert f"is a second down of {plain}, beside " in issue


BAD_PAIRS: dict[str, tuple[torch.Tensor, torch.Tensor, str]] = {
    "rank 0": (torch.ones(0, 4), torch.ones(6, 0), "down [0, 4] and up [6, 0] are not a low-rank"),
    "ranks differ": (
        torch.ones(2, 4),
        torch.ones(6, 3),
        "down [2, 4] and up [6, 3] are not a low-",
    ),
    "exchanged": (
        torch.ones(6, 2),
        torch.ones(2, 4),
        "down [6, 2] and up [2, 4] are not a low-rank",
    ),
    "vectors": (torch.ones(2), torch.ones(2), "down [2] and up [2] are not a low-rank pair"),
    "scalars": (torch.tensor(1.0), torch.tensor(1.0), "down [] and up [] are not a low-rank pair"),
    "kernel of one dimension in up": (
        torch.ones(2, 4, 3),
        torch.ones(6, 2, 3),
        "are not a low-rank",
    ),
    "linear and conv": (torch.ones(2, 4), torch.ones(6, 2, 1, 1), "are not a low-rank pair"),
    "kernel in up": (torch.ones(2, 4, 3, 3), torch.ones(6, 2, 3, 3), "are not a low-rank pair"),
    "integers": (
        torch.ones(2, 4, dtype=torch.int32),
        torch.ones(6, 2),
        "down is torch.int32, expected float32, float16, bfloat16 or float8",
    ),
    "float64": (torch.ones(2, 4), torch.ones(6, 2).double(), "up is torch.float64, expected"),
    "NaN": (torch.full((2, 4), torch.nan), torch.ones(6, 2), "holds NaN or infinity"),
    "infinity": (torch.ones(2, 4), torch.full((6, 2), -torch.inf), "holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_an_impossible_pair_is_named(case: str, tmp_path: Path) -> None:
    down, up, problem = BAD_PAIRS[case]
    (issue,) = issues(tmp_path, peft_keys({LAYER: (down, up)}), "as it is, for 1 reason")
    assert issue.startswith(f"{LAYER}: ")
    assert problem in issue


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """What the header says first, then what the values say."""
    bad = {f"unet.{ATTENTION}.{case.replace(' ', '_')}": BAD_PAIRS[case][:2] for case in BAD_PAIRS}
    values = {name: bad[name] for name in bad if name.endswith(("NaN", "infinity"))}
    assert len(issues(tmp_path, peft_keys(bad), f"for {len(bad) - 2} reasons")) == len(bad) - 2
    assert len(issues(tmp_path, peft_keys(values), "for 2 reasons")) == 2
    unknown = {f"unet.mystery.{i}": torch.ones(1) for i in range(20)}
    found = issues(tmp_path, peft_keys(bad) | unknown, r"(?s)20 of 44 keys.*… and 12 more")
    assert len(found) == 20


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """In float16, which holds every finite value of both kinds, subnormals included."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    down, up = codes.reshape(2, -1), torch.ones(6, 2).to(dtype)
    path = write_lora(tmp_path / "a.safetensors", peft_keys({LAYER: (down, up)}))
    layer = read_adapter(path).layers[LAYER]
    assert layer.down.dtype == layer.up.dtype == torch.float16
    assert torch.equal(layer.down.double(), down.double())


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    assert issues(tmp_path, {}, "holds no tensors") == ()


def test_unknown_keys_can_be_left_out_and_are_recorded(tmp_path: Path) -> None:
    good = peft_keys({LAYER: random_pair(6, 4, 2)})
    unknown = {"state_step": torch.ones(1), "unet.x.oft_diag": torch.ones(1)}
    path = write_lora(tmp_path / "a.safetensors", good | unknown)
    adapter = read_adapter(path, ReadOptions(ignore_unknown=True))
    assert list(adapter.layers) == [LAYER]
    assert (adapter.survey.keys, adapter.survey.used) == (4, 2)
    assert [(each.key, each.why) for each in adapter.survey.unused] == [
        ("state_step", "its ending belongs to no known form of LoRA"),
        ("unet.x.oft_diag", "is part of an early OFT, which klora does not read"),
    ]
    alone = write_lora(tmp_path / "b.safetensors", unknown)
    with pytest.raises(LoraError, match="2 of 2 keys cannot be used"):
        read_adapter(alone, ReadOptions(ignore_unknown=True))
    broken = good | unknown | {"unet.y.lora_A.weight": torch.ones(2, 4)}
    path = write_lora(tmp_path / "c.safetensors", broken)
    with pytest.raises(LoraError, match=r"for 1 reason.\n  - unet.y: has no up"):
        read_adapter(path, ReadOptions(ignore_unknown=True))


@pytest.mark.parametrize(
    "key",
    [
        "bundle_emb.sks.string_to_param.*",
        "emb_params",
        "text_encoder.text_model.embeddings.token_embedding.weight",
    ],
)
def test_token_embeddings_are_refused_by_name(key: str, tmp_path: Path) -> None:
    good = peft_keys({LAYER: random_pair(6, 4, 2)})
    (issue,) = issues(tmp_path, good | {key: torch.ones(2, 4)}, "1 of 3 keys cannot be used")
    assert issue == (
        f"{key}: is an embedding of tokens, which klora does not carry; load it beside the "
        "fusion with pipe.load_textual_inversion"
    )


# --- real files -------------------------------------------------------------------------------


@needs_real_loras
@pytest.mark.parametrize("name", ["sd2_character", "sd2_popart", "sd15_animation", "sd15_analog"])
def test_kohya_and_peft_files_of_one_lora_are_one_adapter(name: str) -> None:
    peft, kohya = (read_adapter(real_lora(f"{name}.{layout}")) for layout in ("peft", "kohya"))
    assert (peft.survey.layout, kohya.survey.layout) == ("peft", "kohya")
    assert list(peft.layers) == list(kohya.layers)
    assert len(peft.layers) >= 128
    assert peft.survey.keys == 2 * len(peft.layers)
    assert kohya.survey.keys == 3 * len(kohya.layers)  # with an alpha each
    for one, other in zip(peft.layers.values(), kohya.layers.values(), strict=True):
        assert torch.equal(one.down, other.down)
        assert torch.equal(one.up, other.up)
        assert one.scaling == other.scaling == 1.0
        assert (one.alpha_source, other.alpha_source) == ("rank", "tensor")


@needs_real_loras
@pytest.mark.parametrize(
    ("content", "style"),
    [("sd2_character", "sd2_popart"), slow("sd15_animation", "sd15_analog")],
)
def test_kohya_and_peft_files_compile_to_the_same_decisions(content: str, style: str) -> None:
    layouts = [("peft", "peft"), ("kohya", "kohya"), ("kohya", "peft")]
    fusions = [
        compile_fusion(
            real_lora(f"{content}.{c}"),
            real_lora(f"{style}.{s}"),
            Klora(pattern="s*"),
        )
        for c, s in layouts
    ]
    plans = [[(e.layer, e.fate, e.timeline, e.scores) for e in f.entries] for f in fusions]
    assert plans[0] == plans[1] == plans[2]
    assert len({timeline.starts for _, _, timeline, _ in plans[0]}) > 30
