"""Judges that grain does not move, and the paired flow loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawings.judges import fitted
from drawings.judges.check import check
from drawings.judges.degraded import MEASURED, blurred, degraded
from drawings.judges.fitted import Judges
from drawings.judges.paired import paired_flow_loss
from drawings.material import Gallery


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Degraded drawings.


def test_a_blur_keeps_the_sum_and_has_the_asked_width() -> None:
    pictures = torch.zeros(2, 3, 17, 17)
    pictures[:, :, 8, 8] = 1
    found = blurred(pictures, torch.tensor([0.5, 1.0]))
    assert torch.allclose(found.sum((2, 3)), torch.ones(2, 3), atol=1e-5)
    squares = (torch.arange(17.0) - 8) ** 2
    width = (found[1, 0].sum(0) * squares).sum().sqrt()
    assert width.item() == pytest.approx(1.0, abs=0.01)
    assert found[0].max() > found[1].max()


def test_degraded_drawings_stay_pictures_and_differ_each() -> None:
    pictures = torch.rand(1, 3, 8, 8, generator=seeded()).expand(4, -1, -1, -1)
    found = degraded(pictures, seeded())
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found, degraded(pictures, seeded()))
    for worse in MEASURED.values():
        assert worse(pictures).shape == pictures.shape
        assert torch.equal(worse(pictures), worse(pictures))


# The check.


def hue(pictures: torch.Tensor) -> torch.Tensor:
    """A subject is a colour here."""
    mean = pictures.mean((2, 3))
    return mean / mean.norm(dim=1, keepdim=True)


def stripes(pictures: torch.Tensor) -> torch.Tensor:
    """A style is a direction of stripes here."""
    pair = torch.stack([pictures.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3)], 1)
    return pair / pair.norm(dim=1, keepdim=True)


def small_gallery() -> Gallery:
    names = tuple(itertools.product(("red", "green", "blue"), ("rows", "columns")))
    pictures = torch.zeros(len(names), 3, 16, 16)
    for picture, (subject, style) in zip(pictures, names, strict=True):
        channel = ("red", "green", "blue").index(subject)
        if style == "rows":
            picture[channel, ::4] = 1
        else:
            picture[channel, :, ::4] = 1
    return Gallery(names, pictures)


#: The two directions of stripes, as ``stripes`` sees them.
LOOKS = {"rows": torch.tensor([1.0, 0.0]), "columns": torch.tensor([0.0, 1.0])}


def test_judges_are_measured_on_pairs_whose_answer_is_known() -> None:
    found = check(hue, stripes, LOOKS, small_gallery())
    assert found["same subject, other style"] == {"subject": pytest.approx(1), "style": 0}
    assert found["other subject, same style"] == {"subject": 0, "style": pytest.approx(1)}
    assert found["separation"] == {"subject": 1, "style": 1}
    assert found["right looks"] == {"style": 1}
    assert found["the drawing itself, blurred"]["subject"] == pytest.approx(1, abs=1e-4)
    assert found["the drawing itself, grainy"]["subject"] < 1


def test_judges_that_see_the_wrong_thing_are_found_out() -> None:
    looks = {"rows": LOOKS["columns"], "columns": LOOKS["rows"]}
    found = check(hue, stripes, looks, small_gallery())
    assert found["right looks"] == {"style": 0}
    three = {name: torch.cat([look, torch.zeros(1)]) for name, look in LOOKS.items()}
    assert check(stripes, hue, three, small_gallery())["separation"] == {"subject": 0, "style": 0}


# Fitting.


def test_fitted_judges_are_saved_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Eyes:
        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            seen.append(pictures)
            return torch.nn.functional.avg_pool2d(pictures, 56).flatten(1)

        def stages(self, pictures: torch.Tensor, count: int) -> list[torch.Tensor]:
            slopes = [pictures.diff(dim=axis).abs().mean(1)[:, :90, :90] for axis in (2, 3)]
            return [torch.stack(slopes, 1)]

    monkeypatch.setattr(fitted, "EfficientNetLite0", Eyes)
    monkeypatch.setattr(fitted, "ShiftTolerantVGG", Eyes)
    gallery = small_gallery()
    judges = Judges.fit(gallery, [Gallery(gallery.names[:2], gallery.pictures[:2])])
    assert sum(map(len, seen)) == 2 * len(gallery.names) + 2  # true, degraded, and drawn by a model
    path = tmp_path / "judges.pt"
    judges.save(path)
    read = Judges.load(path)
    for name in ("subject", "style"):
        before, after = (getattr(each, name)(gallery.pictures) for each in (judges, read))
        assert torch.equal(before, after)
    assert list(read.looks) == ["columns", "rows"]
    columns, rows = (read.style(gallery.pictures) @ look for look in read.looks.values())
    assert (rows > columns).tolist() == [style == "rows" for _, style in gallery.names]


# The paired flow loss.


class Denoiser(torch.nn.Module):
    """Knows the drawing, and is wrong by a constant."""

    def __init__(self, clean: torch.Tensor, wrong: float = 0.0) -> None:
        super().__init__()
        self.clean, self.wrong = clean, wrong
        self.levels: list[float] = []

    def forward(self, sample: torch.Tensor, timestep: float, **_: Any) -> tuple[torch.Tensor]:
        self.levels.append(timestep)
        return ((sample - self.clean) / (timestep / 1000) + self.wrong,)


def looped(unet: Denoiser) -> Any:
    """A pipeline whose own latents are of no use, so that only the mixed ones can be predicted."""

    def loop(prompts: list[str], num_inference_steps: int, **_: Any) -> None:
        for step in range(num_inference_steps):
            junk = torch.full((len(prompts), *unet.clean.shape[1:]), float("nan"))
            unet(junk, 1000 * (1 - step / num_inference_steps), encoder_hidden_states=prompts)

    return type("Pipe", (SimpleNamespace,), {"__call__": lambda _, *a, **k: loop(*a, **k)})(
        unet=unet
    )


def test_the_paired_loss_is_that_of_the_flow_on_the_drawing() -> None:
    clean = torch.rand(1, 2, 3, 3, generator=seeded())
    knowing = Denoiser(clean)
    assert paired_flow_loss(looped(knowing), clean, "a fox") == pytest.approx(0, abs=1e-6)
    assert knowing.levels == [1000, 750, 500, 250]
    assert not knowing._forward_hooks
    assert not knowing._forward_pre_hooks
    wrong = paired_flow_loss(looped(Denoiser(clean, 0.5)), clean, "a fox")
    assert wrong == pytest.approx(0.25, abs=1e-5)
    assert paired_flow_loss(looped(Denoiser(clean + 1)), clean, "a fox") > 1
