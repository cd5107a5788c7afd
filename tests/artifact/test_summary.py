"""A fusion in three lines: what it is, how large, what acts."""

from __future__ import annotations

from dataclasses import replace

from support.golden_fusion import golden_fusion
from support.handmade import hand_entry, hand_fusion

from klora_runtime.artifact.schedule import Reference, Rule

EVIL = "\x1b[2J\r\nall is well\u202e" + "x" * 500


def test_what_it_is_how_large_and_what_acts() -> None:
    fusion = replace(golden_fusion(), family="sd2")
    assert repr(fusion).splitlines() == [
        "Fusion of fox.safetensors and ink.safetensors by rule klora, for sd2",
        "5 layers in text_encoder, unet; 0.00 MB",
        "acting: 1 constant, 1 always content, 1 always style, 1 switching, 1 one-sided",
    ]
    layers = [hand_entry(f"unet.{leaf}", (1000, 1000), rank=100) for leaf in "ab"]
    assert repr(hand_fusion(*layers)).splitlines() == [
        "Fusion of no files by rule by hand",
        "2 layers in unet; 3.20 MB",
        "acting: 2 switching",
    ]


def test_a_thin_one_says_where_its_factors_are() -> None:
    whole = golden_fusion()
    entries = list(whole.entries)
    there = {
        slot: Reference(factors.scale, slot, "down", "up")
        for slot, factors in entries[4].factors.items()
    }
    entries[4] = replace(entries[4], factors={}, references=there)
    _, how_large, acting = repr(replace(whole, entries=tuple(entries))).splitlines()
    assert how_large == "5 layers in text_encoder, unet; factors in its sources"
    assert "1 switching" in acting


def test_names_out_of_strange_files_are_cut_and_harmless() -> None:
    whole = golden_fusion()
    source = replace(whole.sources["content"], file=EVIL)
    fusion = replace(
        whole,
        sources={f"content.{number}": source for number in range(64)},
        rule=Rule(EVIL, {}, {}),
        family=EVIL,
    )
    for text in (repr(fusion), fusion._repr_html_()):
        assert "60 more" in text
        assert all(character.isprintable() or character == "\n" for character in text)
    assert len(repr(fusion).splitlines()) == 3
    assert len(repr(fusion)) < 800


def test_a_notebook_shows_the_lines_and_the_map() -> None:
    html = golden_fusion()._repr_html_()
    assert repr(golden_fusion()) in html
    assert "Which LoRA acts in which layer of the denoiser" in html
