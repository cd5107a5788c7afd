"""Layers in every form that trainers write, from a seed, each with its delta computed on its own.

The deltas are written out by the definition of the form in float64, with other operations than the
package uses, so that one does not repeat the other's mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.lora_files import write_lora

RANK, ALPHA = 3, 2.0

Array = np.ndarray


@dataclass
class Written:
    """One module of a file."""

    tensors: dict[str, torch.Tensor]
    """Ending of the key -> tensor."""
    weight: Array | None
    """Delta of the weight, with its scaling; (out, in) or (out, in, height, width)."""
    bias: Array | None = None


@dataclass
class Source:
    """Random tensors of which float64 copies are kept."""

    seed: int
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> tuple[torch.Tensor, Array]:
        tensor = torch.randn(*shape, generator=self._generator)
        return tensor, tensor.double().numpy()


Writer = Callable[[Source, int, int], Written]


def lora(new: Source, out: int, inner: int) -> Written:
    """up @ down."""
    (down, d), (up, u) = new(RANK, inner), new(out, RANK)
    tensors = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(ALPHA)}
    return Written(tensors, ALPHA / RANK * np.einsum("or,ri->oi", u, d))


def conv1x1(new: Source, out: int, inner: int) -> Written:
    """A 1x1 convolution, which klora takes for the linear layer that it is."""
    written = lora(new, out, inner)
    for ending in (".lora_down.weight", ".lora_up.weight"):
        written.tensors[ending] = written.tensors[ending][..., None, None]
    return written


def locon(new: Source, out: int, inner: int) -> Written:
    """A convolution of 3x3 down, 1x1 up."""
    (down, d), (up, u) = new(RANK, inner, 3, 3), new(out, RANK, 1, 1)
    tensors = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(ALPHA)}
    return Written(tensors, ALPHA / RANK * np.einsum("or,rihw->oihw", u[:, :, 0, 0], d))


def tucker(new: Source, out: int, inner: int) -> Written:
    """A 3x3 convolution inside the rank."""
    (down, d), (mid, m), (up, u) = (
        new(RANK, inner, 1, 1),
        new(RANK, RANK, 3, 3),
        new(out, RANK, 1, 1),
    )
    tensors = {
        ".lora_down.weight": down,
        ".lora_mid.weight": mid,
        ".lora_up.weight": up,
        ".alpha": torch.tensor(ALPHA),
    }
    delta = np.einsum("oa,abhw,bi->oihw", u[:, :, 0, 0], m, d[:, :, 0, 0])
    return Written(tensors, ALPHA / RANK * delta)


def loha(new: Source, out: int, inner: int, kernel: tuple[int, ...] = ()) -> Written:
    """The product, number by number, of two low-rank matrices."""
    columns = inner * int(np.prod(kernel))
    pairs = {name: new(*shape) for name, shape in _hada(out, columns).items()}
    tensors = {f".hada_{name}": pair[0] for name, pair in pairs.items()}
    w1a, w1b, w2a, w2b = (pair[1] for pair in pairs.values())
    delta = np.zeros((out, columns))
    for j in range(RANK):
        for k in range(RANK):
            delta += np.outer(w1a[:, j] * w2a[:, k], w1b[j] * w2b[k])
    return Written(
        tensors | {".alpha": torch.tensor(ALPHA)},
        (ALPHA / RANK * delta).reshape(out, inner, *kernel),
    )


def _hada(out: int, columns: int) -> dict[str, tuple[int, int]]:
    return {
        "w1_a": (out, RANK),
        "w1_b": (RANK, columns),
        "w2_a": (out, RANK),
        "w2_b": (RANK, columns),
    }


def loha_conv(new: Source, out: int, inner: int) -> Written:
    """Of a 3x3 convolution, its kernel folded into the columns."""
    return loha(new, out, inner, (3, 3))


def loha_tucker(new: Source, out: int, inner: int) -> Written:
    """Of a 3x3 convolution, with cores."""
    tensors, parts = {".alpha": torch.tensor(ALPHA)}, []
    for i in (1, 2):
        (t, core), (a, wa), (b, wb) = new(RANK, RANK, 3, 3), new(RANK, out), new(RANK, inner)
        tensors |= {f".hada_t{i}": t, f".hada_w{i}_a": a, f".hada_w{i}_b": b}
        parts.append(np.einsum("jkhw,jo,ki->oihw", core, wa, wb))
    return Written(tensors, ALPHA / RANK * parts[0] * parts[1])


def _lokr_sides(out: int, inner: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (4, 2), (out // 4, inner // 2)


def lokr(new: Source, out: int, inner: int) -> Written:
    """A whole w1, a factored w2."""
    first, (c, d) = _lokr_sides(out, inner)
    (w1, one), (a, wa), (b, wb) = new(*first), new(c, RANK), new(RANK, d)
    tensors = {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(ALPHA)}
    return Written(tensors, ALPHA / RANK * np.kron(one, wa @ wb))


def lokr_factored(new: Source, out: int, inner: int) -> Written:
    """Both sides factored."""
    (a1, b1), (c, d) = _lokr_sides(out, inner)
    (w1a, x), (w1b, y), (w2a, z), (w2b, w) = (
        new(*shape) for shape in ((a1, RANK), (RANK, b1), (c, RANK), (RANK, d))
    )
    tensors = {".lokr_w1_a": w1a, ".lokr_w1_b": w1b, ".lokr_w2_a": w2a, ".lokr_w2_b": w2b}
    delta = ALPHA / RANK * np.kron(x @ y, z @ w)
    return Written(tensors | {".alpha": torch.tensor(ALPHA)}, delta)


def lokr_whole(new: Source, out: int, inner: int) -> Written:
    """Both sides whole: no rank, and an alpha that does nothing."""
    first, second = _lokr_sides(out, inner)
    (w1, one), (w2, two) = new(*first), new(*second)
    tensors = {".lokr_w1": w1, ".lokr_w2": w2, ".alpha": torch.tensor(ALPHA)}
    return Written(tensors, np.kron(one, two))


def lokr_conv(new: Source, out: int, inner: int) -> Written:
    """Of a 3x3 convolution, w2 factored, its kernel folded into the columns."""
    first, (c, d) = _lokr_sides(out, inner)
    (w1, one), (a, wa), (b, wb) = new(*first), new(c, RANK), new(RANK, d * 9)
    tensors = {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(ALPHA)}
    two = (wa @ wb).reshape(c, d, 3, 3)
    return Written(tensors, ALPHA / RANK * _kron_conv(one, two))


def lokr_conv_whole(new: Source, out: int, inner: int) -> Written:
    """Of a 3x3 convolution, w2 whole."""
    first, (c, d) = _lokr_sides(out, inner)
    (w1, one), (w2, two) = new(*first), new(c, d, 3, 3)
    return Written({".lokr_w1": w1, ".lokr_w2": w2}, _kron_conv(one, two))


def lokr_tucker(new: Source, out: int, inner: int) -> Written:
    """Of a 3x3 convolution, w2 with a core."""
    first, (c, d) = _lokr_sides(out, inner)
    (w1, one), (t, core) = new(*first), new(RANK, RANK, 3, 3)
    (a, wa), (b, wb) = new(RANK, c), new(RANK, d)
    tensors = {".lokr_w1": w1, ".lokr_t2": t, ".lokr_w2_a": a, ".lokr_w2_b": b}
    two = np.einsum("jkhw,jc,kd->cdhw", core, wa, wb)
    delta = ALPHA / RANK * _kron_conv(one, two)
    return Written(tensors | {".alpha": torch.tensor(ALPHA)}, delta)


def _kron_conv(one: Array, two: Array) -> Array:
    product = np.einsum("ab,cdhw->acbdhw", one, two)
    a, c, b, d, *kernel = product.shape
    return product.reshape(a * c, b * d, *kernel)


def full(new: Source, out: int, inner: int) -> Written:
    """Every number, and the bias'."""
    (diff, delta), (bias, own) = new(out, inner), new(out)
    return Written({".diff": diff, ".diff_b": bias}, delta, own)


