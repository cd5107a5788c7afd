"""``klora card``: what a card says, that it only says, and that equal input is equal bytes."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cards import card_of, rows, section, split, tokens
from support.shipped import Shipped, error_of, klora, pixels

from klora_compile.report.card import model_card
from klora_compile.report.card_facts import CardFacts
from klora_compile.report.licences import licence_fields, licence_sentences
from klora_runtime import load_fusion, save_fusion
from klora_runtime.__about__ import INSTALL, INSTALL_RUNTIME
from klora_runtime.families.catalogue import FAMILIES, family_name

BASE = "stabilityai/stable-diffusion-2-1"


def test_front_matter_with_everything(stated_artifact: Path) -> None:
    front, _ = split(card_of(stated_artifact, "--base-model", BASE, "--license", "Fox & Ink 2"))
    assert front == {
        "library_name": "klora",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "klora", "diffusers", "text-to-image"],
        "base_model": BASE,
        "base_model_relation": "adapter",
        "instance_prompt": "sks fox, in ink_wash style",
        "license": "other",
        "license_name": "fox-ink-2",
    }


def test_front_matter_says_only_what_was_given(shipped: Shipped) -> None:
    front, body = split(card_of(shipped.artifact))
    assert front == {
        "library_name": "klora",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "klora", "diffusers", "text-to-image"],
    }
    assert section(body, "Base model").startswith("Not stated.")
    assert "BASE-MODEL stands for the folder or the id of yours." in body


def test_the_hub_reads_the_front_matter(stated_artifact: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card_of(stated_artifact, "--base-model", BASE, "--license", "mit")).data
    assert data.library_name == "klora"
    assert data.base_model == BASE
    assert data.license == "mit"
    assert data.to_dict()["instance_prompt"] == "sks fox, in ink_wash style"


@pytest.mark.parametrize(
    ("given", "sources", "fields"),
    [
        (None, (None, None), {}),
        ("Apache-2.0", ("mit", None), {"license": "apache-2.0"}),
        (None, ("cc-by-4.0", "CC-BY-4.0"), {"license": "cc-by-4.0"}),
        (None, ("mit", None), {"license": "other"}),
        (
            None,
            ("CreativeML Open RAIL-M", "mit"),
            {"license": "other", "license_name": "creativeml-open-rail-m-and-mit"},
        ),
        ("私的利用", (), {"license": "other"}),
        ("--- x: y\n#", (), {"license": "other", "license_name": "x-y"}),
    ],
)
def test_licences(
    given: str | None, sources: tuple[str | None, ...], fields: dict[str, str]
) -> None:
    assert licence_fields(given, sources) == fields


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("mit", []),
        ("Fox Terms (notebooks, and more)", []),
        (None, ["fox.safetensors states no licence: ask its author before you pass this file on."]),
        ("cc-by-nc-4.0", ["The licence of fox.safetensors forbids commercial use."]),
        ("CC BY-ND 4.0", ["The licence of fox.safetensors forbids changed versions, and a fused"]),
        (
            "cc-by-nc-nd-4.0",
            [
                "The licence of fox.safetensors forbids changed",
                "The licence of fox.safetensors for",
            ],
        ),
    ],
)
def test_a_card_says_what_licences_forbid(
    shipped: Shipped, licence: str | None, told: list[str]
) -> None:
    source = replace(load_fusion(shipped.artifact).sources["content"], license=licence)
    first, *sentences = licence_sentences("mit", {"content": source})
    assert first == "Licence of the fused file: mit."
    assert len(sentences) == len(told)
    assert all(map(str.startswith, sentences, told))


#: Family -> class of diffusers that samples with it, what of what, tag on the Hub.
CARDS: dict[str | None, tuple[str, str, str | None]] = {
    "sd1": ("StableDiffusionPipeline", "text-to-image", "stable-diffusion"),
    "sd2": ("StableDiffusionPipeline", "text-to-image", "stable-diffusion"),
    "sdxl": ("StableDiffusionXLPipeline", "text-to-image", "stable-diffusion-xl"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", "image-to-image", "stable-diffusion-xl"),
    "sd3": ("StableDiffusion3Pipeline", "text-to-image", "sd3"),
    "flux.1": ("FluxPipeline", "text-to-image", "flux"),
    "chroma": ("ChromaPipeline", "text-to-image", None),
    "flux.2": ("Flux2Pipeline", "text-to-image", "flux2"),
    "qwen-image": ("QwenImagePipeline", "text-to-image", "qwen-image"),
    "z-image": ("ZImagePipeline", "text-to-image", "z-image"),
    "wan": ("WanPipeline", "text-to-video", None),
    "hunyuan-video": ("HunyuanVideoPipeline", "text-to-video", None),
    "ltx": ("LTXPipeline", "text-to-video", None),
    "lumina2": ("Lumina2Pipeline", "text-to-image", "lumina2"),
    "anima": ("AnimaModularPipeline", "text-to-image", None),
    "krea-2": ("Krea2Pipeline", "text-to-image", "krea2"),
    "auraflow": ("AuraFlowPipeline", "text-to-image", None),
    "ltx-2": ("LTX2Pipeline", "text-to-video", None),
    "hidream-i1": ("HiDreamImagePipeline", "text-to-image", "hidream"),
    "hunyuan-video-1.5": ("HunyuanVideo15Pipeline", "text-to-video", None),
    "hunyuan-image": ("HunyuanImagePipeline", "text-to-image", None),
    "wan-vace": ("WanVACEPipeline", "text-to-video", None),
    "qwen-image-2.1": ("QwenImage21Pipeline", "text-to-image", None),
    "kandinsky-5": ("Kandinsky5T2VPipeline", "text-to-video", None),
    "pixart": ("PixArtSigmaPipeline", "text-to-image", None),
    "sana": ("SanaPipeline", "text-to-image", "sana"),
    "cogview-4": ("CogView4Pipeline", "text-to-image", None),
    "cogvideox": ("CogVideoXPipeline", "text-to-video", "cogvideox"),
    "mochi-1": ("MochiPipeline", "text-to-video", None),
    "ideogram-4": ("Ideogram4Pipeline", "text-to-image", "ideogram4"),
    "flux.3": ("Flux3ModularPipeline", "text-to-image", None),
    "ernie-image": ("ErnieImagePipeline", "text-to-image", None),
    "minimax-h3": ("MiniMaxH3ModularPipeline", "text-to-video", None),
    "ace-step": ("AceStepPipeline", "text-to-audio", None),
    "cosmos-predict": ("Cosmos2_5_PredictBasePipeline", "text-to-video", None),
    "sana-video": ("SanaVideoPipeline", "text-to-video", None),
    "bria": ("BriaPipeline", "text-to-image", None),
    "fibo": ("BriaFiboPipeline", "text-to-image", None),
    "glm-image": ("GlmImagePipeline", "text-to-image", None),
    None: ("DiffusionPipeline", "text-to-image", None),
    "next": ("DiffusionPipeline", "text-to-image", None),
}


#: Of pipelines that load their parts when told; `klora sample` takes none.
MODULAR = ("anima", "flux.3", "minimax-h3")


@functools.cache
def family_card(artifact: Path, family: str | None) -> tuple[dict[str, Any], str]:
    fusion = replace(load_fusion(artifact), family=family)
    return split(model_card(fusion, CardFacts("a.klora.safetensors", 1, "0" * 64)))


@pytest.mark.parametrize("family", CARDS)
def test_the_family_gives_the_task_the_tag_and_the_pipeline(
    family: str | None, stated_artifact: Path
) -> None:
    pipeline, task, tag = CARDS[family]
    front, body = family_card(stated_artifact, family)
    assert front["pipeline_tag"] == task
    assert front["tags"][3:] == [task, *([tag] if tag else [])]
    assert f"from diffusers import {pipeline}\n" in body
    named = section(body, "Base model")
    assert named.startswith("Not stated." if family is None else f"{family_name(family)}: any")


def test_several_base_models_are_listed(stated_artifact: Path, tmp_path: Path) -> None:
    several = ("chroma", "flux.1")
    fusion = replace(load_fusion(stated_artifact), family=None, families=several)
    save_fusion(fusion, tmp_path / "a.safetensors")
    again = load_fusion(tmp_path / "a.safetensors")
    assert (again.family, again.families) == (None, several)
    body = split(model_card(again, CardFacts("a.klora.safetensors", 1, "0" * 64)))[1]
    assert section(body, "Base model").startswith("One of Chroma, FLUX.1: their LoRAs have these")
    assert "for chroma or flux.1" in repr(again)


@pytest.mark.parametrize(
    ("several", "task", "made"),
    [
        (("wan", "wan-vace"), "text-to-video", "frames = pipe(prompt="),
        (("chroma", "flux.1"), "text-to-image", "image = pipe(prompt="),
        (("cogview-4", "cogvideox"), None, "result = pipe(prompt="),
    ],
)
def test_several_base_models_have_the_task_that_all_of_them_have(
    several: tuple[str, ...], task: str | None, made: str, stated_artifact: Path
) -> None:
    fusion = replace(load_fusion(stated_artifact), family=None, families=several)
    front, body = split(model_card(fusion, CardFacts("a.klora.safetensors", 1, "0" * 64)))
    assert front.get("pipeline_tag") == task
    assert front["tags"] == ["lora", "klora", "diffusers", *([task] if task else [])]
    assert made in body
    assert "DiffusionPipeline.from_pretrained" in body
    assert ("klora sample" in body) == (task is not None)
    assert ".gif" in body or task != "text-to-video"
    assert " or ".join(f"`{FAMILIES[key].hub}`" for key in several) in body


def test_no_family_is_without_a_card() -> None:
    assert set(CARDS) - {None, "next"} == set(FAMILIES)


@pytest.mark.parametrize("family", CARDS)
def test_the_lines_of_a_card_are_python(family: str | None, stated_artifact: Path) -> None:
    """They name what is there: the pipeline's arguments, a model of the family."""
    body = family_card(stated_artifact, family)[1]
    (lines,) = (token.content for token in tokens(body) if token.info == "python")
    called = {
        ast.unparse(node.func): {word.arg for word in node.keywords}
        for node in ast.walk(ast.parse(lines))
        if isinstance(node, ast.Call)
    }
    takes_image = CARDS[family][1] == "image-to-image"
    expected = {"prompt", "num_inference_steps"} | ({"image"} if takes_image else set())
    assert called["pipe"] == expected
    assert ("load_image" in called) == takes_image
    assert ("pipe.load_components" in called) == (family in MODULAR)
    if family in FAMILIES:
        assert f"such as `{FAMILIES[family].hub}`." in body
    is_command = any(token.content.startswith("klora sample") for token in tokens(body))
    assert is_command == (family not in ("sdxl-refiner", "ace-step", *MODULAR))


