"""What people put around a pipeline, as a table: a new companion is a row in one of these files.

``companion`` says what a row is. ``unets`` has what patches Stable Diffusion, ``ip_adapters``
pictures in prompts, ``caches`` what skips work between steps of a transformer, ``guiders`` how
modular pipelines guide.
"""

from __future__ import annotations

from support.companions.caches import CACHES
from support.companions.guiders import GUIDERS
from support.companions.ip_adapters import IP_ADAPTERS
from support.companions.unets import UNETS

COMPANIONS = (*UNETS, *IP_ADAPTERS, *CACHES, *GUIDERS)
