"""The example that serves many fusions with one pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import serve
import torch
from click.testing import CliRunner
from serve import Request, Server, requests, table, tiny
from support.handmade import State


def test_a_served_image_is_that_of_its_fusion_alone(tmp_path: Path) -> None:
    pipe, artifacts = tiny(tmp_path, count=3)
    pipe.set_progress_bar_config(disable=True)
    pipe("a fox", num_inference_steps=1)  # leaves attributes on the pipeline
    before = State.of(pipe)
    server = Server(pipe, budget=2**20, steps=2)

    def image(server: Server, artifact: Path) -> Any:
        torch.manual_seed(0)
        return server.answer(Request(artifact, "a fox"))[0]

    served = [image(server, artifacts[i]) for i in (0, 1, 0, 2, 2)]
    server.close()
    assert State.of(pipe) == before
    for index, found in zip((0, 1, 0, 2, 2), served, strict=True):
        alone = Server(pipe, budget=0, steps=2)
        assert image(alone, artifacts[index]) == found
        alone.close()
    assert served[0] != served[1] != served[3]


def test_the_queue_asks_for_some_more_often(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    queue = requests(paths, 600)
    assert queue == requests(paths, 600)
    counts = [sum(each.artifact == path for each in queue) for path in paths]
    assert counts[0] > counts[1] > counts[2] > 0


def test_the_table_shows_percentiles() -> None:
    latencies = [serve.Latency(0.0, 0.001, i / 1000) for i in range(1, 101)]
    lines = table(latencies).splitlines()
    assert lines[0].split() == ["milliseconds", "p50", "p90", "p99"]
    assert lines[2].split() == ["swap", "1.00", "1.00", "1.00"]
    assert lines[3].split() == ["image", "50.50", "90.10", "99.01"]
    assert lines[4].split() == ["whole", "request", "51.50", "91.10", "100.01"]


@pytest.mark.slow
def test_the_example_runs() -> None:
    result = CliRunner().invoke(serve.main, ["--requests", "6", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert "6 requests for 4 fusions" in result.output
