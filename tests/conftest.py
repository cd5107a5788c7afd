"""Loads the shared fixtures in every process that runs tests."""

from __future__ import annotations

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, but not into the process that only hands tests out to workers.

    They import torch and diffusers, and the workers start after that process is ready.
    """
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_collection_finish() -> None:
    """Exclude what is imported and collected from later garbage collections."""
    gc.collect()
    gc.freeze()
