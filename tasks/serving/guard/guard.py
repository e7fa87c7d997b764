"""Is a server the one that the run asks for? Compared on its resolved settings, which it tells itself, and on what it
was told when it was started.

Each setting by itself, the same for all: what the run asks for explicitly must be what the server runs with, however it
came to it; what the run leaves open must have been left open for the server too. So None against explicit is a
difference both ways, None = None and N = N are none, and a value that the server chose by itself counts as that value.
What can't shape anything here is not asked at all (`Asked.ignored`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tasks.core.section import is_secret
from tasks.serving.client import ServerFacts
from tasks.serving.compile import SENT
from tasks.serving.guard import told
from tasks.serving.guard.asked import BY_FLAG, DRAFT, FIELDS, KIND, REVISION, SHAPING, Asked, Field, asked_of, of_flag
from tasks.serving.guard.model_dtype import model_dtype
from tasks.serving.guard.same_model import is_folder, same_commit, same_model, snapshot
from tasks.serving.launch.flags import flag_name
from tasks.serving.launch.launch_spec import LaunchSpec

__all__ = ["RECORDED", "Asked", "Comparison", "Difference", "asked_of", "changed", "columns", "compare", "differences",
           "expected", "placed", "table", "text", "told_by", "unlike", "without_left_out"]


@dataclass(frozen=True)
class Difference:
    """One setting in which a server is not what is asked for."""

    field: str
    asked: Any
    found: Any
    flag: str | None = None
    """The SGLang flag that is about it."""
    expect: Mapping[str, Any] | None = None
    """What to write under `expect` where the server is what is meant."""
    how: str | None = None
    """How it is started otherwise, where that takes more than the flag."""

    @property
    def start(self) -> str | None:
        """How a server that is what is asked for is started."""
        if self.how is not None or self.flag is None:
            return self.how
        if self.asked in (None, False, "off"):
            return f"without --{self.flag}"
        return f"with --{self.flag}" + ("" if self.asked is True else f"={self.asked}")

    @property
    def mend(self) -> str:
        """What to do about a server that somebody else runs."""
        left_out = f"leave {self.field} out" if self.start and self.found is None else ""
        return ", or ".join(filter(None, [f"start it {self.start}" if self.start else "",
                                          self.written("expect") or left_out]))

    def written(self, under: str) -> str:
        """The line for the config under which the server is what is meant; empty where none can say it."""
        return f"{under}: {_yaml(self.expect)}" if self.expect else ""

    def shown(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"field": self.field, "asked": self.asked, "found": self.found}

    def __str__(self) -> str:
        return f"{self.field} is {_word(self.found)}, asked for {_word(self.asked)}"


@dataclass(frozen=True)
class Comparison:
    """What a server is against what it must be."""

    differences: list[Difference]
    notes: list[str]
    """What a person should know although it is no difference."""


def differences(asked: Asked, facts: ServerFacts, spec: LaunchSpec | None = None) -> list[Difference]:
    """In what a server is not what is asked for; `spec`: how it was started, where it is one of ours."""
    return compare(asked, facts, spec).differences


def compare(asked: Asked, facts: ServerFacts, spec: LaunchSpec | None = None) -> Comparison:
    """`differences`, and notes on what could not be compared."""
    return _Comparing(asked, facts, spec).done()


def without_left_out(found: Iterable[Difference], spec: LaunchSpec | None, command: Sequence[str]) -> list[Difference]:
    """The differences of a server of ours but for the flags that its SGLang does not have: they were asked for and left
    out of its `command`, which was said then, and would be left out again."""
    asked, emitted = told_by(spec) if spec else {}, told.flags_of(" ".join(command)) or {}
    return [d for d in found if d.flag not in asked or any(e.startswith(str(d.flag)) for e in emitted)]


def placed(wanted: LaunchSpec, was: LaunchSpec | None) -> list[Difference]:
    """In what a server of ours was started otherwise than it would be now, beyond what it must be: its place and its
    share of the machine. `was` is None where that is not known."""
    if was is None:
        return [Difference("record", "this version's", "another version's")]
    names = ["device", "gpu", "host", "mem_fraction", "max_total_tokens", "python"]
    names += ["threads"] if wanted.device == "cpu" else []
    names += ["port"] if wanted.port else []
    return [Difference(n, getattr(wanted, n), getattr(was, n)) for n in names if getattr(wanted, n) != getattr(was, n)]


class _Comparing:
    def __init__(self, asked: Asked, facts: ServerFacts, spec: LaunchSpec | None) -> None:
        self.asked, self.facts, self.info, self.spec = asked, facts, facts.info, spec
        self.told = told.flags_of(facts.info.get("launch_command"))
        if spec:  # what was asked for, not what the launcher adds by itself; without what this SGLang has no flag for
            emitted, self.told = self.told, told_by(spec)
            self.told = {n: v for n, v in self.told.items() if emitted is None or any(e.startswith(n) for e in emitted)}
        self.found: list[Difference] = []
        self.notes: list[str] = []

    def done(self) -> Comparison:
        asked = self.asked
        self._model()
        for field in FIELDS:
            if field.name not in asked.ignored:
                self._setting(field, asked.settings[field.name])
        own = {flag_name(k) for k in self.spec.flags if flag_name(k) not in (*BY_FLAG, KIND)} if self.spec else set()
        for name in sorted({*asked.flags, *own, *SHAPING}):
            self._setting(of_flag(name), asked.flags.get(name))
        if self.facts.generates == asked.classifies:
            self.found.append(_kind(self.facts.generates))
        self._preferred()
        return Comparison(self.found, self.notes)

    def _preferred(self) -> None:
        """What the server lays under every request changes nothing where our requests say it themselves."""
        preferred = self.info.get("preferred_sampling_params")
        if isinstance(preferred, str):
            with contextlib.suppress(ValueError):
                preferred = json.loads(preferred)
        if not preferred:
            return
        if ours := sorted(set(preferred) - SENT) if isinstance(preferred, dict) else [str(preferred)]:
            self.found.append(Difference("preferred_sampling_params", None, ", ".join(ours),
                                         "preferred-sampling-params"))
        else:
            self.notes.append(f"it has preferred_sampling_params ({', '.join(sorted(preferred))}); our requests name "
                              "each of these fields, so they change nothing")

    # -- one setting -----------------------------------------------------------------------------

    def _setting(self, field: Field, wanted: Any, *, expect: bool = True) -> None:
        wanted = None if wanted is None else field.canonical(wanted)
        is_known, was_told = self._was_told(field)
        known, resolved = self._resolved(field, is_known, was_told)
        if wanted is not None and not known:
            self.notes.append(f"{field.name}: it does not say what it runs with, so {_word(wanted)} can't be checked")
        elif wanted is not None and resolved != wanted:
            self._differs(field, wanted, resolved, expect)
        elif wanted is None and is_known and was_told is not None:
            self._differs(field, None, resolved if resolved is not None else was_told, expect)
        elif wanted is None and not is_known and resolved is not None:
            self.notes.append(f"{field.name} is {_word(resolved)}; it does not say whether it was told to")

    def _resolved(self, field: Field, is_known: bool, was_told: Any) -> tuple[bool, Any]:
        """(whether it can be known, what the server runs with)."""
        if field.name == "context_length" and self.facts.context:
            return True, self.facts.context
        raw = self.info.get(field.key)
        if field.name == "dtype" and raw is not None and field.canonical(raw) is None:
            if resolved := model_dtype(self.facts.model_path, self.asked.model):
                self.notes.append(f"dtype was left to SGLang, which makes {resolved} of it for this model")
            return True, resolved
        unclear = field.key not in self.info or isinstance(told.scalar(raw), (dict, list))
        if field.name.startswith("flags.") and unclear:
            return is_known, was_told
        return True, field.canonical(raw)

    def _was_told(self, field: Field) -> tuple[bool, Any]:
        """(whether it can be known, what the server was told or None)."""
        raw = self.info.get(field.key)
        if self.told is None:  # an unset value shows as one, at least
            value = None if raw is None else field.canonical(raw)
            return field.shows_unset or (value is None and field.key in self.info), value
        for name, value in self.told.items():
            # argparse takes a beginning of a flag's name for the flag
            if name == field.flag or (field.flag.startswith(name) and name.replace("-", "_") not in self.info):
                return True, field.canonical(value)
        return True, None

    def _differs(self, field: Field, wanted: Any, found: Any, expect: bool = True) -> None:
        secret = is_secret(field.flag)
        self.found.append(Difference(field.name, "<secret>" if secret else wanted, "<secret>" if secret else found,
                                     field.flag, self._expected(field, found) if expect and not secret else None))

    def _expected(self, field: Field, found: Any) -> dict[str, Any] | None:
        """The setting under which the server would be what is asked for; None where the config can't say it."""
        if field.name.startswith("speculation"):
            return self._expected_speculation()
        if found is None:
            return None
        if field.name.startswith("flags."):
            return {"flags": {field.flag: found}}
        if field.name == "sampling_backend" and found != "pytorch":
            honours = bool(self.info.get("enable_deterministic_inference"))
            return {"deterministic": False, field.name: found} if found == "flashinfer" and not honours else None
        return {field.name: found}

    def _expected_speculation(self) -> dict[str, Any] | None:
        on = told.algorithm(self.info.get("speculative_algorithm"))
        if on not in ("NGRAM", "EAGLE", "EAGLE3", "STANDALONE"):
            return {"speculation": "off"} if on == "off" else None
        given = {f.name.partition(".")[2]: self._was_told(f)[1] for f in FIELDS if "." in f.name} if self.told else {}
        given = {name: value for name, value in given.items() if value is not None}
        name = "nextn" if on == "EAGLE" and "draft_model" not in given else on.lower()
        return {"speculation": {"algorithm": name, **given} if given else name}

    # -- the model -------------------------------------------------------------------------------

    def _model(self) -> None:
        wanted, served = self.asked.model, self.facts.model_path
        same, by_name = same_model(wanted, served, self.facts.url)
        if not same:
            self.found.append(Difference("model", wanted, served, "model-path",
                                         {"model": served} if served else None))
            return
        if by_name:
            self.notes.append(f"it serves {served}, taken for {wanted} by its name alone")
        if is_folder(wanted):
            return
        revision = snapshot(wanted)[1] or self.asked.revision
        commit = snapshot(served or "")[1]
        if is_folder(served or ""):
            if revision:
                self.notes.append(f"revision {revision} can't be checked: it serves a folder")
            return
        field, info = REVISION, self.info
        if commit:
            self.told, self.info = (self.told or {}) | {"revision": commit}, {**self.info, "revision": commit}
        if revision and same_commit(revision, self.info.get("revision")):
            revision = self.info["revision"]
        self._setting(field, revision, expect=False)
        self.info = info


