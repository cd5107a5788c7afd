"""Numbers too large for their code: where they are, and what they lack (`FORMAT.md`, q)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.q.form import MOST
from klora_runtime.artifact.tensor_file import bytes_of

#: Bytes of a place, and of a term.
_SIZE = 4

#: Numbers that a tensor holds at most, padding included, so that places fit.
MOST_PLACES = 2**32


@dataclass(frozen=True)
class Extras:
    """Terms to be added to some numbers, in units of 2^max(width, 1), so that parities stay."""

    places: torch.Tensor
    """(terms,) int64, ascending: places among the numbers of the tensor, padding included."""
    terms: torch.Tensor
    """(terms,) int32, not 0."""
    unit: int = 1
    """Bits of the unit, if all are of one width."""
    first: int = 0
    """Place of the first number that they are of."""

    @classmethod
    def of(cls, numbers: torch.Tensor, width: int, first: int) -> Extras:
        """Return what numbers of one width have beyond their code.

        Args:
            numbers: (rows, 8 part) int32.
            width: how many lowest bits are stored uncoded.
            first: place of the first number.
        """
        unit, low, high = (width, -8, 7) if width else (1, -4, 3)
        if not numbers.numel():
            return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
        least, most = torch.aminmax(numbers)
        if low <= int(least) >> unit and int(most) >> unit <= high:
            return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32), unit)
        whole = numbers.flatten() >> unit
        terms = whole - whole.clamp(low, high)
        places = terms.nonzero().flatten()
        return cls(places + first, terms[places].int(), unit, first)

    def removed(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the numbers of :meth:`of` without the terms."""
        if not len(self.places):
            return numbers
        found = numbers.clone()
        found.view(-1)[self.places - self.first] -= (self.terms << self.unit).to(found.dtype)
        return found

    def bits(self, rows: int, length: int) -> torch.Tensor:
        """Return (rows,) float64: the bits that the terms of each row take."""
        counts = torch.bincount((self.places - self.first) // length, minlength=rows)
        return 2 * 8 * _SIZE * counts.double()

    @staticmethod
    def bytes_of(parts: Sequence[Extras]) -> bytes:
        """Return the bytes of all terms of a tensor: the places, then the terms."""
        places = torch.cat([part.places for part in parts])
        terms = torch.cat([part.terms for part in parts])
        return bytes_of(places.to(torch.int32)) + bytes_of(terms)

    @classmethod
    def read(cls, packed: torch.Tensor, begin: int, numbers: int) -> Extras:
        """Return the terms in the bytes from ``begin`` on.

        Raises:
            ValueError: they are not terms of so many numbers.
        """
        count, rest = divmod(len(packed) - begin, 2 * _SIZE)
        if count < 0 or rest:
            needed = begin + 2 * _SIZE * max(0, count + 1)
            raise ValueError(f"it has {len(packed)} bytes, its numbers need {needed}")
        words = packed[begin:].clone().view(torch.int32)
        places, terms = words[:count].long() & 0xFFFFFFFF, words[count:]
        if bool((places.diff() <= 0).any()) or (count and int(places[-1]) >= numbers):
            raise ValueError(f"the places of its large numbers do not ascend below {numbers}")
        if bool(((terms == 0) | (terms < -MOST) | (terms > MOST)).any()):
            raise ValueError(f"a term of its large numbers is not one of 1 to {MOST}")
        return cls(places, terms)

    def terms_of(self, first: int, count: int) -> Extras | None:
        """Return the terms of ``count`` numbers from ``first`` on; None if none has any."""
        if not len(self.places):
            return None
        bounds = torch.tensor([first, first + count])
        begin, end = torch.searchsorted(self.places, bounds).tolist()
        if begin == end:
            return None
        return Extras(self.places[begin:end], self.terms[begin:end], first=first)

    def dense(self, high: torch.Tensor) -> torch.Tensor:
        """Return (rows, 2 n) int32: what is added to numbers of width 0 of coded bits (rows, n)."""
        found = torch.zeros(len(high), 2 * high.shape[1], dtype=torch.int32)
        found.view(-1)[self.places - self.first] = 2 * self.terms
        return found

    def add_to(self, points: torch.Tensor, width: int) -> None:
        """Add the terms to values in half steps, of numbers with a width above 0."""
        points.view(-1)[self.places - self.first] += self.terms.float() * 2 ** (width + 1)

    def check(self, points: torch.Tensor, width: int) -> None:
        """Check the numbers that have terms, by their values in half steps.

        Raises:
            ValueError: a number is too large.
        """
        own = points.view(-1)[self.places - self.first]
        sizes = (own / 2).floor().abs() if width else ((own.abs() + 1) / 2).floor()
        if float(sizes.max()) > MOST:
            raise ValueError(f"a number in it is not within {MOST}")
