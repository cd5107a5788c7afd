"""What happens to a layer around the rule: fates, zero deltas, one-sided layers, text encoders."""

from __future__ import annotations

import math
from typing import Any

import pytest

from klora_compile.planning.fates import FATES, IDLE
from klora_compile.planning.plan import LayerPlan, Plan, make_plan
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.klora import Klora
from klora_compile.settings.config import Config
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ConfigError, PairingError

ABSENT = None


def side(top_k: float | None = 1.0, l1: float = 10.0, scaling: float = 1.0) -> Side:
    return Side(rank=2, scaling=scaling, frobenius=l1 / 5, l1=l1, top_k=top_k)


ZERO = side(0.0, 0.0)


def numbers(
    component: str,
    k: int | None,
    content: Side | None,
    style: Side | None,
    weight: str | None = None,
) -> LayerNumbers:
    """Of two LoRAs."""
    return LayerNumbers(component, k, {"content": content, "style": style}, weight)


def pair(ratio: float, component: str = "unet") -> LayerNumbers:
    """A layer with this ratio where gamma is 1."""
    return numbers(component, 4, side(ratio), side(1.0))


def planned(config: Config | None = None, **layers: LayerNumbers) -> Plan:
    return make_plan(layers, config or Config.named("klora", gamma=1.0))


def plan_of(layer: LayerNumbers, **settings: Any) -> LayerPlan:
    return planned(Config.named("klora", **{"gamma": 1.0, **settings}), x=layer).layers["x"]


def acts(plan: LayerPlan) -> set[str]:
    return {slot for slot in ("content", "style") if plan.timeline.uses(slot)}


def rows(plan: LayerPlan) -> list[tuple[float, float, float]]:
    return [(start, row["content"], row["style"]) for start, row in plan.timeline.rows()]


# --- layers that both adapt -------------------------------------------------------------------


def test_fates_of_a_duel() -> None:
    """S runs from 0.5 to 2: ratios beyond it never switch."""
    assert plan_of(pair(2.0)).fate == "always content"
    assert plan_of(pair(0.4)).fate == "always style"
    switching = plan_of(pair(1.25))
    assert switching.fate == "switching"
    (first, *one), (second, *other) = rows(switching)
    assert first == 0.0
    assert second == pytest.approx(0.5, abs=1e-15)
    assert (one, other) == ([1.0, 0.0], [0.0, 1.0])
    assert rows(plan_of(pair(2.0))) == [(0.0, 1.0, 0.0)]
    assert rows(plan_of(pair(0.4))) == [(0.0, 0.0, 1.0)]


def test_scores_hold_both_sides_and_the_ratio() -> None:
    layer = numbers("unet", 6, side(3.0, 30.0, 0.5), side(2.0, 10.0, 2.0))
    plan = plan_of(layer, gamma=0.5)
    assert plan.scores == {
        "k": 6,
        "ratio": 3.0,
        "content": {"rank": 2, "scaling": 0.5, "frobenius": 6.0, "l1": 30.0, "top_k": 3.0},
        "style": {"rank": 2, "scaling": 2.0, "frobenius": 2.0, "l1": 10.0, "top_k": 2.0},
    }
    assert plan.scales == {"content": 0.5, "style": 2.0}


def test_only_slots_that_adapt_a_layer_have_a_scale() -> None:
    assert plan_of(numbers("unet", None, None, side(2.0, 10.0, 4.0))).scales == {"style": 4.0}


@pytest.mark.parametrize(
    ("semantics", "fate"), [("paper", "always content"), ("authors", "always style")]
)
def test_a_tie_at_every_step_goes_where_the_semantics_say(semantics: Any, fate: str) -> None:
    assert plan_of(pair(1.0), alpha=0.0, beta=1.0, semantics=semantics).fate == fate


# --- zero deltas, and layers that one LoRA has ------------------------------------------------


@pytest.mark.parametrize("unpaired", ["keep", "drop", "error"])
@pytest.mark.parametrize(
    ("content", "style", "fate", "slots"),
    [
        (side(), ZERO, "one-sided", {"content"}),
        (ZERO, side(), "one-sided", {"style"}),
        (ZERO, ZERO, "zero", set()),
    ],
)
def test_a_zero_delta_leaves_the_layer_to_the_other(
    content: Side, style: Side, fate: str, slots: set[str], unpaired: Any
) -> None:
    """Both files have the layer, so it is paired whatever ``unpaired`` says."""
    plan = plan_of(numbers("unet", 4, content, style), unpaired=unpaired)
    assert (plan.fate, acts(plan)) == (fate, slots)
    assert not plan.timeline.switches
    assert plan.scores["ratio"] is None


