"""The result as a Markdown table with an explanation of its columns."""

from __future__ import annotations

from benchmark.contestants import KINDS
from benchmark.race import Result, Row
from klora_compile.report.summary import bytes_text
from klora_compile.report.table import markdown_table

_HEADINGS = (
    "",
    "seconds per image",
    "ratio to bare",
    "ratio of processor time",
    "peak memory",
    "first image",
    "switch",
    "on disk",
    "difference",
)


def race_table(result: Result) -> str:
    """Return a heading, the table, and an explanation."""
    lines = [
        f"{result.model}, {result.dtype}, {result.resolution} x {result.resolution} pixels, "
        f"{result.steps} steps, rank {result.rank}, {result.switching} of {result.layers} layers "
        f"switch; {result.device}; {result.rounds} rounds in turns",
        "",
        markdown_table(_HEADINGS, map(_cells, result.rows)),
        "",
        "Medians with 95 % bootstrap intervals; ratios are taken within each round, to the bare "
        "model equally compiled; of processor time too, for others may use the machine. First "
        "image: load, attach and run, measured once, the base model there already. Peak memory: "
        "until then, base weights included. Switch: all layers at once. Difference: of the "
        "latents, relative, to literal K-LoRA.",
        *_floor(result),
    ]
    return "\n".join(lines)


def _floor(result: Result) -> list[str]:
    """Return lines about the least possible cost of mode branch."""
    floor = result.branch_floor
    if result.branch_bytes is None or floor is None or result.branch_share is None:
        return []
    return [
        f"Branch multiplies {100 * result.branch_share:.1f}% more than the bare model. "
        f"It moves {bytes_text(result.branch_bytes)} more through memory per image; "
        f"at the {bytes_text(int(result.bandwidth))}/s that a large copy reaches here, "
        f"and nothing kept in caches, its ratio is {floor:.3f} at least."
    ]


def _cells(row: Row) -> list[str]:
    return [
        KINDS[row.name].what + (", compiled" if row.compiled else ""),
        f"{row.seconds:.3g} ({row.spread[0]:.3g} to {row.spread[1]:.3g})",
        _interval(row.ratio, row.ratio_interval),
        _interval(row.work_ratio, row.work_interval),
        "–" if row.peak_bytes is None else bytes_text(row.peak_bytes),
        f"{row.first_image_seconds:.3g} s",
        "–" if row.switch_seconds is None else f"{1000 * row.switch_seconds:.3g} ms",
        "–" if row.bytes_on_disk is None else bytes_text(row.bytes_on_disk),
        "–" if row.difference is None else f"{row.difference:.1e}",
    ]


def _interval(ratio: float | None, ends: tuple[float, float] | None) -> str:
    if ratio is None or ends is None:
        return "–"
    return f"{ratio:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
