"""The script that shows how much of a compile is reading: it runs, and a slow disk is slow."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from benchmark import reading
from click.testing import CliRunner
from safetensors.torch import save_file

from klora_compile.reading.files.lora_file import open_lora

KEY = "unet.conv_in.lora_A.weight"


def test_it_runs() -> None:
    command = ["--share", "0.001", "--rounds", "1", "--rank", "2", "--disk", "100"]
    result = CliRunner().invoke(reading.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    title, *rows = result.stdout.splitlines()
    assert re.fullmatch(r"sdxl: 8 layers, rank 2, two files of \d+ MB; CPU, \d+ threads", title)
    assert [row.split("  ")[0] for row in rows] == ["disk", "warm", "100 MB/s"]
    assert rows[0].endswith("hidden at most")
    assert all(re.search(r"\d s \(\d+%\) +\d+\.\d%$", row) for row in rows[1:])


def test_each_part_of_a_file_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    path, block = tmp_path / "lora.safetensors", 2**20
    save_file({KEY: torch.zeros(3 * block, dtype=torch.uint8)}, str(path))
    with reading.simulated_disk(block), open_lora(path) as file:
        assert len(file.sha256) == 64
        file.tensor(KEY)
    assert sum(waited) == 4  # three blocks of numbers, and the header
