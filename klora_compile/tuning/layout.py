"""The components of the page and their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr

from klora_compile.rules.lookup import RULES
from klora_compile.trying.names import RULE, all_settings
from klora_compile.tuning.controls import (
    BIAS,
    CLOCK,
    FURTHER,
    PATTERN,
    PATTERNS,
    PROMPT,
    SEED,
    STEPS,
    Controls,
    Texts,
)
from klora_runtime.artifact.timeline import CLOCKS

_HOVER = (files(__package__) / "hover.js").read_text(encoding="utf-8")

#: Range of the sliders of weights; the box of further settings takes -100 to 100.
_WEIGHTS = (0.0, 2.0)
_MOST_STEPS = 100


@dataclass(frozen=True)
class Layout:
    """The components that events read or write."""

    controls: Mapping[str, Any]
    """By the names of :attr:`~klora_compile.tuning.controls.Controls.names`, in that order."""
    map: Any
    picture: Any
    plain: Any
    compare: Any
    follow: Any
    draw: Any
    stop: Any
    status: Any
    strip: Any
    numbers: Any
    """Numbers of what the strip of this tab shows."""
    commands: Any
    copy: Any
    name: Any
    overwrite: Any
    save: Any
    saved: Any


def lay_out(controls: Controls, first: Texts, title: str, artifact: str) -> Layout:
    """Place all components; call it inside ``gr.Blocks``.

    Args:
        controls: the controls.
        first: the settings that the page starts with.
        title: the heading.
        artifact: suggested name of the artifact.
    """
    gr.HTML(f"<h2>{escape(title)}</h2>", elem_id="title")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            named = _controls(controls, first)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            follow = gr.Checkbox(True, label="Draw after each change", elem_id="follow")
            compare = gr.Checkbox(True, label="Draw the plain sum too", elem_id="compare")
        with gr.Column(scale=7, min_width=480):
            status = gr.HTML(elem_id="status")
            with gr.Row(elem_id="pictures"):
                picture = _picture("A: these settings", "picture")
                plain = _picture("B: the plain sum", "plain")
            strip = gr.Gallery(
                label="Tried; click one to go back to its settings",
                elem_id="strip",
                columns=8,
                height=170,
                fit_columns=False,
                allow_preview=False,
                object_fit="contain",
                format="png",
                buttons=[],
                interactive=False,
            )
            shown = gr.HTML(elem_id="map", js_on_load=_HOVER)
            with gr.Row(equal_height=True):
                name = gr.Textbox(artifact, label="Artifact", elem_id="name", scale=4)
                overwrite = gr.Checkbox(label="Replace a file", elem_id="overwrite", min_width=120)
                save = gr.Button("Save artifact", elem_id="save", min_width=120)
            saved = gr.HTML(elem_id="saved")
            commands = gr.Code(
                language="shell",
                label="The same on the command line",
                elem_id="commands",
                interactive=False,
                lines=2,
                wrap_lines=True,
                show_line_numbers=False,
                buttons=[],
            )
            copy = gr.Button("Copy command", elem_id="copy")
    numbers = gr.State([])
    return Layout(
        *(named, shown, picture, plain, compare, follow, draw, stop, status, strip, numbers),
        *(commands, copy, name, overwrite, save, saved),
    )


def _controls(controls: Controls, first: Texts) -> dict[str, Any]:
    """Place the controls, with the values of the first settings."""
    values = dict(zip(controls.names, controls.values(first), strict=True))
    known = all_settings()
    made: dict[str, Any] = {
        PROMPT: gr.Textbox(values[PROMPT], label="Prompt", lines=2, elem_id=PROMPT),
        RULE: gr.Dropdown(list(RULES), value=values[RULE], label="Rule", elem_id=RULE),
        BIAS: gr.Slider(
            -1.0, 1.0, values[BIAS], step=0.05, label="Bias", info=known[BIAS].help, elem_id=BIAS
        ),
        PATTERN: gr.Radio(list(PATTERNS), value=values[PATTERN], label="Pattern", elem_id=PATTERN),
        CLOCK: gr.Radio(list(CLOCKS), value=values[CLOCK], label="Clock", elem_id=CLOCK),
    }
    for name, slot in zip(controls.weights, controls.slots, strict=True):
        made[name] = gr.Slider(
            *_WEIGHTS, values[name], step=0.05, label=f"Weight of {slot}", elem_id=f"weight-{slot}"
        )
    with gr.Row():
        made[STEPS] = gr.Slider(
            1, _MOST_STEPS, values[STEPS], step=1, label="Steps", elem_id=STEPS, min_width=140
        )
        made[SEED] = gr.Number(values[SEED], precision=0, label="Seed", elem_id=SEED, min_width=100)
    with gr.Accordion("Further settings", open=bool(values[FURTHER])):
        made[FURTHER] = gr.Textbox(
            values[FURTHER],
            show_label=False,
            lines=3,
            placeholder="guidance=4",
            info="One NAME=VALUE a line; it wins over a control.",
            elem_id=FURTHER,
        )
    return {name: made[name] for name in controls.names}


def _picture(label: str, name: str) -> Any:
    return gr.Image(
        label=label,
        elem_id=name,
        format="png",
        type="pil",
        height=330,
        interactive=False,
        buttons=["download", "fullscreen"],
    )
