"""Choices of many layers at once, against the inequality evaluated literally for each of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klora_runtime.linking import crossings
from klora_runtime.linking.crossings import NEVER, Choices, choices
from klora_runtime.linking.inequality import Inequality

RULES = [
    Inequality(),
    Inequality(tie="style"),
    Inequality("s*", 1.5, 1.3),
    Inequality("s*", 1.5, 1.275, "style"),
    Inequality("s", 1.5, 1.0, less=0.5),
    Inequality("s", 1.5, 1.0, less=0.37),
    Inequality("s", -1.0, 1.2),  # S falls: found by halves
    Inequality("s*", 0.7, 5.3),  # 7 * 0.7 is no float64: found by halves
    Inequality("s", 2.0, -0.7),
    Inequality("s", 0.0, 0.7),
    Inequality("s", 1e-3, 1.0),
]


def timeline(found: Choices, index: int) -> list[tuple[float, bool]]:
    """Segments of one layer, as :meth:`Inequality.timeline` gives them."""
    content = bool(found.begins[index])
    segments = [(0.0, content)]
    for start in found.switches[index].tolist():
        if start < NEVER:
            content = not content
            segments.append((start, content))
    return segments


def sums(rule: Inequality, gamma: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers of all ratios, and of ratios at and beside the ends and the start of S."""
    generator = torch.Generator().manual_seed(seed)
    s_s = torch.rand(60, generator=generator, dtype=torch.float64) + 0.1
    ratios = 3.0 * torch.rand(60, generator=generator, dtype=torch.float64) + 1e-9
    near = [rule.scale(t) for t in (0.0, 1e-12, 0.1, math.nextafter(1.0, 0.0))]
    nudges = (-1e-9, -1e-13, -2e-16, 0.0, 2e-16, 1e-13, 1e-9)
    special = torch.tensor([end + nudge for end in near for nudge in nudges], dtype=torch.float64)
    ratios[: len(special)] = special.clamp(min=1e-300)
    s_s[::5] = 1.0  # so that some ratios are exact ties
    return ratios * gamma * s_s, s_s


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.7310585786300049])
def test_every_layer_gets_the_literal_timeline(rule: Inequality, gamma: float) -> None:
    s_c, s_s = sums(rule, gamma, seed=3)
    found = choices(rule, s_c, s_s, torch.tensor(gamma, dtype=torch.float64))
    for index, own in enumerate(zip(s_c.tolist(), s_s.tolist(), strict=True)):
        assert timeline(found, index) == rule.timeline(*own, gamma)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Inequality,
        st.sampled_from(["s", "s*"]),
        st.floats(1e-3, 100),
        st.floats(0, 100),
        st.sampled_from(["content", "style"]),
    ),
    st.floats(1e-6, 1e6),
    st.integers(0, 1000),
)
def test_whatever_the_settings(rule: Inequality, gamma: float, seed: int) -> None:
    s_c, s_s = (each[::7] for each in sums(rule, gamma, seed))
    found = choices(rule, s_c, s_s, torch.tensor(gamma, dtype=torch.float64))
    for index, own in enumerate(zip(s_c.tolist(), s_s.tolist(), strict=True)):
        assert timeline(found, index) == rule.timeline(*own, gamma)


@pytest.mark.parametrize("rule", RULES[:6], ids=str)
def test_proposals_of_usual_rules_are_confirmed(
    rule: Inequality, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise linking takes a hundred times as long."""
    monkeypatch.setattr(crossings, "_halved", None)
    choices(rule, *sums(rule, 0.9, seed=5), torch.tensor(0.9, dtype=torch.float64))


def test_pairs_together_are_pairs_one_by_one() -> None:
    rule = RULES[2]
    s_c, s_s = sums(rule, 1.0, seed=1)
    gammas = torch.tensor([[0.5], [1.0], [1.7]], dtype=torch.float64)
    together = choices(rule, s_c, torch.stack([s_s, 2 * s_s, s_s]), gammas)
    assert together.switches.shape == (3, 60, 3)
    for row, factor in enumerate((1.0, 2.0, 1.0)):
        alone = choices(rule, s_c, factor * s_s, gammas[row, 0])
        assert torch.equal(together.begins[row], alone.begins)
        assert torch.equal(together.switches[row], alone.switches)


def test_what_is_not_confirmed_is_found_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossings, "_OF_STEP", range(9, 10))
    test_every_layer_gets_the_literal_timeline(RULES[0], 0.7310585786300049)
