"""One small file of a model on the hub: found, known to be missing, or unreachable and said to be.

`huggingface_hub.hf_hub_download` alone can't tell these apart: it hands out an old copy in silence, tries for minutes
where there is none, and its error for "no network" is a kind of "no such file".
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import silent_tqdm

from tasks.core.config import ModelRef
from tasks.core.errors import InputError, UnreachableError

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_BAR: Any = silent_tqdm  # has what is called of a tqdm, and not its type

_LOG_IN = "log in (`hf auth login`, or set HF_TOKEN) with an account that may read it"
# What a hub's refusal means, and its mend; a subclass before its parents.
_REFUSALS: tuple[tuple[type[HfHubHTTPError], str], ...] = (
    (GatedRepoError, f"the model is gated; accept its terms on its page, then {_LOG_IN}"),
    (DisabledRepoError, "the model was disabled on the hub; take another one"),
    (RevisionNotFoundError, "the model has no such revision; pin a commit, branch or tag of its own"),
    (RepositoryNotFoundError, f"no such model, or a private one; mend the id, or {_LOG_IN}"),
)


@dataclass(frozen=True)
class HubFile:
    """A file of a model on the hub, here."""

    path: Path
    source: str
    """`hub:OWNER/NAME@COMMIT/FILE`"""
    commit: str
    cached: bool
    """The hub could not be reached: the copy of an earlier download."""
    notes: tuple[str, ...] = ()


class _Unreachable(Exception):
    """No hub answered; the reason in words."""


class _Refused(Exception):
    """The hub, or the disk, says no; why, and the mend."""


def find(model: ModelRef, name: str, key: str, endpoint: str | None = None,
         cache_dir: str | Path | None = None) -> HubFile | None:
    """The file `name` of `model` at its revision; None where the model has none.

    Whether a hub answers is asked once (HF_HUB_ETAG_TIMEOUT, 10 s); only a hub that then breaks off in the middle is
    asked again, as huggingface_hub does. Raises InputError, naming the config `key`, for a model or revision that does
    not exist or may not be read, and UnreachableError where no hub answers and no copy of an earlier download is left.
    """
    revision = model.revision or constants.DEFAULT_REVISION
    what = f"{name} of {model.path} at revision {revision}"
    try:
        kept = try_to_load_from_cache(model.path, name, cache_dir, revision)
        if kept is not None and _COMMIT.fullmatch(revision):  # a commit never changes: no need to ask
            path, reason = _path(kept), None
        else:
            path, reason = _download(model.path, revision, name, endpoint, cache_dir), None
    except _Refused as error:
        raise InputError(f"{key}: cannot have {what} from {_hub(endpoint)}: {error}") from error.__cause__
    except HFValidationError as error:
        raise InputError(f"{key}: '{model.path}' is no id of a model on the hub: {error}") from error
    except _Unreachable as error:
        if kept is None:
            raise UnreachableError(
                f"{key}: cannot ask {_hub(endpoint)} for {what}: {error}, and there is no earlier copy in "
                f"{cache_dir or constants.HF_HUB_CACHE}. Check the network and HF_ENDPOINT"
                f"{', unset HF_HUB_OFFLINE,' if constants.is_offline_mode() else ''} or name a folder with the model"
            ) from error.__cause__
        path, reason = _path(kept), f"{_hub(endpoint)} could not be asked ({error})"
    return _found(model, name, path, what, key, reason)


def _found(model: ModelRef, name: str, path: Path | None, what: str, key: str, reason: str | None) -> HubFile | None:
    if path is None:
        if reason:
            log.warning("%s: %s: there is none, says the answer of an earlier time: %s", key, what, reason)
        else:
            log.info("%s: there is no %s", key, what)
        return None
    commit = path.parent.name  # the cache keeps snapshots/COMMIT/FILE
    source = f"hub:{model.path}@{commit}/{name}"
    if reason is None:
        return HubFile(path, source, commit, False)
    note = f"the copy of an earlier download, of commit {commit}: {reason}"
    log.warning("%s: %s: %s", key, what, note)
    return HubFile(path, source, commit, True, (note,))


def _path(kept: Any) -> Path | None:
    return Path(kept) if isinstance(kept, str) else None  # else: known not to exist


def _download(repo: str, revision: str, name: str, endpoint: str | None, cache_dir: str | Path | None) -> Path | None:
    """The file in the cache, fresh from the hub; None where the hub has none. Raises _Refused and _Unreachable."""
    try:
        try:
            url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint)
            head = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=endpoint)  # one try
            if head.commit_hash is None or head.etag is None:
                raise _Unreachable("what answered is not a Hugging Face hub")
        except RemoteEntryNotFoundError:
            head = None  # the call below finds so too, and keeps it in the cache
        path = Path(hf_hub_download(repo, name, revision=revision, endpoint=endpoint, cache_dir=cache_dir,
                                    tqdm_class=_NO_BAR))
    except RemoteEntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        _raise_for(error)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Unreachable(_first_line(error)) from error
    except OSError as error:
        if error.errno is not None:  # of this machine's disk, not of the network
            raise _Refused(f"{_first_line(error)}; name a folder to write to in HF_HUB_CACHE") from error
        raise _Unreachable(_first_line(error)) from error
    if head is None or path.parent.name != head.commit_hash:  # it fell back on an old copy, and does not say so
        raise _Unreachable("it stopped answering after the first question")
    return path


def _raise_for(error: HfHubHTTPError) -> NoReturn:
    for kind, words in _REFUSALS:
        if isinstance(error, kind):
            raise _Refused(words) from error
    status = error.response.status_code
    if status in (401, 403):
        raise _Refused(f"the hub answered {status}; {_LOG_IN}") from error
    raise _Unreachable(f"it answered HTTP {status}") from error


def _hub(endpoint: str | None) -> str:
    return _without_password(endpoint or constants.ENDPOINT)


def _first_line(error: Exception) -> str:
    return _without_password((str(error).strip().splitlines() or [type(error).__name__])[0])


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
