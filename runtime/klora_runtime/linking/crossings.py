"""The choices of many layers at once, equal to :meth:`Inequality.timeline` to the bit.

Arrays only propose a breakpoint. It counts if the inequality, evaluated literally, changes its
value between the float64 before it and itself: it changes at most once in a piece of the progress,
so that is the breakpoint. Where no proposal is confirmed, the search by halves finds it.

A proposal goes backwards through the operations of S, one at a time. Each of them rounds, so in
each the first of a few neighbouring float64 is taken at which the rest of the inequality holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from klora_runtime.lazy_torch import torch
from klora_runtime.linking.breakpoints import first_where
from klora_runtime.linking.inequality import Inequality

#: Progress of a switch that does not happen; all others are smaller.
NEVER = 1.0

#: Neighbours of a proposal that are tried, on either side of it.
_REACH = 2

#: The smallest proposal: smaller ones could step below 0.
_TINY = 1e-300


@dataclass(frozen=True)
class Choices:
    """Which of two LoRAs acts in each layer, over progress."""

    begins: torch.Tensor
    """Same shape as the sums, bool: whether the content acts at progress 0."""
    switches: torch.Tensor
    """(..., switches) float64: ascending progress at which the other LoRA acts from then on;
    :data:`NEVER` fills the places of switches that do not happen, in between too."""


@dataclass(frozen=True)
class _Piece:
    """A range of progress in which S rises or falls."""

    start: float
    last: float
    less: float | None
    """What is subtracted from alpha * t + beta in it; None if arrays cannot compute S."""


def choices(
    inequality: Inequality, s_c: torch.Tensor, s_s: torch.Tensor, gamma: torch.Tensor
) -> Choices:
    """Return the choices of layers that both LoRAs change.

    Args:
        inequality: the inequality with its constants.
        s_c: sizes of the content's deltas, float64 above 0, of any shape.
        s_s: sizes of the style's deltas, float64 above 0, of that shape.
        gamma: balance of the LoRAs, float64 above 0, of that shape or broadcast to it.
    """
    shape = (s_c + s_s + gamma).shape
    s_c, s_s, gamma = (each.expand(shape) for each in (s_c, s_s, gamma))
    pieces = _pieces(inequality)
    columns: list[torch.Tensor] = []
    first = before = torch.empty(0)
    for piece in pieces:
        begins, ends = (
            _content(inequality, gamma * inequality.scale(t) * s_s, s_c)
            for t in (piece.start, piece.last)
        )
        if not columns:
            first = begins
        else:
            wrapped = torch.full(s_c.shape, NEVER, dtype=torch.float64)
            columns.append(wrapped.masked_fill_(before != begins, piece.start))
        columns.append(_crossed(inequality, piece, begins, ends, s_c, s_s, gamma))
        before = ends
    return Choices(first, torch.stack(columns, -1))


@cache
def _pieces(inequality: Inequality) -> tuple[_Piece, ...]:
    return tuple(
        _Piece(start, last, _less(inequality, start)) for start, last in inequality.pieces()
    )


def _less(inequality: Inequality, start: float) -> float | None:
    """Return what one subtraction has to take from the line, if it equals the literal S."""
    if inequality.alpha <= 0.0:
        return None
    if inequality.pattern == "s":
        return inequality.less
    line = inequality.alpha * start + inequality.beta
    turns = round((line - line % inequality.alpha) / inequality.alpha)
    less = turns * inequality.alpha
    return less if Fraction(less) == turns * Fraction(inequality.alpha) else None


def _content(inequality: Inequality, scaled: torch.Tensor, s_c: torch.Tensor) -> torch.Tensor:
    return s_c >= scaled if inequality.tie == "content" else s_c > scaled


def _crossed(
    inequality: Inequality,
    piece: _Piece,
    begins: torch.Tensor,
    ends: torch.Tensor,
    s_c: torch.Tensor,
    s_s: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return the progress at which the choice changes inside a piece, or NEVER."""
    found = torch.full(begins.shape, NEVER, dtype=torch.float64)
    there = torch.nonzero((begins != ends).flatten()).flatten()
    if not len(there):
        return found
    own = [each.reshape(-1)[there] for each in (s_c, s_s, gamma)]
    if piece.less is None:
        values = torch.full(there.shape, -1.0, dtype=torch.float64)
    else:
        values = _proposed(inequality, piece.less, *own)
    for index in torch.nonzero(values < 0.0).flatten().tolist():
        values[index] = _halved(inequality, piece, *(float(each[index]) for each in own))
    found.view(-1)[there] = values
    return found


def _halved(inequality: Inequality, piece: _Piece, s_c: float, s_s: float, gamma: float) -> float:
    """Return the progress at which the choice changes inside a piece, found by halves."""
    after = inequality.chooses_content(s_c, s_s, gamma, piece.last)

    def changed(t: float) -> bool:
        return inequality.chooses_content(s_c, s_s, gamma, t) == after

    return first_where(changed, piece.start, piece.last)


def _proposed(
    inequality: Inequality,
    less: float,
    s_c: torch.Tensor,
    s_s: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return the first progress without content, -1 where no proposal is confirmed."""
    alpha, beta = inequality.alpha, inequality.beta

    def content(scale: torch.Tensor) -> torch.Tensor:
        return _content(inequality, gamma * scale * s_s, s_c)

    def of_line(line: torch.Tensor) -> torch.Tensor:
        return content(line if less == 0.0 else line - less)

    def of_product(product: torch.Tensor) -> torch.Tensor:
        return of_line(product + beta)

    def at(t: torch.Tensor) -> torch.Tensor:
        return of_product(alpha * t)

    scale, _ = _first(content, s_c / (gamma * s_s))
    line = scale if less == 0.0 else _first(of_line, scale + less)[0]
    half = (line - _before(line)) * 0.5
    product, _ = _first(of_product, line - beta - half)
    progress, confirmed = _first(at, product / alpha)
    return torch.where(confirmed, progress, -1.0)


def _first(
    content: Callable[[torch.Tensor], torch.Tensor], near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first float64 near each proposal at which a monotone condition ends.

    Returns:
        That float64, where the second result is true: the condition holds at the one before it.
    """
    bits = near.clamp(min=_TINY).view(torch.int64) - _REACH  # floats above 0 sort like their bits
    begins = holds = content(bits.view(torch.float64))
    for _ in range(2 * _REACH):
        bits = bits + holds  # a step without a branch; choosing among values takes longer
        holds = content(bits.view(torch.float64))
    return bits.view(torch.float64), begins & ~holds


def _before(value: torch.Tensor) -> torch.Tensor:
    """Return the float64 before each value above 0."""
    return (value.view(torch.int64) - 1).view(torch.float64)
