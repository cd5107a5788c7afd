"""A server with one pipeline and many fusions: it answers a queue and prints its latencies.

python examples/serve.py                                      tiny models, made on the spot
python examples/serve.py --model FOLDER a.klora.safetensors b.klora.safetensors

Each request names an artifact and a prompt. A library keeps recently used artifacts in memory. The
only handle swaps its fusion; this keeps the weights' memory, so nothing is compiled again. As in
practice, some artifacts are requested much more often than others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from klora_compile.report.table import text_table

PROMPTS = ("a fox", "a fox by the sea", "a fox at night", "portrait of a fox")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Request:
    """A request of a client."""

    artifact: Path
    prompt: str


@dataclass(frozen=True)
class Latency:
    """The seconds that one request took."""

    at_hand: float
    """Time to get the fusion: about 0 if it is kept, else the time to load it."""
    swap: float
    """Time to swap the fusion on the pipeline."""
    image: float
    """Time to sample."""

    @property
    def whole(self) -> float:
        """Time from taking the request to its image."""
        return self.at_hand + self.swap + self.image


def requests(artifacts: Sequence[Path], count: int, seed: int = 0) -> list[Request]:
    """Return a queue in which the n-th artifact has a share proportional to 1 / n."""
    chance = 1.0 / np.arange(1, len(artifacts) + 1)
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(artifacts), size=count, p=chance / chance.sum())
    return [Request(artifacts[c], PROMPTS[i % len(PROMPTS)]) for i, c in enumerate(chosen)]


class Server:
    """A pipeline with one handle, whose fusion is swapped for each request.

    Args:
        pipe: a diffusers pipeline.
        budget: bytes of fusions that may stay loaded.
        steps: number of steps of each image.
    """

    def __init__(self, pipe: Any, budget: int, steps: int) -> None:
        from klora_runtime import FusionLibrary

        self.library = FusionLibrary(budget, device=pipe.device)
        self._pipe, self._steps = pipe, steps
        self._handle: Any = None
        self._current: Any = None

    def answer(self, request: Request) -> tuple[Any, Latency]:
        """Return the image of a request."""
        from klora_runtime import apply_fusion

        begin = time.perf_counter()
        fusion = self.library.get(request.artifact)
        loaded = time.perf_counter()
        if self._handle is None:
            self._handle = apply_fusion(self._pipe, fusion)
        elif fusion is not self._current:
            self._handle.swap(fusion)
        self._current = fusion
        swapped = time.perf_counter()
        image = self._pipe(request.prompt, num_inference_steps=self._steps).images[0]
        done = time.perf_counter()
        return image, Latency(loaded - begin, swapped - loaded, done - swapped)

    def close(self) -> None:
        """Restore the pipeline."""
        if self._handle is not None:
            self._handle.remove()


def table(latencies: Sequence[Latency]) -> str:
    """Return percentiles in milliseconds, a row for each part of a request."""
    parts: dict[str, Callable[[Latency], float]] = {
        "fusion at hand": lambda each: each.at_hand,
        "swap": lambda each: each.swap,
        "image": lambda each: each.image,
        "whole request": lambda each: each.whole,
    }
    rows = []
    for name, part in parts.items():
        values = np.percentile([1000 * part(each) for each in latencies], PERCENTILES)
        rows.append([name, *(f"{value:.2f}" for value in values)])
    heads = ["milliseconds", *(f"p{percentile}" for percentile in PERCENTILES)]
    return text_table(rows, heads=heads, numbers=True)


def tiny(folder: Path, count: int = 4) -> tuple[Any, list[Path]]:
    """Return a tiny pipeline with random weights, and artifacts for it."""
    from tiny_pipeline import tiny_lora, tiny_pipeline

    from klora_compile import compile_fusion
    from klora_runtime import save_fusion

    pipe = tiny_pipeline("sd1")
    content = tiny_lora(pipe, folder / "fox.safetensors", seed=0)
    artifacts = []
    for index in range(count):
        style = tiny_lora(pipe, folder / f"style{index}.safetensors", seed=1 + index)
        artifacts.append(folder / f"{index}.klora.safetensors")
        save_fusion(compile_fusion(content, style, device="cpu"), artifacts[-1])
    return pipe, artifacts


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A diffusers folder.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--requests", "count", default=40, show_default=True, help="Length of the queue.")
@click.option("--steps", default=8, show_default=True, help="Steps of each image.")
@click.option("--budget", default=2**30, show_default=True, help="Bytes of fusions to keep loaded.")
def main(
    artifacts: tuple[Path, ...],
    model: Path | None,
    device: str,
    count: int,
    steps: int,
    budget: int,
) -> None:
    """Answer a queue of requests and print the percentiles of their latency."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            pipe, files = tiny(Path(folder))
        else:
            from diffusers import DiffusionPipeline

            pipe, files = DiffusionPipeline.from_pretrained(model).to(device), list(artifacts)
        if not files:
            raise click.UsageError("name the artifacts that fit the model.")
        pipe.set_progress_bar_config(disable=True)
        server = Server(pipe, budget, steps)
        latencies = [server.answer(request)[1] for request in requests(files, count)]
        click.echo(f"{count} requests for {len(files)} fusions, {len(server.library)} kept loaded")
        click.echo(table(latencies))
        server.close()


if __name__ == "__main__":
    main()
