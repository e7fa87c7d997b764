from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.serving.launch import launcher


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder; what runs in it at the end is stopped."""
    folder = tmp_path / "state"
    folder.mkdir()
    yield folder
    launcher.stop_all(launcher.running(folder), 0)