def lora_with_bias(new: Source, out: int, inner: int) -> Written:
    """PEFT's ``lora_bias``, which is scaled as the pair is."""
    written = lora(new, out, inner)
    bias, own = new(out)
    written.tensors[".lora_B.bias"] = bias
    written.bias = ALPHA / RANK * own
    return written


def norm(new: Source, out: int, inner: int) -> Written:
    """LyCORIS' deltas of a norm."""
    (weight, own), (bias, beside) = new(out), new(out)
    return Written({".w_norm": weight, ".b_norm": bias}, own, beside)


#: Forms of linear layers, and of layers that a table parts.
LINEAR: Mapping[str, Writer] = {
    "LoRA": lora,
    "LoRA, 1x1": conv1x1,
    "LoRA with bias": lora_with_bias,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, factored": lokr_factored,
    "LoKr, whole": lokr_whole,
    "full difference": full,
}
#: Forms of 3x3 convolutions.
CONVOLUTIONS: Mapping[str, Writer] = {
    "LoCon": locon,
    "LoCon, Tucker": tucker,
    "LoHa, conv": loha_conv,
    "LoHa, Tucker": loha_tucker,
    "LoKr, conv": lokr_conv,
    "LoKr, conv, whole": lokr_conv_whole,
    "LoKr, Tucker": lokr_tucker,
}
NORMS: Mapping[str, Writer] = {"norm difference": norm}


def dora(base: Array, delta: Array, magnitude: Array, axis: int) -> Array:
    """DoRA's change of a weight, by a loop over its rows (axis 0) or columns (1)."""
    adapted = base + delta
    result = np.empty_like(adapted)
    for i in range(adapted.shape[axis]):
        index = (i,) if axis == 0 else (slice(None), i)
        length = np.sqrt((adapted[index] ** 2).sum())
        result[index] = magnitude.reshape(-1)[i] * adapted[index] / length - base[index]
    return result


def magnitude_shape(weight: Array, axis: int) -> tuple[int, ...]:
    """As LyCORIS writes it."""
    sizes = [1] * weight.ndim
    sizes[axis] = weight.shape[axis]
    return tuple(sizes)


def base_model(path: Path, weights: Mapping[tuple[str, str], Array]) -> Path:
    """A pipeline's folder in diffusers' names: (component, module) -> weight."""
    components: dict[str, dict[str, torch.Tensor]] = {}
    for (component, module), value in weights.items():
        tensor = torch.from_numpy(np.ascontiguousarray(value)).float()
        components.setdefault(component, {})[f"{module}.weight"] = tensor
    for component, tensors in components.items():
        (path / component).mkdir(parents=True)
        save_file(tensors, str(path / component / "model.safetensors"))
    (path / "model_index.json").write_text("{}")
    return path


#: A layer with DoRA, and a file of it.
DORA_LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def small_dora(folder: Path) -> tuple[Path, Path]:
    new = Source(1)
    tensors = {
        f"{DORA_LAYER}.lora_A.weight": new(2, 30)[0],
        f"{DORA_LAYER}.lora_B.weight": new(40, 2)[0],
    }
    path = write_lora(
        folder / "a.safetensors", tensors | {f"{DORA_LAYER}.dora_scale": new(40, 1)[0]}
    )
    return path, base_model(
        folder / "base", {("unet", DORA_LAYER.removeprefix("unet.")): new(40, 30)[1]}
    )
