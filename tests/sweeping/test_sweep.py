"""Sweeps on a tiny pipeline: pictures, failures, resuming, sheets, and the command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.shipped import PROMPT, Shipped, error_of, klora, pixels

from klora_compile import Settings, compile_fusion
from klora_compile.rules import Direct, Klora
from klora_compile.sampling.making import read_making
from klora_compile.sweeping import Sweep, sweep
from klora_runtime import apply_fusion
from klora_runtime.errors import KloraError

COMMON = {"steps": 2}
AXES = {"bias": [-0.4, 0.4], "weight.style": [0.5, 1.0]}


@pytest.fixture
def pipe(shipped: Shipped) -> Any:
    return DiffusionPipeline.from_pretrained(shipped.model)


@pytest.fixture(scope="module")
def pair(shipped: Shipped) -> tuple[Path, Path]:
    return shipped.pair


def swept(
    pipe: Any, pair: tuple[Path, Path], axes: Mapping[str, Sequence[Any]], **options: Any
) -> Sweep:
    settings = {**COMMON, **options.pop("settings", {})}
    return sweep(pipe, *pair, axes, prompt=PROMPT, settings=settings, device="cpu", **options)


def made(pipe: Any, pair: tuple[Path, Path], axes: Any, **options: Any) -> list[str]:
    """The names of the pictures that a sweep makes."""
    names: list[str] = []
    swept(pipe, pair, axes, on_picture=lambda name, left: names.append(name), **options)
    return names


def test_every_cell_is_the_picture_of_its_own_fusion(pipe: Any, pair: tuple[Path, Path]) -> None:
    left: list[int] = []
    found = swept(pipe, pair, AXES, on_picture=lambda _, remaining: left.append(remaining))
    assert left == [6, 5, 4, 3, 2, 1]
    assert len(found.cells) == 6
    for cell in found.cells:
        bias = cell.settings.get("bias")
        rule = Direct() if bias is None else Klora(bias=bias)
        settings = Settings(weights={"style": cell.settings["weight.style"]})
        fusion = compile_fusion(*pair, rule, settings, device="cpu")
        with apply_fusion(pipe, fusion):
            generator = torch.Generator().manual_seed(0)
            alone = pipe(PROMPT, num_inference_steps=2, generator=generator).images[0]
        assert cell.picture is not None
        assert pixels(cell.picture) == pixels(alone), cell.name
    assert len({pixels(cell.picture) for cell in found.cells if cell.picture}) == 6


def test_a_sheet_shows_each_picture_in_its_place(pipe: Any, pair: tuple[Path, Path]) -> None:
    found = swept(pipe, pair, {"bias": [0.0, 0.4], "rule": ["direct", "klora"]})
    sheet, times = found.sheet(), 5  # 32 pixels, enlarged to 144 or more
    step = 32 * times + 6
    for cell in found.cells:
        right, below = len(found.grid.columns) - cell.column, len(found.grid.rows) - cell.row
        left, top = sheet.width - right * step, sheet.height - below * step
        shown = sheet.crop((left, top, left + 32 * times, top + 32 * times))
        assert cell.picture is not None
        small = shown.resize((32, 32), Image.Resampling.NEAREST)
        assert (pixels(small) == pixels(cell.picture)) != cell.repeats, cell.name
        if cell.repeats:
            assert shown.getpixel((1, 1)) == (238, 238, 238)
            assert len(set(shown.get_flattened_data())) > 2  # the reason
    assert [cell.repeats for cell in found.cells] == [False, True, True, False, False, False]


UNKNOWN_SLOT = {"label": "wrong", "rule": "groups", "table": {"content.3 *": "0:1"}}


def test_a_cell_that_fails_says_why_and_the_others_go_on(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    axes = {"cells": [UNKNOWN_SLOT, {"rule": "klora"}]}
    found = swept(pipe, pair, axes, folder=tmp_path / "cells")
    assert [cell.picture is None for cell in found.cells] == [False, True, False]
    assert str(found.cells[1].error).startswith("table: there is no LoRA 'content.3'; name one of")
    assert found.sheet().width > 0
    index = json.loads((tmp_path / "cells" / "index.json").read_text())
    assert index["cells"][1]["error"] == found.cells[1].error
    assert index["cells"][1]["file"] is None


def test_a_sweep_whose_cells_all_fail_is_an_error(pipe: Any, pair: tuple[Path, Path]) -> None:
    with pytest.raises(KloraError, match="every cell failed; the first one, direct sum: weights"):
        swept(pipe, pair, {"bias": [0.0, 0.1]}, settings={"weight.content.low": 0.5})
    pipe(PROMPT, num_inference_steps=1)


def test_a_sweep_goes_on_where_it_stopped(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cells"
    axes = {"bias": [-0.4, 0.0, 0.4]}

    def interrupt(_: str, left: int) -> None:
        if left == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(pipe, pair, axes, folder=folder, on_picture=interrupt)
    assert len(list(folder.glob("*.png"))) == 2
    assert made(pipe, pair, axes, folder=folder) == ["bias 0", "bias 0.4"]
    assert made(pipe, pair, axes, folder=folder) == []
    assert made(pipe, pair, {"bias": [0.0, 0.2]}, folder=folder) == ["bias 0.2"]
    (damaged,) = folder.glob("direct-*.png")
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert made(pipe, pair, axes, folder=folder) == ["direct sum"]
    again, fresh = swept(pipe, pair, axes, folder=folder), swept(pipe, pair, axes)
    for one, other in zip(again.cells, fresh.cells, strict=True):
        assert one.picture is not None
        assert other.picture is not None
        assert pixels(one.picture) == pixels(other.picture)


def test_a_folder_of_other_inputs_is_refused(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, axes = tmp_path / "cells", {"bias": [0.0]}
    swept(pipe, pair, axes, folder=folder)
    config = dict(pipe.scheduler.config)
    pipe.scheduler.register_to_config(_use_default_values=list(config)[::-1])
    assert made(pipe, pair, axes, folder=folder) == []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KloraError, match="holds pictures of other inputs") as raised:
        swept(pipe, (pair[1], pair[0]), axes, folder=folder)
    issues = " ".join(raised.value.issues)
    assert "loras.content.file: the folder was begun with fox.safetensors, found ink" in issues
    with pytest.raises(KloraError, match="mode: the folder was begun with auto, found branch"):
        swept(pipe, pair, axes, folder=folder, mode="branch")
    pipe.scheduler.register_to_config(steps_offset=1 - config["steps_offset"])
    with pytest.raises(KloraError, match="model: the folder was begun with"):
        swept(pipe, pair, axes, folder=folder)
    pipe.scheduler.register_to_config(steps_offset=config["steps_offset"])
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.01)
    with pytest.raises(KloraError, match="model: the folder was begun with"):
        swept(pipe, pair, axes, folder=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_something_else_is_refused(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("dear fox")
    with pytest.raises(KloraError, match="holds files that no sweep wrote"):
        swept(pipe, pair, {"bias": [0.0]}, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def by_command(shipped: Shipped, pair: tuple[Path, Path], *options: object) -> Any:
    fixed = ("--model", shipped.model, "--prompt", PROMPT, "--device", "cpu")
    return klora("sweep", *pair, *fixed, *options)


OPTIONS = ("--steps", "1,2", "--seed", "0,7", "--bias", "-0.4,0.4", "--weight", "style=0.5")


def test_the_command_writes_sheets_and_an_index(
    shipped: Shipped, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = by_command(shipped, pair, *OPTIONS, "-o", "grid.png", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["outputs"] == ["grid-1.png", "grid-2.png"]
    assert facts["columns"] == ["direct sum", "bias -0.4", "bias 0.4"]
    assert facts["rows"] == ["steps 1", "steps 2"]
    assert facts["sheets"] == ["seed 0", "seed 7"]
    assert facts["title"] == f"fox.safetensors + ink.safetensors: rule klora, {PROMPT}, style 0.5"
    assert Image.open("grid-1.png").size == Image.open("grid-2.png").size
    assert pixels(Path("grid-1.png")) != pixels(Path("grid-2.png"))
    assert len({cell["file"] for cell in facts["cells"]}) == 12
    again = by_command(shipped, pair, *OPTIONS, "-o", "grid.png", "--force")
    assert again.exit_code == 0, again.output
    assert "wrote grid-1.png, grid-2.png: 3 columns by 2 rows\nevery picture was there\n" in (
        again.stdout
    )


def test_a_cell_says_how_it_was_made_and_can_be_made_again(
    shipped: Shipped, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--steps", 2, "--bias", "-0.4,0.4", "--seed", 7, "-o", "grid.png")
    assert by_command(shipped, pair, *words).exit_code == 0
    cells = json.loads(Path("grid.cells/index.json").read_text())["cells"]
    cell = Path("grid.cells", cells[2]["file"])
    making = read_making(cell)
    assert (making.seed, making.rule, making.rule_settings["bias"]) == (7, "klora", 0.4)
    assert making.loras["content"].keys() == {"file", "sha256", "autov2", "autov3"}
    shown = klora("inspect", cell)
    assert "klora rule: klora" in shown.stdout
    assert "bias 0.4" in shown.stdout
    for bias, name in ((0.4, "right"), (0.3, "wrong")):
        compiled = klora(
            *("compile", *pair, "--bias", bias, "-o", f"{name}.klora.safetensors"),
            *("--device", "cpu"),
        )
        assert compiled.exit_code == 0, compiled.output
    model = ("--model", shipped.model, "--device", "cpu", "-o", "again.png")
    wrong = klora("sample", "wrong.klora.safetensors", "--again", cell, *model)
    assert "bias: expected 0.4, found 0.3" in error_of(wrong, 1)
    right = klora("sample", "right.klora.safetensors", "--again", cell, *model)
    assert right.exit_code == 0, right.output
    assert pixels(Path("again.png")) == pixels(cell)
    missing = klora("sample", "--again", cell, *model)
    assert "Missing argument 'FILE'" in error_of(missing, 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--bias", "0.1"), "a sweep takes 1 to 3 settings with several values, found 0"),
        (("--bias", "0,x"), "bias: expected a number, found x."),
        (("--bias", "0,2"), "bias: expected a number from -1 to 1, found 2.0."),
        (("--weight", "0.5,1"), "'0.5,1' is not SLOT=N,..."),
        (("--weight", "style=1", "--weight", "style=0,1"), "weight.style is named twice"),
        (("--mu", "1,2"), "mu: of the rules direct, klora none has this setting"),
        (("--bais", "1,2"), "No such option"),
        (("--bias", "0,1", "-o", "grid.gif"), "a .gif is for videos; name a .png."),
    ],
)
def test_options_that_are_wrong(
    shipped: Shipped,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = by_command(shipped, pair, "-o", "grid.png", *options)
    assert error in error_of(result, 2)
    assert list(tmp_path.iterdir()) == []
