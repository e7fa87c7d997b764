"""A real SGLang server on a CPU, and the small model of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# the last file that the export writes before it renames the folder
COMPLETE = "config.json"


def ensure_demo_model(out: Path, python: str | None = None) -> Path:
    """The demo's model folder, exported with `python` (this interpreter where None) if it is not there yet.

    Raises RuntimeError with the end of the export's output when it fails.
    """
    if (out / COMPLETE).is_file():
        return out
    export = subprocess.run([python or sys.executable, str(_HERE / "export_model.py"), str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                            env=os.environ | {"TQDM_DISABLE": "1"})
    if export.returncode != 0:
        end = "\n".join(export.stdout.splitlines()[-12:])
        raise RuntimeError(f"the demo's model could not be exported to {out}:\n{end}")
    return out
