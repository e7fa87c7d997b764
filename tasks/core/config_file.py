"""YAML as people write it: its values, each its own, and the line of every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tasks.core.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps `1e-3` a number (YAML 1.1 reads it as text), and says where a 13th month stands."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The node's value; what looks like a date or a number and is none is a YAMLError with its line."""
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts in quotes what `_Loader` would take for a number."""


for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
                                  list("-+0123456789."))


def parse_value(text: str) -> Any:
    """Any value in YAML. Raises ValueError with what is wrong."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark and mark.line else ""
        raise ValueError(where + (getattr(error, "problem", None) or "nested too deeply")) from None


def as_yaml(value: Any) -> str:
    """A plain value as YAML that people can read and that reads back as itself; keys in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    try:
        if parse_value(text) == value:
            return text
    except ValueError:
        pass
    # PyYAML writes U+0085 as it is, and reads it as the end of a line
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False))


def parse(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in `text`, and the line of each of its dotted keys. Raises InputError with file and line."""
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = _own(yaml.load(text, Loader=_Loader))  # a SafeLoader
        if isinstance(data, dict) and root is not None:
            _collect(root, "", lines, path)
            return data, lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply, or an alias (*name) stands inside of what it names") from None
    raise InputError(f"{path}: a config is a mapping of keys (run, model, sources, heuristics, ...)")


def _own(value: Any) -> Any:
    """The value with its aliases (*name) as copies: what is set at one place must not change another."""
    if isinstance(value, dict):
        return {key: _own(child) for key, child in value.items()}
    return [_own(child) for child in value] if isinstance(value, list) else value


def _collect(node: yaml.Node, prefix: str, lines: dict[str, int], path: Path,
             but: frozenset[str] = frozenset()) -> None:
    """Line numbers of every key `but` some; a key given twice in one mapping is an error."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == _MERGE or key.value in but:
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(f"{path}:{line}: the key '{prefix}{key.value}' is given twice")
            seen.add(key.value)
            lines[f"{prefix}{key.value}"] = line
            _collect(value, f"{prefix}{key.value}.", lines, path)
        for merged in (value for key, value in node.value if key.tag == _MERGE):  # `<<: *name`: what the mapping lacks
            for other in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
                _collect(other, prefix, lines, path, but | frozenset(seen))
                seen |= {key.value for key, _ in other.value}
    elif isinstance(node, yaml.SequenceNode):
        for n, value in enumerate(node.value):
            lines[f"{prefix}{n}"] = value.start_mark.line + 1
            _collect(value, f"{prefix}{n}.", lines, path)