@pytest.mark.parametrize("gamma", ["paper", "code"])
def test_zero_deltas_do_not_poison_gamma(gamma: Any) -> None:
    """0/0 and x/0 have no part in it; all else is as without these layers."""
    config = Config.named("klora", gamma=gamma)
    both = {"a": pair(1.0), "b": numbers("unet", 4, side(2.0, 30.0), side(1.0, 10.0))}
    zeros = {"z": numbers("unet", 4, ZERO, ZERO)}
    plain, with_zeros = make_plan(both, config), make_plan(both | zeros, config)
    assert plain.derived == with_zeros.derived == {"gamma": {"unet": 2.0}}
    assert plain.layers == {n: p for n, p in with_zeros.layers.items() if n != "z"}


@pytest.mark.parametrize("gamma", ["paper", "code"])
@pytest.mark.parametrize(
    ("content", "style", "value"), [(side(), ZERO, None), (ZERO, side(), 0.0), (ZERO, ZERO, None)]
)
def test_gamma_of_nothing_but_zeros_is_undefined_or_zero(
    content: Side, style: Side, value: float | None, gamma: Any
) -> None:
    plan = make_plan({"x": numbers("unet", 4, content, style)}, Config.named("klora", gamma=gamma))
    assert plan.derived["gamma"] == {"unet": value}
    assert plan.layers["x"].fate in ("one-sided", "zero")


def test_gamma_counts_pairs_of_its_own_component_only() -> None:
    plan = planned(
        Config.named("klora", gamma="paper"),
        a=numbers("transformer", 4, side(1.0, 30.0), side(1.0, 10.0)),
        b=numbers("transformer_2", 4, side(1.0, 10.0), side(1.0, 20.0)),
        c=numbers("transformer", None, side(None, 1e9), ABSENT),
        d=numbers("text_encoder", 4, side(1.0, 1e9), side()),
    )
    assert plan.derived["gamma"] == {"transformer": 3.0, "transformer_2": 0.5}


@pytest.mark.parametrize("slot", ["content", "style"])
def test_an_unpaired_layer_acts_always_or_not_at_all_or_is_an_error(slot: str) -> None:
    sides = {"content": ABSENT, "style": ABSENT, slot: side(None)}
    layer = numbers("unet", None, **sides)
    kept = plan_of(layer)
    assert (kept.fate, acts(kept), kept.timeline.switches) == ("one-sided", {slot}, False)
    dropped = plan_of(layer, unpaired="drop")
    assert (dropped.fate, acts(dropped)) == ("dropped", set())
    assert dropped.scores[slot] is not None  # a reader still sees what was measured
    with pytest.raises(
        PairingError, match="only one LoRA adapts 1 of the denoiser's layers"
    ) as caught:
        plan_of(layer, unpaired="error")
    assert caught.value.issues == (f"x: only the {slot} LoRA has it",)
    assert "--unpaired drop" in str(caught.value)


def test_unpaired_layers_that_are_zero_are_zero() -> None:
    assert plan_of(numbers("unet", None, side(None, 0.0), ABSENT)).fate == "zero"


@pytest.mark.parametrize("unpaired", ["keep", "drop", "error"])
def test_unpaired_has_no_say_in_text_encoders(unpaired: Any) -> None:
    layer = numbers("text_encoder", None, side(None), ABSENT)
    plan = plan_of(layer, unpaired=unpaired)
    assert (plan.fate, acts(plan)) == ("constant", {"content"})


# --- text encoders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "slots", "fate"),
    [
        ("both", {"content", "style"}, "constant"),
        ("content", {"content"}, "constant"),
        ("style", {"style"}, "constant"),
        ("none", set(), "dropped"),
    ],
)
@pytest.mark.parametrize(
    "component",
    ["text_encoder", "text_encoder_2", "text_encoder_3", "connectors", "text_conditioner"],
)
def test_text_encoders_hold_constant_weights(
    component: str, choice: Any, slots: set[str], fate: str
) -> None:
    plan = plan_of(pair(1.25, component), text_encoder=choice)
    assert (plan.fate, acts(plan), plan.timeline.switches) == (fate, slots, False)
    assert plan.scores["ratio"] is None
    assert planned(x=pair(1.25, component)).derived["gamma"] == {}


def test_a_text_encoder_layer_of_the_other_lora_is_dropped() -> None:
    layer = numbers("text_encoder", None, side(None), ABSENT)
    assert plan_of(layer, text_encoder="style").fate == "dropped"
    assert plan_of(numbers("text_encoder", 4, ZERO, ZERO)).fate == "zero"


