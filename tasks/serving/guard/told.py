"""What a server was told when it was started, and values in one spelling, so that two of them can be compared."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from tasks.core.config_servers import DTYPES
from tasks.serving.launch.flags import flag_name

_DTYPES = {other: name for name, others in DTYPES.items() for other in others}
_NOT_SET = ("", "auto", "none", "null")


def flags_of(command: str | None) -> dict[str, Any] | None:
    """The flags of a command line by their names, True for one without a value; None where it is not known.

    SGLang joins the words with spaces, so a value ends where the next `--` begins. Of a flag given twice the last
    counts, as for argparse.
    """
    if not isinstance(command, str) or "--" not in command:
        return None  # an Engine(...) call, or a server that does not say
    out: dict[str, Any] = {}
    for piece in re.split(r"(?:^|\s+)--(?=[A-Za-z])", command)[1:]:
        name, value = re.fullmatch(r"([\w-]+)(?:=|\s+|$)(.*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
        name, value = flag_name(name), value.strip().strip("'\"") or True
        if name.startswith("no-") and value is True:
            name, value = name.removeprefix("no-"), False
        out[name] = value
    return out


def scalar(value: Any) -> Any:
    """Numbers as numbers, words of truth as truth, any other text as it is; a list of one is its element."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text) if not text.lstrip("+-").isdigit() else int(text)
    except ValueError:
        return text


def text(value: Any) -> str | None:
    """As it is written, also where it looks like a number: a commit."""
    return None if value is None else str(value).strip()


def folder(value: Any) -> str | None:
    """A folder of this machine by its real path; anything else, such as a hub id, as it is."""
    if value is None:
        return None
    with contextlib.suppress(OSError):
        if Path(str(value)).expanduser().is_dir():
            return str(Path(str(value)).expanduser().resolve())
    return str(value)


def dtype(value: Any) -> Any:
    """A number format's one name; None for `auto`, which is the same as not set."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower().removeprefix("torch.")
    return None if word in _NOT_SET else _DTYPES.get(word, word)


def settable(value: Any) -> Any:
    """As `scalar`; None for the words that say that a setting is left open, an empty mapping and a switch that is
    off."""
    if value is False or value in ({}, "{}") or (isinstance(value, str) and value.strip().lower() in _NOT_SET):
        return None
    return scalar(value)


def algorithm(value: Any) -> str:
    """A speculation's algorithm as SGLang resolves it, or `off`. NEXTN is EAGLE by another name, and FROZEN_KV_MTP what
    it makes of either for some models."""
    word = "" if value is None else str(value).strip().lower()
    if word in (*_NOT_SET, "off", "no", "disable", "disabled", "false"):
        return "off"
    return "EAGLE" if word in ("nextn", "mtp", "frozen_kv_mtp") else word.replace("-", "").upper()
