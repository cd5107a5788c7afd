"""LoRAs with what was computed from them, so that each number is computed once for many schedules.

A schedule needs few numbers of each LoRA: norms, Top-K sums, inner products, and the layers that
its rule derives. None of them depends on thresholds, so other settings of the same LoRAs cost only
the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from klora_compile.measuring.norms import Pair, frobenius_norms, inner_products
from klora_compile.measuring.statistics import OnLayer, Statistics
from klora_compile.measuring.together import measured_together
from klora_compile.planning.deriving import Derivation, derivations, derive, note_of
from klora_compile.planning.picking import settled
from klora_compile.profiles.once import measure_once
from klora_compile.profiles.store import Store
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.rules.kit.picking import Together
from klora_compile.rules.rule import Derived, Rule
from klora_compile.settings.config import Config
from klora_compile.slots import scheduled
from klora_compile.sources import layers_by_slot
from klora_runtime.lazy_torch import torch

#: Layer name -> layer.
Layers = Mapping[str, Layer]
#: Slot -> layer name -> layer.
LayersOfSlots = Mapping[str, Layers]
#: Layer name -> every K of its Top-K sums.
Sums = Mapping[str, Sequence[int]]

#: Derived slots that stay in memory; those that were made longest ago go first.
_DERIVED_KEPT = 4


class MeasuredSlot:
    """The layers of one slot, and what was measured of them so far.

    Args:
        layers: layer name -> layer.
        device: see :class:`MeasuredLoras`.
        store: see :class:`MeasuredLoras`.
    """

    def __init__(self, layers: Layers, device: str | torch.device, store: Store | None) -> None:
        self.layers = layers
        self._device, self._store = device, store
        self._norms: dict[str, float] | None = None
        self._statistics: dict[str, Statistics] = {}

    def norms(self, on_layer: OnLayer | None = None) -> dict[str, float]:
        """Return layer name -> Frobenius norm, without its scaling."""
        if self._norms is None:
            self._norms = frobenius_norms(self.layers.values(), on_layer=on_layer)
        return self._norms

    def statistics(self, sums: Sums, on_layer: OnLayer | None = None) -> dict[str, Statistics]:
        """Return layer name -> statistics with these sums, and those that were asked for before.

        Args:
            sums: every K of layers; layers of other slots do not matter.
            on_layer: see :data:`~klora_compile.measuring.statistics.OnLayer`.
        """
        before = self._statistics
        lacks = any(
            name not in before or not set(sums.get(name, ())) <= before[name].top_k.keys()
            for name in self.layers
        )
        if lacks:
            found = self._measured(sums, on_layer)
            self._statistics = {
                name: Statistics(
                    each.l1,
                    {**(before[name].top_k if name in before else {}), **each.top_k},
                    each.frobenius,
                )
                for name, each in found.items()
            }
        return self._statistics

    def _measured(self, sums: Sums, on_layer: OnLayer | None) -> dict[str, Statistics]:
        layers = self.layers.values()
        if self._store is not None:
            return measure_once(
                layers, sums, device=self._device, store=self._store, on_layer=on_layer
            )
        from klora_compile.measuring.measure import measure  # it imports torch

        return measure(layers, sums, device=torch.device(self._device), on_layer=on_layer)


class MeasuredLoras:
    """LoRAs that were read, and everything that was computed from them so far.

    Args:
        adapters: source -> LoRA; :func:`~klora_compile.sources.read_sources` has checked that they
            match each other.
        device: where to measure, from :func:`~klora_compile.measuring.places.place_of`.
        store: keeps statistics on disk too; None to keep them in memory only.
        calibrated: slot -> layer name -> what a base model calibrated; None without one.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        *,
        device: str | torch.device,
        store: Store | None = None,
        calibrated: Mapping[str, Mapping[str, Derived]] | None = None,
    ) -> None:
        self.adapters = adapters
        self.calibrated = calibrated
        self._device, self._store = device, store
        own = layers_by_slot(adapters)
        self._own = {slot: self._slot(layers) for slot, layers in own.items()}
        self.given = {slot: own[slot] for slot in scheduled(own)}
        self._derived: dict[tuple[str, str], MeasuredSlot] = {}
        self._together: Together | None = None
        self._products: dict[str, dict[Pair, float]] | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Parts of a pipeline that the LoRAs change, sorted."""
        every = (layer for own in self._own.values() for layer in own.layers.values())
        return tuple(sorted({layer.component for layer in every}))

    def settled(self, config: Config) -> Config:
        """Return a config whose rule makes a schedule itself.

        See :func:`~klora_compile.planning.picking.settled`.
        """
        return settled(config, self._measured_together)

    def measure(self, configs: Iterable[Config], *, on_layer: OnLayer | None = None) -> None:
        """Measure at once what the rules of several configs need of the LoRAs as given.

        Args:
            configs: rules with their settings.
            on_layer: see :data:`~klora_compile.measuring.statistics.OnLayer`; over all LoRAs.

        Raises:
            LoraError: the values of a layer cannot be measured.
        """
        rules = [self.settled(config).rule for config in configs]
        sums: dict[str, set[int]] = {}
        for rule in rules:
            for name, k in layer_ks(self.given, rule).items():
                sums.setdefault(name, set()).add(k)
        wanted = {name: sorted(ks) for name, ks in sums.items()}
        done, total = 0, sum(map(len, self.given.values()))
        for slot, layers in self.given.items():
            on_own = shifted(on_layer, done, total)
            if any("l1" in rule.needs for rule in rules):
                self._own[slot].statistics(wanted, on_own)
            if any("l1" not in rule.needs for rule in rules):
                self._own[slot].norms(on_own)
            done += len(layers)
        if any(rule.needs_products for rule in rules):
            self.products(self.given)

    def notes(self, config: Config) -> dict[str, str]:
        """Return derived slot -> the note that says how; equal notes mean equal layers.

        Args:
            config: a settled config.
        """
        origins = config.rule.derives(tuple(self.given))
        notes = {slot: note_of(slot, own, config) for slot, own in origins.items()}
        return {slot: str(note) for slot, note in notes.items()}

    def lacking(self, config: Config) -> list[Derivation]:
        """Return what must be computed for the derived slots of a config.

        Args:
            config: a settled config.
        """
        lacking = [key[0] for key in self.notes(config).items() if key not in self._derived]
        return [job for job in derivations(self.given, config) if job.slot in lacking]

    def slots(
        self, config: Config, jobs: Sequence[Derivation], *, on_layer: OnLayer | None = None
    ) -> dict[str, MeasuredSlot]:
        """Return the slots of a config: derived slots instead of given ones, or beside them.

        Args:
            config: a settled config.
            jobs: what :meth:`lacking` returned.
            on_layer: called after each layer that is derived.
        """
        notes = self.notes(config)
        lacking = [key for key in notes.items() if key not in self._derived]
        if lacking:
            made = derive(
                self.given, jobs, config.rule, calibrated=self.calibrated, on_layer=on_layer
            )
            for slot, note in lacking:
                if slot in made:  # without a layer in common, nothing is merged
                    self._derived[slot, note] = self._slot(made[slot])
        held = {k[0]: self._derived[k] for k in notes.items() if k in self._derived}
        while len(self._derived) > max(_DERIVED_KEPT, len(held)):
            del self._derived[next(iter(self._derived))]
        return {**self._own, **held}

    def products(self, layers: LayersOfSlots) -> dict[str, dict[Pair, float]]:
        """Return the inner products of layers, without their scalings.

        See :func:`~klora_compile.measuring.norms.inner_products`.
        """
        if any(layers[slot] is not own for slot, own in self.given.items()):
            return inner_products(layers)
        if self._products is None:
            self._products = inner_products(layers)
        return self._products

    def _measured_together(self) -> Together:
        if self._together is None:
            self._together = measured_together(self.given)
        return self._together

    def _slot(self, layers: Layers) -> MeasuredSlot:
        return MeasuredSlot(layers, self._device, self._store)


def layer_ks(layers: LayersOfSlots, rule: Rule) -> dict[str, int]:
    """Return K of each layer that two or more LoRAs adapt, if the rule uses Top-K sums (eq. 5)."""
    ks = {}
    for name in sorted({name for own in layers.values() for name in own}):
        found = [own[name] for own in layers.values() if name in own]
        k = rule.count([layer.rank for layer in found], found[0].numel)
        if len(found) > 1 and k is not None:
            ks[name] = k
    return ks


def shifted(on_layer: OnLayer | None, done: int, total: int) -> OnLayer | None:
    """Return a callback for a part of the work that reports to ``on_layer`` of the whole."""
    if on_layer is None:
        return None
    return lambda name, index, _: on_layer(name, done + index, total)