# --- weights ----------------------------------------------------------------------------------


def test_weights_act_on_coefficients_and_not_on_the_choice() -> None:
    layers = {
        "switching": pair(1.25),
        "content": pair(3.0),
        "style": pair(0.1),
        "single": numbers("unet", None, side(None), ABSENT),
        "text": pair(1.0, "text_encoder"),
    }
    plain = make_plan(layers, Config())
    weighted = make_plan(layers, Config.named("klora", content_weight=0.25, style_weight=-2.0))
    assert plain.derived == weighted.derived
    for name, one in plain.layers.items():
        other = weighted.layers[name]
        assert (one.fate, one.scores, one.timeline.starts) == (
            other.fate,
            other.scores,
            other.timeline.starts,
        )
        assert rows(other) == [(t, 0.25 * c, -2.0 * s) for t, c, s in rows(one)]


def test_a_weight_of_zero_stores_nothing_of_its_slot() -> None:
    assert acts(plan_of(pair(1.25), content_weight=0.0)) == {"style"}
    assert acts(plan_of(pair(3.0), content_weight=0.0)) == set()


def test_every_fate_is_reached_and_known() -> None:
    reached = {
        plan_of(pair(3.0)).fate,
        plan_of(pair(0.1)).fate,
        plan_of(pair(1.0)).fate,
        plan_of(numbers("unet", 4, ZERO, side())).fate,
        plan_of(pair(1.0, "text_encoder")).fate,
        plan_of(numbers("unet", 4, ZERO, ZERO)).fate,
        plan_of(pair(1.0, "text_encoder"), text_encoder="none").fate,
        planned(w=pair(1.0), b=bias("w")).layers["b"].fate,
        plan_of(LayerNumbers("unet", None, {"content": None}, beside={"turbo": side()})).fate,
    }
    assert reached == {*Klora.fates, *FATES} - {IDLE}


# --- biases -----------------------------------------------------------------------------------


def bias(weight: str, content: Side | None = None, style: Side | None = None) -> LayerNumbers:
    """A bias that style would win by itself, and whose sums would turn gamma over."""
    own = (content or side(1e-3, 1e6), style or side(1e3, 1e-6))
    return numbers("unet", 4, *own, weight)


def test_a_bias_is_chosen_with_its_weight_and_not_counted() -> None:
    plan = planned(Config(), w=pair(1.25), b=bias("w"))
    assert plan.derived["gamma"] == {"unet": 1.0}
    assert plan.layers["b"].timeline == plan.layers["w"].timeline
    assert plan.layers["b"].scores["ratio"] == plan.layers["w"].scores["ratio"]
    for ratio, slot in ((3.0, "content"), (0.1, "style")):
        assert acts(planned(w=pair(ratio), b=bias("w")).layers["b"]) == {slot}


def test_a_bias_whose_weight_only_a_lora_beside_changes_is_chosen_by_itself() -> None:
    beside = LayerNumbers("unet", None, {"content": None, "style": None}, beside={"turbo": side()})
    found = planned(w=beside, b=bias("w")).layers["b"]
    assert rows(found) == rows(planned(b=bias("w")).layers["b"])
    assert acts(found)


def test_a_bias_of_one_lora_acts_while_that_has_its_weight() -> None:
    plan = planned(w=pair(1.25), b=numbers("unet", None, side(None), ABSENT, "w"))
    assert rows(plan.layers["b"]) == [
        (0.0, 1.0, 0.0),
        (plan.layers["w"].timeline.starts[1], 0.0, 0.0),
    ]
    for style in (ABSENT, ZERO):  # the weight is the style's at all times
        plan = planned(w=pair(0.1), b=numbers("unet", 4, side(), style, "w"))
        assert (plan.layers["b"].fate, acts(plan.layers["b"])) == ("dropped", set())
    plan = planned(w=pair(0.1), b=numbers("unet", 4, ZERO, ZERO, "w"))
    assert plan.layers["b"].fate == "zero"


def test_a_bias_without_its_weight_is_a_layer_of_its_own() -> None:
    assert plan_of(numbers("unet", 4, side(1.25), side(1.0), "not there")).fate == "switching"


def test_layers_keep_their_order() -> None:
    names = ["z", "a", "m"]
    assert list(planned(**{name: pair(1.0) for name in names}).layers) == names


def test_timelines_are_of_both_slots_always() -> None:
    for layer in (pair(1.0), numbers("unet", None, side(None), ABSENT)):
        assert isinstance(plan_of(layer).timeline, Timeline)
        assert set(plan_of(layer).timeline.coefficients) == {"content", "style"}


