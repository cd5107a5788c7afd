"""K-LoRA's timeline against its inequality, written down a second time and asked at every step."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from klora_runtime.artifact.timeline import Timeline, progress_of_step
from klora_runtime.linking.breakpoints import first_where, near_range_end
from klora_runtime.linking.gamma import gamma_of_ratios, gamma_of_sums
from klora_runtime.linking.inequality import Inequality

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

LAST = math.nextafter(1.0, 0.0)

#: Progress of every step of every N from 1 to 1000, each once, ascending.
STEPS: Floats = np.unique(np.concatenate([(np.arange(n) + 0.5) / n for n in range(1, 1001)]))


def literal(rule: Inequality, s_c: float, s_s: float, gamma: float, t: Floats) -> Booleans:
    """Whether S_c >= gamma * S(t) * S_s, as the paper writes it, at each t."""
    s = np.float64(rule.alpha) * t + np.float64(rule.beta)
    if rule.pattern == "s*":
        s = s % np.float64(rule.alpha)
    right = np.float64(gamma) * s * np.float64(s_s)
    return s_c >= right if rule.tie == "content" else s_c > right


def looked_up(segments: list[tuple[float, bool]], t: Floats) -> Booleans:
    starts = np.array([start for start, _ in segments])
    choices = np.array([choice for _, choice in segments])
    return choices[np.searchsorted(starts, t, side="right") - 1]


def assert_timeline_is_literal(rule: Inequality, s_c: float, s_s: float, gamma: float) -> None:
    segments = rule.timeline(s_c, s_s, gamma)
    wanted = literal(rule, s_c, s_s, gamma, STEPS)
    wrong = STEPS[looked_up(segments, STEPS) != wanted]
    assert wrong.size == 0, (segments, wrong[:5])
    ends = np.array([0.0, LAST])
    assert (looked_up(segments, ends) == literal(rule, s_c, s_s, gamma, ends)).all()
    # each breakpoint is the smallest float64 at which the choice is the new one
    assert segments[0][0] == 0.0
    for (_, before), (start, after) in pairwise(segments):
        assert before != after
        assert 0.0 < start < 1.0
        around = np.array([math.nextafter(start, 0.0), start])
        assert literal(rule, s_c, s_s, gamma, around).tolist() == [before, after]


positive = st.floats(1e-6, 1e6)
ties = st.sampled_from(["content", "style"])
patterns_s = st.builds(Inequality, st.just("s"), st.floats(-100, 100), st.floats(-100, 100), ties)
patterns_star = st.builds(Inequality, st.just("s*"), st.floats(1e-3, 100), st.floats(0, 100), ties)
usual = st.sampled_from(
    [Inequality(tie=tie) for tie in ("content", "style")]
    + [
        Inequality("s*", 1.5, beta, tie)
        for beta in (1.3, 1.275, 0.0, 1.5)
        for tie in ("content", "style")
    ]
)
rules = usual | patterns_s | patterns_star


@settings(max_examples=60, deadline=None)
@given(rule=rules, s_c=positive, s_s=positive, gamma=positive)
def test_timeline_is_the_inequality_at_every_step(
    rule: Inequality, s_c: float, s_s: float, gamma: float
) -> None:
    assert_timeline_is_literal(rule, s_c, s_s, gamma)


@settings(max_examples=60, deadline=None)
@given(
    rule=rules,
    s_s=positive,
    gamma=positive,
    steps=st.integers(1, 1000) | st.integers(1, 10**17),
    share=st.floats(0, 1, exclude_max=True),
    nudge=st.integers(-2, 2),
)
@example(rule=Inequality("s*", 1.5, 1.3), s_s=1.0, gamma=1.0, steps=1, share=0.0, nudge=0)
@example(rule=Inequality("s", 1.0, 0.0, "style"), s_s=1.0, gamma=1.0, steps=0, share=0.0, nudge=0)
def test_timeline_is_the_inequality_where_a_step_is_a_tie(
    rule: Inequality, s_s: float, gamma: float, steps: int, share: float, nudge: int
) -> None:
    """S_c is such that both sides are equal at one step, or differ in the last bit.

    No steps stand for the last progress below 1.
    """
    t = progress_of_step(int(share * steps), steps) if steps else LAST
    s_c = gamma * rule.scale(t) * s_s
    assume(t < 1.0)
    assume(1e-9 < s_c < 1e15)
    assert bool(literal(rule, s_c, s_s, gamma, np.array([t]))[0]) == (rule.tie == "content")
    for _ in range(abs(nudge)):
        s_c = math.nextafter(s_c, math.copysign(math.inf, nudge))
    assert_timeline_is_literal(rule, s_c, s_s, gamma)


@settings(max_examples=100, deadline=None)
@given(rule=usual, ratio=st.floats(1e-3, 3.0))
def test_a_layer_switches_once_under_s_and_twice_under_s_star(
    rule: Inequality, ratio: float
) -> None:
    segments = rule.timeline(ratio, 1.0, 1.0)
    assert len(segments) - 1 <= (1 if rule.pattern == "s" else 2)


def test_ties_by_hand() -> None:
    """S(t) = t, free of rounding: at t = 1/2 a ratio of 1/2 is equal, and the tie decides."""
    after = math.nextafter(0.5, 1.0)
    content, style = (Inequality("s", 1.0, 0.0, tie) for tie in ("content", "style"))
    assert content.timeline(0.5, 1.0, 1.0) == [(0.0, True), (after, False)]
    assert style.timeline(0.5, 1.0, 1.0) == [(0.0, True), (0.5, False)]
    assert content.timeline(0.0, 1.0, 1.0) == [(0.0, True), (math.nextafter(0.0, 1.0), False)]
    assert style.timeline(0.0, 1.0, 1.0) == [(0.0, False)]
    assert content.timeline(2.0, 2.0, 2.0) == [(0.0, True), (after, False)]


def test_pattern_s_by_hand() -> None:
    """S(t) = 1.5 t + 0.5: a ratio of 1.25 is reached at t = 1/2, one of 2 never."""
    (_, first), (switch, second) = Inequality().timeline(1.25, 1.0, 1.0)
    assert (first, second) == (True, False)
    assert switch == pytest.approx(0.5, abs=1e-15)
    assert Inequality().timeline(2.0, 1.0, 1.0) == [(0.0, True)]
    assert Inequality().timeline(math.nextafter(0.5, 0.0), 1.0, 1.0) == [(0.0, False)]
    assert len(Inequality().timeline(0.5, 1.0, 1.0)) == 2  # equal at progress 0
    assert Inequality(tie="style").timeline(0.5, 1.0, 1.0) == [(0.0, False)]


def test_pattern_s_star_by_hand() -> None:
    """S*(t) = (1.5 t + 1.25) mod 1.5 wraps at t = 1/6; ratio 0.5 is reached at t = 1/2."""
    style_first = Inequality("s*", 1.5, 1.25).timeline(0.5, 1.0, 1.0)
    assert [choice for _, choice in style_first] == [False, True, False]
    assert [start for start, _ in style_first] == pytest.approx([0, 1 / 6, 1 / 2], abs=1e-15)
    content_first = Inequality("s*", 1.5, 1.25).timeline(1.375, 1.0, 1.0)
    assert [choice for _, choice in content_first] == [True, False, True]
    assert [start for start, _ in content_first] == pytest.approx([0, 1 / 12, 1 / 6], abs=1e-15)
    assert Inequality("s*", 1.5, 1.25).timeline(1.5, 1.0, 1.0) == [(0.0, True)]


def test_a_falling_pattern_s_switches_from_style_to_content() -> None:
    rule = Inequality("s", -1.0, 1.0)
    assert rule.timeline(0.25, 1.0, 1.0) == [(0.0, False), (0.75, True)]
    assert_timeline_is_literal(rule, 0.25, 1.0, 1.0)


def test_a_constant_pattern_never_switches() -> None:
    for beta, choice in ((0.5, True), (2.0, False)):
        assert Inequality("s", 0.0, beta).timeline(1.0, 1.0, 1.0) == [(0.0, choice)]


@pytest.mark.parametrize(
    "rule", [Inequality(), Inequality("s", -2.0, 1.0), Inequality("s*", 1.5, 1.3)]
)
def test_range_holds_every_value_of_the_scale(rule: Inequality) -> None:
    low, high = rule.range()
    values = [rule.scale(float(t)) for t in np.linspace(0, LAST, 10_001)]
    assert low <= min(values) < low + 1e-3 * (high - low)
    assert high - 1e-3 * (high - low) < max(values) <= high


@settings(max_examples=100, deadline=None)
@given(limit=st.floats(0, 1))
def test_first_where_finds_the_smallest_float(limit: float) -> None:
    assert first_where(lambda t: t >= limit, 0.0, 1.0) == limit
    after = math.nextafter(limit, 2.0)
    assert first_where(lambda t: t > limit, 0.0, 2.0) == after


def test_a_timeline_object_looks_up_as_the_rule_chooses() -> None:
    """The runtime's own lookup, at breakpoints and beside them."""
    rule = Inequality("s*", 1.5, 1.3)
    segments = rule.timeline(0.7, 1.0, 1.0)
    line = Timeline(
        tuple(start for start, _ in segments),
        {"content": tuple(float(choice) for _, choice in segments)},
    )
    assert len(segments) == 3
    for start, _ in segments[1:]:
        for t in (math.nextafter(start, 0.0), start, math.nextafter(start, 1.0)):
            assert bool(line.at(t)["content"]) == rule.chooses_content(0.7, 1.0, 1.0, t)


