"""FourierFT (arXiv 2405.03003) and WaveFT (arXiv 2505.12532): a few frequencies or wavelets.

The file has their strengths; where they lie follows from a seed and the weight's shape, as torch's
generator draws them. The delta is the real part of the inverse transform, times ``scaling``.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch

from klora_compile.reading.forms.parts import Form, Header, Need, Part, Values
from klora_runtime.artifact.delta import Dense
from klora_runtime.errors import shown

FREQUENCIES, WAVELETS = Part("fourierft_spectrum"), Part("waveft_spectrum")

#: PEFT's names of the wavelet of Haar.
_HAAR = ("db1", "haar")


class FourierFt(Form):
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

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
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "waveft"
    parts = (WAVELETS,)
    needs = Need.SHAPE
    peft = MappingProxyType({"WAVEFT": None})

    def problems(self, layer: Header) -> list[str]:
        found = _problems(layer, WAVELETS)
        family = layer.settings.get("wavelet_family", _HAAR[0])
        if not found and layer.settings.get("use_idwt", True) and family not in _HAAR:
            return [f"is WaveFT of the wavelet {shown(family)}, and klora computes those of Haar"]
        return found

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        spectrum = _spread(layer, values.tensors[WAVELETS])
        if layer.settings.get("use_idwt", True):
            spectrum = _haar(spectrum)
        return Dense((spectrum * layer.settings["scaling"]).float()), 0.0


def _problems(layer: Header, part: Part) -> list[str]:
    shape, settings = layer.shapes[part], layer.settings
    scaling = settings.get("scaling")
    if type(settings.get("random_loc_seed")) is not int or type(scaling) not in (int, float):
        return [
            f"PEFT's configuration says where its {part.name} lies; keep adapter_config.json "
            "beside the file"
        ]
    if len(shape) != 1:
        return [f"{part.name} {list(shape)} is no vector"]
    if layer.weight is not None and (len(layer.weight) != 2 or shape[0] > math.prod(layer.weight)):
        return [
            f"{part.name} {list(shape)} does not fit the base model's weight {list(layer.weight)}"
        ]
    return []


def _spread(layer: Header, numbers: torch.Tensor) -> torch.Tensor:
    """The numbers at the places that the seed draws, float64, zeros elsewhere."""
    assert layer.weight is not None
    out, inner = layer.weight
    generator = torch.Generator().manual_seed(layer.settings["random_loc_seed"])
    places = torch.randperm(out * inner, generator=generator)[: len(numbers)]
    spectrum = torch.zeros(out * inner, dtype=torch.float64)
    spectrum[places] = numbers.double()
    return spectrum.view(out, inner)


def _haar(spectrum: torch.Tensor) -> torch.Tensor:
    """One level of the inverse transform; odd sides are cut from one that is longer by one.

    The quarters are the mean, what alternates from row to row, from column to column, and both.
    """
    out, inner = spectrum.shape
    rows, columns = out + out % 2, inner + inner % 2
    padded = torch.zeros(rows, columns, dtype=spectrum.dtype)
    padded[:out, :inner] = spectrum
    half, middle = rows // 2, columns // 2
    by_row, by_column = padded[:half, middle:].clone(), padded[half:, :middle].clone()
    padded[half:, :middle], padded[:half, middle:] = by_row, by_column
    for dim in (0, 1):
        low, high = padded.chunk(2, dim=dim)
        joined = torch.stack([low + high, low - high], dim=dim + 1)
        padded = joined.flatten(dim, dim + 1) / math.sqrt(2.0)
    return padded[:out, :inner]
