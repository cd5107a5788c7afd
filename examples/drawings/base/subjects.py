"""The styles and subjects that the base model sees or never sees, and their prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from drawings.material import icons

#: Word in prompts -> package of drawings.
TRAINING_STYLES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "flat": "fluent-emoji-flat",
    "emojione": "emojione",
}
HELD_OUT_STYLES = {
    "ink": "fluent-emoji-high-contrast",
    "soft": "fluent-emoji",
    "firefox": "fxemoji",
    "blob": "noto-v1",
    "mono": "emojione-monotone",
}
STYLES = TRAINING_STYLES | HELD_OUT_STYLES

#: Settings are chosen on these, word in prompts = name of the drawing in every package.
TUNING_SUBJECTS = tuple(
    """
    penguin octopus mushroom rocket cactus frog pineapple guitar tractor headphone rooster telescope
    banana camera anchor snake umbrella tiger bell trumpet lollipop helicopter hammer ghost
    """.split()
)
#: Reported numbers are measured on these.
REPORTED_SUBJECTS = tuple(
    """
    elephant snail whale spider turtle koala crocodile dolphin pig goat
    strawberry grapes cherries watermelon pear lemon hamburger doughnut tulip sunflower
    sailboat bicycle ambulance airplane key crown bomb candle violin microscope
    """.split()
)
HELD_OUT_SUBJECTS = TUNING_SUBJECTS + REPORTED_SUBJECTS

#: Shares of drawings that are trained with no prompt, and with one that leaves the style open.
_EMPTY, _NEUTRAL = 0.1, 0.2

#: Categories of noto's drawings that the base learns.
_THINGS = ("Animals & Nature", "Food & Drink", "Objects")

#: Drawings that hardly differ from others, or hold letters: variants of persons, flags, signs.
_VARIANT = re.compile(
    r"skin-tone|-tone\d|^flags?(-|$)|keycap|clock$|oclock|thirty|letter|digit|hair|domino|mahjong|circled"
    r"|button$|-square|squared|^regional|family|^couple|^kiss-|playing-card|-dark$|-light$|-medium$"
    r"|(^|-)(man|woman|men|women|person|people)(-|$)"
)


def training_subjects(packages: Path) -> tuple[str, ...]:
    """Return the names of the drawings that the base sees, in order.

    A name counts if two training styles have it. It does not count if it holds the word of a
    held-out subject (``spouting-whale``), or if it is another name of such a drawing.
    """
    held_out = set(HELD_OUT_SUBJECTS)
    twins = {
        name
        for package in TRAINING_STYLES.values()
        for name in _twins(icons(packages, package), held_out)
    }
    counts = Counter(
        name for package in TRAINING_STYLES.values() for name in _names(icons(packages, package))
    )
    return tuple(
        sorted(
            name
            for name, count in counts.items()
            if count >= 2
            and name not in twins
            and not _VARIANT.search(name)
            and held_out.isdisjoint(name.split("-"))
        )
    )


def things(packages: Path) -> tuple[str, ...]:
    """Return the training subjects that the base learns: animals, food and objects, in order.

    Every training style has them. The more subjects, the more updates until a word changes a
    picture: of all 1,250 training subjects, signs and smileys among them, it knew after 12,000
    updates of 16 drawings little but faces.
    """
    path = packages / TRAINING_STYLES["noto"] / "metadata.json"
    categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
    known = {name for category in _THINGS for name in categories[category]}
    for package in TRAINING_STYLES.values():
        known &= set(_names(icons(packages, package)))
    return tuple(name for name in training_subjects(packages) if name in known)


def prompt(subject: str, style: str | None = None) -> str:
    """Return the prompt of a drawing, in training and sampling, with or without its style.

    Args:
        subject: name of the drawing, ``red-apple``.
        style: word of the style.
    """
    words = f"a {subject.replace('-', ' ')}"
    return words if style is None else f"{words}, {style} style"


def prompts(names: Sequence[tuple[str, str]]) -> list[str]:
    """Write the prompts of drawings in training: some leave the style open, some are empty."""
    texts = []
    for (subject, style), chance in zip(names, torch.rand(len(names)).tolist(), strict=True):
        if chance < _EMPTY:
            texts.append("")
        else:
            texts.append(prompt(subject, None if chance < _EMPTY + _NEUTRAL else style))
    return texts


def _names(pack: dict[str, dict[str, dict[str, str]]]) -> Iterable[str]:
    hidden = {name for name, icon in pack["icons"].items() if icon.get("hidden")}
    return (pack["icons"].keys() | pack.get("aliases", {}).keys()) - hidden


def _twins(pack: dict[str, dict[str, dict[str, str]]], names: set[str]) -> set[str]:
    """Other names of the same drawings."""
    aliases = {name: alias["parent"] for name, alias in pack.get("aliases", {}).items()}
    bodies = {name: icon["body"] for name, icon in pack["icons"].items()}
    drawn = {bodies[aliases.get(name, name)] for name in names if aliases.get(name, name) in bodies}
    return {
        name
        for name in bodies.keys() | aliases.keys()
        if bodies.get(aliases.get(name, name)) in drawn
    }
