"""From a YAML file and `--set`s to a `RunConfig`, each value with where it came from."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tasks.core.config import RunConfig
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
        data, lines = _parse(_text(path), path)
        origins = {key: f"{path}:{line}" for key, line in lines.items()}
        _fan_out(data, origins)
    overrides = [*_by_role(sets or []), *([f"run={run}"] if run else [])]
    for override in overrides:
        key = _apply(data, override)
        stale = [k for k in origins if k == key or k.startswith(key + ".")]
        for k in stale:
            del origins[k]
        origins[key] = "--run" if run and override is overrides[-1] else "--set"
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError("\n".join(_explain(e, path, origins) for e in error.errors())) from None
    return config, _all_origins(config, origins)


def recorded_run(path: str | Path) -> dict[str, Any] | None:
    """The `run.json` at `path`, or None where it is a config."""
    path = Path(path)
    if path.suffix != ".json":
        return None
    try:
        raw = json.loads(_text(path))
    except ValueError:
        return None  # whatever it is: YAML has the better messages
    return raw if isinstance(raw, dict) and {"winnow", "config", "origins", "inputs"} <= raw.keys() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


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


def _by_role(sets: list[str]) -> list[str]:
    """The overrides, role-less ones by role and first: a role's own key wins over one that stands for several."""
    shared, own = [], []
    for override in sets:
        key, equals, value = override.partition("=")
        parts = key.strip().split(".")
        if len(parts) > 1 and parts[0] == "generation" and parts[1] in ALIASES:
            warn_role_less(parts[1], "--set")
            shared += [f"generation.{role}.{'.'.join(parts[1:])}{equals}{value}" for role in ALIASES[parts[1]]]
        else:
            own.append(override)
    return [*shared, *own]


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps `1e-3` a number (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."),
)


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict) or root is None:
        raise InputError(f"{path}: a config is a mapping of keys (run, model, sources, heuristics, ...)")
    lines: dict[str, int] = {}
    _collect(root, "", lines, path)
    return data, lines


def _collect(node: yaml.Node, prefix: str, lines: dict[str, int], path: Path) -> None:
    """Line numbers of every key; a key given twice in one mapping is an error."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(f"{path}:{line}: the key '{prefix}{key.value}' is given twice")
            seen.add(key.value)
            lines[f"{prefix}{key.value}"] = line
            _collect(value, f"{prefix}{key.value}.", lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for n, value in enumerate(node.value):
            lines[f"{prefix}{n}"] = value.start_mark.line + 1
            _collect(value, f"{prefix}{n}.", lines, path)


def _apply(data: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` (value in YAML) in `data`; returns the key."""
    key, equals, raw = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"--set {override}: write key.path=value, such as --set scoring.top_k=2")
    try:
        value = yaml.load(raw, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    target: Any = data
    parts = key.split(".")
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
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
    return key


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
    shown = "" if isinstance(given, (dict, list)) or error["type"] == "value_error" else f" (given: {given!r})"
    return f"{where}: {key + ': ' if key else ''}{message[:1].lower()}{message[1:]}{shown}"


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


def _all_origins(config: RunConfig, given: Origins) -> Origins:
    """An origin for every leaf: its own, its nearest given parent's if that was a leaf, or default."""
    out = {}
    for key in flatten(config.model_dump(mode="json")):
        known_at = key
        while known_at and known_at not in given:
            known_at = known_at.rpartition(".")[0]
        is_set = known_at == key or (known_at and given[known_at].startswith("--"))
        out[key] = given[known_at] if is_set else "default"
    return out
