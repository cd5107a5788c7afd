"""The schedule as a picture: what its labels say, that none overlaps, its colours and formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.golden_fusion import golden_fusion, switching_entry
from support.lora_files import GOLDEN
from support.shipped import error_of, klora

from klora_compile.report.plot import plot_schedule, schedule_figure
from klora_compile.report.plot_theme import THEMES
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.palette import colours
from klora_runtime.artifact.schedule import Slot
from klora_runtime.artifact.timeline import Timeline

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")

from matplotlib.colors import to_hex
from matplotlib.text import Text

FUSION, ENTRY = golden_fusion(), switching_entry()
LONG = "a-very-long-name-of-a-lora-that-someone-trained-on-forty-pictures-v12-final.safetensors"


def layer(module: str, ratio: float, timeline: Timeline = ENTRY.timeline) -> Entry:
    scores = {"klora": {**ENTRY.scores["klora"], "ratio": ratio}}
    return replace(ENTRY, module=module, scores=scores, timeline=timeline)


def blocks(sizes: Sequence[int], spread: float = 1.0) -> Fusion:
    """A fusion of blocks with these numbers of layers, whose ratios are far from each other."""
    entries = [
        layer(f"up_blocks.{block}.attentions.{block}.to_{number}", spread ** (number - 2))
        for block, size in enumerate(sizes)
        for number in range(size)
    ]
    return replace(FUSION, entries=tuple(sorted(entries, key=lambda entry: entry.layer)))


def many_loras() -> Fusion:
    """Three contents, two styles and an accelerator, in files with long names."""
    roles = {"content.1": "content", "content.2": "content", "content.3": "content"}
    roles |= {"style.1": "style", "style.2": "style", "turbo": "always"}
    sources = {slot: replace(FUSION.sources["content"], file=f"{slot}-{LONG}") for slot in roles}
    slots = {slot: Slot(role, (slot,)) for slot, role in roles.items()}
    starts = tuple(number / len(roles) for number in range(len(roles)))
    turns = {
        slot: tuple(float(number == place) for place in range(len(roles)))
        for number, slot in enumerate(roles)
    }
    factors = dict.fromkeys(roles, ENTRY.factors["content"])
    entry = replace(
        layer("mid_block.attentions.0.to_q", 1.0, Timeline(starts, turns)), factors=factors
    )
    return replace(FUSION, sources=sources, slots=slots, entries=(entry,))


CASES = {
    "golden": FUSION,
    "small blocks": blocks([1] * 60 + [40] + [1] * 60),
    "blocks of all sizes": blocks([2, 12, 2, 12, 2, 2, 30, 1, 1, 1]),
    "far ratios": blocks([5, 5], spread=30.0),
    "noise": replace(blocks([5, 5]), clock="noise"),
    "many LoRAs": many_loras(),
}


def drawn(fusion: Fusion, theme: str = "light") -> Any:
    figure = schedule_figure(fusion, None, THEMES[theme])
    figure.draw_without_rendering()
    return figure


def texts(figure: Any) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", CASES)
def test_no_label_overlaps_another_or_leaves_the_picture(name: str) -> None:
    figure = drawn(CASES[name])
    boxes = {text: text.get_window_extent() for text in texts(figure)}
    assert len(boxes) > 6
    for one, other in combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one.get_text(), other.get_text())
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes.items():
        inside = box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
        assert inside, text.get_text()


def test_large_blocks_keep_their_names() -> None:
    figure = drawn(blocks(([1] * 7 + [3]) * 10))
    names = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert {f"unet.up_blocks.{n}.attentions.{n}" for n in range(7, 80, 8)} <= names
    assert 10 < len(names) < 80


@pytest.mark.parametrize("name", CASES)
def test_the_legend_is_below_everything_and_names_the_files(name: str) -> None:
    figure = drawn(CASES[name])
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(top <= axes.get_tightbbox().y0 for axes in figure.axes)
    labels = [text.get_text() for text in legend.get_texts()]
    if name == "golden":
        assert labels == ["content: fox.safetensors", "style: ink.safetensors"]
    if name == "many LoRAs":
        assert len(labels) == 6
        assert labels[1] == f"content.2: {f'content.2-{LONG}'[:30]}…{LONG[-30:]}"
        assert labels[5].startswith("turbo (at every step): turbo-a-very")


def test_each_of_several_loras_has_its_own_colour() -> None:
    names = {f"content.{n}": Slot("content", ()) for n in range(1, 5)}
    names |= {f"style.{n}": Slot("style", ()) for n in range(1, 5)}
    found = colours({**names, "merged": Slot("merged", ()), "turbo": Slot("always", ())})
    for one, other in combinations(found, 2):
        distance = sum((a - b) ** 2 for a, b in zip(found[one], found[other], strict=True))
        assert distance > 45**2, (one, other)
    first = colours({"content": Slot("content", ()), "style": Slot("style", ())})
    assert list(first.values()) == [found["content.1"], found["style.1"]]
    assert len(set(colours({f"style.{n}": Slot("style", ()) for n in range(12)}).values())) == 12


@pytest.mark.parametrize("theme", THEMES)
def test_themes(tmp_path: Path, theme: str) -> None:
    idle = Timeline((0.0, 0.5), {"content": (1.0, 0.0), "style": (0.0, 0.0)})
    fusion = replace(FUSION, entries=(layer("mid_block.attentions.0.to_q", 1.0, idle),))
    plot_schedule(fusion, tmp_path / "map.png", theme=theme)
    with Image.open(tmp_path / "map.png") as image:
        pixels = image.convert("RGB")
    blank = THEMES[theme].blank
    assert "#{:02x}{:02x}{:02x}".format(*blank) == THEMES[theme].paper
    assert pixels.getpixel((2, 2)) == blank
    counts = {colour: n for n, colour in pixels.getcolors(1 << 20) or []}
    assert counts[blank] > 2 * counts[colours(fusion.slots)["content"]] > 0
    figure = drawn(fusion, theme)
    for text in texts(figure):
        assert to_hex(text.get_color()) == THEMES[theme].ink, text.get_text()


def test_svg_is_text_and_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_schedule(FUSION, tmp_path / f"{name}.svg", theme="dark")
    written = (tmp_path / "a.svg").read_text()
    assert written == (tmp_path / "b.svg").read_text()
    assert ">content: fox.safetensors</text>" in written
    assert "<dc:date>" not in written


def test_the_command_draws_in_a_theme(tmp_path: Path) -> None:
    for theme in THEMES:
        picture = tmp_path / f"{theme}.png"
        result = klora("inspect", GOLDEN, "--plot", picture, "--theme", theme)
        assert result.exit_code == 0, result.output
        with Image.open(picture) as image:
            assert image.convert("RGB").getpixel((2, 2)) == THEMES[theme].blank
    assert "--theme is of the picture that --plot draws" in error_of(
        klora("inspect", GOLDEN, "--theme", "dark"), 2
    )
