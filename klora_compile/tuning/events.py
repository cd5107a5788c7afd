"""What happens on the page: the map follows a control at once, the picture follows after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from klora_compile.trying.names import RULE, rule_settings
from klora_compile.trying.studio import Picture, StoppedError
from klora_compile.tuning.controls import (
    BIAS,
    FURTHER,
    PATTERN,
    PROMPT,
    STEPS,
    Controls,
    Texts,
    Value,
    known_names,
)
from klora_compile.tuning.desk import Desk
from klora_compile.tuning.layout import Layout
from klora_compile.tuning.repeating import ENDING, Recipe, save_artifact
from klora_compile.tuning.schedule import map_html
from klora_runtime.errors import KloraError, shown

#: Pictures narrower than this are shown with sharp pixels.
_SMALL = 256

#: Gradio replaces it by that of the event.
_PROGRESS = gr.Progress()

_COPY = "(text) => { navigator.clipboard.writeText(text); }"


@dataclass(frozen=True)
class Events:
    """The answers of the page to its events, and their wiring."""

    desk: Desk
    first: Texts
    """The settings that the page starts with."""
    recipe: Recipe
    folder: Path
    """Where artifacts are saved."""

    @property
    def controls(self) -> Controls:
        """The controls of the page."""
        return Controls(self.desk.slots)

    def connect(self, page: Any, at: Layout) -> None:
        """Wire the components of a page."""
        values = list(at.controls.values())
        drawing = {
            "outputs": [at.picture, at.plain, at.status, at.strip, at.numbers],
            "show_progress_on": [at.status],
            "concurrency_id": "pictures",
            **_EVERY,
        }
        showing = {
            "inputs": [at.name, *values],
            "outputs": [at.map, at.status, at.commands],
            "concurrency_limit": 4,
            **_QUIET,
        }
        fitting = {
            "inputs": at.controls[RULE],
            "outputs": [at.controls[n] for n in (BIAS, PATTERN, FURTHER)],
            **_QUIET,
        }
        opened = page.load(self.load, None, values, **_PRIVATE)
        chosen = at.strip.select(self.go_back, at.numbers, values, **_PRIVATE)
        for begun in (opened, chosen):
            begun.then(self.fit_rule, **fitting)
        at.controls[RULE].change(self.fit_rule, **fitting)
        for shown_now in (
            gr.on(_changes(at), self.show, **showing),
            *(begun.then(self.show, **showing) for begun in (opened, chosen)),
        ):
            shown_now.then(self.draw_if, [at.follow, at.compare, *values], **drawing)
        gr.on([at.draw.click, at.compare.input], self.draw, [at.compare, *values], **drawing)
        self._connect_buttons(page, at, values)

    def _connect_buttons(self, page: Any, at: Layout, values: list[Any]) -> None:
        """Wire what draws nothing."""
        at.name.change(self.commands, [at.name, *values], at.commands, **_QUIET)
        at.save.click(self.save, [at.name, at.overwrite, *values], at.saved, **_QUIET)
        at.copy.click(None, at.commands, None, js=_COPY, **_PRIVATE)
        at.stop.click(self.stop, None, None, queue=False, **_PRIVATE)
        page.unload(self.leave)

    def load(self) -> tuple[Value, ...]:
        """Return values of the controls for a tab that opens: what was tried last, in any tab."""
        tried = self.desk.tried
        return self.controls.values(tried[0].settings if tried else self.first)

    def fit_rule(self, rule: str) -> list[Any]:
        """Show the controls that a rule has, and say what else it has."""
        own = rule_settings(rule)
        info = f"One NAME=VALUE a line; it wins over a control. Rule {rule}: {known_names(rule)}."
        return [gr.update(visible=n in own) for n in (BIAS, PATTERN)] + [gr.update(info=info)]

    def show(self, request: gr.Request, name: str, *values: Value) -> tuple[Any, ...]:
        """Show the map and the commands of settings; what the tab generates stops."""
        self.desk.stop(_tab(request))
        try:
            settings = self.controls.settings(values)
            fusion = self.desk.fusion(settings)
            return map_html(fusion), "", self._commands(name, settings)
        except KloraError as error:
            return gr.skip(), _wrong(error), gr.skip()

    def commands(self, name: str, *values: Value) -> Any:
        """Return the commands for another name of the artifact."""
        try:
            return self._commands(name, self.controls.settings(values))
        except KloraError:
            return gr.skip()

    def draw_if(
        self,
        request: gr.Request,
        follow: bool = True,
        compare: bool = True,
        progress: Any = _PROGRESS,
        *values: Value,
    ) -> Iterator[tuple[Any, ...]]:
        """Draw, if the page shall draw after each change."""
        if follow:
            yield from self.draw(request, compare, progress, *values)
        else:
            yield (gr.skip(),) * 5

    def draw(
        self,
        request: gr.Request,
        compare: bool = True,
        progress: Any = _PROGRESS,
        *values: Value,
    ) -> Iterator[tuple[Any, ...]]:
        """Draw the picture of settings, and then that of the plain sum."""
        run = self.desk.run(_tab(request))
        same = gr.skip()
        try:
            settings = self.controls.settings(values)
            made = run.picture(settings, _reporting(progress, "A", settings))
            strip, numbers = self._strip()
            yield _image(made), same, _took(made), strip, numbers
            if compare:
                beside = run.plain_sum(settings, _reporting(progress, "B", settings))
                yield same, _image(beside), _took(made, beside), same, same
            else:
                yield same, None, same, same, same
        except StoppedError:
            yield same, same, "stopped", same, same
        except KloraError as error:
            yield same, same, _wrong(error), same, same

    def go_back(self, numbers: list[int], event: gr.SelectData) -> Any:
        """Return the values of the controls of what was chosen on the strip."""
        tried = self.desk.numbered(numbers[event.index]) if event.index < len(numbers) else None
        if tried is None:
            return [gr.skip()] * len(self.controls.names)
        return self.controls.values(tried.settings)

    def stop(self, request: gr.Request) -> None:
        """Stop what the tab generates."""
        self.desk.stop(_tab(request))

    def leave(self, request: gr.Request) -> None:
        """Stop what a tab generates that was closed or loaded again."""
        self.desk.stop(_tab(request))

    def save(self, name: str, overwrite: bool, *values: Value) -> str:
        """Save the artifact of settings, and say where."""
        try:
            fusion = self.desk.fusion(self.controls.settings(values))
            path = save_artifact(fusion, self.folder, name or "", overwrite=overwrite)
            return f"wrote {escape(shown(path))}"
        except KloraError as error:
            return _wrong(error)

    def _commands(self, name: str, settings: Texts) -> str:
        artifact = f"{(name or '').strip().removesuffix(ENDING) or 'fusion'}{ENDING}"
        return self.recipe.commands(settings, artifact, self.desk.mode)

    def _strip(self) -> tuple[list[tuple[Any, str]], list[int]]:
        """Return what the strip shows, and the numbers of it."""
        tried = self.desk.tried
        shown_ones = [
            (each.thumbnail, self.controls.caption(each.settings, self.first)) for each in tried
        ]
        return shown_ones, [each.number for each in tried]


#: Of events that nobody shall call from outside the page.
_PRIVATE = {"api_visibility": "private"}
#: Of events of which the last one counts.
_EVERY = {"trigger_mode": "always_last", **_PRIVATE}
#: Of such events that take no time.
_QUIET = {"show_progress": "hidden", **_EVERY}


def _changes(at: Layout) -> list[Any]:
    """Return the events by which a user changes a control."""
    found = []
    for name, control in at.controls.items():
        if name in (PROMPT, FURTHER):
            found += [control.submit, control.blur]
        else:
            found.append(control.input)
    return found


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)


def _reporting(progress: Any, what: str, settings: Texts) -> Callable[[int], None]:
    """Return a callback that shows how far a picture is."""
    steps = settings.get(STEPS, "")
    total = int(steps) if steps.isdigit() else None

    def on_evaluation(done: int) -> None:
        within = done if total is None else min(done, total)
        progress((within, total), desc=f"drawing {what}")

    return on_evaluation


def _image(picture: Picture) -> Any:
    image = picture.shot.frames[0]
    return gr.update(value=image, elem_classes=["klora-pixels"] if image.width < _SMALL else [])


def _took(*pictures: Picture) -> str:
    times = [f"{n}: {each.shot.seconds:.2f} s" for n, each in zip("AB", pictures, strict=False)]
    first = pictures[0]
    parts = [*times, f"schedule {1e3 * first.changing:.0f} ms"]
    if first.deriving:
        parts.append(f"derived layers {first.deriving:.2f} s")
    return f"drawn. {', '.join(parts)}; mode {first.mode}"


def _wrong(error: KloraError) -> str:
    return f'<span class="klora-wrong" role="alert">{escape(str(error))}</span>'
