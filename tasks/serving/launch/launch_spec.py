"""What is asked of a launched SGLang server, and the command line and environment that say it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tasks.core.config import GenerationConfig, Launch, ModelRef, RunConfig, ServerConfig
from tasks.core.config_servers import Speculation, is_loopback
from tasks.core.errors import InputError
from tasks.serving.launch.flags import (
    Capabilities,
    LaunchFailed,
    LaunchRefused,
    Rendered,
    Value,
    flag_name,
    plain,
    render,
)
from tasks.serving.launch.flags_probe import probe

__all__ = ["CommandLine", "LaunchFailed", "LaunchRefused", "LaunchSpec", "classifies", "command", "command_line",
           "environment", "from_launch", "interpreter", "specs_of"]

log = logging.getLogger("winnow.servers")

ROOT = Path(__file__).resolve().parents[3]
CPU_LAUNCHER = ROOT / "tasks/serving/sglang_cpu/launch.py"
# SGLang's flags that have a key of their own in the config.
_KEYS = {
    "model-path": "launch.model", "revision": "model.revision", "host": "launch.host", "port": "launch.port",
    "device": "launch.device", "base-gpu-id": "launch.gpus", "dtype": "launch.dtype",
    "context-length": "launch.context_length", "mem-fraction-static": "launch.mem_fraction",
    "max-total-tokens": "launch.max_total_tokens", "sampling-backend": "launch.sampling_backend",
    "enable-deterministic-inference": "launch.deterministic",
    "enable-custom-logit-processor": "launch.custom_processors", "sampling-mask-max-tokens": "launch.mask_limit",
    "speculative-algorithm": "launch.speculation.algorithm",
    "speculative-draft-model-path": "launch.speculation.draft_model",
    "speculative-draft-model-revision": "launch.speculation.draft_revision",
    "speculative-num-steps": "launch.speculation.steps", "speculative-eagle-topk": "launch.speculation.topk",
    "speculative-num-draft-tokens": "launch.speculation.draft_tokens",
    "speculative-ngram-min-bfs-breadth": "launch.speculation.min_breadth",
    "speculative-ngram-max-bfs-breadth": "launch.speculation.max_breadth",
    "config": "launch.flags",  # a file of more flags would go around every check made here
}


@dataclass(frozen=True)
class LaunchSpec:
    """What is asked for. None leaves a setting to SGLang (for `port`: a free one)."""

    model: str
    role: str = "generator"
    device: Literal["cuda", "cpu"] = "cuda"
    gpu: int | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    dtype: str | None = None
    deterministic: bool = True
    custom_processors: bool = True
    allow_public: bool = False
    context_length: int | None = None
    mem_fraction: float | None = None
    max_total_tokens: int | None = None
    sampling_backend: str | None = None
    """None: pytorch where seeds are honoured or the device is the CPU, else SGLang's own."""
    threads: int = 1
    revision: str | None = None
    python: str | None = None
    speculation: dict[str, str | int] = field(default_factory=dict)
    """What is given of `Speculation`; empty: off."""
    mask_limit: int | None = None
    flags: dict[str, str | int | float | bool] = field(default_factory=dict)
    ready_timeout_s: float = 600.0

    @property
    def digest(self) -> str:
        """Identity of the server asked for: all but the port and how long one waits for it."""
        asked = dataclasses.asdict(self)
        del asked["port"], asked["ready_timeout_s"]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def embeds(self) -> bool:
        """A reward or embedding model, which does not generate."""
        return any(plain(name) == "is-embedding" and on is True for name, on in self.flags.items())


@dataclass(frozen=True)
class CommandLine:
    """What is run, and what was left out of it because this SGLang does not know it."""

    argv: list[str]
    warnings: tuple[str, ...] = ()


def specs_of(config: RunConfig, role: str, server: ServerConfig) -> list[LaunchSpec]:
    """How an entry of `servers.ROLE` is launched (see `from_launch`); none for a `url`."""
    if server.launch is None:
        return []
    return from_launch(server.launch, role=role, model=config.model_of(role), generation=config.generation.role(role),
                       classifies=classifies(config, role))


def classifies(config: RunConfig, role: str) -> bool:
    """Whether a role's servers score texts (/classify) and generate none."""
    return role == "judge" and config.quality.method == "pointwise"


