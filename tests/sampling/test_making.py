"""A picture says how it was made: in words of A1111, as JSON, and so that klora repeats it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.hub import Hub
from support.shipped import PROMPT, Shipped, error_of, klora, pixels, sampled
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import compile_fusion, read_adapter, thin
from klora_runtime import load_fusion, save_fusion

OPTIONS = (
    *("--seed", 5, "--guidance", 4.5, "--height", 48, "--width", 40, "--scheduler", "ddim"),
    *("--mode", "merge", "--negative-prompt", 'a dog, "old"', "--weight", "style=0.5"),
)


@pytest.fixture
def desk(shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shipped:
    """The artifact and the model where a user has them."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(shipped.artifact, tmp_path)
    (tmp_path / "model").symlink_to(shipped.model)
    return Shipped(Path(shipped.artifact.name), Path("model"))


def texts(picture: Path) -> dict[str, str]:
    with Image.open(picture) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_text_is_that_of_a1111(desk: Shipped) -> None:
    assert sampled(desk, Path("fox.png"), *OPTIONS).exit_code == 0
    prompt, negative, settings = texts(Path("fox.png"))["parameters"].split("\n")
    assert prompt == PROMPT
    assert negative == 'Negative prompt: a dog, "old"'
    loras = {s.file: s.sha256[:10] for s in load_fusion(desk.artifact).sources.values()}
    hashes = ", ".join(f"{Path(file).stem}: {short}" for file, short in loras.items())
    assert settings == (
        "Steps: 2, Sampler: DDIM, CFG scale: 4.5, Seed: 5, Size: 40x48, Model: model, "
        f'Lora hashes: "{hashes}", klora artifact: {desk.artifact}, '
        f"klora artifact hash: {digest(desk.artifact)[:10]}, klora rule: klora, klora settings: "
        '"alpha 1.5, beta 0.5, content_weight 1, gamma paper, network_alpha applied, pattern s, '
        "semantics paper, style_weight 1, text_encoder both, tie content, top_k auto, unpaired "
        'keep", klora weights: style 0.5, '
        "Version: klora 0.1.0"
    )


def test_a_picture_is_made_again(desk: Shipped, tmp_path: Path) -> None:
    turbo = compile_fusion(tiny_lora(tiny_pipeline("sd1"), tmp_path / "t.safetensors", seed=7))
    save_fusion(turbo, tmp_path / "turbo.klora.safetensors")
    always = ("--always", "turbo=turbo.klora.safetensors:0.5")
    assert sampled(desk, Path("fox.png"), *OPTIONS, *always).exit_code == 0
    result = klora("sample", "--again", "fox.png", "--device", "cpu", "-o", "again.png")
    assert result.exit_code == 0, result.output
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
    other = klora("sample", "--again", "fox.png", "--seed", 6, "--device", "cpu", "-o", "6.png")
    assert other.exit_code == 0, other.output
    assert sampled(desk, Path("six.png"), *OPTIONS, *always, "--seed", 6).exit_code == 0
    assert Path("6.png").read_bytes() == Path("six.png").read_bytes()
    assert pixels(Path("6.png")) != pixels(Path("fox.png"))


