"""What can go wrong with a request, and what each of it means for the request and for its server.

This is the one place where a failure gets its name. `kind` is the status that the row gets if it was the
last attempt; the table says what happens before that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What a kind of failure means."""

    about: str
    strike: bool = True
    """It counts as one of the request's attempts."""
    again: bool = True
    """Another attempt may help; elsewhere, where there is another server."""
    fault: bool = True
    """It speaks against the server: enough of them in a row and the server is left alone for a while."""


TAXONOMY: dict[str, Rule] = {
    "unreachable": Rule("the server refused the connection; the request was never sent", strike=False, fault=False),
    "overloaded": Rule("the server turned the request away: HTTP 429 or 503", strike=False, fault=False),
    "wrong_model": Rule("the server serves another model than it did", strike=False, fault=False),
    "changed": Rule("the server runs with other settings than it did", strike=False, fault=False),
    "crashed": Rule("the server died while the request was in flight", strike=False, fault=False),
    "disconnected": Rule("the connection broke, the server lives", fault=False),
    "timeout": Rule("no whole answer in time"),
    "server_error": Rule("HTTP 5xx, or an address that is no SGLang server"),
    "bad_response": Rule("an answer that is not SGLang's: cut short, garbage, ids that cannot be"),
    "aborted": Rule("the server gave the request up: HTTP 200 with finish_reason abort"),
    "rejected": Rule("the server refuses this very request: HTTP 4xx", again=False, fault=False),
    "poison": Rule("in flight at two crashes of servers", again=False, fault=False),
}


class RequestFailed(Exception):
    """A request that brought no usable answer; `kind` is a key of TAXONOMY."""

    def __init__(self, kind: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.rule = kind, TAXONOMY[kind]
        self.retry_after_s = retry_after_s
