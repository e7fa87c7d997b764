"""What a model's makers recommend: its generation_config.json, read, checked and put into a request's terms.

Hugging Face fills in what the file is silent about (top_k 50, greedy unless do_sample says otherwise). That is no word
of the model's makers, no serving engine does it, and it is not done here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from tasks.core.config import ModelRef
from tasks.core.config_generation import GenerationConfig
from tasks.core.errors import InputError, did_you_mean
from tasks.core.heuristics import parse_processor

log = logging.getLogger(__name__)

FILE = "generation_config.json"

# The file's keys and the request fields that they are.
_REQUEST = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_new_tokens",
            "min_new_tokens": "min_new_tokens", "eos_token_id": "stop_token_ids", "stop_strings": "stop"}
# The cuts in the order in which Hugging Face applies them (GenerationMixin._get_logits_processor of transformers):
# key -> processor, its parameter, the values that cut nothing.
_CUTS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "top_k": ("top_k", "top_k", (0, -1)), "top_p": ("top_p", "top_p", (1.0,)), "min_p": ("min_p", "min_p", (0.0,)),
    "typical_p": ("typical", "mass", (1.0,)), "epsilon_cutoff": ("epsilon", "epsilon", (0.0, 1.0)),
    "eta_cutoff": ("eta", "epsilon", (0.0, 1.0))}
# Change the tokens, and no request can ask for them: key -> the values at which they change nothing.
_IMPOSSIBLE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "penalty_alpha": (0,), "dola_layers": (), "top_h": (1,), "guidance_scale": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({}, []),
    "force_words_ids": ([],), "constraints": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "forced_decoder_ids": ([],), "exponential_decay_length_penalty": (), "watermarking_config": (),
    "token_healing": (False,), "max_length": (), "min_length": (0,), "max_time": ()}
# Nothing that a sampled token depends on, or only with what is in _IMPOSSIBLE.
_ELSEWHERE = frozenset((
    # where the file comes from
    "transformers_version", "_from_model_config", "_commit_hash", "_name_or_path", "model_type", "trust_remote_code",
    # other special tokens: the tokenizer's and the chat template's concern
    "bos_token_id", "pad_token_id", "decoder_start_token_id",
    # the engine's own: caches, compilation, numbers that are not finite
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "low_memory",
    "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config", "attn_implementation",
    "remove_invalid_values", "renormalize_logits",
    # what a call gives back
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate",
    # of beams
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
    # speculation
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"))
KNOWN = frozenset((*_REQUEST, *_CUTS, *_IMPOSSIBLE, *_ELSEWHERE, "do_sample"))
_OFF_TOP_K = -1
_INT32 = 2**31 - 1  # an engine's token counts and ids


@dataclass(frozen=True)
class ModelDefaults:
    """What a model's generation_config.json recommends."""

    source: str
    """For people and origins: `data/models/X/generation_config.json` or
    `hub:OWNER/NAME@COMMIT/generation_config.json`."""
    commit: str | None
    """Commit of a hub model."""
    cached: bool
    """The hub could not be reached: this is the copy of an earlier download, and a branch may have moved on since. (A
    copy of a pinned commit is that commit for ever: the hub is not asked, and this is False.)"""
    raw: dict[str, Any]
    """The file as read."""
    fields: dict[str, Any]
    """Request fields by `GenerationConfig`'s names. Temperature 0 stands alone: greedy decoding has no cuts."""
    processors: tuple[tuple[str, float], ...]
    """The cuts in Hugging Face's order as (processor of tasks.core.heuristics, value): no temperature, none that cut
    nothing, and none for greedy decoding."""
    notes: tuple[str, ...]
    """What people should know: keys that can't be had, have no effect or are unknown; a cached copy."""

    def recorded(self) -> dict[str, Any]:
        """As JSON, for run.json; `from_recorded` is its inverse."""
        return asdict(self) | {"processors": [list(p) for p in self.processors], "notes": list(self.notes)}


