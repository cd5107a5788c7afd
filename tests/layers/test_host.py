"""A second host: a program with its own names, weights and conversions, and no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.handmade import delta_of, hand_entry, hand_fusion
from support.other_device import OtherDevice
from torch import nn

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.devices.device_types import TYPES
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.choice import choose
from klora_runtime.layers.claim import mark_of, refuse_claimed
from klora_runtime.layers.execution import compute_dtype, execution_device
from klora_runtime.layers.freezing import refuse_freezing
from klora_runtime.layers.host import Casting, Host
from klora_runtime.layers.live_fusion import LiveFusion, checked_weights
from klora_runtime.layers.targets import chosen_components, find_targets


class Program(Host):
    """Its blocks have numbers for names, and it takes models off the device as it likes."""

    offloading = False

    def paths(self, path: str) -> Sequence[str]:
        return (path.replace("blocks.", "diffusion_model."), path)

    def offloads(self, model: nn.Module) -> bool:
        return self.offloading

    def unused(self, lineage: Sequence[nn.Module], name: str) -> str | None:
        return "is skipped here; do not skip it" if hasattr(lineage[-2], "skips") else None

    def unwritable(
        self, lineage: Sequence[nn.Module], names: Sequence[str], *, small: bool
    ) -> str | None:
        return "is read from disk at each call" if hasattr(lineage[-1], "on_disk") else None

    def casting(self, module: nn.Module) -> Casting | None:
        return Casting(torch.bfloat16, "a cast") if hasattr(module, "casts") else None


class Player:
    """What such a program does with a fusion, all of it."""

    def __init__(self, model: nn.Module, fusion: Fusion, mode: str, host: Host) -> None:
        names = chosen_components(fusion, None)
        self._models = dict.fromkeys(names, model)
        refuse_claimed(self._models, self)
        refuse_freezing(self._models.values())
        targets = find_targets(self._models, fusion, host)
        weights = checked_weights(fusion, {})
        chosen, self.why = choose(mode, targets, weights)
        self.live = LiveFusion(fusion, chosen, weights)
        self.live.write()
        for component in self.models:
            vars(component).update(mark_of(self))

    @property
    def models(self) -> tuple[nn.Module, ...]:
        return tuple(self._models.values())

    def sample(self, steps: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.live.mode.check()
        results = []
        for step in range(steps):
            self.live.move(progress_of_step(step, steps))
            results.append(self.models[0](x))
        return results

    def stop(self) -> None:
        self.live.release()
        for component, name in ((c, n) for c in self.models for n in mark_of(self)):
            del vars(component)[name]


ENTRY = hand_entry("transformer.blocks.0", (5, 7), size=1.0)
FUSION = hand_fusion(ENTRY)
X = torch.randn(2, 7, generator=torch.Generator().manual_seed(3))


def a_model() -> nn.Module:
    """What the artifact calls ``blocks.0`` is ``diffusion_model.0``."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("diffusion_model", nn.Sequential(nn.Linear(7, 5)))
    return model.requires_grad_(False)


def leaf_of(model: nn.Module) -> Any:
    return model.get_submodule("diffusion_model.0")


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_layers_serve_another_host(mode: str) -> None:
    model = a_model()
    bare = model(X)
    player = Player(model, FUSION, mode, Program())
    for found, slot in zip(player.sample(2, X), ("content", "style"), strict=True):
        torch.testing.assert_close(found, bare + X @ delta_of(ENTRY, slot).float().T)
    with pytest.raises(
        InUseError, match=r"^transformer already carries a fusion; call .remove"
    ) as e:
        Player(model, FUSION, mode, Program())
    assert e.value.handle is player
    player.stop()
    assert torch.equal(model(X), bare)
    Player(model, FUSION, mode, Program()).stop()


def test_a_host_without_names_of_its_own_finds_those_of_the_artifact() -> None:
    with pytest.raises(IncompatibleModelError, match=r"transformer\.blocks\.0: there is no such"):
        find_targets({"transformer": a_model()}, FUSION)
    target = find_targets({"transformer": a_model()}, FUSION, Program())[0]
    assert target.path == "transformer.diffusion_model.0.weight"
    assert target.names == ("diffusion_model", "0")


def test_what_a_host_skips_is_refused_at_first_and_before_each_run() -> None:
    model = a_model()
    player = Player(model, FUSION, "merge", Program())
    block: Any = model.get_submodule("diffusion_model")
    block.skips = True
    with pytest.raises(InUseError, match=r"diffusion_model\.0: is skipped here; do not skip it"):
        player.sample(2, X)
    with pytest.raises(IncompatibleModelError, match=r"diffusion_model\.0: is skipped here"):
        find_targets({"transformer": model}, FUSION, Program())


def test_what_a_host_keeps_elsewhere_is_branched() -> None:
    model = a_model()
    leaf_of(model).on_disk = True
    player = Player(model, FUSION, "auto", Program())
    assert player.live.mode.name == "branch"
    assert player.why == (
        "not every weight can be merged into (transformer.diffusion_model.0: is read from disk at "
        "each call)"
    )


def test_what_a_host_converts_is_branched_in_the_dtype_it_multiplies_in() -> None:
    model = a_model()
    leaf_of(model).to(torch.float8_e4m3fn).casts = True
    target = find_targets({"transformer": model}, FUSION, Program())[0]
    assert compute_dtype(target) == torch.bfloat16
    with pytest.raises(IncompatibleModelError, match=r"is torch.float8_e4m3fn, by a cast"):
        choose("merge", [target], {})


def test_copies_stay_off_the_device_of_a_host_that_offloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TYPES["mps"], "free_memory", lambda device: 1e9)
    for offloading, place in ((True, "cpu"), (False, "mps:0")):
        host, model = Program(), a_model()
        host.offloading = offloading
        with OtherDevice("mps:0") as other:
            model.to(other.device)
            player = Player(model, FUSION, "merge", host)
            assert f"base weights on {place}" in player.live.mode.nbytes()


def test_a_weight_that_is_nowhere_is_computed_where_the_host_brings_it() -> None:
    class Bringing(Program):
        def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
            return torch.device("cpu")

    with torch.device("meta"):
        model = a_model()
    for host, brought in ((Program(), False), (Bringing(), True)):
        target = find_targets({"transformer": model}, FUSION, host)[0]
        assert execution_device(target) == torch.device("cpu")
        if brought:
            assert choose("branch", [target], {})[0].name == "branch"
        else:
            with pytest.raises(IncompatibleModelError, match="no memory"):
                choose("branch", [target], {})
