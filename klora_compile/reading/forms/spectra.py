"""FourierFT (arXiv 2405.03003) and WaveFT (arXiv 2505.12532): deltas with a sparse spectrum.

The file has the coefficients; torch's generator draws their positions from a seed and the weight's
shape. The delta is the real part of the inverse transform, times ``scaling``.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.forms.parts import Form, Header, Need, Part, Values
from klora_runtime.artifact.delta import Dense
from klora_runtime.errors import shown
from klora_runtime.lazy_torch import torch

FREQUENCIES, WAVELETS = Part("fourierft_spectrum"), Part("waveft_spectrum")

#: PEFT's names of wavelets. PEFT's tables of coif4 and coif5 are wrong: the first is not an
#: orthogonal filter, and PEFT itself fails with the second.
_WAVELETS = (
    *(f"db{order}" for order in range(1, 11)),
    *(f"sym{order}" for order in range(2, 11)),
    *(f"coif{order}" for order in range(1, 4)),
)


class FourierFt(Form):
    """The form of FourierFT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "fourierft"
    parts = (FREQUENCIES,)
    needs = Need.SHAPE
    peft = MappingProxyType({"FOURIERFT": None})

    def problems(self, layer: Header) -> list[str]:
        return _problems(layer, FREQUENCIES)

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        spectrum = _spread(layer, values.tensors[FREQUENCIES])
        return Dense((torch.fft.ifft2(spectrum).real * layer.settings["scaling"]).float()), 0.0


class WaveFt(Form):
    """The form of WaveFT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "waveft"
    parts = (WAVELETS,)
    needs = Need.SHAPE
    peft = MappingProxyType({"WAVEFT": None})

    def problems(self, layer: Header) -> list[str]:
        found = _problems(layer, WAVELETS)
        if found or not layer.settings.get("use_idwt", True):
            return found
        family = layer.settings.get("wavelet_family", _WAVELETS[0])
        if family not in _WAVELETS:
            return [
                f"is WaveFT of {shown(family)}, and klora computes db1 to db10, sym2 to sym10 and "
                "coif1 to coif3"
            ]
        if _low(family) is None:
            return [f"its wavelet {family} needs PyWavelets; install pywavelets"]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        delta = _spread(layer, values.tensors[WAVELETS])
        if layer.settings.get("use_idwt", True):
            low = _low(layer.settings.get("wavelet_family", _WAVELETS[0]))
            assert low is not None
            delta = _inverse(delta, low)
        return Dense((delta * layer.settings["scaling"]).float()), 0.0


def _problems(layer: Header, part: Part) -> list[str]:
    shape, settings = layer.shapes[part], layer.settings
    scaling = settings.get("scaling")
    if type(settings.get("random_loc_seed")) is not int or type(scaling) not in (int, float):
        return [
            f"PEFT's configuration says where its {part.name} lies; keep adapter_config.json "
            "beside the file"
        ]
    if len(shape) != 1:
        return [f"{part.name} {list(shape)} is not a vector"]
    if layer.weight is not None and (len(layer.weight) != 2 or shape[0] > math.prod(layer.weight)):
        return [
            f"{part.name} {list(shape)} does not fit the base model's weight {list(layer.weight)}"
        ]
    return []


def _spread(layer: Header, numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers at the positions drawn from the seed, float64, zeros elsewhere."""
    assert layer.weight is not None
    out, inner = layer.weight
    generator = torch.Generator().manual_seed(layer.settings["random_loc_seed"])
    places = torch.randperm(out * inner, generator=generator)[: len(numbers)]
    spectrum = torch.zeros(out * inner, dtype=torch.float64)
    spectrum[places] = numbers.double()
    return spectrum.view(out, inner)


def _low(family: str) -> torch.Tensor | None:
    """Return the low-pass filter of a wavelet's inverse transform; None if it is unknown."""
    if family == _WAVELETS[0]:  # Haar's
        return torch.full((2,), math.sqrt(0.5), dtype=torch.float64)
    try:
        from pywt import Wavelet
    except ImportError:
        return None
    return torch.tensor(Wavelet(family).rec_lo, dtype=torch.float64)


def _inverse(spectrum: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Compute one level of the inverse transform, cut to the size of the spectrum.

    The spectrum is padded on both sides by the length that the transform removes at the borders, to
    an even size. Its quarters are the mean and the details by rows, by columns, and by both.
    """
    length = len(low)
    alternating = torch.tensor([1.0, -1.0], dtype=low.dtype).repeat(length // 2)
    high = alternating * low.flip(0)
    before, after = zip(*(_margins(size, length - 2) for size in spectrum.shape), strict=True)
    padded = torch.nn.functional.pad(spectrum, (before[1], after[1], before[0], after[0]))
    quarters = [part for half in padded.chunk(2) for part in half.chunk(2, dim=1)]
    kernels = [torch.outer(rows, columns) for rows in (low, high) for columns in (low, high)]
    kernels[1], kernels[2] = kernels[2], kernels[1]
    whole = torch.nn.functional.conv_transpose2d(
        torch.stack(quarters)[None], torch.stack(kernels)[:, None], stride=2, padding=length - 2
    )[0, 0]
    return whole[: spectrum.shape[0], : spectrum.shape[1]]


def _margins(size: int, lost: int) -> tuple[int, int]:
    """Return the padding before and after, so that the total size is even."""
    added = lost + (size + lost) % 2
    return added // 2, added - added // 2