def from_recorded(recorded: dict[str, Any]) -> ModelDefaults:
    """The `ModelDefaults` of a run.json; InputError where it is not one."""
    names = {f.name for f in fields(ModelDefaults)}
    try:
        if set(recorded) != names:
            raise ValueError(f"keys {sorted(set(recorded) ^ names)} are missing or too many")
        cuts = tuple((name, value) for name, value in recorded["processors"])
        return ModelDefaults(**recorded | {"processors": cuts, "notes": tuple(recorded["notes"])})
    except (TypeError, ValueError) as error:
        raise InputError(f"model defaults: not as a run records them: {error}") from error


def read_model_defaults(model: ModelRef, key: str = "model.path", endpoint: str | None = None,
                        cache_dir: str | Path | None = None) -> ModelDefaults | None:
    """The model's generation_config.json, from its folder or from the hub at its revision; None where it has none.

    `key` is the config key that names the model, for messages; `endpoint` and `cache_dir` stand for HF_ENDPOINT and
    HF_HUB_CACHE. Raises InputError for a file that is wrong and for a model that does not exist or can't be read, and
    UnreachableError where the hub gives no answer and no copy of an earlier download is left.
    """
    if model.is_local:
        return _read_folder(Path(model.path), key)
    from tasks.core import hub_file  # the hub's client is slow to import

    found = hub_file.find(model, FILE, key, endpoint, cache_dir)
    return None if found is None else _interpret(_load(found.path, key), key, source=found.source,
                                                 commit=found.commit, cached=found.cached, notes=found.notes)


def _read_folder(folder: Path, key: str) -> ModelDefaults | None:
    if not folder.is_dir():
        raise InputError(f"{key}: no model folder at {folder} (looked in {Path.cwd()}); for a hub model write "
                         "OWNER/NAME")
    path = folder / FILE
    if not os.path.lexists(path) and os.access(folder, os.X_OK):  # a link to nowhere is not "no file"
        log.info("%s: %s has no %s: the model's makers recommend nothing", key, folder, FILE)
        return None
    return _interpret(_load(path, key), key, source=str(path))


def _load(path: Path, key: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite, parse_int=_int64)
    except OSError as error:
        raise InputError(f"{key}: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{key}: {path} is not valid JSON: {error}; put a good copy there") from error
    if not isinstance(raw, dict):
        raise InputError(f"{key}: {path} must hold a mapping ({{...}}), not a {type(raw).__name__}")
    return raw


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _int64(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"{reprlib.repr(value)} is too large a number")
    return value


def _interpret(raw: dict[str, Any], key: str, *, source: str, commit: str | None = None, cached: bool = False,
               notes: tuple[str, ...] = ()) -> ModelDefaults:
    given = {k: v for k, v in raw.items() if v is not None}  # null: not given
    where = f"{key}: {source}"
    sampled = given.get("do_sample", True)
    if not isinstance(sampled, bool):
        _refuse(where, "do_sample", sampled, "true or false")
    if not sampled:
        idle, why = [k for k in ("temperature", *_CUTS) if k in given], "do_sample is false"
    elif _is_number(given.get("temperature"), 0):
        idle, why = [k for k in _CUTS if k in given], "temperature is 0"
    else:
        idle, why = [], ""
    used = {k: v for k, v in given.items() if k not in idle} | ({"temperature": 0.0} if why else {})
    if idle:
        notes += (f"{', '.join(idle)}: of no effect, as {why}",)
    return ModelDefaults(source, commit, cached, raw, _request(used, where), _processors(used, where),
                         (*notes, *_left_out(given)))


