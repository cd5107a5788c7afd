"""The benchmark of catalogues prints what it measured, and the example draws every pair."""

from __future__ import annotations

from pathlib import Path

import catalogue as example
import demo
import pytest
from benchmark import catalogue as bench
from click.testing import CliRunner

from klora_compile.cli import main as klora
from klora_runtime import Catalogue


def test_the_synthetic_layers_are_those_of_sdxl() -> None:
    table = bench.sdxl_table()
    assert len(table.places) == 722
    assert len({place.path for place in table.places}) == 722


def test_a_row_is_of_a_catalogue_that_can_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "synthetic.safetensors"
    row = bench.measured_row(4, path)
    assert row[0] == "4 x 4"
    assert len(Catalogue.open(path)) == 16
    bench.serve(path, 4, 10)
    assert "| fusion(a, b), thin |" in capsys.readouterr().out


def test_the_example_draws_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and so are its commands."""
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "klora", lambda *w: klora([*map(str, w)], standalone_mode=False))
    result = CliRunner().invoke(example.main, [str(tmp_path / "out"), "penguin", "frog"])
    assert result.exit_code == 0, result.output
    assert "10 pairs are on" in result.output
    assert (tmp_path / "out" / "pictures.png").read_bytes().startswith(b"\x89PNG")
