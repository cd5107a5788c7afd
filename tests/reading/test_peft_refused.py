"""Adapters of PEFT that klora refuses: saved by PEFT itself, with the proof of each reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel, get_peft_model
from support.peft_kinds import LINEAR, kind
from support.peft_models import layers, merged_changes, randomise
from tiny_pipeline import relative_difference
from transformers import LlamaConfig, LlamaForCausalLM

from klora_compile import read_adapter
from klora_runtime.errors import LoraError

pytestmark = pytest.mark.slow

#: What counts as another change of a weight.
OTHER = 0.1


def refused(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(LoraError) as error:
        read_adapter(folder)
    (issue,) = error.value.issues
    assert issue == f"peft_type: is {name}, which klora does not read: {reason}"


def trained(config: Any, folder: Path) -> Any:
    tuned = randomise(get_peft_model(layers(), copy.deepcopy(config))).eval()
    tuned.save_pretrained(folder)
    return tuned


def changes(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What PEFT changes with a saved adapter."""
    tuned = PeftModel.from_pretrained(layers().to(dtype), folder)
    return merged_changes(tuned, layers().to(dtype))


def assert_differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, change in one.items():
        assert relative_difference(other[name].float(), change) > OTHER, name


def test_psoft_depends_on_the_signs_of_singular_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both signs are right, and which one comes out is the library's choice."""
    trained(kind("Psoft", LINEAR, r=4), tmp_path)
    refused(
        tmp_path,
        "PSOFT",
        "its factors are singular vectors of the base model's weight, whose signs are in no file "
        "and differ from library to library",
    )
    before, svd = changes(tmp_path), torch.linalg.svd

    def with_other_signs(weight: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        left, sizes, right = svd(weight, **options)
        signs = torch.ones(len(sizes))
        signs[::2] = -1.0
        left, right = left * signs, signs[:, None] * right
        torch.testing.assert_close(left * sizes @ right, weight)
        return left, sizes, right

    monkeypatch.setattr(torch.linalg, "svd", with_other_signs)
    assert_differ(before, changes(tmp_path))


def test_adamss_depends_on_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks scikit-learn for them again when it loads an adapter."""

    def clusters(turn: int) -> Callable[..., tuple[torch.Tensor, int]]:
        return lambda rows, count, _: ((torch.arange(len(rows)) + turn) % count, count)

    clustering = "peft.tuners.adamss.layer.clustering_Z"
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setattr(clustering, clusters(0))
    trained(kind("Adamss", ["to_k", "to_q"], r=6, num_subspaces=2), tmp_path)
    refused(
        tmp_path,
        "ADAMSS",
        "the rows that its parts change follow from clusters of the base model's weight, which are "
        "in no file",
    )
    before = changes(tmp_path)
    monkeypatch.setattr(clustering, clusters(1))
    assert_differ(before, changes(tmp_path))


def test_lily_depends_on_the_input(tmp_path: Path) -> None:
    tuned = trained(kind("Lily", LINEAR, r=3), tmp_path)
    refused(tmp_path, "LILY", "its change of a layer depends on the layer's input")
    layer = tuned.base_model.model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    rows = torch.randn(2, layer.in_features)

    def added(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(layer(x) - layer.base_layer(x))

    assert relative_difference(added(rows)[:1], added(rows[:1])) > 1e-3  # the other row counts too
    with pytest.raises(NotImplementedError):
        tuned.merge_and_unload()


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, num_hidden_layers=1, use_cache=False, **sizes)
    ).eval()


def test_x_lora_depends_on_the_input(tmp_path: Path) -> None:
    """Its folder has the adapters in folders of their own."""
    names = {}
    for name in ("0", "1"):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        get_peft_model(language_model(), config).save_pretrained(tmp_path / f"of-{name}")
        names[name] = str(tmp_path / f"of-{name}")
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=names)
    tuned = get_peft_model(language_model(), config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", "XLORA", "its change of a layer depends on the layer's input")
    mixed = []
    for word in (1, 2):
        with torch.no_grad():
            tuned(torch.tensor([[word]]))
        mixed.append(tuned.get_latest_scalings())
    assert relative_difference(*mixed) > 1e-4


def test_shadow_changes_no_weight(tmp_path: Path) -> None:
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    tuned = get_peft_model(model, peft.ShadowConfig())
    tuned.save_pretrained(tmp_path)
    refused(tmp_path, "SHADOW", "it adds a separate model and changes no weight")
    with pytest.raises(Exception, match=r"(?i)merge"):
        tuned.merge_and_unload()
