"""What a branch adds, for every kind of module, against the module with the sum in its weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from klora_runtime.artifact.delta import LowRank
from klora_runtime.layers.additions import Addition, kind_of
from klora_runtime.layers.leaf import attach, detach

#: Name -> a module, and the shape of an input of two.
MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "one dimension": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 6, 9)),
    "two": (lambda: nn.Conv2d(6, 4, (3, 1), dilation=2, padding=2), (2, 6, 7, 7)),
    "three": (lambda: nn.Conv3d(6, 4, (1, 2, 2), stride=(1, 2, 2)), (2, 6, 3, 4, 4)),
    "pointwise, three": (lambda: nn.Conv3d(6, 4, 1), (2, 6, 2, 3, 3)),
    "same": (lambda: nn.Conv2d(6, 4, 3, padding="same"), (2, 6, 5, 5)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "reflect": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 12, 3, padding=1, groups=6), (2, 6, 5)),
    "groups, three, replicate": (
        lambda: nn.Conv3d(6, 4, 3, padding=1, groups=2, padding_mode="replicate"),
        (2, 6, 3, 4, 4),
    ),
    "embedding": (lambda: nn.Embedding(7, 4), (2, 5)),
}


def inputs(name: str, module: Any) -> torch.Tensor:
    shape, generator = MODULES[name][1], torch.Generator().manual_seed(3)
    if isinstance(module, nn.Embedding):
        return torch.randint(0, 7, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def layouts(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """As it is, without a batch, and with channels last."""
    found = [x, x[0]]
    if x.dim() in (4, 5) and name != "linear":
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        found.append(x.to(memory_format=last))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["factors", "dense", "both"])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_computes_as_with_the_sum_in_its_weight(
    name: str, what: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    module = MODULES[name][0]().requires_grad_(False)
    out, *inner = module.weight.shape
    down, up, gate = torch.randn(3, *inner), torch.randn(3, out), torch.tensor([0.5, 0.0, -2.0])
    dense = torch.randn(module.weight.shape)
    delta = torch.zeros(module.weight.shape)
    if what != "dense":
        gated = LowRank(down * gate.view(-1, *(1 for _ in inner)), up.t())
        delta += gated.matrix().reshape(delta.shape).float()
    if what != "factors":
        delta += dense
    parts = (None, None, None) if what == "dense" else (down, up, gate)
    own = [None if part is None else part.to(dtype) for part in parts]
    addition = Addition(*own, None if what == "factors" else dense.to(dtype))
    module.to(dtype)
    exact = MODULES[name][0]().double().requires_grad_(False)
    exact.load_state_dict(module.double().state_dict())
    exact.weight += delta
    module.to(dtype)

    attach(module, addition)

    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for x in layouts(name, inputs(name, module)):
        own_x, exact_x = (x, x) if x.dtype == torch.int64 else (x.to(dtype), x.to(dtype).double())
        found, expected = module(own_x), exact(exact_x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)
    detach(module)
    assert type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class Padding(nn.Conv1d):
    """As causal convolutions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class Scaling(nn.Embedding):
    """As language models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Coarse(nn.Conv2d):
    """As quantisers do, which change the weight alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight.round(), self.bias)


class CastWeightBiasOp:
    """The base of ComfyUI's layers, in its name."""


class Casting(nn.Conv2d, CastWeightBiasOp):
    """As these layers do, which cast the weight if they must."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_classes_that_do_more_around_the_multiplication_cannot_add_a_branch() -> None:
    assert kind_of(Padding) is None
    assert kind_of(Scaling) is None
    assert kind_of(Coarse) is kind_of(nn.Conv2d)
    assert kind_of(Casting) is kind_of(nn.Conv2d)
    coarse = Coarse(2, 2, 1)
    attach(coarse, Addition(None, None, None, torch.zeros(2, 2, 1, 1)))
    assert kind_of(type(coarse)) is kind_of(nn.Conv2d)


def test_other_modules_cannot_add_a_branch() -> None:
    assert kind_of(nn.LayerNorm) is None
    assert kind_of(nn.ConvTranspose2d) is None


def _thin(module: nn.Linear) -> Addition:
    torch.manual_seed(2)
    down, up = torch.randn(3, module.in_features), torch.randn(3, module.out_features)
    return Addition(down, up, torch.tensor([1.0, 0.5, -1.0]))


def test_a_branch_needs_no_second_memory_for_a_linear_layers_result() -> None:
    module = nn.Linear(6, 4).requires_grad_(False)
    attach(module, _thin(module))
    made: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                made.append(result.data_ptr())
            return result

    with Watch(), torch.no_grad():
        result = module(torch.randn(2, 5, 6))
    assert result.data_ptr() == made[0]


class Keeping(nn.Linear):
    """A layer that gives out the result that it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().forward(x)
        return self.kept


def test_a_result_that_its_layer_keeps_is_not_written() -> None:
    module = Keeping(6, 4).requires_grad_(False)
    x = torch.randn(2, 5, 6)
    plain = module(x).clone()
    attach(module, _thin(module))
    with torch.no_grad():
        first, second = module(x), module(x)
    assert torch.equal(module.kept, plain)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_a_selective_checkpoint_keeps_the_results_of_frozen_layers() -> None:
    module = nn.Linear(6, 4).requires_grad_(False)
    attach(module, _thin(module))
    x, weight = torch.randn(3, 6), torch.randn(4, 4, requires_grad=True)

    def trained(weight: torch.Tensor) -> torch.Tensor:
        return (module(x) @ weight).sin().sum()

    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    total = checkpoint(trained, weight, use_reentrant=False, context_fn=contexts)
    (found,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, torch.autograd.grad(trained(weight), weight)[0])


def test_a_branch_has_gradients_as_before() -> None:
    module = nn.Linear(6, 4)
    x = torch.randn(2, 5, 6, requires_grad=True)
    addition = _thin(module)
    attach(module, addition)
    (found,) = torch.autograd.grad(module(x).square().sum(), x)
    assert addition.down is not None
    assert addition.up is not None
    assert addition.gate is not None
    twin = x.detach().clone().requires_grad_()
    total = module.weight + (addition.up.t() * addition.gate) @ addition.down
    exact = torch.nn.functional.linear(twin, total, module.bias).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(exact, twin)[0])