def _kind(generates: bool) -> Difference:
    """Of a server that generates, or does not, where the other is asked for."""
    if generates:
        return Difference("kind of model", "a reward model", "one that generates",
                          how="with a reward model and --is-embedding")
    return Difference("kind of model", "one that generates", "an embedding or reward model",
                      how="with a model that generates, without --is-embedding")


def told_by(spec: LaunchSpec) -> dict[str, Any]:
    """What is asked of a server of ours, by flags."""
    speculation = spec.speculation or {}
    asked = {"dtype": spec.dtype, "context-length": spec.context_length, "sampling-backend": spec.sampling_backend,
             "sampling-mask-max-tokens": spec.mask_limit, "revision": spec.revision,
             "speculative-algorithm": speculation.get("algorithm"),
             **{f"speculative-{flag}": speculation.get(name) for name, flag in DRAFT.items()},
             **{flag_name(name): None if value is False else value for name, value in spec.flags.items()}}
    return {name: value for name, value in asked.items() if value is not None}


# --- servers against servers ---

_SHAPES = {
    "revision": told.scalar, "dtype": told.dtype, "quantization": told.settable, "kv_cache_dtype": told.dtype,
    "json_model_override_args": told.settable, "context_length": told.scalar,
    "enable_deterministic_inference": bool, "enable_custom_logit_processor": bool, "sampling_backend": told.scalar,
    "sampling_mask_max_tokens": told.scalar, "speculative_algorithm": told.algorithm,
    **{f"speculative_{flag.replace('-', '_')}": told.scalar for flag in DRAFT.values()},
    "attention_backend": told.scalar, "version": told.scalar}