def test_a_family_of_music_has_no_pictures(stated_artifact: Path) -> None:
    assert ".audios[0]\n" in section(family_card(stated_artifact, "ace-step")[1], "How to load")


def test_a_video_family_makes_videos(stated_artifact: Path) -> None:
    front, body = family_card(stated_artifact, "wan")
    assert "text-to-video" in front["tags"]
    loading = section(body, "How to load")
    assert ".frames[0]\n" in loading
    assert "-o video.gif\n" in loading


def test_sources_with_digests_licences_and_trigger_words(stated_artifact: Path) -> None:
    _, body = split(card_of(stated_artifact))
    lines = rows(section(body, "Sources"))
    files = [stated_artifact.with_name(name) for name in ("fox_v2.safetensors", "ink.safetensors")]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    sizes = [f"{path.stat().st_size:,}" for path in files]
    assert lines == [
        ["Role", "File", "Bytes", "Keys", "Ranks", "Licence", "Trigger words", "SHA-256"],
        ["content", files[0].name, sizes[0], "peft", "4", "Fox Terms 1.1", "sks fox", digests[0]],
        [
            *("style", files[1].name, sizes[1], "peft", "4", "not stated", "in ink_wash style"),
            digests[1],
        ],
    ]
    assert "No licence of its own is stated for the fused file." in section(body, "Sources")
    assert "ink.safetensors states no licence: ask its author" in section(body, "Sources")
    _, body = split(card_of(stated_artifact, "--license", "Ours *alone*"))
    assert "Licence of the fused file: Ours &#42;alone&#42;." in section(body, "Sources")