def _request(used: dict[str, Any], where: str) -> dict[str, Any]:
    """The request fields of the file's keys, checked by the config's own ranges."""
    request = {field: _as_sent(key, used[key]) for key, field in _REQUEST.items() if used.get(key, []) != []}
    try:
        checked = GenerationConfig.model_validate(request, strict=True)  # strict: true is not 1, "0.7" not 0.7
    except ValidationError as error:
        wrong = error.errors()[0]
        words = wrong["msg"].removeprefix("Value error, ")
        field = wrong["loc"][0] if wrong["loc"] else words.partition(":")[0]
        for key in (k for k, f in _REQUEST.items() if f == field):
            _refuse(where, key, used[key], _range(_REQUEST[key]))
        raise InputError(f"{where}: {words}; mend the file") from None  # of two fields that don't go together
    out: dict[str, Any] = {field: getattr(checked, field) for field in request}
    for key, field in _REQUEST.items():
        listed = isinstance(out.get(field), list)
        for value in out[field] if listed else [out.get(field)]:
            if isinstance(value, int) and value > _INT32:
                _refuse(where, key, used[key], f"{_range(field)}, at most {_INT32}")
            if isinstance(value, str) and not _is_text(value):
                _refuse(where, key, used[key], _range(field))
        if listed:
            out[field] = list(dict.fromkeys(out[field]))
    return out


def _is_text(value: str) -> bool:
    return bool(value) and not re.search("[\ud800-\udfff]", value)  # half a surrogate pair can't be sent


def _as_sent(key: str, value: Any) -> Any:
    if key in ("eos_token_id", "stop_strings") and not isinstance(value, list):
        value = [value]
    if key == "eos_token_id":
        return [_whole(v) for v in value]
    return _OFF_TOP_K if key == "top_k" and _is_number(value, 0) else _whole(value)


def _whole(value: Any) -> Any:
    # JSON has one kind of number: 20.0 is 20
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(value: Any, *among: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value in among


def _range(field: str) -> str:
    """What a request field may be, in words."""
    if field == "stop":
        return "a text that is not empty, or a list of them"
    if field == "stop_token_ids":
        return "a token id (a whole number of 0 or more) or a list of them"
    words = [f"{word} {getattr(bound, sign)}" for bound in GenerationConfig.model_fields[field].metadata
             for sign, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))
             if hasattr(bound, sign)]
    kind = "a whole number" if field in ("top_k", "max_new_tokens", "min_new_tokens") else "a number"
    return f"{kind}, {' and '.join(words)}"


def _refuse(where: str, key: str, value: Any, words: str) -> NoReturn:
    raise InputError(f"{where}: {key}: {reprlib.repr(value)}, must be {words}; mend the file (of a hub model: in a "
                     "copy of its folder)")


def _processors(used: dict[str, Any], where: str) -> tuple[tuple[str, float], ...]:
    """The file's cuts in Hugging Face's order."""
    out = []
    for key, (name, parameter, neutral) in _CUTS.items():
        if key not in used or _is_number(used[key], *neutral):
            continue
        try:
            cut = parse_processor({"name": name, "params": {parameter: used[key]}}, f"{where}: {key}")
        except InputError as error:  # in the file's words
            raise InputError(str(error).replace(f"{key}.params.{parameter}:", f"{key}:")) from None
        out.append((cut.name, cut.value))
    return tuple(out)


def _left_out(given: dict[str, Any]) -> list[str]:
    """Notes on the keys that shape tokens but can't be had, and on those that nobody knows."""
    # in Hugging Face, too, the lengths of the answer go before those of prompt and answer
    overruled = {total for total, own in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
                 if own in given}
    notes = []
    impossible = [k for k, v in given.items() if k in _IMPOSSIBLE and v not in _IMPOSSIBLE[k] and k not in overruled]
    if impossible:
        notes.append(f"{', '.join(impossible)}: left out, SGLang's /generate has nothing like it")
    for key in given:
        if key in KNOWN:
            continue
        if key in GenerationConfig.model_fields:
            notes.append(f"{key}: no key of {FILE}, left out; set generation.ROLE.{key} to have it")
        else:
            notes.append(f"unknown key {key!r}, left out{did_you_mean(key, sorted(KNOWN))}")
    return notes
