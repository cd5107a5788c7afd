"""A blind test by eye: which of two pictures is better, without names.

    python -m drawings.table.blind begin PACKAGES PICTURES TEST "K-LoRA s" "direct sum 1 : 1"
    python -m drawings.table.blind choose TEST
    python -m drawings.table.blind reveal TEST

PICTURES is a folder of the table's, OUT/pictures/entangled-tuning. TEST/pair-NN.png has the true
drawing above, and below it A and B in a random order. Choices are kept in TEST/choices.json one by
one; TEST/key.json says what A was, so do not read it before.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click
import torch
from PIL import Image, ImageDraw

from drawings.base.subjects import STYLES
from drawings.material import drawing, picture
from drawings.table.intervals import bootstrap
from drawings.table.pictures import first, folder_of

_CELL, _GAP, _LABEL = 192, 12, 16
#: What may be chosen, and its value if A is the first rule.
_VALUES = {"a": 1.0, "b": 0.0, "=": 0.5}

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Compare two rules by eye, without their names."""


@main.command()
@click.argument("packages", type=_FOLDER)
@click.argument("pictures", type=_FOLDER)
@click.argument("test", type=click.Path(file_okay=False, path_type=Path))
@click.argument("one")
@click.argument("other")
@click.option("--pairs", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
def begin(
    packages: Path, pictures: Path, test: Path, one: str, other: str, pairs: int, seed: int
) -> None:
    """Paste pairs of rules ONE and OTHER from PICTURES, with the true drawings from PACKAGES."""
    if (test / "key.json").exists():
        raise click.ClickException(f"{test} holds a test already. Name another folder.")
    folders = [folder_of(pictures, name) for name in (one, other)]
    shared = sorted(path.name for path in folders[0].glob("*.png"))
    shared = [name for name in shared if (folders[1] / name).is_file()]
    if not shared:
        raise click.ClickException(f"{pictures} has no cell of both rules. Draw them first.")
    chance = random.Random(seed)
    chance.shuffle(shared)
    test.mkdir(parents=True, exist_ok=True)
    key = []
    for number, name in enumerate(shared[:pairs], 1):
        swapped = chance.random() < 0.5
        subject, _, style = name.removesuffix(".png").rpartition("-")
        true = drawing(packages, STYLES[style], subject)
        two = [first(folder / name) for folder in (folders[::-1] if swapped else folders)]
        _pair(true, two).save(test / f"pair-{number:02}.png")
        key.append({"cell": f"{subject}, {style}", "swapped": swapped})
    sealed = {"one": one, "other": other, "pairs": key}
    (test / "key.json").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(key)} pairs in {test}")


@main.command()
@click.argument("test", type=_FOLDER)
def choose(test: Path) -> None:
    """Ask for a choice on each pair that has none: a, b or = for neither; q stops."""
    choices = _choices(test)
    for path in sorted(test.glob("pair-*.png")):
        if path.stem in choices:
            continue
        answer = click.prompt(f"{path}: a, b or =", type=click.Choice([*_VALUES, "q"]))
        if answer == "q":
            return
        choices[path.stem] = answer
        text = json.dumps(choices, indent=1) + "\n"
        new = test / "choices.new"
        new.write_text(text, encoding="utf-8")
        new.replace(test / "choices.json")


@main.command()
@click.argument("test", type=_FOLDER)
def reveal(test: Path) -> None:
    """Say how often each rule was chosen, with an interval over subjects."""
    key = json.loads((test / "key.json").read_text(encoding="utf-8"))
    click.echo(verdict(key, _choices(test)))


def verdict(key: dict[str, object], choices: dict[str, str]) -> str:
    """Return the share of the first rule, a tie counting half, with its 95 % interval.

    Raises:
        click.ClickException: a pair has no choice yet.
    """
    pairs: list[dict[str, object]] = key["pairs"]  # type: ignore[assignment]
    by_subject: dict[str, list[float]] = {}
    for number, pair in enumerate(pairs, 1):
        answer = choices.get(f"pair-{number:02}")
        if answer is None:
            raise click.ClickException(f"Pair {number} has no choice yet. Choose all of them.")
        value = _VALUES[answer]
        subject = str(pair["cell"]).partition(",")[0]
        by_subject.setdefault(subject, []).append(1 - value if pair["swapped"] else value)
    share = bootstrap([sum(values) / len(values) for values in by_subject.values()])
    return (
        f"{key['one']!r} was preferred to {key['other']!r} in {100 * share.mean:.0f} % "
        f"({100 * share.low:.0f} to {100 * share.high:.0f} %) of {len(pairs)} pairs."
    )


def _choices(test: Path) -> dict[str, str]:
    path = test / "choices.json"
    found: dict[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _pair(truth: torch.Tensor | None, two: list[Image.Image]) -> Image.Image:
    """Paste the true drawing above A and B."""
    paper = Image.new("RGB", (2 * _CELL + 3 * _GAP, 2 * (_CELL + _LABEL + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(paper)
    places = [(_GAP, "A", two[0]), (_CELL + 2 * _GAP, "B", two[1])]
    below = _CELL + _LABEL + 2 * _GAP
    if truth is not None:
        centre = (paper.width - _CELL) // 2
        pen.text((centre, _GAP), "true drawing", fill="black")
        _paste(paper, picture(truth), (centre, _GAP + _LABEL))
    for left, label, drawn in places:
        pen.text((left, below), label, fill="black")
        _paste(paper, drawn, (left, below + _LABEL))
    return paper


def _paste(paper: Image.Image, drawn: Image.Image, place: tuple[int, int]) -> None:
    paper.paste(drawn.resize((_CELL, _CELL), Image.Resampling.BICUBIC), place)


if __name__ == "__main__":
    main()
