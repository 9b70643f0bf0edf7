from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage():
    """Trainer collects garbage before each run; looking through all that was imported takes longer than a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
