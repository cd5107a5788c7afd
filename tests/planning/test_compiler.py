"""Compiling two files: which layers meet, with which K, alpha and factors; and which never do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lora_files import peft_keys, random_pair, write_lora

from klora_compile import Settings, compile_fusion, read_adapter, reschedule
from klora_compile.rules import Direct, Klora
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import ConfigError, LoraError, PairingError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, KEY, VALUE = (f"{BLOCK}.attn2.to_{name}" for name in "qkv")
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def lora(
    path: Path,
    layers: dict[str, tuple[int, int, int]],
    *,
    seed: int = 0,
    alpha: float | None = None,
) -> Path:
    """A file with layers of (out, in, rank), in the order given."""
    pairs = {
        name: random_pair(*shape, seed=seed + i) for i, (name, shape) in enumerate(layers.items())
    }
    tensors = peft_keys(pairs)
    if alpha is not None:
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in layers}
    return write_lora(path, tensors)


def entries(fusion: Fusion) -> dict[str, Entry]:
    return {entry.layer: entry for entry in fusion.entries}


@pytest.fixture
def content(tmp_path: Path) -> Path:
    layers = {QUERY: (8, 6, 2), KEY: (8, 12, 2), TEXT: (4, 4, 1)}
    return lora(tmp_path / "content.safetensors", layers, seed=1, alpha=1.0)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    layers = {VALUE: (8, 12, 3), KEY: (8, 12, 3), QUERY: (8, 6, 3)}
    return lora(tmp_path / "style.safetensors", layers, seed=7, alpha=6.0)


def test_layers_meet_by_path_and_not_by_order(content: Path, style: Path) -> None:
    """Swapping the order of the layers inside a file changes nothing."""
    found = entries(compile_fusion(content, style, device="cpu"))
    assert list(found) == sorted([TEXT, KEY, QUERY, VALUE])
    sources = {"content": read_adapter(content), "style": read_adapter(style)}
    for name, entry in found.items():
        for slot, adapter in sources.items():
            score = entry.scores["klora"][slot]
            assert (score is None) == (name not in adapter.layers)
            if slot in entry.factors:
                assert torch.equal(entry.factors[slot].delta.down, adapter.layers[name].down)
    assert found[VALUE].fate == found[VALUE].fate == "one-sided"
    assert found[TEXT].fate == "constant"


def test_k_is_the_product_of_the_ranks_or_as_set(content: Path, style: Path) -> None:
    def ks(top_k: int | None) -> dict[str, int | None]:
        fusion = compile_fusion(content, style, Klora(top_k=top_k), device="cpu")
        return {name: entry.scores["klora"]["k"] for name, entry in entries(fusion).items()}

    assert ks(None) == {QUERY: 6, KEY: 6, VALUE: None, TEXT: None}
    assert ks(50) == {QUERY: 48, KEY: 50, VALUE: None, TEXT: None}  # at most the layer's size


def test_alpha_is_applied_or_ignored_as_the_semantics_say(content: Path, style: Path) -> None:
    """alpha / rank is 1/2 and 2; it scales L1, Top-K and the factors, or nothing at all."""
    paper = entries(compile_fusion(content, style, device="cpu"))
    authors = entries(compile_fusion(content, style, Klora(semantics="authors"), device="cpu"))
    scalings = {"content": 0.5, "style": 2.0}
    for name in (QUERY, KEY):
        for slot, scaling in scalings.items():
            one, other = paper[name].scores["klora"][slot], authors[name].scores["klora"][slot]
            assert (one["scaling"], other["scaling"]) == (scaling, 1.0)
            assert one["l1"] == scaling * other["l1"]
            assert one["top_k"] == scaling * other["top_k"]
            for entry, expected in ((paper[name], scaling), (authors[name], 1.0)):
                if slot in entry.factors:
                    assert entry.factors[slot].scale == expected
    assert authors[VALUE].factors["style"].scale == 1.0


def test_a_negative_alpha_weighs_as_much_as_a_positive_one(tmp_path: Path, style: Path) -> None:
    layers = {QUERY: (8, 6, 2)}
    found = []
    for alpha in (3.0, -3.0):
        path = lora(tmp_path / f"{alpha}.safetensors", layers, alpha=alpha)
        entry = entries(compile_fusion(path, style, device="cpu"))[QUERY]
        found.append((entry.timeline, entry.scores["klora"]["ratio"]))
        scale = entry.scores["klora"]["content"]["scaling"]
        assert scale == alpha / 2
    assert found[0] == found[1]


def test_an_alpha_of_zero_is_a_zero_delta(tmp_path: Path, style: Path) -> None:
    path = lora(tmp_path / "zero.safetensors", {QUERY: (8, 6, 2)}, alpha=0.0)
    entry = entries(compile_fusion(path, style, device="cpu"))[QUERY]
    assert (entry.fate, set(entry.factors)) == ("one-sided", {"style"})


def test_a_weight_of_zero_makes_an_artifact_without_that_slot(
    content: Path, style: Path, tmp_path: Path
) -> None:
    """The choice stays what it was, so a layer may be the content's and have nothing stored."""
    rule, settings = Klora(gamma=1e-9), Settings(content_weight=0.0)
    save_fusion(compile_fusion(content, style, rule, settings, device="cpu"), tmp_path / "a")
    found = entries(load_fusion(tmp_path / "a"))
    assert found[QUERY].fate == "always content"
    assert not found[QUERY].acts
    assert set(found[VALUE].factors) == {"style"}