# --- settings ---------------------------------------------------------------------------------


def test_defaults_follow_semantics_and_pattern() -> None:
    def of(**settings: Any) -> tuple[Any, ...]:
        p = Config.named("klora", **settings).parameters()
        return tuple(p[name] for name in ("alpha", "beta", "gamma", "tie", "network_alpha"))

    assert of() == (1.5, 0.5, "paper", "content", "applied")
    assert of(pattern="s*") == (1.5, 1.3, "paper", "content", "applied")
    assert of(semantics="authors") == (1.5, 0.5, "code", "style", "ignored")
    assert of(semantics="authors", pattern="s*") == (1.5, 1.275, "code", "style", "ignored")
    assert of(semantics="authors", pattern="s*", alpha=2) == (2.0, 1.7, "code", "style", "ignored")
    assert of(semantics="authors", gamma="paper", beta=1)[1:3] == (1.0, "paper")
    assert of(gamma=2)[2] == 2.0
    assert Config().parameters()["top_k"] == "auto"
    assert Config.named("klora", top_k="auto") == Config()


CONFIGS = [
    Config(),
    Config.named("klora", semantics="authors", pattern="s*"),
    Config.named("klora", alpha=-1, beta=3, gamma=2, top_k=5),
    Config.named(
        "klora",
        gamma="code",
        content_weight=0.5,
        style_weight=2,
        text_encoder="none",
        unpaired="drop",
    ),
    Config.named("klora", semantics="authors", gamma="paper", pattern="s*", alpha=0.1, beta=0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_back_are_the_same_settings(config: Config) -> None:
    again = Config.from_parameters("klora", config.parameters())
    assert again.parameters() == config.parameters()
    assert (
        Config.from_parameters("klora", {**config.parameters(), "new in a later version": 1})
        == again
    )


def test_parameters_that_lack_something_are_an_error() -> None:
    rest = {k: v for k, v in Config().parameters().items() if k not in ("gamma", "top_k")}
    with pytest.raises(ConfigError, match="the rule's parameters lack gamma, top_k"):
        Config.from_parameters("klora", rest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semantics": "mine"}, "semantics: expected one of paper, authors, found 'mine'"),
        ({"pattern": "S"}, "pattern: expected one of s, s*, found 'S'"),
        ({"text_encoder": None}, "text_encoder: expected one of both, content, style, none"),
        ({"unpaired": ["keep"]}, "unpaired: expected one of keep, drop, error, found ['keep']"),
        ({"gamma": "ratio"}, "gamma: expected one of paper, code, found 'ratio'"),
        ({"gamma": 0}, "gamma: expected a number from 1e-12 to 1e+12, found 0"),
        ({"gamma": -1.0}, "gamma: expected a number from"),
        ({"gamma": math.nan}, "gamma: expected a number from"),
        ({"gamma": {"unet": 1.0}}, "gamma: expected a number from"),
        ({"alpha": math.inf}, "alpha: expected a number from -100 to 100, found inf"),
        ({"alpha": 10**400}, "alpha: expected a number from -100 to 100, found 1000"),
        ({"alpha": "1"}, "alpha: expected a number from -100 to 100, found '1'"),
        ({"alpha": True}, "alpha: expected a number from -100 to 100, found True"),
        ({"alpha": 0, "pattern": "s*"}, "alpha: expected a number from 0.001 to 100, found 0"),
        ({"alpha": -1.5, "pattern": "s*"}, "alpha: expected a number from 0.001 to 100"),
        ({"beta": -0.1, "pattern": "s*"}, "beta: expected a number from 0 to 100, found -0.1"),
        ({"beta": 101}, "beta: expected a number from -100 to 100, found 101"),
        ({"top_k": 0}, "top_k: expected a whole number from 1, found 0"),
        ({"top_k": 1.0}, "top_k: expected a whole number from 1, found 1.0"),
        ({"top_k": True}, "top_k: expected a whole number from 1, found True"),
        ({"top_k": "all"}, "top_k: expected a whole number from 1, found 'all'"),
        ({"content_weight": math.nan}, "content_weight: expected a number from -100 to 100"),
        ({"style_weight": None}, "style_weight: expected a number from -100 to 100, found None"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.named("klora", **settings)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="expected"):
        Config.named("klora", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -100}, {"alpha": 100, "beta": -100}, {"pattern": "s*", "beta": 100, "alpha": 1e-3}],
)
def test_the_ends_of_the_ranges_are_allowed(settings: dict[str, Any]) -> None:
    assert plan_of(pair(1.0), **settings).fate in Klora.fates