def test_the_schedule(stated_artifact: Path) -> None:
    _, body = split(card_of(stated_artifact))
    part = section(body, "Schedule")
    fusion = load_fusion(stated_artifact)
    lines = rows(part)
    settings = dict(line for line in lines if len(line) == 2)
    assert settings.items() >= {"rule": "klora", "pattern": "s", "alpha": "1.5"}.items()
    assert settings["gamma, computed"] == f"{fusion.rule.derived['gamma']['unet']:.6g}"
    fates = {line[1]: line[0] for line in lines if len(line) == 3}
    assert fates.pop("Fate") == f"Layers ({len(fusion.entries)})"
    assert sum(map(int, fates.values())) == len(fusion.entries)
    assert int(fates["switching"]) == sum(e.fate == "switching" for e in fusion.entries)
    (drawn,) = [t.content for t in tokens(part) if t.type == "fence"]
    shown = klora("inspect", stated_artifact).stdout
    names = [line.split()[0] for line in drawn.splitlines()[:-2]]
    assert names == re.findall(r"^(unet\S+) ", shown, re.MULTILINE)
    assert {len(line) for line in drawn.splitlines()[:-2]} == {max(map(len, names)) + 62}


def test_the_file(stated_artifact: Path) -> None:
    _, body = split(card_of(stated_artifact))
    facts = dict(rows(section(body, "File")))
    data = stated_artifact.read_bytes()
    assert facts["Name"] == stated_artifact.name
    assert facts["SHA-256"] == hashlib.sha256(data).hexdigest()
    assert facts["Size"].startswith(f"{len(data):,} bytes (")
    assert facts["Format"] == "klora-fusion, version 1"
    assert facts["Written by"] == load_fusion(stated_artifact).tool