def test_adapters_that_were_read_already_are_taken(content: Path, style: Path) -> None:
    by_path = compile_fusion(content, str(style), device="cpu")
    by_value = compile_fusion(read_adapter(content), read_adapter(style), device="cpu")
    assert by_path.fingerprint == by_value.fingerprint
    assert [e.scores for e in by_path.entries] == [e.scores for e in by_value.entries]
    assert by_path.sources == by_value.sources


def test_progress_counts_the_layers_of_both(content: Path, style: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    compile_fusion(content, style, device="cpu", on_layer=lambda *args: seen.append(args))
    assert [(done, total) for _, done, total in seen] == [(i, 6) for i in range(1, 7)]
    assert [name for name, _, _ in seen] == sorted([TEXT, KEY, QUERY]) + sorted([QUERY, KEY, VALUE])


def test_roles_are_not_exchangeable(content: Path, style: Path) -> None:
    one = entries(compile_fusion(content, style, device="cpu"))[QUERY].scores["klora"]
    other = entries(compile_fusion(style, content, device="cpu"))[QUERY].scores["klora"]
    assert one["content"] == other["style"]
    assert one["ratio"] == pytest.approx(1 / other["ratio"])


def test_provenance_of_both_files_is_recorded(content: Path, style: Path) -> None:
    fusion = compile_fusion(content, style, Klora(pattern="s*"), device="cpu")
    for slot, path in (("content", content), ("style", style)):
        source = fusion.sources[slot]
        assert (source.file, source.bytes) == (path.name, path.stat().st_size)
        assert source.layout == "peft"
        assert fusion.slots[slot].role == slot
    assert fusion.sources["content"].ranks == (1, 2)
    assert Klora.from_parameters(fusion.rule.parameters) == Klora(pattern="s*")
    assert fusion.tool.startswith("klora ")


# --- two LoRAs that do not belong together ----------------------------------------------------


def test_other_shapes_are_refused_and_the_families_named(tmp_path: Path) -> None:
    one = lora(
        tmp_path / "one.safetensors", {QUERY: (8, 8, 2), KEY: (8, 768, 2), VALUE: (8, 768, 2)}
    )
    two = {QUERY: (8, 8, 2), KEY: (8, 1024, 2), VALUE: (8, 1024, 2)}
    with pytest.raises(PairingError, match="2 layers have two shapes") as caught:
        compile_fusion(one, lora(tmp_path / "two.safetensors", two), device="cpu")
    assert caught.value.issues[0] == f"{KEY}: [8, 768] in CONTENT, [8, 1024] in STYLE"
    assert "is for Stable Diffusion 1.x" in str(caught.value)
    assert "for Stable Diffusion 2.x; take two LoRAs of one base model" in str(caught.value)


def whole(path: Path, modules: Sequence[str], width: int) -> Path:
    """A LoRA of modules in the spelling that makes their family known."""
    shapes = {f"{name}.lora_down.weight": (2, width) for name in modules}
    shapes |= {f"{name}.lora_up.weight": (width, 2) for name in modules}
    return write_lora(path, {name: torch.ones(shape) for name, shape in shapes.items()})


FLUX_1 = ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_0_img_mod_lin"]
FLUX_1_PEFT = [
    *(f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(19)),
    *(f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(38)),
]
WAN = [f"diffusion_model.blocks.{i}.self_attn.q" for i in range(3)]
SDXL = ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"]


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (FLUX_1, WAN, ("FLUX.1", "one of Wan, Wan VACE")),
        (FLUX_1_PEFT, WAN, ("one of Chroma, FLUX.1", "one of Wan, Wan VACE")),
        (SDXL, FLUX_1, ("Stable Diffusion XL", "FLUX.1")),
        (WAN, SDXL, ("one of Wan, Wan VACE", "Stable Diffusion XL")),
    ],
)
def test_a_partner_of_another_family_is_named(
    one: list[str], other: list[str], names: tuple[str, str], tmp_path: Path
) -> None:
    paths = [
        whole(tmp_path / f"{i}.safetensors", modules, 2048 if modules is SDXL else 16)
        for i, modules in enumerate((one, other))
    ]
    with pytest.raises(PairingError) as caught:
        compile_fusion(*paths)
    assert f"is for {names[0]}, STYLE" in str(caught.value)
    assert f" for {names[1]}; take two LoRAs of one base model" in str(caught.value)


