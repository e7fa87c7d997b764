"""What every part of the config is made of, and the words that stand for one value."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
)

_SECRET = re.compile(r"(^|-|api|auth|access|hf)(key|token|password|passwd|secret|credentials?)$|key-b$|watermark-config"
                     r"|headers?$")
_USER = re.compile(r"https?://[^/\s]*@|://[^/\s]*:[^/\s]*@")  # a name alone may be a token where it is http
_HALF = re.compile("[\ud800-\udfff]")


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, docstrings are the fields' help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) for v in given) and cls._wants_numbers(info.field_name):
            raise ValueError("must be a number, not yes or no (true or false)")
        if any(isinstance(v, str) and _HALF.search(v) for v in given):
            raise ValueError("has half of a surrogate pair in it, which is no text")
        return 0.0 if isinstance(value, float) and value == 0 else value  # -0.0 is the same number under another id

    @classmethod
    def _wants_numbers(cls, name: str | None) -> bool:
        kinds = str(cls.model_fields[name].annotation) if name else ""
        return bool(re.search(r"\b(int|float)\b", kinds)) and "bool" not in kinds


def one_of(what: str) -> WrapValidator:
    """For a union of types: what is none of them is refused with one message, not one for each."""
    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"must be {what} (given: {reprlib.repr(value)})") from None

    return WrapValidator(check)


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


def _no_user(address: str) -> str:
    if _USER.search(address):
        raise ValueError("has a user or a password in the address, and the config ends in run.json, where no secret "
                         "belongs; give it by the environment or a file of the storage's own")
    return address


Address = Annotated[str, AfterValidator(_no_user)]
"""A path or a URL, without anybody's name and password in it."""


def _no_secrets(flags: dict[str, Any]) -> dict[str, Any]:
    if found := [name for name, value in flags.items()
                 if is_secret(name) or (isinstance(value, str) and _USER.search(value))]:
        raise ValueError(f"{', '.join(found)}: the config ends in run.json, where no secret belongs; let the server "
                         "have it from its environment or a file of its own")
    return flags


Flags = Annotated[dict[str, str | int | float | bool], AfterValidator(_no_secrets)]
"""SGLang flags by their long names."""