def test_what_the_card_says_of_loading_works(
    stated_artifact: Path, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / stated_artifact.name).write_bytes(stated_artifact.read_bytes())
    (tmp_path / "model").symlink_to(shipped.model)
    monkeypatch.chdir(tmp_path)
    install = [t.content for t in tokens(split(card_of(stated_artifact))[1]) if t.info == "sh"]
    assert install[:2] == [f"{INSTALL_RUNTIME}\n", f"{INSTALL}\n"]
    blocks = {
        token.info: token.content
        for token in tokens(split(card_of(stated_artifact, "--base-model", "model"))[1])
        if token.type == "fence"
    }
    run: dict[str, Any] = {}
    code = blocks["python"].replace("steps=30", "steps=2")
    exec(code.replace("images[0]", "images[0].copy()"), run)
    assert run["image"].size == (32, 32)
    program, *arguments = shlex.split(blocks["sh"])
    assert program == "klora"
    assert klora(*arguments, "--steps", 2).exit_code == 0
    assert Path("picture.png").is_file()
    assert "sks fox, in ink_wash style" in arguments


def test_equal_input_gives_equal_bytes(stated_artifact: Path, tmp_path: Path) -> None:
    cards, maps = [], []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        copy = folder / stated_artifact.name
        copy.write_bytes(stated_artifact.read_bytes())
        card, picture = folder / "README.md", folder / "map.png"
        assert klora("card", copy, "-o", card, "--map", picture).exit_code == 0
        cards.append(card.read_bytes())
        maps.append(picture.read_bytes())
        assert sorted(p.name for p in folder.iterdir()) == [
            "README.md",
            stated_artifact.name,
            "map.png",
        ]
    assert cards[0] == cards[1]
    assert maps[0] == maps[1]
    assert str(tmp_path).encode() not in cards[0]


