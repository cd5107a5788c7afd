"""Pictures of pairs of LoRAs with the settings of candidates, scored by two judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from drawings.base.subjects import STYLES, prompt
from drawings.judges.fitted import Judges
from drawings.loras.files import lora_path
from drawings.material import drawing
from drawings.table.kept import Verdicts
from klora_compile import OwnPictures
from klora_compile.calibrating.pictures import turns
from klora_compile.judging.judge import About
from klora_compile.judging.own_pictures import OwnPicturesJudge, as_tensor, harmonic_mean
from klora_compile.searching.space import Candidate, baseline
from klora_compile.trying.loras import loras_to_try
from klora_compile.trying.studio import Studio
from klora_compile.trying.trial import trial_of

#: Key of a verdict: the score by the true drawing, and by the LoRAs' own pictures.
TRUTH, OWN = JUDGES = ("truth", "own-pictures")

#: Of each LoRA.
_ALONE = OwnPictures(count=8)

#: The plain sum. A candidate is made with a prompt; which one makes no difference here.
ANY_PROMPT = {"prompt": ""}
PLAIN_SUM = baseline(ANY_PROMPT)

#: A subject and a style.
Pair = tuple[str, str]


@dataclass
class Easel:
    """Draws pairs with one base, and scores the pictures."""

    pipe: Any
    judges: Judges
    own_judge: OwnPicturesJudge
    packages: Path
    loras: Path
    """Folder of the LoRAs of one regime."""
    prompts: Mapping[str, tuple[str, ...]]
    """File stem of a LoRA -> the prompts that it was trained with."""
    sampling: Mapping[str, Any]
    """Settings of the sampling, by full name."""
    seeds: int
    _alone: dict[Path, tuple[Image.Image, ...]] = field(default_factory=dict, init=False)

    def verdicts(self, pair: Pair, candidates: list[Candidate]) -> list[Verdicts]:
        """Draw a pair with each candidate and every seed, and score the pictures.

        Raises:
            ValueError: there is no true drawing.
        """
        subject, style = pair
        files = (lora_path(self.loras, "subject", subject), lora_path(self.loras, "style", style))
        truth = drawing(self.packages, STYLES[style], subject)
        if truth is None:
            raise ValueError(f"There is no true drawing of {subject}, {style}.")
        own, text = self._own(*files), prompt(subject, style)
        found = []
        with Studio(self.pipe, loras_to_try(*files)) as studio:
            for each in candidates:
                verdicts = []
                for seed in range(self.seeds):
                    about = About(text, seed, each.settings, own)
                    verdicts.append(self._scores(self._picture(studio, about), about, style, truth))
                found.append(verdicts)
        return found

    def _picture(self, studio: Studio, about: About) -> Image.Image:
        case = {"prompt": about.prompt, "seed": about.seed}
        return studio.picture(trial_of({**about.settings, **self.sampling, **case})).shot.frames[0]

    def _own(self, content: Path, style: Path) -> Mapping[str, tuple[Image.Image, ...]]:
        """Return slot -> pictures of its LoRA alone, each drawn once."""
        for file in (content, style):
            if file not in self._alone:
                with Studio(self.pipe, loras_to_try(file)) as studio:
                    self._alone[file] = tuple(
                        self._picture(studio, About(text, seed, PLAIN_SUM.settings))
                        for text, seed in turns(_ALONE, self.prompts[file.stem])
                    )
        return {"content": self._alone[content], "style": self._alone[style]}

    @torch.no_grad()
    def _scores(
        self, picture: Image.Image, about: About, style: str, truth: torch.Tensor
    ) -> dict[str, float]:
        seen = as_tensor([picture])
        true = truth[None] / 2 + 0.5
        near = {
            "subject": float(self.judges.subject(seen)[0] @ self.judges.subject(true)[0]),
            "style": float(self.judges.style(seen)[0] @ self.judges.looks[style]),
        }
        scores = {TRUTH: harmonic_mean(*near.values()), OWN: self.own_judge(picture, about)}
        return {name: round(value, 5) for name, value in (scores | near).items()}