def from_launch(launch: Launch, *, role: str, model: ModelRef, generation: GenerationConfig, classifies: bool = False
                ) -> list[LaunchSpec]:
    """One spec for each GPU listed, or one for the CPU. `model` and `generation` are the role's; what `launch` says
    itself comes first. `classifies`: a reward model, which SGLang has to be told of some.

    Raises InputError where no GPU is listed.
    """
    gpus: list[int | None] = list(launch.gpus) if launch.device == "cuda" else [None]
    if not gpus:
        raise InputError(f"servers.{role}: launch.gpus is empty; name at least one GPU")
    served, revision = (launch.model, None) if launch.model else (model.path, model.revision)
    own = {flag_name(name) for name in launch.flags}
    below = {name: value for name, value in generation.engine.items() if flag_name(name) not in own}
    if classifies and "is-embedding" not in {*own, *map(flag_name, below)}:
        below["is-embedding"] = True
    return [LaunchSpec(
        model=served, revision=revision, role=role, device=launch.device, gpu=gpu,
        port=launch.port + n if launch.port else None, host=launch.host,
        dtype=None if launch.dtype == "auto" else launch.dtype, deterministic=launch.deterministic,
        custom_processors=launch.custom_processors, allow_public=launch.allow_public,
        context_length=launch.context_length or generation.context_length, mem_fraction=launch.mem_fraction,
        max_total_tokens=launch.max_total_tokens, sampling_backend=launch.sampling_backend, threads=launch.threads,
        python=launch.python, mask_limit=launch.mask_limit, flags=below | launch.flags,
        speculation=launch.speculation.model_dump(exclude_none=True) if launch.speculation.on else {},
        ready_timeout_s=launch.ready_timeout_s) for n, gpu in enumerate(gpus)]


def command(spec: LaunchSpec, port: int, capabilities: Capabilities | None = None, *,
            cache_dir: Path | None = None) -> list[str]:
    """`command_line`'s argv; what was left out is logged."""
    line = command_line(spec, port, capabilities, cache_dir=cache_dir)
    for warning in line.warnings:
        log.warning("%s server: %s", spec.role, warning)
    return line.argv


def command_line(spec: LaunchSpec, port: int, capabilities: Capabilities | None = None, *,
                 cache_dir: Path | None = None) -> CommandLine:
    """What starts the server. A name in `spec.flags` takes the place of the same flag set here.

    `capabilities` are those of the SGLang that is started, which is asked where they are not given (see `probe` for
    `cache_dir`). Raises LaunchRefused for a setting that cannot be, LaunchFailed where no interpreter has SGLang.
    """
    _check(spec)
    python = interpreter(spec)
    start = [python, str(CPU_LAUNCHER)] if spec.device == "cpu" else [python, "-P", "-m", "sglang.launch_server"]
    ours = _options(spec, port)
    # whatever the model: the flags are the same, and are asked for once
    where = environment(spec) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    known = capabilities or probe(start, where, cache_dir=cache_dir)
    _check_flags(spec.flags, known)
    rendered = _rendered(ours, spec.flags, known)
    return CommandLine([*start, *rendered.argv], rendered.warnings)


def environment(spec: LaunchSpec) -> dict[str, str]:
    """What the server's environment has beyond this process's."""
    models = [spec.model, *([str(draft)] if (draft := spec.speculation.get("draft_model")) else [])]
    extra = {"HF_HUB_OFFLINE": "1"} if all(Path(model).expanduser().is_dir() for model in models) else {}
    if spec.device == "cuda":
        return extra
    # Spinning OpenMP threads on a busy machine cost a factor of 100. The one function that SGLang compiles here is
    # no faster for it, and compiling takes 20 s and a C++ compiler.
    return extra | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(spec.threads), "KMP_BLOCKTIME": "0",
                    "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


def interpreter(spec: LaunchSpec) -> str:
    """The Python that has SGLang: the one named, this one, or that of .venv-sglang."""
    if spec.python:
        return spec.python
    if importlib.util.find_spec("sglang"):
        return sys.executable
    apart = ROOT / ".venv-sglang" / "bin" / "python"
    if apart.exists():
        return str(apart)
    raise LaunchFailed(f"no SGLang: {sys.executable} cannot import it and {apart} does not exist; run `make "
                       "install-sglang`, or name an interpreter that has it (launch.python)")


