"""The map of a fusion for notebooks: true to the timelines, small, and safe to show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise, product
from xml.etree import ElementTree

import pytest
from support.golden_fusion import golden_fusion, switching_entry

from klora_runtime.artifact.blocks import blocks
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.palette import colours, mixed, parts_of
from klora_runtime.artifact.schedule import Slot
from klora_runtime.artifact.schedule_html import schedule_html
from klora_runtime.artifact.timeline import Timeline

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<script>alert("1")</script>\x1b[2J\u202e\' onload=x &amp;'
BLANK = "nothing"
FUSION, ENTRY = golden_fusion(), switching_entry()


def layer(module: str, timeline: Timeline) -> Entry:
    return replace(ENTRY, module=module, timeline=timeline)


def fusion_of(entries: Sequence[Entry]) -> Fusion:
    return replace(FUSION, entries=tuple(entries))


def one_hot(*starts: float) -> Timeline:
    turns = [index % 2 for index in range(len(starts) + 1)]
    coefficients = {
        "content": tuple(1.0 - turn for turn in turns),
        "style": tuple(float(turn) for turn in turns),
    }
    return Timeline((0.0, *starts), coefficients)


def parsed(html: str) -> ElementTree.Element:
    """The tree; that it is one means that every text was escaped."""
    return ElementTree.fromstring(html)


def grid(html: str) -> list[list[str]]:
    """Colour of each row at each column of the map."""
    heat = parsed(html).find(f".//{SVG}svg/{SVG}svg")
    assert heat is not None
    columns, rows = (int(size) for size in heat.attrib["viewBox"].split()[2:])
    cells = [[BLANK] * columns for _ in range(rows)]
    for path in heat.iter(f"{SVG}path"):
        shapes = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\3z", path.attrib["d"])
        assert "".join("M{} {}h{}v{}h-{}z".format(*s, s[2]) for s in shapes) == path.attrib["d"]
        for left, top, width, height in (map(int, shape) for shape in shapes):
            for row, column in product(range(top, top + height), range(left, left + width)):
                assert cells[row][column] == BLANK
                cells[row][column] = path.attrib["fill"]
    return cells


def expected_grid(fusion: Fusion, columns: int) -> list[list[str]]:
    palette = colours(fusion.slots)

    def colour(entry: Entry, progress: float) -> str:
        parts = parts_of(entry.timeline.at(progress))
        rgb = mixed([(palette[slot], part) for slot, part in parts.items()])
        return "#{:02x}{:02x}{:02x}".format(*rgb) if parts else BLANK

    return [
        [colour(entry, (column + 0.5) / columns) for column in range(columns)]
        for block in blocks(fusion)
        for entry in block.acting().entries
    ]


def test_the_map_is_what_the_timelines_say() -> None:
    fading = Timeline((0.0, 0.25, 0.5), {"content": (0.0, 1.0, 0.25), "style": (0.0, 0.0, -0.75)})
    modules = [f"down_blocks.0.attentions.{index}.to_q" for index in range(5)]
    twice, brief = one_hot(1 / 3, 0.9), one_hot(0.5, 0.5001)
    timelines = [one_hot(0.25), twice, twice, fading, brief]
    fusion = fusion_of([layer(*pair) for pair in zip(modules, timelines, strict=True)])
    found = grid(schedule_html(fusion, ""))
    assert found == expected_grid(fusion, 480)
    assert found[3][:120] == [BLANK] * 120


def test_weights_act_in_the_map() -> None:
    fusion = fusion_of([layer("mid_block.attentions.0.to_q", one_hot(0.5))])
    (row,) = grid(schedule_html(fusion, "", {"style": 0.0}))
    assert row == ["#2667a8"] * 240 + [BLANK] * 240


def test_it_has_a_title_a_legend_block_names_and_an_axis() -> None:
    names = [f"down_blocks.{block}.attentions.0.to_{leaf}" for block in (0, 1) for leaf in "qkv"]
    html = schedule_html(fusion_of([layer(name, one_hot(0.5)) for name in names]), "a\nb", {}, 0.25)
    tree = parsed(html)
    texts = [text for text in tree.itertext() if text.strip()]
    assert texts == [
        "a\nb",
        "Which LoRA acts in which layer of the denoiser",
        " content\u2003",
        " style\u2003",
        "unet.down_blocks.0.attentions.0: 3 layers",
        "unet.down_blocks.0.attentions.0",
        "unet.down_blocks.1.attentions.0: 3 layers",
        "unet.down_blocks.1.attentions.0",
        "progress now: 0.25",
        "0",
        "1",
        "progress of sampling",
    ]
    assert 'd="M120.0 0v48.0"' in html or 'd="M120.0 0v48"' in html


def test_names_that_would_not_fit_are_tooltips_only() -> None:
    names = [f"transformer_blocks.{index}.attn.to_q" for index in range(400)]
    tree = parsed(schedule_html(fusion_of([layer(name, one_hot(0.5)) for name in names]), ""))
    beside = [t for t in tree.iter(f"{SVG}text") if t.attrib.get("text-anchor") == "end"]
    heights = [float(text.attrib["y"]) for text in beside if text.text != "1"]
    assert 30 <= len(heights) <= 41
    assert all(after - before >= 11.9 for before, after in pairwise(heights))
    assert len(list(tree.iter(f"{SVG}title"))) == 400


def test_names_out_of_strange_files_are_only_text() -> None:
    slots = {EVIL: Slot("content", ()), "style": Slot("style", ())}
    timeline = Timeline((0.0, 0.5), {EVIL: (1.0, 0.0), "style": (0.0, 1.0)})
    entry = replace(layer(f"{EVIL}.0.to_q", timeline), component=EVIL)
    fusion = replace(fusion_of([entry]), slots=slots)
    tree = parsed(schedule_html(fusion, f"of {EVIL}".replace("\x1b", "?")))
    tags = {element.tag.removeprefix(SVG) for element in tree.iter()}
    assert tags == {"div", "pre", "strong", "span", "svg", "path", "rect", "title", "text"}
    assert not [name for element in tree.iter() for name in element.attrib if name[:2] == "on"]
    texts = [text for text in tree.itertext() if "script" in text]
    assert len(texts) == 4
    assert all("\x1b" not in text and len(text) < 80 for text in texts)


def test_no_file_makes_it_large() -> None:
    names = [f"transformer_blocks.{index // 10}.attn.to_{index % 10}" for index in range(20_000)]
    usual = [layer(name, one_hot((i + 1) / 801)) for i, name in enumerate(names[:800])]
    assert len(schedule_html(fusion_of(usual), "")) < 50_000

    restless = [one_hot(*accumulate([1 / 2_000] * count)) for count in (1_899, 1_900)]
    many = [layer(name, restless[i // 20 % 2]) for i, name in enumerate(names)]
    html = schedule_html(fusion_of(many), "")
    assert len(html) < 500_000
    assert "(one layer in 20 is drawn)" in html
    assert len(grid(html)) == 1_000


@pytest.mark.parametrize("every", ["unet", "none"])
def test_nothing_to_draw_is_said(every: str) -> None:
    text = [entry for entry in FUSION.entries if entry.component != every]
    chosen = text if every == "unet" else []
    html = schedule_html(fusion_of(chosen), "")
    assert "<em>No layer of the denoiser acts.</em>" in html
    assert f"{SVG}svg" not in {element.tag for element in parsed(html).iter()}


def test_coefficients_of_any_size_are_drawn() -> None:
    huge = Timeline((0.0,), {"content": (1e308,), "style": (-1e308,)})
    (row,) = grid(schedule_html(fusion_of([layer("conv_in", huge)]), "", {"style": 100.0}))
    assert len(set(row)) == 1
    assert row[0] not in (BLANK, "#000000")


def test_numbers_of_any_length_have_an_order() -> None:
    names = ["b.10.q", "b.9.q", f"b.{'9' * 5_000}.q", "b.010.k", "b.x.q"]
    order = blocks(fusion_of([layer(name, one_hot()) for name in names]))
    assert [block.name[5:12] for block in order] == ["b", "b.9", "b.010", "b.10", "b.99999"]
