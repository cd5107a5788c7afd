"""What people put around a pipeline, as a table: a new companion is a row in one of these files.

``companion`` says what a row is. ``unets`` has what patches Stable Diffusion, ``caches`` what skips
work between steps of a transformer, ``guiders`` how modular pipelines guide.
"""

from __future__ import annotations

from support.companions.caches import CACHES
from support.companions.guiders import GUIDERS
from support.companions.unets import UNETS

COMPANIONS = (*UNETS, *CACHES, *GUIDERS)
