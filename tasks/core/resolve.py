"""From a YAML file and `--set`s to a `RunConfig`, each value with where it came from."""

from __future__ import annotations

import json
import re
import reprlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tasks.core.config import RunConfig
from tasks.core.config_file import parse, parse_value
from tasks.core.config_generation import ALIASES, fan_out, warn_role_less
from tasks.core.errors import InputError, did_you_mean

Origins = dict[str, str]
"""Dotted key -> `file:line`, `--set` or `default`."""


def load_config(path: str | Path, sets: list[str] | None = None, run: str | None = None
                ) -> tuple[RunConfig, Origins]:
    """The validated config of `path` with the `key.path=value` overrides applied.

    `path` may be the `run.json` of a run as well: its config then, with the origins that it had.
    Raises InputError that names file, line, key and mend, one line per mistake.
    """
    path = Path(path)
    if recorded := recorded_run(path):
        data, origins = recorded["config"], {k: o for k, o in recorded["origins"].items() if o != "default"}
    else:
        data, lines = parse(_text(path), path)
        origins = {key: f"{path}:{line}" for key, line in lines.items()}
    _spell_out(data, origins)
    _override(data, origins, sets or [])
    if run is not None:
        data["run"], origins["run"] = run, "--run"
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError("\n".join(_explain(e, path, origins) for e in error.errors())) from None
    return config, _all_origins(config, origins)


_RECORDED: dict[str, type] = {"config": dict, "origins": dict, "inputs": dict, "identity": dict, "prompts": int,
                              "prompts_digest": str, "tokenizer": str}


def recorded_run(path: str | Path) -> dict[str, Any] | None:
    """The `run.json` at `path`, or None where it is a config. Raises InputError for one of another version."""
    path = Path(path)
    if path.suffix != ".json":
        return None
    try:
        raw = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None  # whatever it is: YAML has the better messages
    if not isinstance(raw, dict) or not {"winnow", "config"} <= raw.keys():
        return None
    if lacking := [key for key, kind in _RECORDED.items() if not isinstance(raw.get(key), kind)]:
        raise InputError(f"{path}: a run.json of another version of Winnow ({raw['winnow']}) or one that was edited, "
                         f"without {', '.join(lacking)}; use the config that the run was begun with")
    return raw


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _spell_out(data: dict[str, Any], origins: Origins) -> None:
    """Short forms become what they stand for, in place, and their origins with them: role-less keys of `generation`, a
    plain list of servers, a plain word for speculation."""
    _fan_out(data, origins)
    if isinstance(servers := data.get("servers"), list):
        data["servers"] = {"generator": servers}
        for o in [o for o in origins if o.startswith("servers.")]:
            origins[f"servers.generator.{o.removeprefix('servers.')}"] = origins.pop(o)
    by_role = data.get("servers")
    for role, listed in by_role.items() if isinstance(by_role, dict) else ():
        for n, server in enumerate(listed if isinstance(listed, list) else ()):
            for part in ("launch", "expect"):
                key, settings = f"servers.{role}.{n}.{part}.speculation", server.get(part) if isinstance(
                    server, dict) else None
                if isinstance(settings, dict) and "speculation" in settings and not isinstance(
                        word := settings["speculation"], dict):
                    settings["speculation"] = {"algorithm": word}
                    if key in origins:
                        origins[f"{key}.algorithm"] = origins[key]


def _fan_out(data: dict[str, Any], origins: Origins) -> None:
    """Role-less keys of `generation` become those of the roles that lack them, and bring their origins along."""
    given = data.get("generation")
    if not isinstance(given, dict):
        return
    known = set(origins)
    for key in fan_out(given):
        where = origins.get(f"generation.{key}", "config")
        warn_role_less(key, where)
        for role in ALIASES[key]:
            if f"generation.{role}.{key}" in known:
                continue
            for o in [o for o in known if o == f"generation.{key}" or o.startswith(f"generation.{key}.")]:
                origins[f"generation.{role}.{o.removeprefix('generation.')}"] = f"{origins[o]} (generation.{key})"
        for o in [o for o in known if o == f"generation.{key}" or o.startswith(f"generation.{key}.")]:
            del origins[o]


def _override(data: dict[str, Any], origins: Origins, sets: list[str]) -> None:
    """Apply the overrides. Those without a role come last, for the roles that no other override gives the key: a role's
    own key wins over one that stands for several."""
    role_less: dict[str, str] = {}
    given: set[str] = set()

    def apply(key: str, equals: str, raw: str) -> set[str]:
        paths = _apply(data, key, equals, raw)
        for k in [k for k in origins if k == key or k.startswith(f"{key}.")]:
            del origins[k]
        origins.update(dict.fromkeys(paths, "--set"))
        _spell_out(data, origins)
        return paths

    for override in sets:
        key, equals, raw = override.partition("=")
        key = re.sub(r"^servers\.(?=[0-9])", "servers.generator.", key.strip())
        if key.split(".")[1:2] and key.startswith("generation.") and key.split(".")[1] in ALIASES:
            role_less[key] = f"{equals}{raw}"
        else:
            given |= apply(key, equals, raw)
    for key, rest in role_less.items():
        name = key.split(".")[1]
        warn_role_less(name, "--set")
        for role in ALIASES[name]:
            own = f"generation.{role}.{key.removeprefix('generation.')}"
            if not any(k == own or k.startswith(f"{own}.") or (k.count(".") > 1 and own.startswith(f"{k}."))
                       for k in given):
                apply(own, rest[:1], rest[1:])


