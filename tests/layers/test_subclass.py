"""Classes that lie over the class of one object, and are taken off in any order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from klora_runtime.layers.additions import Addition
from klora_runtime.layers.leaf import attach, branch_of, detach, is_branched
from klora_runtime.layers.subclass import Overlay, inherited


class Thing:
    """What overlays are put over."""

    def __init__(self, word: str = "plain") -> None:
        self.word = word

    def said(self) -> str:
        return self.word


def saying(word: str) -> Overlay:
    def methods(plain: Any) -> dict[str, Any]:
        return {"said": lambda thing: f"{word} {plain.said(thing)}"}

    return Overlay(methods)


@pytest.mark.parametrize("first", [0, 1])
def test_overlays_are_retired_in_any_order(first: int) -> None:
    thing, overlays = Thing(), (saying("one"), saying("two"))
    for overlay in overlays:
        overlay.put_on(thing)
        overlay.put_on(thing)
    assert thing.said() == "two one plain"
    assert [overlay.is_on(thing) for overlay in overlays] == [True, True]
    assert [overlay.is_outermost(thing) for overlay in overlays] == [False, True]

    overlays[first].retire([thing])
    assert overlays[1 - first].is_on(thing)
    overlays[1 - first].retire([thing])
    assert type(thing) is Thing


def test_one_that_is_covered_stays_until_it_is_the_outermost() -> None:
    thing, below, above = Thing(), saying("one"), saying("two")
    below.put_on(thing)
    above.put_on(thing)
    below.take_off(thing)
    assert below.is_on(thing)
    above.take_off(thing)
    assert below.is_outermost(thing)
    below.take_off(thing)
    below.take_off(thing)
    assert type(thing) is Thing


def test_taking_one_off_uncovers_those_beneath_that_were_retired() -> None:
    thing, below, above = Thing(), saying("one"), saying("two")
    below.put_on(thing)
    above.put_on(thing)
    below.retire([thing])
    above.take_off(thing)
    assert type(thing) is Thing


def test_the_class_tells_what_it_is_over_and_makes_plain_things() -> None:
    thing, overlay = Thing(), saying("one")
    overlay.put_on(thing)
    own: Any = type(thing)
    assert (own.__name__, own.__module__, own.__qualname__, own.__doc__) == (
        "Thing", __name__, "Thing", Thing.__doc__,
    )  # fmt: skip
    assert type(own("other")) is Thing
    assert own("other").said() == "other"


def test_things_of_one_class_share_one_over_it() -> None:
    things, overlay = [Thing(), Thing()], saying("one")
    for thing in things:
        overlay.put_on(thing)
    assert type(things[0]) is type(things[1])
    assert type(Thing()) is Thing


def test_a_leaf_is_branched_by_the_same_means() -> None:
    leaf, other = nn.Linear(3, 2), nn.Linear(3, 2)
    parts = torch.ones(1, 3), torch.ones(1, 2), torch.full((1,), 0.5)
    x = torch.randn(4, 3)
    expected = leaf(x)
    attach(leaf, Addition(*parts))
    assert is_branched(leaf)
    assert not is_branched(other)
    assert branch_of(leaf).tensors == parts
    branched = expected + 0.5 * x.sum(dim=1, keepdim=True)
    torch.testing.assert_close(leaf(x), branched)
    twin = copy.deepcopy(leaf)  # of one leaf alone, with a branch of its own
    detach(leaf)
    assert type(leaf) is nn.Linear
    assert torch.equal(leaf(x), expected)
    torch.testing.assert_close(twin(x), branched)


def test_a_leaf_whose_class_was_changed_is_not_branched_any_more() -> None:
    leaf, over = nn.Linear(3, 2), Overlay(lambda _: {})
    attach(leaf, Addition(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1)))
    over.put_on(leaf)
    assert not is_branched(leaf)
    over.take_off(leaf)
    assert is_branched(leaf)


def calling(plain: Any) -> dict[str, Any]:
    said = inherited(plain, "said")
    assert said is not None
    return {"said": lambda thing: f"over {said(thing)}"}


@pytest.mark.parametrize("off", ["patch first", "overlay first"])
@pytest.mark.parametrize("on", ["patch first", "overlay first"])
def test_what_others_patch_on_the_class_acts_and_goes_in_any_order(on: str, off: str) -> None:
    """As caches do, by ``thing.__class__``."""

    class Own(Thing):
        pass

    def patch() -> None:
        original = thing.__class__.said

        def said(thing: Thing) -> str:
            return f"patched {original(thing)}"

        thing.__class__.said = said  # type: ignore[method-assign]
        thing.__class__.original = original

    def unpatch() -> None:
        thing.__class__.said = thing.__class__.original
        del thing.__class__.original

    thing: Any = Own()
    overlay = Overlay(calling)
    steps: list[Callable[[], None]] = [patch, lambda: overlay.put_on(thing)]
    for step in steps if on == "patch first" else steps[::-1]:
        step()
    assert thing.said() == "over patched plain"
    undo: list[tuple[Callable[[], None], str]] = [
        (unpatch, "over plain"),
        (lambda: overlay.retire([thing]), "patched plain"),
    ]
    for step, said in undo if off == "patch first" else undo[::-1]:
        step()
        assert thing.said() in (said, "plain")
    assert type(thing) is Own
    assert thing.said() == "plain"
    assert "original" not in vars(Own)


def test_a_class_that_others_give_the_thing_comes_beneath() -> None:
    class Louder(Thing):
        def said(self) -> str:
            return super().said().upper()

    thing, overlay = Thing(), Overlay(calling)
    overlay.put_on(thing)
    thing.__class__ = Louder
    assert thing.said() == "over PLAIN"
    assert thing.__class__ is Louder
    thing.__class__ = Thing
    assert thing.said() == "over plain"
    overlay.retire([thing])
    thing.__class__ = Louder
    assert thing.said() == "PLAIN"


def test_classes_equal_the_one_that_they_lie_over() -> None:
    thing, leaf, overlays = Thing(), nn.Linear(2, 2), (saying("one"), saying("two"))
    for overlay in overlays:
        overlay.put_on(thing)
    attach(leaf, Addition(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)))
    for cls, plain, other in ((type(thing), Thing, Overlay), (type(leaf), nn.Linear, nn.Conv2d)):
        assert cls is not plain
        assert cls == plain
        assert plain == cls
        assert cls in {plain: 1}
        assert cls != other
        assert cls != "Thing"
        assert cls in (other, plain)
    detach(leaf)


def test_an_overlay_on_things_of_equal_classes_knows_them_apart() -> None:
    covered, plain, one, two = Thing(), Thing(), saying("one"), saying("two")
    one.put_on(covered)
    two.put_on(plain)
    two.put_on(covered)
    assert covered.said() == "two one plain"
    assert plain.said() == "two plain"
