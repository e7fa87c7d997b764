"""Verifiers: does a text give the right answer, or follow its instructions?

`verify` decides one text in this process; `VerifierPool` decides many in worker processes
under a time limit that a hung regular expression or a runaway simplification cannot escape.
"""

from __future__ import annotations

from tasks.labels.verifiers.base import Verdict, check_ground_truth, names, verify
from tasks.labels.verifiers.pool import VerifierPool, WorkerStartError

__all__ = ["Verdict", "VerifierPool", "WorkerStartError", "check_ground_truth", "names", "verify"]