"""Of /server_info, what shapes a token, with its spelling."""
_OF_MACHINE = ("attention_backend", "version")
RECORDED = ("model_path", *_SHAPES, "preferred_sampling_params", "max_total_num_tokens", "random_seed", "tp_size",
            "dp_size", "device", "disable_radix_cache", "chunked_prefill_size", "page_size")
"""Of /server_info, what goes into `run.json`: what can shape a token, and never a key or a password."""


def changed(before: ServerFacts, now: ServerFacts, asked: Asked | None = None) -> list[Difference]:
    """In what a server that shapes tokens runs otherwise than another, or than itself before.

    With `asked`, the two are different servers of a run: what can't matter there is left out, folders go by their
    names, and the machines' own kernels and SGLang versions may differ (`unlike` tells of those).
    """
    out = []
    same = now.model_path == before.model_path
    if not same and asked is not None and before.model_path:
        same = same_model(before.model_path, now.model_path, now.url)[0]
    if not same:
        out.append(Difference("model", before.model_path, now.model_path))
    if asked is None and now.generates != before.generates:
        out.append(_kind(now.generates))
    for key, canonical in _SHAPES.items():
        name = BY_FLAG[key.replace("_", "-")].name if key.replace("_", "-") in BY_FLAG else key
        if asked is not None and (name in asked.ignored or key in _OF_MACHINE
                                  or (key == "revision" and is_folder(now.model_path or ""))):
            continue
        if key in before.info and key in now.info:
            was, is_now = canonical(before.info[key]), canonical(now.info[key])
            if was != is_now:
                out.append(Difference(name, was, is_now, key.replace("_", "-")))
    return out