SANA = [f"transformer.transformer_blocks.{i}.attn1.to_q" for i in range(20)]
SANA_VIDEO = [*SANA, "transformer.transformer_blocks.3.ff.conv_temp"]
BRIA = [*FLUX_1_PEFT, *(f"transformer.time_embed.timestep_embedder.linear_{i}" for i in (1, 2))]


@pytest.mark.parametrize(("one", "other"), [(SANA, SANA_VIDEO), (FLUX_1_PEFT, BRIA)])
def test_a_lora_that_may_be_of_several_families_is_paired_with_one_of_each(
    one: list[str], other: list[str], tmp_path: Path
) -> None:
    """A rule of whole LoRAs looks at the families alone."""
    width = 2240 if one is SANA else 16
    paths = [
        whole(tmp_path / f"{i}.safetensors", modules, width)
        for i, modules in enumerate((one, other))
    ]
    assert compile_fusion(*paths, Direct(), device="cpu").entries


@pytest.mark.parametrize(
    "other", [{VALUE: (8, 12, 2)}, {TEXT: (4, 4, 1)}, {"transformer.x": (4, 4, 1)}]
)
def test_nothing_in_common_is_refused(
    other: dict[str, tuple[int, int, int]], tmp_path: Path
) -> None:
    """A common text encoder is no common ground: K-LoRA chooses inside the denoiser."""
    one = lora(tmp_path / "one.safetensors", {QUERY: (8, 6, 2), TEXT: (4, 4, 1)})
    two = lora(tmp_path / "two.safetensors", other)
    with pytest.raises(PairingError, match="have no denoiser layer in common") as caught:
        compile_fusion(one, two, device="cpu")
    assert caught.value.issues[0] == "content adapts text_encoder, unet"


def test_errors_come_before_anything_is_measured(content: Path, style: Path) -> None:
    seen: list[object] = []
    with pytest.raises(ConfigError, match="device tpu: not a device; expected auto"):
        compile_fusion(content, style, device="tpu", on_layer=lambda *args: seen.append(args))
    with pytest.raises(LoraError, match="No such file"):
        compile_fusion(content, "none.safetensors", on_layer=lambda *args: seen.append(args))
    assert seen == []


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("klora", None, "rule: expected a rule such as Klora(), found 'klora'."),
        (
            None,
            {"unpaired": "drop"},
            "settings: expected Settings(...), found {'unpaired': 'drop'}",
        ),
    ],
)
def test_a_rule_is_given_as_an_object(
    rule: Any, settings: Any, message: str, content: Path, style: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_fusion(content, style, rule, settings, device="cpu")
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        reschedule(compile_fusion(content, style, device="cpu"), rule, settings)
    assert message in str(caught.value)
