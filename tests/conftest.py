from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# one thread per library, no hub, no telemetry: set before anything is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

# No timed assertion: a busy machine is no failure. `winnow` repeats the same examples, `explore` (make explore) draws
# new ones. Hypothesis' explain phase traces every line: a slow test would then time out and hide what it found.
PHASES = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
hypothesis.settings.register_profile("explore", deadline=None, phases=PHASES, print_blob=True)
hypothesis.settings.register_profile("winnow", hypothesis.settings.get_profile("explore"), derandomize=True, database=None)
hypothesis.settings.load_profile("winnow")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte tokenizer and a chat template."""
    from tests.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_run_left_open():
    """Contexts are cached per process; a test must not see another's."""
    yield
    from tasks import context

    for url in list(context._open):
        context.release(url)