def unlike(servers: Sequence[ServerFacts]) -> list[str]:
    """In what the servers of a role differ from each other that shapes tokens, with who has which value."""
    out = []
    for key in ("dtype", "quantization", "kv_cache_dtype", "sampling_backend", "attention_backend", "version",
                "enable_deterministic_inference", "speculative_algorithm"):
        who: dict[Any, list[str]] = {}
        for facts in servers:
            if key in facts.info:
                who.setdefault(_SHAPES[key](facts.info[key]), []).append(facts.url)
        if len(who) > 1:
            out.append(f"{key}: " + "; ".join(f"{_word(v)} at {', '.join(urls)}" for v, urls in who.items()))
    return out


# --- for people ---

Mend = Literal["expect", "launch", "none"]


def columns(mend: Mend = "expect") -> list[str]:
    """What stands above the rows of `table`."""
    return ["setting", "asked for", "it is", *([] if mend == "none" else ["to mend"])]


def table(found: Iterable[Difference], mend: Mend = "expect") -> list[tuple[str, ...]]:
    """Rows (setting, asked for, it is, to mend); `mend`: for a server that others run, one of ours, or without."""
    last = {"expect": lambda d: [d.mend], "launch": lambda d: [d.written("launch")], "none": lambda _: []}[mend]
    return [(d.field, _word(d.asked), _word(d.found), *last(d)) for d in found]


def text(found: Iterable[Difference], mend: Mend = "expect") -> str:
    """`table` as lines of text in columns."""
    rows = [columns(mend), *table(found, mend)]
    widths = [*(max(len(row[n]) for row in rows) for n in range(3)), 0]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def expected(found: Iterable[Difference], given: Mapping[str, Any]) -> str:
    """The whole `expect` under which a server is what is meant, with what is `given` there already; empty where it
    can't be said, or is what the only row says."""
    found = list(found)
    if not all(d.expect for d in found) or (len(found) < 2 and not given):
        return ""
    whole = dict(given)
    for name, value in ((n, v) for d in found for n, v in (d.expect or {}).items()):
        whole[name] = {**whole.get(name, {}), **value} if name == "flags" else value
    if "flags" in whole:
        whole["flags"] = {n: "<secret>" if is_secret(n) else v for n, v in whole["flags"].items()}
    return f"expect: {_yaml(whole)}"


def _word(value: Any) -> str:
    return "not set" if value is None else "yes" if value is True else "no" if value is False else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
