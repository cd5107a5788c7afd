"""From a pipeline's results to one file: what a pipeline takes and gives, sheets, animations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image, ImageDraw
from support.shipped import PROMPT, pixels

from klora_compile.sampling import labels
from klora_compile.sampling.album import write_shots
from klora_compile.sampling.pictures import Request, Shot, arguments, sample
from klora_compile.sampling.sheet import Row, contact_sheet
from klora_runtime import KloraError
from klora_runtime.errors import ConfigError


class _Pipe:
    """As much of a pipeline as sampling looks at."""

    def __init__(self, result: Any = None) -> None:
        self.result = result
        self.calls: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []

    def set_progress_bar_config(self, **config: Any) -> None:
        self.bars.append(config)


class _Plain(_Pipe):
    def __call__(self, prompt: str, num_inference_steps: int = 9, generator: Any = None) -> Any:
        self.calls.append({"steps": num_inference_steps, "seed": generator.initial_seed()})
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class _Video(_Pipe):
    def __call__(
        self,
        prompt: str,
        num_frames: int = 3,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        assert output_type == "pil"
        return self.result


class _Unconditional(_Pipe):
    def __call__(self, batch_size: int = 1, generator: Any = None, height: int = 8) -> Any: ...


class _Editing(_Pipe):
    def __call__(self, prompt: str, image: Any, generator: Any = None) -> Any: ...


@pytest.mark.parametrize(
    ("pipe", "settings", "message"),
    [
        (
            _Plain(),
            {"guidance_scale": 2.0},
            "--guidance: _Plain does not take it (guidance_scale); of the options of this command "
            "it takes --prompt, --steps, --seed.",
        ),
        (
            _Plain(),
            {"negative_prompt": ""},
            "--negative-prompt: _Plain does not take it (negative_prompt); of the options of this "
            "command it takes --prompt, --steps, --seed.",
        ),
        (
            _Unconditional(),
            {},
            "--prompt: _Unconditional does not take it (prompt); of the options of this command "
            "it takes --seed, --height.",
        ),
        (
            _Editing(),
            {},
            "_Editing needs image, which this command has no option for; sample with apply_fusion "
            "in Python.",
        ),
    ],
)
def test_what_a_pipeline_does_not_take_is_wrong_usage(
    pipe: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments(pipe, Request((PROMPT,), settings=settings))
    assert str(caught.value) == message


def test_options_that_are_not_given_are_left_to_the_pipeline() -> None:
    pipe = _Plain(SimpleNamespace(images=[Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))]))
    request = Request(("a", "b"), 3, 2, {"num_inference_steps": None, "guidance_scale": None})
    shots = list(sample(pipe, request))
    assert [(shot.prompt, shot.seed) for shot in shots] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    assert {len(shot.frames) for shot in shots} == {1}
    assert pipe.calls == [{"steps": 9, "seed": seed} for seed in (3, 4, 3, 4)]
    assert [bar["desc"] for bar in pipe.bars] == [f"picture {n} of 4" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            ValueError("`height` has to be\ndivisible by 8"),
            "_Plain failed at prompt 'a fox in ink', seed 0: ValueError: `height` has to be "
            "divisible by 8",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "_Plain failed at prompt 'a fox in ink', seed 0: OutOfMemoryError: CUDA out of memory. "
            "Try a smaller --height and --width, or --dtype bfloat16.",
        ),
        (
            SimpleNamespace(audios=[1]),
            "_Plain gave a SimpleNamespace with neither images nor frames; sample with "
            "apply_fusion in Python.",
        ),
        (
            SimpleNamespace(images=[[1]]),
            "_Plain gave a list where a picture was expected; sample with apply_fusion in Python.",
        ),
    ],
)
def test_a_pipeline_that_fails_is_one_error(result: Any, message: str) -> None:
    with pytest.raises(KloraError) as caught:
        list(sample(_Plain(result), Request((PROMPT,))))
    assert str(caught.value) == message


def test_a_sheet_holds_every_picture_as_it_is_and_its_labels() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff", "#ff00ff"]
    pictures = [Image.new("RGB", (50, 40), colour) for colour in colours]
    rows = [Row("a fox", pictures[:3]), Row("", pictures[3:])]
    sheet = contact_sheet(rows, ["seed 0", "seed 1", "seed 2"])
    assert sheet.size == (26 + 2 * 6 + 3 * (50 + 6), 12 + 2 * 6 + 2 * (40 + 6))
    for index, picture in enumerate(pictures):
        place = (38 + index % 3 * 56, 24 + index // 3 * 46)
        box = (*place, place[0] + 50, place[1] + 40)
        assert sheet.crop(box).tobytes() == picture.tobytes()
    dark = [sheet.crop(box).convert("L").getextrema()[0] < 100 for box in LABELS.values()]
    assert dict(zip(LABELS, dark, strict=True)) == {
        "first row": True,
        "empty row": False,
        "headings": True,
        "between": False,
    }


#: Boxes of the sheet above: left, top, right, bottom.
LABELS = {
    "first row": (0, 24, 32, 64),
    "empty row": (0, 70, 32, 110),
    "headings": (38, 0, 206, 23),
    "between": (38, 65, 206, 69),
}


def test_long_labels_are_wrapped_and_end_with_an_ellipsis() -> None:
    font = labels.font_for("word", 12)
    lines = labels.wrapped("word " * 500 + "x" * 500, font, 96).splitlines()
    assert len(lines) == 24
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 96 + 12 for line in lines)
    assert labels.wrapped("x" * 50, font, 96).replace("\n", "") == "x" * 50
    tall = contact_sheet([Row("word " * 60, [Image.new("RGB", (16, 16))])], ["seed 0"])
    assert tall.height > 15 * 12


def test_labels_take_a_font_that_has_their_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    monkeypatch.setattr(labels, "_FONTS", ("nowhere.ttf", str(wide)))
    assert labels.font_for("a fox", 12).getname()[0] != "DejaVu Sans"
    assert labels.font_for("a café — лиса", 12).getname()[0] == "DejaVu Sans"


def frames(count: int, size: int = 8) -> tuple[Image.Image, ...]:
    pictures = [Image.new("RGB", (size, size), (20 * n, 0, 90)) for n in range(count)]
    for n, picture in enumerate(pictures):
        ImageDraw.Draw(picture).point((n % size, 0), fill="#ffffff")
    return tuple(pictures)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_one_video_makes_an_animation(tmp_path: Path, ending: str) -> None:
    shots = list(sample(_Video(SimpleNamespace(frames=[list(frames(3))])), Request((PROMPT,))))
    output = tmp_path / f"fox.{ending}"
    assert write_shots(shots, output) == "an animation of 3 frames"
    with Image.open(output) as animation:
        assert animation.n_frames == 3
        animation.seek(2)
        assert pixels(animation) == pixels(frames(3)[2])
        assert animation.info["duration"] == 120


def test_videos_make_a_row_of_frames_each(tmp_path: Path) -> None:
    shots = [Shot(PROMPT, seed, frames(40), True, 1.0) for seed in (0, 1)]
    output = tmp_path / "fox.png"
    assert write_shots(shots, output) == "a sheet of 2 videos, 16 of 40 frames each"
    chosen = [0, 3, 5, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 36, 39]
    rows = [Row(f"{PROMPT} (seed {n})", [frames(40)[i] for i in chosen]) for n in (0, 1)]
    assert pixels(output) == pixels(contact_sheet(rows, [f"frame {i}" for i in chosen]))


def test_frames_as_arrays_are_pictures_too() -> None:
    video = torch.linspace(0, 1, 2 * 4 * 4 * 3).reshape(1, 2, 4, 4, 3).numpy()
    (shot,) = sample(_Video(SimpleNamespace(frames=video)), Request((PROMPT,)))
    assert shot.is_video
    assert [frame.size for frame in shot.frames] == [(4, 4), (4, 4)]
    assert shot.frames[1].getpixel((3, 3)) == (250, 252, 255)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("encoding error 5"), "encoding error 5"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def save(image: Image.Image, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a pict")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    output = tmp_path / "fox.png"
    output.write_bytes(b"mine")
    with pytest.raises(KloraError) as caught:
        write_shots([Shot(PROMPT, 0, frames(1), False, 1.0)], output, overwrite=True)
    assert str(caught.value) == f"{output} cannot be written: {words}."
    assert output.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [output]