def test_a_sheet_is_made_again_elsewhere(
    desk: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files lie beside the picture, and the user is in another folder."""
    words = ("--prompt", "a cat", "--count", 2)
    assert sampled(desk, Path("sheet.png"), *words).exit_code == 0
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    result = klora("sample", "--again", "../sheet.png", "--device", "cpu", "-o", "again.png")
    assert result.exit_code == 0, result.output
    assert Path("again.png").read_bytes() == Path("../sheet.png").read_bytes()


def test_what_is_on_the_hub_is_found_there(
    hub: Hub, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        path.relative_to(shipped.model).as_posix(): path.read_bytes()
        for path in shipped.model.rglob("*")
        if path.is_file()
    }
    model = hub.add("me/model", files)
    fused = hub.add("me/fused", {"a.klora.safetensors": shipped.artifact.read_bytes()})
    words = ("sample", "me/fused", "--model", "me/model", "--prompt", PROMPT, "--steps", 2)
    assert klora(*words, "--device", "cpu", "-o", "fox.png").exit_code == 0
    model.commit({"model_index.json": b"{}"})
    fused.commit({"a.klora.safetensors": b"newer"})
    result = klora("sample", "--again", "fox.png", "--device", "cpu", "-o", "again.png")
    assert result.exit_code == 0, result.output
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()


def test_another_artifact_is_refused(desk: Shipped, tmp_path: Path) -> None:
    assert sampled(desk, Path("fox.png")).exit_code == 0
    before = digest(desk.artifact)
    save_fusion(
        compile_fusion(tiny_lora(tiny_pipeline("sd1"), tmp_path / "t.safetensors", seed=7)),
        desk.artifact,
        overwrite=True,
    )
    words = ("sample", "--again", "fox.png", "--device", "cpu", "-o", "x.png")
    error = error_of(klora(*words), 1)
    assert error == (
        "these are not the artifacts that the picture was made with:\n  - the artifact: expected "
        f"{desk.artifact} with sha256 {before}, found {digest(desk.artifact)}"
    )
    assert not Path("x.png").exists()
    desk.artifact.unlink()
    assert "does not exist" in klora(*words).output


def test_no_metadata(desk: Shipped) -> None:
    assert sampled(desk, Path("fox.png"), "--no-metadata").exit_code == 0
    assert texts(Path("fox.png")) == {}
    reference = Path("reference.png")
    Image.open("fox.png").save(reference)
    assert Path("fox.png").read_bytes() == reference.read_bytes()
    assert sampled(desk, Path("told.png")).exit_code == 0
    assert pixels(Path("told.png")) == pixels(reference)


def test_no_path_is_told(desk: Shipped, tmp_path: Path) -> None:
    words = ("sample", tmp_path / desk.artifact, "--model", tmp_path / "model", "--prompt", "a")
    made = klora(*words, "--steps", 1, "--device", "cpu", "-o", "fox.png")
    assert made.exit_code == 0, made.output
    assert not any(str(tmp_path) in text for text in texts(Path("fox.png")).values())


def test_autov3_is_told_where_the_file_is(desk: Shipped, shipped: Shipped) -> None:
    files = {
        slot: shipped.artifact.with_name(f"{name}.safetensors")
        for slot, name in (("content", "fox"), ("style", "ink"))
    }
    adapters = {slot: read_adapter(path) for slot, path in files.items()}
    save_fusion(thin(load_fusion(desk.artifact), adapters), "thin.klora.safetensors")
    sources = [word for slot, path in files.items() for word in ("--source", f"{slot}={path}")]
    small = Shipped(Path("thin.klora.safetensors"), desk.model)
    assert sampled(small, Path("fox.png"), *sources).exit_code == 0
    told = json.loads(texts(Path("fox.png"))["klora_making"])["loras"]
    for slot, path in files.items():
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        assert told[slot]["autov2"] == digest(path)[:10]
        assert told[slot]["autov3"] == hashlib.sha256(data[begin:]).hexdigest()[:12]


def test_inspect_shows_it(desk: Shipped) -> None:
    assert sampled(desk, Path("fox.png"), *OPTIONS).exit_code == 0
    result = klora("inspect", "fox.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(texts(Path("fox.png"))["parameters"])
    assert f"artifact: {desk.artifact}, sha256 {digest(desk.artifact)}" in result.stdout
    facts = json.loads(klora("inspect", "fox.png", "--json").stdout)
    assert facts["settings"]["negative_prompt"] == 'a dog, "old"'
    assert (facts["prompts"], facts["seed"], facts["weights"]) == ([PROMPT], 5, {"style": 0.5})


def told(path: Path, making: Any) -> Path:
    """A picture with a text of its own."""
    info = PngInfo()
    info.add_itxt("klora_making", making if isinstance(making, str) else json.dumps(making))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_text_that_is_not_valid(desk: Shipped, tmp_path: Path) -> None:
    assert sampled(desk, Path("fox.png")).exit_code == 0
    good = json.loads(texts(Path("fox.png"))["klora_making"])
    assert klora("inspect", told(tmp_path / "good.png", good)).exit_code == 0
    wrong: list[Any] = ["", "[]", "{}", "[" * 100_000, {**good, "prompts": []}]
    wrong += [{**good, "prompts": [1]}, {**good, "seed": "1"}, {**good, "count": 0}]
    wrong += [{**good, "artifact": {"file": 1}}, {**good, "weights": {"style": "x"}}]
    wrong += [{**good, "model": None}, {**good, "loras": [1]}, {**good, "settings": None}]
    wrong += [{**good, "facts": {}}, {**good, "loras": {"a": {"file": "a", "sha256": "b"}}}]
    for making in wrong:
        path = told(tmp_path / "wrong.png", making)
        for words in (("inspect", path), ("sample", "--again", path, "-o", "x.png")):
            error = error_of(klora(*words), 2)
            assert error.endswith("is not valid. Get the picture again."), making


def test_what_a_picture_says_cannot_act_in_a_terminal(desk: Shipped, tmp_path: Path) -> None:
    assert sampled(desk, Path("fox.png")).exit_code == 0
    good = json.loads(texts(Path("fox.png"))["klora_making"])
    path = told(tmp_path / "odd.png", {**good, "prompts": ["\x1b[2J"], "model": "\x1b]0;a"})
    assert "\x1b" not in klora("inspect", path).stdout


def test_pictures_that_say_nothing(tmp_path: Path) -> None:
    plain, none = tmp_path / "plain.png", tmp_path / "none.png"
    Image.new("RGB", (4, 4)).save(plain)
    none.write_bytes(b"text")
    assert "does not say how klora made it" in error_of(klora("inspect", plain), 2)
    assert "is no picture that can be read" in error_of(klora("inspect", none), 2)
