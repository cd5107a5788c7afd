"""Searches from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from klora_compile.calibrating.pictures import OwnPictures
from klora_compile.judging.judge import OWN_PICTURES, About
from klora_compile.searching.result import Search
from klora_compile.sources import Lora
from klora_compile.sweeping.result import OnPicture


def search(
    pipe: Any,
    content: Lora | Sequence[Lora],
    style: Lora | Sequence[Lora] = (),
    axes: Mapping[str, Iterable[Any]] | None = None,
    *,
    prompt: str | Sequence[str],
    judge: str | Callable[[Image.Image, About], float] = OWN_PICTURES,
    candidates: int = 24,
    seeds: Iterable[int] = range(8),
    best: int = 5,
    own: OwnPictures | None = None,
    settings: Mapping[str, Any] | None = None,
    always: Mapping[str, Lora] | None = None,
    folder: str | Path | None = None,
    mode: str = "auto",
    device: str = "auto",
    draw_seed: int = 0,
    check: bool = True,
    on_picture: OnPicture | None = None,
) -> Search:
    """Search for settings of a fusion whose pictures a judge likes best.

    Candidates are drawn at random from all combinations of values, and the rules take turns. All
    meet the plain sum on two pictures or more; the better part meets it on twice as many, and so
    on (successive halving, arXiv 1502.07943), until the best few have all prompts and seeds. Then
    the best one and the plain sum are compared on as many further seeds, by which nothing was
    chosen. A candidate of which a picture fails is out, and says why.

    Args:
        pipe: a diffusers pipeline.
        content: the LoRA of a subject, or several; see :func:`~klora_compile.compile_fusion`.
        style: the LoRA of a style, or several.
        axes: settings with their values, such as ``{"rule": ["direct", "np"], "weight.style": [1,
            1.4]}``; names as for :func:`~klora_compile.sweeping.sweep`, without those of the
            sampling. By default rule, bias and weights.
        prompt: what the pictures show, or several such texts.
        judge: ``own-pictures`` (similarity to each LoRA's own pictures: 0 like those of the others,
            1 like its own), ``MODULE:FUNCTION``, ``FILE.py:FUNCTION``, or a function that takes a
            picture and what is known of it and returns a number; higher is better.
        candidates: how many are drawn, at least 1.
        seeds: seeds for each prompt.
        best: how many candidates the last round and the sheet have, at least 1.
        own: prompts that show each LoRA alone, and how many such pictures; by default the LoRAs'
            trigger words. They are made if a prompt is named or the judge is ``own-pictures``.
        settings: settings of all candidates, by name, such as steps.
        always: name -> a LoRA that acts beside the others at every step.
        folder: keeps each picture as it comes; the same search goes on there, and judges anew.
        mode: see :func:`~klora_runtime.apply_fusion`.
        device: where to measure.
        draw_seed: seed of the drawing of candidates.
        check: whether to compare the best one and the plain sum on further seeds.
        on_picture: called before each picture that is made, with its name and how many remain at
            most.

    Returns:
        The search: candidates with their scores, the plain sum's, and sheets.

    Raises:
        ConfigError: a setting is unknown, out of its range, or acts in no candidate; the judge is
            unknown; or a LoRA has no prompt of its own.
        LoraError: a file cannot be read completely.
        PairingError: the LoRAs are for different models.
        KloraError: the folder holds pictures of other inputs; the judge raises, or returns no
            finite number; every candidate failed, or the plain sum did.
    """
    from klora_compile.searching.plan import plan_of
    from klora_compile.searching.run import searched
    from klora_compile.sweeping.run import How
    from klora_compile.trying.loras import loras_to_try

    values: dict[str, tuple[Any, ...]] = {
        name: (value,) for name, value in (settings or {}).items()
    }
    values |= {name: tuple(each) for name, each in (axes or {}).items()}
    values["prompt"] = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    values["seed"] = tuple(seeds)
    loras = loras_to_try(content, style, always=always, device=device)
    plan = plan_of(
        values,
        loras.adapters,
        count=candidates,
        judge=judge,
        own=own or OwnPictures(),
        seed=draw_seed,
        best=best,
        checked=check,
    )
    how = How(None if folder is None else Path(folder), mode)
    return searched(pipe, loras, plan, how, on_picture)
