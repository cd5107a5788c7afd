"""From profiles and statistics to the numbers of a LoRA in a catalogue."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from klora_compile.cataloguing.selecting import StoredLora
from klora_compile.measuring.statistics import Statistics
from klora_compile.profiles.profile import ProfiledLayer
from klora_compile.profiles.store import Store
from klora_runtime.catalogue.document import CataloguedLora, Keys
from klora_runtime.errors import KloraError, shown
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.numbers import Numbers, Place, Ranks, Table
from klora_runtime.linking.terms import Terms


@dataclass
class Pools:
    """Tables and ranks that LoRAs share."""

    tables: dict[tuple[Place, ...], Table] = field(default_factory=dict)
    ranks: dict[tuple[int, ...], Ranks] = field(default_factory=dict)

    def table(self, places: tuple[Place, ...]) -> Table:
        """Return the table with these layers."""
        return self.tables.setdefault(places, Table(places))

    def rank(self, values: tuple[int, ...]) -> Ranks:
        """Return the ranks with these values."""
        return self.ranks.setdefault(values, Ranks(values))


@dataclass(frozen=True)
class _Row:
    """What is known of one layer."""

    half: str
    layer: ProfiledLayer
    norm: float
    statistics: Statistics


def partners_for(terms: Terms, ranks: Collection[int]) -> tuple[int, ...]:
    """Return the keys of the sums that a LoRA needs for partners of these ranks."""
    if not terms.measures:
        return ()
    assert terms.duel is not None
    return tuple(sorted(set(ranks))) if terms.duel.top_k is None else (terms.duel.top_k,)


def numbers_of(
    store: Store,
    lora: StoredLora,
    name: str,
    terms: Terms,
    partners: Sequence[int],
    pools: Pools,
) -> tuple[CataloguedLora, Numbers]:
    """Return a LoRA of a catalogue and its numbers.

    Args:
        store: the store with its statistics.
        lora: the LoRA.
        name: its name in the catalogue.
        terms: the terms of linking.
        partners: from :func:`partners_for`.
        pools: tables and ranks of other LoRAs.

    Raises:
        KloraError: its statistics are missing, damaged, or lack a sum.
    """
    rows = _rows(store, lora)
    table = pools.table(tuple(row.layer.place for row in rows))
    ranks = pools.rank(tuple(row.layer.rank for row in rows))
    sums = {partner: _column([_sum(row, partner, terms) for row in rows]) for partner in partners}
    numbers = Numbers(
        table,
        ranks,
        scaling=_column([row.layer.scaling for row in rows]),
        norm=_column([row.norm for row in rows]),
        frobenius=_column([row.statistics.frobenius for row in rows]),
        l1=_column([row.statistics.l1 for row in rows]),
        sums=sums,
    )
    keys = [_keys(row) for row in rows]
    whole = tuple(each for each in keys if each is not None)
    catalogued = CataloguedLora(
        name=name,
        sources={half: profile.source for half, profile in lora.profiles.items()},
        families=lora.first.families,
        table=table,
        ranks=ranks,
        keys=whole if len(whole) == len(keys) else None,
        partners=tuple(partners),
        digest="0" * 64,
    )
    return catalogued, numbers


def _rows(store: Store, lora: StoredLora) -> list[_Row]:
    rows = []
    for half, profile in lora.profiles.items():
        statistics = store.statistics(profile.statistics)
        if statistics is None or len(statistics) != len(profile.layers):
            raise KloraError(
                f"the store has no statistics of {shown(profile.path)}; profile it again, or add "
                "--complete."
            )
        own = zip(profile.layers, profile.norms, statistics, strict=True)
        rows += [_Row(half, *each) for each in own]
    return sorted(rows, key=lambda row: row.layer.place.path)


def _sum(row: _Row, partner: int, terms: Terms) -> float:
    assert terms.duel is not None
    numel = 1
    for size in row.layer.place.shape:
        numel *= size
    wanted = partner if terms.duel.top_k is not None else row.layer.rank * partner
    return row.statistics.top_k[min(wanted, numel)]


def _keys(row: _Row) -> Keys | None:
    if row.layer.pair is None:
        return None
    down, up, rows = row.layer.pair
    return Keys(row.half, down, up, rows)


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
