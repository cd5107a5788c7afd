"""The part of the workshop that shows how small an artifact becomes: a row for every form."""

from __future__ import annotations

import pytest
from benchmark import size
from click.testing import CliRunner


@pytest.mark.slow
def test_the_example_prints_a_row_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "TOLERANCES", (0.1,))
    monkeypatch.setattr(size, "OF_LORAS", (0.1,))
    result = CliRunner().invoke(size.main, ["--steps", "2", "--pictures", "1"])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows]
    assert names[2:] == [
        "as it was",
        "--compress 0.1",
        "mixed precision, 2 bits and signs",
        "mixed precision, 3 bits and signs",
        "--compress 0.1 --compress-by lora",
        "--thin",
        "the bare model, without LoRAs",
    ]
    assert rows[7][-1] == "equal |"
    small, two, three, _, _, bare = (
        0.0 if "equal" in row[-1] else float(row[-1].removesuffix(" dB |")) for row in rows[3:]
    )
    assert small > three + 3 > two + 3
    assert small > bare + 10