def test_the_map_is_drawn_and_linked_from_the_card(stated_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    card, picture = tmp_path / "README.md", tmp_path / "pictures" / "a map (1).png"
    result = klora("card", stated_artifact, "-o", card, "--map", picture)
    assert result.stdout == f"wrote {picture}\nwrote {card}\n"
    images = [t for t in tokens(split(card.read_text())[1]) if t.type == "image"]
    assert [t.attrs["src"] for t in images] == ["pictures/a%20map%20%281%29.png"]
    plotted = tmp_path / "plotted.png"
    klora("inspect", stated_artifact, "--plot", plotted)
    assert pixels(picture) == pixels(plotted)


def test_a_printed_card_is_the_written_one(stated_artifact: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert klora("card", stated_artifact, "-o", card).exit_code == 0
    assert card_of(stated_artifact) == card.read_bytes().decode()


def test_an_existing_card_needs_force(stated_artifact: Path, tmp_path: Path) -> None:
    card, picture = tmp_path / "README.md", tmp_path / "map.png"
    card.write_text("mine")
    wanted = f"{card} exists already; add --force (overwrite=True in Python) to replace it."
    assert error_of(klora("card", stated_artifact, "-o", card, "--map", picture), 1) == wanted
    assert (card.read_text(), picture.exists()) == ("mine", False)
    assert klora("card", stated_artifact, "-o", card, "--force").exit_code == 0
    assert card.read_text().startswith("---\n")
    picture.write_bytes(b"mine")
    wanted = f"{picture} exists already; add --force (overwrite=True in Python) to replace it."
    assert (
        error_of(klora("card", stated_artifact, "-o", tmp_path / "a", "--map", picture), 1)
        == wanted
    )


def test_a_failed_write_leaves_the_old_card(
    stated_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(path: Path, data: bytes) -> int:
        path.write_text("half a card")
        raise OSError(28, "No space left on device")

    card = tmp_path / "README.md"
    card.write_text("mine")
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    error = error_of(klora("card", stated_artifact, "-o", card, "--force"), 1)
    assert error == f"{card} cannot be written: No space left on device."
    assert card.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [card]


def test_without_matplotlib_nothing_is_written(
    stated_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("-o", tmp_path / "README.md", "--map", tmp_path / "map.png")
    error = error_of(klora("card", stated_artifact, *options), 1)
    assert error == (
        "the plot needs matplotlib, which is not installed. Run this in klora's source folder: "
        "pip install ./runtime '.[plot,sample]'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--map", "map.svg"), "--map map.svg: expected a name that ends in .png."),
        (
            ("-o", "map.png", "--map", "map.png"),
            "-o and --map are both map.png; name two files.",
        ),
        (
            ("--base-model", "a b"),
            "Invalid value for '--base-model': 'a b' is not an id on the",
        ),
        (("--base-model", "a/b/c"), "Invalid value for '--base-model': 'a/b/c' is not an id"),
        (("--base-model", "x\n---"), "Invalid value for '--base-model': 'x\\n---' is not an id"),
        (("-o", "nowhere/README.md"), "nowhere is not a folder; make it first."),
    ],
)
def test_wrong_usage_is_status_2(
    stated_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = options if "-o" in options else ("-o", "README.md", *options)
    assert error_of(klora("card", stated_artifact, *given), 2).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_gets_no_card(stated_artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.klora.safetensors"
    data = bytearray(stated_artifact.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    error = error_of(klora("card", damaged, "-o", tmp_path / "README.md"), 1)
    assert "its bytes do not match its digest" in error
    assert not (tmp_path / "README.md").exists()
