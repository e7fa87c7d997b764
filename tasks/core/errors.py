"""What can go wrong for a user, and the exit code that says so (the contract's codes)."""

from __future__ import annotations


class WinnowError(Exception):
    """A failure with a message for people; the command line prints it without a traceback."""

    exit_code = 1


class InputError(WinnowError):
    """The user's input is wrong: config, prompts, arguments. The message names file, key and mend."""

    exit_code = 2


class ThresholdError(WinnowError):
    """The run finished, but below a threshold that its config sets."""

    exit_code = 3


class UnreachableError(WinnowError):
    """No server answers; running the same command again resumes."""

    exit_code = 4


class InterruptedRun(WinnowError):
    """The run was interrupted; running the same command again resumes."""

    exit_code = 130


class StorageError(InterruptedRun):
    """Nothing can be written any more: a full disk, a quota. What was written stands; mend it and resume."""


def did_you_mean(word: str, known: list[str]) -> str:
    """`, did you mean 'x'?` or a full stop, to end a sentence that names an unknown word."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else "."
