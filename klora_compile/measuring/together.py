"""Numbers of LoRAs together: how much alike they are, from rank x rank products."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations

from klora_compile.measuring.norms import inner_products
from klora_compile.reading.layers import Layer
from klora_compile.rules.kit.picking import Together
from klora_compile.threads import single_thread
from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.schedule import CONTENT, STEPLESS, STYLE

#: Singular values up to this share of the largest count as rounding.
_RANK_TOLERANCE = 1e-6


def measured_together(given: Mapping[str, Mapping[str, Layer]]) -> Together:
    """Return the numbers of LoRAs together; see :class:`Together`.

    Args:
        given: slot -> layer name -> layer.
    """
    weights = {slot: dict(_weights(own)) for slot, own in given.items()}
    owners = Counter(name for own in weights.values() for name in own)
    common = {
        slot: {name: layer for name, layer in own.items() if owners[name] > 1}
        for slot, own in weights.items()
    }
    count = len({name for own in common.values() for name in own})
    if not count:
        return Together(tuple(given), 0)
    with single_thread():
        energies = {
            slot: math.fsum((layer.scaling * layer.delta.norm()) ** 2 for layer in own.values())
            for slot, own in common.items()
        }
        products = _products(common)
        shares = _shares(common) if common.keys() == {CONTENT, STYLE} else ((0.0, 0.0),) * 2
    strongest, weakest = max(energies.values()), min(energies.values())
    whole = max(0.0, math.fsum([*energies.values(), *(2.0 * each for each in products.values())]))
    cosines = [
        product / math.sqrt(energies[one] * energies[other])
        for (one, other), product in products.items()
        if energies[one] and energies[other]
    ]
    return Together(
        slots=tuple(given),
        layers=count,
        ratio=math.sqrt(strongest / weakest) if weakest else 0.0,
        growth=math.sqrt(whole / strongest) if strongest else 0.0,
        cosine=max(cosines, default=0.0),
        inputs=shares[0][0],
        inputs_by_chance=shares[0][1],
        outputs=shares[1][0],
        outputs_by_chance=shares[1][1],
    )


def _weights(layers: Mapping[str, Layer]) -> Iterator[tuple[str, Layer]]:
    """Yield the weights of a denoiser."""
    for name, layer in layers.items():
        steps = layer.component not in STEPLESS
        if steps and layer.parameter == "weight" and len(layer.shape) > 1:
            yield name, layer


def _products(layers: Mapping[str, Mapping[str, Layer]]) -> dict[tuple[str, str], float]:
    """Return two slots -> inner product of their scaled deltas, over all layers."""
    found = inner_products(layers)
    return {
        (one, other): math.fsum(
            layers[one][name].scaling * layers[other][name].scaling * pairs[one, other]
            for name, pairs in found.items()
            if (one, other) in pairs
        )
        for one, other in combinations(layers, 2)
    }


def _shares(layers: Mapping[str, Mapping[str, Layer]]) -> tuple[tuple[float, float], ...]:
    """Return (share, share by chance) of the content's energy on inputs, then on outputs."""
    whole, kept = [], {side: ([0.0], [0.0]) for side in ("inputs", "outputs")}
    for name, content in layers[CONTENT].items():
        style = layers[STYLE][name]
        if not isinstance(content.delta, LowRank) or not isinstance(style.delta, LowRank):
            continue
        flat, basis = content.delta.in_float64(), style.delta.singular()
        count = int((basis.values > _RANK_TOLERANCE * basis.values[0]).sum())
        scale = content.scaling**2
        energy = scale * content.delta.norm() ** 2
        whole.append(energy)
        inside = flat.up @ (flat.down @ basis.right[:count].T)
        onto = (basis.left[:, :count].T @ flat.up) @ flat.down
        for side, part, size in (
            ("inputs", inside, flat.down.shape[1]),
            ("outputs", onto, flat.up.shape[0]),
        ):
            shares, chances = kept[side]
            shares.append(scale * float(part.square().sum()))
            chances.append(energy * count / size)
    total = math.fsum(whole)
    if not total:
        return ((0.0, 0.0),) * 2
    return tuple(
        (math.fsum(shares) / total, math.fsum(chances) / total) for shares, chances in kept.values()
    )
