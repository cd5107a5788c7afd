"""``klora sample``: the pictures are those of the Python API; options, output, what help costs."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from PIL import Image
from support.lora_files import run_python
from support.pairs import slow
from support.shipped import PROMPT, Shipped, error_of, klora, pixels, sampled
from tiny_pipeline import tiny_pipeline

from klora_compile.commands.sampling_options import MODES
from klora_compile.sampling.pictures import OPTIONS
from klora_compile.sampling.sheet import Row, contact_sheet
from klora_runtime.layers import choice


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("klora_compile.sampling.run.load_pipeline", loaded)


def test_one_prompt_makes_the_picture_of_the_python_api(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    result = sampled(shipped, output, "--seed", 5, "--no-metadata")
    assert result.exit_code == 0, result.stderr
    assert pixels(output) == pixels(shipped.picture(seed=5))
    reference = tmp_path / "reference.png"
    shipped.picture(seed=5).save(reference)
    assert output.read_bytes() == reference.read_bytes()
    assert re.fullmatch(
        rf"wrote {re.escape(str(output))}: a picture; mode merge: every weight is a plain float32 "
        r"tensor; \d+\.\d\d s per picture\n",
        result.stdout,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.png", "reference.png"]


def test_all_options_reach_the_pipeline(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    options = "--steps 3 --guidance 4.5 --height 48 --width 40 --scheduler ddim --mode merge"
    negative, weights = ("--negative-prompt", "a dog"), ("--weight", "style=0.5")
    result = sampled(shipped, output, *options.split(), *negative, *weights)
    assert result.exit_code == 0, result.stderr
    wanted: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "height": 48,
        "width": 40,
        "negative_prompt": "a dog",
        "scheduler": DDIMScheduler,
        "weights": {"style": 0.5},
    }
    assert pixels(output) == pixels(shipped.picture(**wanted))
    plain = {"num_inference_steps": 3, "height": 48, "width": 40}
    for left_out in ("guidance_scale", "negative_prompt", "scheduler", "weights"):
        others = wanted | plain
        del others[left_out]
        assert pixels(output) != pixels(shipped.picture(**others)), left_out


def test_prompts_and_a_count_make_a_labelled_sheet(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    result = sampled(shipped, output, "--prompt", "a cat", "--count", 2, "--seed", 7)
    assert result.exit_code == 0, result.stderr
    assert "a sheet of 2 prompts by 2 seeds; mode merge" in result.stdout
    assert re.search(r"\d s per picture, the first \d+\.\d\d s\n$", result.stdout)
    seeds = (7, 8)
    rows = [Row(p, [shipped.picture(p, seed) for seed in seeds]) for p in (PROMPT, "a cat")]
    wanted = contact_sheet(rows, ["seed 7", "seed 8"])
    assert pixels(output) == pixels(wanted)


def test_a_picture_depends_on_its_prompt_and_seed_alone(shipped: Shipped, tmp_path: Path) -> None:
    sheet, alone = tmp_path / "sheet.png", tmp_path / "alone.png"
    size = ("--height", 48, "--width", 48)
    assert sampled(shipped, sheet, "--prompt", "a cat", "--count", 2, *size).exit_code == 0
    assert sampled(shipped, alone, "--seed", 1, *size).exit_code == 0
    picture, whole = Image.open(alone), Image.open(sheet)
    left, top = whole.width - 48 - 6, whole.height - 2 * (48 + 6)
    assert whole.crop((left, top, left + 48, top + 48)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("ending", ["jpg", slow("jpeg"), "webp", slow("PNG")])
def test_other_picture_formats(shipped: Shipped, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"fox.{ending}"
    assert sampled(shipped, output).exit_code == 0
    with Image.open(output) as picture:
        assert picture.format == {"jpg": "JPEG", "webp": "WEBP"}.get(ending.lower(), picture.format)
        if ending in ("webp", "PNG"):
            assert pixels(picture) == pixels(shipped.picture())


def test_a_failing_pipeline_ends_with_status_1(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", forward)
    assert error_of(sampled(shipped, tmp_path / "fox.png"), 1) == (
        "StableDiffusionPipeline failed at prompt 'a fox in ink', seed 0: RuntimeError: no kernel "
        "image is available"
    )


def test_an_animation_of_a_picture_is_wrong_usage(shipped: Shipped, tmp_path: Path) -> None:
    error = error_of(sampled(shipped, tmp_path / "fox.gif"), 2)
    assert error == f"-o {tmp_path / 'fox.gif'}: a .gif is for videos; name a .png."


def test_an_existing_file_needs_force(shipped: Shipped, tmp_path: Path, no_sampling: None) -> None:
    output = tmp_path / "fox.png"
    output.write_bytes(b"mine")
    assert error_of(sampled(shipped, output), 1) == (
        f"{output} exists already; add --force (overwrite=True in Python) to replace it."
    )
    assert output.read_bytes() == b"mine"


def test_force_overwrites(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    output.write_bytes(b"mine")
    assert sampled(shipped, output, "--force").exit_code == 0
    assert pixels(output) == pixels(shipped.picture())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere/fox.png", (), "{folder}/nowhere is not a folder; make it first."),
        (
            "fox.tiff",
            (),
            "-o {folder}/fox.tiff: expected a name that ends in .png, .jpg, .jpeg, .webp, or for "
            "one video in .gif or .webp; found .tiff.",
        ),
        (
            "fox",
            (),
            "-o {folder}/fox: expected a name that ends in .png, .jpg, .jpeg, .webp, or for one "
            "video in .gif or .webp; found no ending.",
        ),
        (
            "fox.gif",
            ("--count", 2),
            "-o {folder}/fox.gif: a .gif holds one video, and this would be 2; name a .png.",
        ),
        (
            "fox.png",
            ("--seed", 2**63 - 1),
            "--seed 9223372036854775807 and --count 1 go past 9223372036854775807.",
        ),
    ],
)
def test_a_bad_output_is_seen_before_the_work(
    shipped: Shipped,
    tmp_path: Path,
    no_sampling: None,
    name: str,
    options: tuple[object, ...],
    message: str,
) -> None:
    error = error_of(sampled(shipped, tmp_path / name, *options), 2)
    assert error == message.format(folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_artifact_is_no_output(shipped: Shipped, no_sampling: None) -> None:
    before = shipped.artifact.read_bytes()
    error = error_of(sampled(shipped, shipped.artifact, "--force"), 2)
    assert error == f"{shipped.artifact} is one of the inputs; name another file."
    assert shipped.artifact.read_bytes() == before


def test_a_folder_that_takes_no_files_is_seen_before_the_work(
    shipped: Shipped, tmp_path: Path, no_sampling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    output = tmp_path / "fox.png"
    assert (
        error_of(sampled(shipped, output), 1) == f"{output} cannot be written: Permission denied."
    )


def test_a_plain_lora_is_no_artifact(shipped: Shipped, tmp_path: Path, no_sampling: None) -> None:
    lora = Shipped(shipped.artifact.with_name("fox.safetensors"), shipped.model)
    error = error_of(sampled(lora, tmp_path / "fox.png"), 1)
    assert "A plain LoRA has to be compiled first" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weight", "subject=2"), "there is no slot subject; this fusion has content, style."),
        (("--device", "cuda:99"), "device cuda:99: torch sees "),
        (("--weight", "style"), "Invalid value for '--weight': 'style' is not SLOT=FACTOR."),
        (("--weight", "style=x"), "Invalid value for '--weight': 'x' is not NUMBER."),
        (
            ("--guidance", "nan"),
            "Invalid value for '--guidance' / '--guidance-scale': 'nan' is out of range for",
        ),
        (("--dtype", "int8"), "Invalid value for '--dtype' / '--torch-dtype': 'int8' is not"),
        (("--count", 0), "Invalid value for '--count' / '--num-images-per-prompt': 0 is not in"),
    ],
)
def test_wrong_usage_is_status_2(
    shipped: Shipped, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert error_of(sampled(shipped, tmp_path / "fox.png", *options), 2).startswith(message)


def test_modes_are_those_of_the_runtime() -> None:
    assert MODES == choice.MODES


@pytest.mark.parametrize("command", ["sample", "card"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom klora_compile.cli import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('modules:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    output = run_python(code).stdout
    assert f"{command} [OPTIONS] FILE" in output
    loaded = set(output.partition("modules: ")[2].split())
    assert "click" in loaded
    heavy = {"torch", "numpy", "safetensors", "diffusers", "transformers", "PIL", "matplotlib"}
    assert not loaded & heavy


def test_what_is_missing_is_named(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "klora_compile.sampling.run", raising=False)
    monkeypatch.delitem(sys.modules, "klora_compile.sampling.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert error_of(sampled(shipped, tmp_path / "fox.png"), 1) == (
        "klora sample needs PIL, which is not installed. Run this in klora's source folder: "
        "pip install ./runtime '.[plot,sample]'"
    )


def test_the_command_has_an_option_for_each_argument() -> None:
    taken = inspect.signature(type(tiny_pipeline("sd1")).__call__).parameters
    help_text = klora("sample", "--help").output
    assert set(OPTIONS) <= set(taken)
    assert all(option in help_text for option in OPTIONS.values())
