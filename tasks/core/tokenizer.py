"""A model's tokenizer, loaded once and checked, and what it makes of chats and of ids."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.core.chat_template import Chat, ChatTemplate, apply
from tasks.core.config import ModelRef
from tasks.core.errors import InputError
from tasks.core.identity import digest

_loading = threading.Lock()


def load_tokenizer(model: ModelRef, key: str = "model.path", needs_template: bool = True) -> Any:
    """The tokenizer of `model`, with a chat template unless the config gives one; loaded once a process.

    Raises InputError, naming the config `key`, when there is no such model, tokenizer or (if needed) template.
    """
    with _loading:  # shards ask for it at once
        tokenizer = _load(model.path, model.revision, key)
    if needs_template and not tokenizer.chat_template:
        raise InputError(f"{key}: the tokenizer of {model.path} has no chat template; put a chat_template.jinja "
                         "beside it, or give one in the role's chat_template")
    return tokenizer


@lru_cache(maxsize=4)
def _load(name: str, revision: str | None, key: str) -> Any:
    path, looks_local = Path(name), ModelRef(path=name).is_local
    if looks_local and not path.is_dir():
        raise InputError(f"{key}: no model folder at {path} (looked in {Path.cwd()}); for the demo's model run "
                         "`make demo-model`, for a hub model write OWNER/NAME")
    if looks_local and not any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{key}: {path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the "
                         "model's tokenizer files there")
    from transformers import AutoTokenizer  # slow to import: only once the cheap checks have passed

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # hub, network and format errors of many libraries
        raise InputError(f"{key}: cannot load the tokenizer of {name}"
                         f"{f' at {revision}' if revision else ''}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def render(tokenizer: Any, chats: list[Chat], template: ChatTemplate | None = None) -> list[list[int]]:
    """Token ids of each chat, ready for the answer: the template applied once, no second BOS.

    Without `template` it is the tokenizer's own, told the default date. Raises InputError for a chat that it refuses.
    """
    return tokenizer(apply(tokenizer, chats, template), add_special_tokens=False)["input_ids"] if chats else []


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of output ids, special tokens left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def fingerprint(tokenizer: Any) -> str:
    """Digest of the tokenizer's vocabulary and own chat template, for provenance and resume."""
    backend = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else sorted(
        tokenizer.get_vocab().items())
    return digest("tokenizer", backend, tokenizer.chat_template)


def decode_all(tokenizer: Any, many: list[list[int]]) -> list[str]:
    """`decode` of each, faster than one by one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [decode(tokenizer, ids) for ids in many]
    return backend.decode_batch(many, skip_special_tokens=True)


def vocabulary_size(model: ModelRef, tokenizer: Any) -> int:
    """No token id of the model is as large as this.

    The model's own size where its config can be read (its table of tokens is often larger than the tokenizer's);
    else the tokenizer's, rounded up as generously as such tables are.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
        size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    except Exception:  # no config, or of a kind that this version does not know: it is only a bound
        size = None
    return max(int(size or 0), len(tokenizer)) if size else (len(tokenizer) // 1024 + 2) * 1024
