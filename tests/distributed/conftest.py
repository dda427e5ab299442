"""One thread, as the processes that torchrun starts have: the models here are tiny."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Every test here."""
