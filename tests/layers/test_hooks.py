"""Mode branch beside what others hang on leaves, in every order; and leaves that are not called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from support.handmade import delta_of, hand_entry, hand_fusion
from torch import nn

from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.branch import Branch
from klora_runtime.layers.host import Host
from klora_runtime.layers.targets import Target, find_targets

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Halving(ModelHook):
    """Changes what goes in and what comes out."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return (args[0] * 0.5, *args[1:]), kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        return output + 1


class Squaring(ModelHook):
    """Replaces the forward, and calls the one that was there."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs).square()


def diffusers_hook(hook: type[ModelHook]) -> Callable[[nn.Module], Callable[[], None]]:
    def put_on(leaf: nn.Module) -> Callable[[], None]:
        registry = HookRegistry.check_if_exists_or_initialize(leaf)
        registry.register_hook(hook(), hook.__name__)
        return lambda: registry.remove_hook(hook.__name__)

    return put_on


def accelerate_hook(leaf: nn.Module) -> Callable[[], None]:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    hooks.add_hook_to_module(leaf, Doubling())
    return lambda: hooks.remove_hook_from_module(leaf)


class Around:
    """An object that puts its own method around a layer's, and later puts that method back."""

    def __init__(self, leaf: Any) -> None:
        self.original_forward = leaf.forward
        self._leaf = leaf
        leaf.forward = self.forward_around

    def forward_around(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_forward(*args, **kwargs) * 0.5 + 1

    def take_off(self) -> None:
        self._leaf.forward = self.original_forward


def two_objects(leaf: nn.Module) -> Callable[[], None]:
    inner, outer = Around(leaf), Around(leaf)

    def take_off() -> None:
        outer.take_off()
        inner.take_off()

    return take_off


HOOKS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "torch's forward hook": lambda leaf: (
        leaf.register_forward_hook(lambda m, args, out: out.square()).remove
    ),
    "torch's forward pre-hook": lambda leaf: (
        leaf.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)).remove
    ),
    "diffusers' hook around": diffusers_hook(Halving),
    "diffusers' hook instead": diffusers_hook(Squaring),
    "accelerate's": accelerate_hook,
    "an object around": lambda leaf: Around(leaf).take_off,
    "two objects around": two_objects,
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leaf(x)  # type: ignore[no-any-return]


def targets_in(model: nn.Module, *entries: Any, host: Host | None = None) -> list[Target]:
    return find_targets({"unet": model}, hand_fusion(*entries), host or Host())


def branched(model: nn.Module, entry: Any) -> Branch:
    branch = Branch(targets_in(model, entry))
    branch.write(0.0, {})
    return branch


def literal(entry: Any, put_on: Callable[[Any], object]) -> torch.Tensor:
    torch.manual_seed(0)
    model = Model()
    model.leaf.weight.data += delta_of(entry, "content").float()
    put_on(model.leaf)
    return model(X)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["hook first", "fusion first"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_branch_acts_inside_of_hooks(kind: str, order: str) -> None:
    """And either may go first."""
    entry = hand_entry("unet.leaf", (4, 6), switch=None)
    put_on = HOOKS[kind]
    torch.manual_seed(0)
    model = Model()
    plain = dict(vars(model.leaf))
    bare = model(X)
    if order == "hook first":
        take_off = put_on(model.leaf)
    branch = branched(model, entry)
    if order == "fusion first":
        take_off = put_on(model.leaf)
    torch.testing.assert_close(model(X), literal(entry, put_on))

    take_off()
    torch.testing.assert_close(model(X), literal(entry, lambda leaf: None))
    take_off = put_on(model.leaf)
    branch.check()
    torch.testing.assert_close(model(X), literal(entry, put_on))
    branch.release()
    assert type(model.leaf) is nn.Linear
    hooked = model(X)
    branch = branched(model, entry)
    torch.testing.assert_close(model(X), literal(entry, put_on))
    branch.release()
    assert torch.equal(model(X), hooked)
    take_off()
    assert torch.equal(model(X), bare)
    assert {n for n in vars(model.leaf) if n.startswith("_klora")} == set()
    forward = vars(model.leaf).get("forward")
    assert forward is None or forward.__func__ is nn.Linear.forward
    assert vars(model.leaf).keys() - plain.keys() <= {"forward", "_diffusers_hook"}


class Doubling(nn.Conv1d):
    """Does more than its base class around the multiplication."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2)


def test_a_class_that_does_more_around_the_multiplication_is_written_in_place() -> None:
    entry = hand_entry("unet.leaf", (4, 6, 3), switch=None)
    model, x = Model(), torch.randn(2, 6, 5)
    model.leaf = Doubling(6, 4, 3, padding=1)  # type: ignore[assignment]
    bare, weight = model(x), model.leaf.weight
    expected = nn.functional.conv1d(
        x * 2, weight + delta_of(entry, "content").float(), model.leaf.bias, padding=1
    )
    branch = branched(model, entry)
    assert branch.writes
    torch.testing.assert_close(model(x), expected)
    branch.release()
    assert torch.equal(model(x), bare)


def test_a_forward_that_is_replaced_by_something_else_is_refused() -> None:
    model, entry = Model(), hand_entry("unet.leaf", (4, 6), switch=None)
    held = model.leaf.forward

    def halved(x: torch.Tensor) -> torch.Tensor:
        return held(x) * 0.5

    model.leaf.forward = halved  # type: ignore[method-assign]
    with pytest.raises(IncompatibleModelError) as error:
        Branch(targets_in(model, entry))
    assert "unet.leaf: its forward was replaced on the instance" in error.value.issues[0]
    assert "halved" in error.value.issues[0]

    del model.leaf.forward
    branch = branched(model, entry)
    model.leaf.forward = halved  # type: ignore[method-assign]
    with pytest.raises(InUseError, match="its forward was replaced on the instance"):
        branch.check()
    del model.leaf.forward
    branch.release()


class Reading(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.leaf.weight)


class Skipping(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_leaf_whose_weight_is_read_and_that_is_not_called_is_named() -> None:
    entry = hand_entry("unet.leaf", (4, 6), switch=None)
    for model in (Model(), Skipping()):
        branch = branched(model, entry)
        branch.check()
        model(X)
        branch.confirm(model)

    model = Reading()
    branch = branched(model, entry)
    branch.check()
    model(X)
    with pytest.raises(InUseError, match="1 layers carry a branch and were not called") as error:
        branch.confirm(model)
    assert error.value.issues == ("unet.leaf",)
    branch.check()
    branch.confirm(model)  # not run since
    branch.confirm(nn.Linear(2, 2))


def test_a_host_tells_who_reads_weights() -> None:
    class Telling(Host):
        def reads_weight(self, lineage: Any, name: str) -> bool:
            return name == "leaf" and isinstance(lineage[-2], Reading)

    entry = hand_entry("unet.leaf", (4, 6), switch=None)
    Branch(targets_in(Model(), entry, host=Telling()))
    with pytest.raises(IncompatibleModelError, match="its parent module reads the weight"):
        Branch(targets_in(Reading(), entry, host=Telling()))
