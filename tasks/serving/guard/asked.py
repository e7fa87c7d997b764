"""What a server must be for a run: the settings of its entry in the config, and what of them can matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.core.config import RunConfig, ServerConfig
from tasks.core.heuristics import Heuristic
from tasks.serving.compile import compile_heuristic
from tasks.serving.guard import told
from tasks.serving.launch.flags import flag_name
from tasks.serving.launch.launch_spec import classifies


@dataclass(frozen=True)
class Field:
    """A setting: its name in `Settings`, its flag, and how its values are brought to one spelling."""

    name: str
    flag: str
    canonical: Callable[[Any], Any] = told.scalar
    shows_unset: bool = False
    """Whether /server_info leaves it None unless the server was told."""

    @property
    def key(self) -> str:
        """Its name in /server_info."""
        return self.flag.replace("-", "_")


DRAFT = {"draft_model": "draft-model-path", "draft_revision": "draft-model-revision", "steps": "num-steps",
          "topk": "eagle-topk", "draft_tokens": "num-draft-tokens", "min_breadth": "ngram-min-bfs-breadth",
          "max_breadth": "ngram-max-bfs-breadth"}
FIELDS = (
    Field("dtype", "dtype", told.dtype),
    Field("context_length", "context-length", shows_unset=True),
    Field("deterministic", "enable-deterministic-inference", bool),
    Field("custom_processors", "enable-custom-logit-processor", bool),
    Field("sampling_backend", "sampling-backend"),
    Field("mask_limit", "sampling-mask-max-tokens"),
    Field("speculation", "speculative-algorithm", told.algorithm, shows_unset=True),
    *(Field(f"speculation.{name}", f"speculative-{flag}",
            {"draft_model": told.folder, "draft_revision": told.text}.get(name, told.scalar))
      for name, flag in DRAFT.items()),
)
REVISION = Field("revision", "revision", told.text, shows_unset=True)
BY_FLAG = {f.flag: f for f in (*FIELDS, REVISION)}
KIND = "is-embedding"
"""Not compared as a flag: some reward models are served as such without it. What counts is what the server is."""
SHAPING = ("quantization", "kv-cache-dtype", "json-model-override-args", "enable-watermark")
"""Flags that make another model of the same weights, or bend what it says: not asked for is asked for without."""


def of_flag(name: str) -> Field:
    """Any flag as a setting."""
    return Field(f"flags.{name}", name, told.dtype if name.endswith("dtype") else told.settable)


@dataclass(frozen=True)
class Asked:
    """What a server must be. None in `settings` and `revision`: left to SGLang."""

    role: str
    model: str
    revision: str | None
    settings: Mapping[str, Any]
    """By the names of `Settings`, in canonical spelling."""
    flags: Mapping[str, Any]
    """More SGLang flags."""
    ignored: frozenset[str] = frozenset()
    """Names of settings that can't matter here."""
    classifies: bool = False
    """A reward model, asked at /classify; else one that generates."""

    def shown(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"model": self.model, "revision": self.revision, **self.settings, "flags": dict(self.flags),
                "ignored": sorted(self.ignored)}


def asked_of(config: RunConfig, role: str, server: ServerConfig, heuristics: Iterable[Heuristic]) -> Asked:
    """What an entry of `servers.ROLE` must be for this run.

    A flag comes before the setting that it stands for, as on the command line. Ignored: draft settings without
    speculation, the mask's limit where none is recorded, custom processors where no heuristic needs one, and what a
    judge, whose verdict is one token's probabilities, has no use for.
    """
    settings, generation = server.settings, config.generation.role(role)
    model, speculation = config.model_of(role), settings.speculation
    values: dict[str, Any] = {
        "dtype": settings.dtype, "context_length": settings.context_length or generation.context_length,
        "deterministic": settings.deterministic, "custom_processors": settings.custom_processors,
        "sampling_backend": settings.sampling_backend, "mask_limit": settings.mask_limit,
        "speculation": speculation.algorithm, "revision": None if settings.model else model.revision}
    values |= {f"speculation.{name}": getattr(speculation, name) for name in DRAFT}
    if speculation.max_breadth is not None and speculation.min_breadth is None:
        values["speculation.min_breadth"] = 1
    flags = {flag_name(k): v for given in (generation.engine, settings.flags) for k, v in given.items()}
    values |= {BY_FLAG[k].name: v for k, v in flags.items() if k in BY_FLAG}
    values = {f.name: None if values[f.name] is None else f.canonical(values[f.name]) for f in BY_FLAG.values()}
    flags = {k: v for k, v in flags.items() if k not in BY_FLAG and k != KIND}
    return Asked(role, settings.model or model.path, values.pop("revision"), values, flags,
                 frozenset(_ignored(config, role, values, heuristics)), classifies(config, role))


def _ignored(config: RunConfig, role: str, values: Mapping[str, Any], heuristics: Iterable[Heuristic]) -> set[str]:
    out = {f"speculation.{name}" for name in DRAFT} if values["speculation"] == "off" else set()
    if role == "judge":
        return out | {"sampling_backend", "mask_limit", "custom_processors"}
    honours = (values["deterministic"] and values["sampling_backend"] == "pytorch" and values["speculation"] == "off")
    if not any(compile_heuristic(h, honours).custom_params is not None for h in heuristics):
        out.add("custom_processors")
    if not config.generation.generator.sampling_mask:
        out.add("mask_limit")
    return out