# --- gamma ------------------------------------------------------------------------------------


def test_gamma_of_the_paper_is_a_ratio_of_sums() -> None:
    assert gamma_of_sums([1.0, 2.0, 0.0], [4.0, 0.0, 2.0]) == 0.5
    assert gamma_of_sums([], []) is None
    assert gamma_of_sums([1.0], [0.0]) is None
    assert gamma_of_sums([0.0], [1.0]) == 0.0


def test_gamma_of_the_code_is_a_mean_of_ratios_without_outliers() -> None:
    """Ratios of 3 times the mean or more are dropped; layers without a style have none."""
    assert gamma_of_ratios([1.0, 3.0], [1.0, 1.0]) == 2.0
    ratios = [1.0] * 9 + [100.0]  # mean 10.9
    assert gamma_of_ratios(ratios, [1.0] * 10) == 1.0
    assert gamma_of_ratios([1.0, 1.0, 1.0, 9.0], [1.0] * 4) == 1.0  # 9 is exactly 3 x 3
    assert gamma_of_ratios([1.0, 1.0, 1.0, 8.9], [1.0] * 4) == pytest.approx(11.9 / 4)
    assert gamma_of_ratios([5.0, 2.0], [0.0, 1.0]) == 2.0
    assert gamma_of_ratios([], []) is None
    assert gamma_of_ratios([1.0], [0.0]) is None
    assert gamma_of_ratios([0.0, 0.0], [1.0, 2.0]) == 0.0


def test_sums_of_gamma_do_not_depend_on_the_order() -> None:
    values, ones = [0.1, 0.2, 0.3], [1.0] * 3  # left to right 0.6000000000000001, backwards 0.6
    assert gamma_of_sums(values, ones) == gamma_of_sums(values[::-1], ones) == 0.6 / 3
    assert gamma_of_ratios(values, ones) == gamma_of_ratios(values[::-1], ones) == 0.6 / 3


# --- near ties --------------------------------------------------------------------------------


def test_near_range_end() -> None:
    ends = Inequality().range()
    assert ends == (0.5, 2.0)
    assert near_range_end(0.5 + 9e-7, ends) == 0.5
    assert near_range_end(2.0 - 9e-7, ends) == 2.0
    assert near_range_end(0.5 + 2e-6, ends) is None
    assert near_range_end(1.0, ends) is None
