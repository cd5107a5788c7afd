"""The options of a search, for ``klora sweep``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from klora_compile.commands.parameters import SlotText

#: Parameters of these options.
_NAMES = ("search", "judge", "own_prompts", "best", "search_seed")

#: The judge that comes with klora.
_OWN_PICTURES = "own-pictures"


@dataclass(frozen=True)
class Searching:
    """What the options ask for."""

    count: int
    judge: str
    own_prompts: dict[str, list[str]]
    """Slot -> prompts that show its LoRA alone."""
    best: int
    seed: int


_OPTIONS = (
    click.option(
        "--search",
        type=click.IntRange(1, 100_000),
        metavar="N",
        help="Search instead: draw N combinations of the settings with several values, and find "
        "the best by pictures. Without such settings: of rules, bias and weights.",
    ),
    click.option(
        "--judge",
        metavar=f"{_OWN_PICTURES}|MODULE:FUNCTION|FILE.py:FUNCTION",
        help="Who scores the pictures of a search: similarity to each LoRA's own pictures, or a "
        "function of yours, which is run.  [default: own-pictures]",
    ),
    click.option(
        "--own-prompt",
        "own_prompts",
        type=SlotText("TEXT"),
        multiple=True,
        help="A prompt that shows one LoRA alone, such as content=a fox; repeat it for others. "
        "[default: the trigger words that the LoRA states]",
    ),
    click.option(
        "--best",
        type=click.IntRange(1, 100),
        help="How many candidates of a search the sheet shows.  [default: 5]",
    ),
    click.option(
        "--search-seed",
        type=click.IntRange(0, 2**63 - 1),
        help="Seed of the drawing of candidates.  [default: 0]",
    ),
)


def search_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as ``searching``, None without ``--search``."""

    @wraps(command)
    def with_search(**values: Any) -> None:
        asked = {name: values.pop(name) for name in _NAMES}
        stated = [name for name, value in asked.items() if value not in (None, ())]
        if asked["search"] is None and stated:
            flag = stated[0].rstrip("s").replace("_", "-")
            raise click.UsageError(f"--{flag} is for a search; add --search N.")
        command(searching=None if asked["search"] is None else _searching(asked), **values)

    wrapped: Callable[..., None] = with_search
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _searching(asked: dict[str, Any]) -> Searching:
    prompts: dict[str, list[str]] = {}
    for slot, text in asked["own_prompts"]:
        prompts.setdefault(slot, []).append(text)
    return Searching(
        asked["search"],
        asked["judge"] or _OWN_PICTURES,
        prompts,
        asked["best"] or 5,
        asked["search_seed"] or 0,
    )