def _apply(data: dict[str, Any], key: str, equals: str, raw: str) -> set[str]:
    """Set `key` of `data` to a value in YAML; the keys that this gives, its own and those inside of the value."""
    if not equals or not key:
        raise InputError(f"--set {key}{equals}{raw}: write key.path=value, such as --set scoring.top_k=2")
    try:
        value = parse_value(raw)
    except ValueError as error:
        raise InputError(f"--set {key}={raw}: the value is not valid YAML: {error}") from None
    target: Any = data
    parts = key.split(".")
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        if isinstance(target, list):
            if not (part.isascii() and part.isdigit() and len(part) < 10) or int(part) >= len(target):
                raise InputError(f"--set {key}: '{'.'.join(parts[:n])}' is a list of {len(target)}; "
                                 f"'{part}' must be a number from 0 to {len(target) - 1}")
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
        else:
            raise InputError(f"--set {key}: '{'.'.join(parts[:n])}' is a single value, it has no keys")
        if last:
            target[index] = value
        else:
            if isinstance(target, dict) and target.get(index) is None:
                target[index] = {}
            target = target[index]
    return {key, *(f"{key}.{inside}" for inside in _paths(value))}


def _paths(value: Any) -> Iterator[str]:
    """The dotted keys inside of nested mappings and lists, those of containers as well."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield str(key)
        yield from (f"{key}.{inside}" for inside in _paths(child))


def _model_at(location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The config section that holds the key at `location`."""
    current: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        field = current.model_fields.get(part)
        if field is None:
            return None
        current = _section(field.annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _section(annotation: Any) -> Any:
    """The BaseModel inside Optional[...] or list[...], else the annotation."""
    for arg in typing.get_args(annotation):
        found = _section(arg)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation


def _explain(error: Any, path: Path, origins: Origins) -> str:
    location = tuple(error["loc"])
    key = ".".join(map(str, location))
    known_at = key
    while known_at and known_at not in origins:
        known_at = known_at.rpartition(".")[0]
    where = origins.get(known_at, str(path))
    given = error.get("input")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section = _model_at(location[:-1])
        fields = list(section.model_fields) if section else []
        word = str(location[-1])
        hint = did_you_mean(word, fields)
        return f"{where}: unknown key '{key}'{hint}" + (f" Known here: {', '.join(fields)}." if hint == "." else "")
    if error["type"] == "missing":
        section = _model_at(location[:-1])
        field = section.model_fields.get(str(location[-1])) if section else None
        about = f" ({field.description})" if field and field.description else ""
        return f"{where}: the key '{key}' is missing{about}"
    if error["type"] == "literal_error":
        allowed = error.get("ctx", {}).get("expected", "")
        options = [o.strip(" '") for o in allowed.replace(" or ", ", ").split(",")]
        return f"{where}: {key}: unknown value {given!r}{did_you_mean(str(given), options)} Allowed: {allowed}."
    if error["type"] == "model_type" and (section := _model_at(location)):
        return f"{where}: {key}: a mapping is needed ({', '.join(section.model_fields)}), given: {_safe(given)}"
    shown = "" if isinstance(given, (dict, list)) or error["type"] == "value_error" else f" (given: {_safe(given)})"
    quoted = "; put it in quotes" if error["type"] == "string_type" and shown and given is not None else ""
    said = message if message[1:2].isupper() else f"{message[:1].lower()}{message[1:]}"
    return f"{where}: {key + ': ' if key else ''}{said}{shown}{quoted}"


def _safe(given: Any) -> str:
    """A value for a message, without what an address has before its @."""
    return reprlib.repr(re.sub(r"//[^/\s]*@", "//***@", given) if isinstance(given, str) else given)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key; empty containers are leaves."""
    items: Any = None
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value and any(isinstance(v, (dict, list)) for v in value):
        items = enumerate(value)
    if items is None:
        return {prefix[:-1]: value}
    out: dict[str, Any] = {}
    for key, child in items:
        out |= flatten(child, f"{prefix}{key}.")
    return out


def origins_of(config: RunConfig) -> Origins:
    """The origins of a config that came without any, as from Prefect: what it was given, and the defaults."""
    given = flatten(config.model_dump(mode="json", exclude_unset=True))
    return {key: "config" if key in given else "default" for key in flatten(config.model_dump(mode="json"))}


def _all_origins(config: RunConfig, given: Origins) -> Origins:
    """An origin for every leaf: that of its key, --set where a part of it (an item of a list) was, or default."""
    out = {}
    for key in flatten(config.model_dump(mode="json")):
        changed = any(origin.startswith("--") for k, origin in given.items() if k.startswith(f"{key}."))
        out[key] = "--set" if changed else given.get(key, "default")
    return out
