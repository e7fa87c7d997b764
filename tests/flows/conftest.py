from __future__ import annotations

from pathlib import Path

import pytest

from flows import cli
from tasks.serving.launch.launch_spec import ROOT
from tasks.serving.sglang_cpu import ensure_demo_model


@pytest.fixture
def winnow(capsys):
    """Run a command here; (exit code, stdout and stderr as one text without line breaks)."""
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    return run


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo's model."""
    return ensure_demo_model(ROOT / "data/models/SmolLM2-135M-Instruct")
