"""The choices of many layers at once, equal to :meth:`Inequality.timeline` to the bit.

Arrays only propose a breakpoint. It counts if the inequality, evaluated literally, changes its
value between the float64 before it and itself: it changes at most once in a piece of the progress,
so that is the breakpoint. Where no proposal is confirmed, the search by halves finds it.

A proposal goes backwards through the operations of S, one at a time. Each of them rounds, so in
each the first of a few neighbouring float64 is taken at which the operation reaches its result.

Here a truth value is a float64, 1 or 0, unless a name says otherwise: torch compares float64 into
float64 in a third of the time that it needs into bool, and selects or gathers slower still. So
layers without a breakpoint are computed too, and left out at the end.
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

#: Neighbours of a proposal for S that are tried, by tie, as a range of steps from it: two products
#: round, and a tie to the content lets it act a little longer.
_OF_SCALE = {"content": range(-1, 3), "style": range(-2, 2)}

#: Neighbours that are tried for an operation with one rounding.
_OF_STEP = range(-1, 1)


@dataclass(frozen=True)
class Choices:
    """Which of two LoRAs acts in each layer, over progress."""

    ratio: torch.Tensor
    """Same shape as the sums, float64: S_c / (gamma S_s)."""
    begins: torch.Tensor
    """Same shape, bool: whether the content acts at progress 0."""
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


@dataclass(frozen=True)
class _Layers:
    """The layers of one call, all of one shape or broadcast to it."""

    inequality: Inequality
    s_c: torch.Tensor
    s_s: torch.Tensor
    gamma: torch.Tensor
    ratio: torch.Tensor

    def content(self, scale: torch.Tensor | float) -> torch.Tensor:
        """Return whether the content acts where S has this value."""
        scaled = self.gamma * scale * self.s_s
        return scaled.le_(self.s_c) if self.inequality.tie == "content" else scaled.lt_(self.s_c)


def choices(
    inequality: Inequality, s_c: torch.Tensor, s_s: torch.Tensor, gamma: torch.Tensor
) -> Choices:
    """Return the choices of layers that both LoRAs change.

    Args:
        inequality: the inequality with its constants.
        s_c: sizes of the content's deltas, float64 above 0, of any shape.
        s_s: sizes of the style's deltas, float64 above 0, of that shape or broadcast to it.
        gamma: balance of the LoRAs, float64 above 0, likewise.
    """
    ratio = s_c / (gamma * s_s)
    s_c, s_s = s_c.expand(ratio.shape), s_s.expand(ratio.shape)
    layers = _Layers(inequality, s_c, s_s, gamma, ratio)
    columns: list[torch.Tensor] = []
    first = before = torch.empty(0)
    for piece in _pieces(inequality):
        begins, ends = (layers.content(inequality.scale(t)) for t in (piece.start, piece.last))
        if not columns:
            first = begins
        else:
            wrapped = torch.full_like(ratio, NEVER)
            columns.append(wrapped.masked_fill_(before != begins, piece.start))
        columns.append(_crossed(layers, piece, begins, ends))
        before = ends
    one = columns[0].unsqueeze(-1) if len(columns) == 1 else torch.stack(columns, -1)
    return Choices(ratio, first.to(torch.bool), one)


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


def _crossed(
    layers: _Layers, piece: _Piece, begins: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Return the progress at which the choice changes inside a piece, or NEVER."""
    crosses = (begins - ends).abs_()
    if piece.less is None:
        found, confirmed = torch.full_like(crosses, NEVER), torch.zeros_like(crosses)
    else:
        proposed, confirmed = _proposed(layers, piece.less)
        found = torch.where(crosses.to(torch.bool), proposed, NEVER)
    if torch.equal(confirmed.mul_(crosses), crosses):
        return found
    flat, sizes = found.view(-1), (layers.s_c, layers.s_s, layers.gamma)
    own = [each.expand(crosses.shape).reshape(-1) for each in sizes]
    for index in torch.nonzero((confirmed != crosses).view(-1)).flatten().tolist():
        numbers = (float(each[index]) for each in own)
        flat[index] = _halved(layers.inequality, piece, *numbers)
    return found


def _halved(inequality: Inequality, piece: _Piece, s_c: float, s_s: float, gamma: float) -> float:
    """Return the progress at which the choice changes inside a piece, found by halves."""
    after = inequality.chooses_content(s_c, s_s, gamma, piece.last)

    def changed(t: float) -> bool:
        return inequality.chooses_content(s_c, s_s, gamma, t) == after

    return first_where(changed, piece.start, piece.last)


def _proposed(layers: _Layers, less: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first progress without content, and whether that is confirmed.

    Where the choice does not change, both mean nothing.
    """
    alpha, beta = layers.inequality.alpha, layers.inequality.beta

    def at(t: torch.Tensor) -> torch.Tensor:
        line = (alpha * t).add_(beta)
        return layers.content(line if less == 0.0 else line.sub_(less))

    scale = line = _first(layers.content, layers.ratio, _OF_SCALE[layers.inequality.tie])
    if less != 0.0:
        line = _first(lambda line: (line - less).lt_(scale), scale + less, _OF_STEP)
    half = (line - _step(line, -1)).mul_(0.5)
    near = (line - beta).sub_(half)  # the sum rounds up to the line from here on
    product = _first(lambda product: (product + beta).lt_(line), near, _OF_STEP)
    progress = _first(lambda t: (alpha * t).lt_(product), product / alpha, _OF_STEP)
    return progress, at(_step(progress, -1)).sub_(at(progress))


def _first(
    holds: Callable[[torch.Tensor], torch.Tensor], near: torch.Tensor, steps: range
) -> torch.Tensor:
    """Return the first float64 near each proposal at which a monotone condition ends.

    Args:
        holds: the condition, which holds below that float64.
        near: the proposals.
        steps: where to look, from the proposals on; the result may lie one after the last.
    """
    count = holds(_step(near, steps[0]))
    for step in steps[1:]:
        count.add_(holds(_step(near, step)))
    bits = near.view(torch.int64) + count.to(torch.int64)
    return bits.add_(steps[0]).view(torch.float64)


def _step(value: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the float64 that many places after each value above 0; they sort like their bits."""
    return (value.view(torch.int64) + steps).view(torch.float64) if steps else value
