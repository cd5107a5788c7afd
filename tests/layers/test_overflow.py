"""A fusion that a layer's dtype cannot hold is refused, and nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from support.handmade import hand_entry, hand_fusion
from torch import nn

from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.layers import overflow
from klora_runtime.layers.choice import choose
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.targets import find_targets

HEADLINE = "the fusion is too strong for the dtype of these layers"
MOST = torch.finfo(torch.float16).max


def layer(
    name: str,
    *,
    down: float = 1.0,
    up: float = 1.0,
    scale: float = 1.0,
    coefficients: tuple[float, float] = (1.0, 1.0),
) -> Entry:
    """A layer of rank 1 whose delta is all over scale * coefficient * up * down."""
    timeline = Timeline((0.0, 0.5), {"content": coefficients, "style": (0.0, 0.0)})
    delta = LowRank(torch.full((1, 4), down), torch.full((4, 1), up))
    entry = hand_entry(f"unet.{name}", (4, 4))
    return replace(entry, timeline=timeline, factors={"content": Stored(scale, delta)})


def dense(name: str, values: torch.Tensor, parameter: str = "weight") -> Entry:
    entry = replace(layer(name), parameter=parameter, shape=tuple(values.shape))
    return replace(entry, factors={"content": Stored(1.0, Dense(values))})


def model(dtype: torch.dtype, value: float = 1.0) -> nn.ModuleDict:
    made = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two")}).to(dtype)
    for parameter in made.parameters():
        nn.init.constant_(parameter, value)
    return made


def live(
    unet: nn.Module, fusion: Fusion, mode: str, weights: Mapping[str, float] | None = None
) -> LiveFusion:
    targets = find_targets({"unet": unet}, fusion)
    return LiveFusion(fusion, choose(mode, targets, {})[0], weights or {})


def test_a_delta_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    magnitudes = overflow._magnitudes

    def counting(tensors: Sequence[torch.Tensor]) -> list[float]:
        seen.append(len(tensors))
        return magnitudes(tensors)

    monkeypatch.setattr(overflow, "_magnitudes", counting)
    fusion, other = (hand_fusion(layer("one", down=2.0), layer("two")) for _ in range(2))
    for each, new in ((fusion, [4]), (fusion, []), (other, [4])):
        seen.clear()
        sizes = overflow.sizes_of(find_targets({"unet": model(torch.float16)}, each))
        assert [size["content"].delta for size in sizes] == [2.0, 1.0]
        assert seen == new


def bits(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


BEYOND = {
    "weight, late": (layer("two", scale=1e3, coefficients=(1.0, 100.0)), "merge", "progress 0.5"),
    "weight, with its base": (
        layer("two", scale=MOST - 10),
        "merge",
        "its weight would reach 6.555e\\+04",
    ),
    "dense weight": (dense("two", torch.full((4, 4), 1e5)), "merge", "its weight would reach"),
    "bias": (dense("two", torch.full((4,), 1e5), "bias"), "branch", "its bias would reach"),
    "gate": (layer("two", scale=1e5), "branch", "the factor on its delta would reach 1e\\+05"),
    "factors": (layer("two", down=1e6, up=1e6), "branch", "the factors of content do not fit"),
    "useless rank": (layer("two", down=1e6, up=0.0), "branch", "the factors of content do not fit"),
    "dense delta": (dense("two", torch.full((4, 4), 1e5)), "branch", "its delta would reach"),
    "NaN": (dense("two", torch.full((4, 4), torch.nan)), "merge", "would reach nan"),
    "NaN in factors": (layer("two", down=torch.nan), "branch", "the factors of content do not fit"),
}


@pytest.mark.parametrize(("entry", "mode", "words"), BEYOND.values(), ids=BEYOND)
def test_what_float16_cannot_hold_is_refused(entry: Entry, mode: str, words: str) -> None:
    unet = model(torch.float16, 60.0)
    before = bits(unet)
    applied = live(unet, hand_fusion(layer("one"), entry), mode)

    with pytest.raises(IncompatibleModelError, match=words) as error:
        applied.write()

    assert str(error.value).startswith(HEADLINE)
    assert [issue.split(":")[0] for issue in error.value.issues] == [entry.layer]
    assert same(bits(unet), before)


WITHIN = {
    "weight": (layer("one", scale=MOST - 100), "merge"),
    "weight that cancels": (layer("one", scale=-MOST), "merge"),
    "uneven factors": (layer("one", down=6e4, up=6e4, scale=1e-6), "branch"),
    "dense delta": (dense("one", torch.full((4, 4), 6e4)), "branch"),
}


@pytest.mark.parametrize(("entry", "mode"), WITHIN.values(), ids=WITHIN)
def test_what_float16_holds_is_not(entry: Entry, mode: str) -> None:
    unet = model(torch.float16, 60.0)
    applied = live(unet, hand_fusion(entry), mode)

    applied.write()

    x = torch.full((1, 4), 1e-3, dtype=torch.float16)
    assert unet["one"](x).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in unet.parameters())


@pytest.mark.parametrize("mode", ["merge", "branch"])
@pytest.mark.parametrize(("scale", "coefficient"), [(1e37, 1e37), (1e37, -1e37)])
def test_numbers_of_an_artifact_beyond_float32(scale: float, coefficient: float, mode: str) -> None:
    unet = model(torch.float32)
    entry = layer("one", scale=scale, coefficients=(coefficient, 0.0))

    with pytest.raises(IncompatibleModelError, match="would reach 1e\\+74, and float32 holds"):
        live(unet, hand_fusion(entry), mode).write()

    assert same(bits(unet), bits(model(torch.float32)))


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_weight_that_makes_it_so_changes_nothing(mode: str) -> None:
    unet = model(torch.float16)
    applied = live(unet, hand_fusion(layer("one", scale=1e3), layer("two", scale=1.0)), mode)
    applied.write()
    x, before = torch.full((1, 4), 1e-3, dtype=torch.float16), bits(unet)
    expected = unet["one"](x)

    with pytest.raises(IncompatibleModelError, match=HEADLINE):
        applied.set_weights({"content": 100.0})

    assert applied.enabled
    assert applied.weights == {}
    assert same(bits(unet), before)
    assert torch.equal(unet["one"](x), expected)
    applied.set_weights({"content": 50.0})
    applied.release()
    assert same(bits(unet), bits(model(torch.float16)))


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_fusion_that_makes_it_so_is_not_swapped_in(mode: str) -> None:
    unet = model(torch.float16)
    first, other = hand_fusion(layer("one")), hand_fusion(layer("one"), layer("two", scale=1e5))
    applied = live(unet, first, mode)
    applied.write()
    x, before = torch.full((1, 4), 1e-3, dtype=torch.float16), bits(unet)
    expected = unet["one"](x)

    with pytest.raises(IncompatibleModelError, match=HEADLINE):
        applied.swap(other, find_targets({"unet": unet}, other))

    assert applied.enabled
    assert applied.fusion is first
    assert same(bits(unet), before)
    assert torch.equal(unet["one"](x), expected)


def test_a_base_that_is_infinite_already_is_no_matter_of_the_fusion() -> None:
    unet = model(torch.float16)
    with torch.no_grad():
        unet["one"].weight[0, 0] = torch.inf
    applied = live(unet, hand_fusion(layer("one", scale=100.0)), "merge")

    applied.write()

    assert unet["one"].weight[0, 1] == 101.0
