"""What every part of the config is made of, and the words that stand for one value."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

_SECRET = re.compile(r"(^|-)(key|token|password|passwd|secret|credentials?)$|key-b$|watermark-config|headers?$")


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, docstrings are the fields' help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def words(**also: tuple[Any, ...]) -> BeforeValidator:
    """Canonical words: case and outer spaces do not matter, and each keyword stands for what is listed with it.

    What is not listed comes out as it went in, for the field's own type to refuse: an unknown value is never taken for
    a default.
    """
    meant = {_word(other): name for name, others in also.items() for other in (name, *others)}

    def canonical(value: Any) -> Any:
        try:
            if _word(value) in meant:
                return meant[_word(value)]
        except TypeError:  # a list or a mapping: not a word
            return value
        return value.strip().lower() if isinstance(value, str) else value

    return BeforeValidator(canonical)


def _word(value: Any) -> Any:
    # the type tells True from 1
    plain = value.strip().lower().removeprefix("torch.") if isinstance(value, str) else value
    return type(value), plain


def is_secret(flag: str) -> bool:
    """Whether the value of an SGLang flag must not be written down."""
    return bool(_SECRET.search(flag.lstrip("-").lower().replace("_", "-")))


def _no_secrets(flags: dict[str, Any]) -> dict[str, Any]:
    if found := [name for name in flags if is_secret(name)]:
        raise ValueError(f"{', '.join(found)}: the config ends in run.json, where no secret belongs; let the server "
                         "have it from its environment or a file of its own")
    return flags


Flags = Annotated[dict[str, str | int | float | bool], AfterValidator(_no_secrets)]
"""SGLang flags by their long names."""
