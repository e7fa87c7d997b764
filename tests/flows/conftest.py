from __future__ import annotations

import pytest

from flows import cli


@pytest.fixture
def winnow(capsys):
    """Run a command here; (exit code, stdout and stderr as one text without line breaks)."""
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    return run