# --- the parts ---


def _options(spec: LaunchSpec, port: int) -> dict[str, Value]:
    """What the spec's own keys say, by SGLang's names."""
    asked: dict[str, Value | None] = {
        "model-path": _model_path(spec.model, "launch.model"), "revision": spec.revision, "host": spec.host,
        "port": port, "device": spec.device, "dtype": spec.dtype, "context-length": spec.context_length,
        "mem-fraction-static": spec.mem_fraction, "max-total-tokens": spec.max_total_tokens,
        "sampling-backend": spec.sampling_backend or ("pytorch" if spec.deterministic else None),
        "sampling-mask-max-tokens": spec.mask_limit, "enable-deterministic-inference": spec.deterministic,
        "enable-custom-logit-processor": spec.custom_processors, "enable-metrics": True, **_guessing(spec),
    }
    if spec.device == "cpu":
        asked |= {
            "attention-backend": "torch_native", "sampling-backend": "pytorch", "grammar-backend": "none",
            "disable-overlap-schedule": True, "cuda-graph-backend-decode": "disabled",
            "cuda-graph-backend-prefill": "disabled", "mem-fraction-static": spec.mem_fraction or 0.3,
            "max-total-tokens": spec.max_total_tokens or 32768,
        }
    else:
        asked["base-gpu-id"] = spec.gpu
    return {name: value for name, value in asked.items() if value is not None}


def _guessing(spec: LaunchSpec) -> dict[str, Value | None]:
    if not spec.speculation:
        return {}
    asked = Speculation.model_validate(spec.speculation)
    return {
        "speculative-algorithm": asked.algorithm.upper(),
        "speculative-draft-model-path": (_model_path(asked.draft_model, "launch.speculation.draft_model")
                                         if asked.draft_model else None),
        "speculative-draft-model-revision": asked.draft_revision, "speculative-num-steps": asked.steps,
        "speculative-eagle-topk": asked.topk, "speculative-num-draft-tokens": asked.draft_tokens,
        "speculative-ngram-min-bfs-breadth": asked.min_breadth,
        "speculative-ngram-max-bfs-breadth": asked.max_breadth,
    } if asked.on else {}


def _rendered(ours: Mapping[str, Value], theirs: Mapping[str, Value], known: Capabilities) -> Rendered:
    # what is off is off where SGLang has no such flag: nothing to warn of
    ours = {name: value for name, value in ours.items() if value is not False or known.find(name, whole=True)}
    return render([*ours.items(), *theirs.items()], known, sure=ours)


def _check(spec: LaunchSpec) -> None:
    if spec.custom_processors and not spec.allow_public and not is_loopback(spec.host):
        raise LaunchRefused(f"launch.host: {spec.host} is reachable from other machines, and with custom processors "
                            "every client can run code on the server; listen on 127.0.0.1, or set allow_public: true "
                            "on a network where you trust every machine")
    if spec.sampling_backend not in (None, "pytorch") and (spec.deterministic or spec.device == "cpu"):
        why = "deterministic: true" if spec.deterministic else "device: cpu"
        raise LaunchRefused(f"launch.sampling_backend: {spec.sampling_backend} does not go with {why}, where SGLang "
                            "samples with pytorch")


def _check_flags(flags: Mapping[str, Value], known: Capabilities) -> None:
    """No flag goes around a key of the config, whatever its spelling, and whether or not this SGLang has it."""
    for name in flags:
        found = known.find(name)
        asked = [plain(n) for n in found[0].names] if found else [plain(name), plain(name).removeprefix("no-")]
        for own, key in _KEYS.items():
            if any(own == one or (not found and own.startswith(one)) for one in asked):
                raise LaunchRefused(f"launch.flags: {name} is set by the key of its own ({key}), not as a flag"
                                    if own != "config" else f"launch.flags: {name} names a file of more flags; give "
                                    "each of them here")


def _model_path(model: str, key: str) -> str:
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise LaunchRefused(f"{key}: there is no folder {path.absolute()}")
    return model
