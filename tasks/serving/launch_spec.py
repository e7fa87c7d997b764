"""What is asked of a launched SGLang server, and the command line and environment that say it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import ipaddress
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
CPU_LAUNCHER = Path(__file__).resolve().parent / "sglang_cpu" / "launch.py"
_OURS = ("model-path", "host", "port", "enable-custom-logit-processor")


class LaunchFailed(Exception):
    """A server could not be started; the message says what failed, the usual cause and where the log is."""


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
    threads: int = 1
    revision: str | None = None
    python: str | None = None
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
        return any(_flag(name) == "is-embedding" and on is True for name, on in self.flags.items())


def command(spec: LaunchSpec, port: int) -> list[str]:
    """The command line. A name in `spec.flags` takes the place of the same flag set here.

    Raises LaunchFailed for a setting that is refused and where no interpreter has SGLang.
    """
    _check(spec)
    options: dict[str, str | int | float | bool | None] = {
        "model-path": _model_path(spec.model), "revision": spec.revision, "host": spec.host, "port": port,
        "device": spec.device, "dtype": spec.dtype, "context-length": spec.context_length,
        "mem-fraction-static": spec.mem_fraction, "max-total-tokens": spec.max_total_tokens,
        "sampling-backend": spec.sampling_backend or ("pytorch" if spec.deterministic else None),
        "enable-deterministic-inference": spec.deterministic,
        "enable-custom-logit-processor": spec.custom_processors, "enable-metrics": True,
    }
    if spec.device == "cpu":
        start = [str(CPU_LAUNCHER)]
        options |= {
            "attention-backend": "torch_native", "sampling-backend": "pytorch", "grammar-backend": "none",
            "disable-overlap-schedule": True, "cuda-graph-backend-decode": "disabled",
            "cuda-graph-backend-prefill": "disabled", "mem-fraction-static": spec.mem_fraction or 0.3,
            "max-total-tokens": spec.max_total_tokens or 32768,
        }
    else:
        start = ["-P", "-m", "sglang.launch_server"]
        options["base-gpu-id"] = spec.gpu
    options |= {_flag(name): value for name, value in spec.flags.items()}
    return [interpreter(spec), *start, *_rendered(options)]


def environment(spec: LaunchSpec) -> dict[str, str]:
    """What the server's environment has beyond this process's."""
    extra = {"HF_HUB_OFFLINE": "1"} if Path(spec.model).expanduser().is_dir() else {}
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


def _check(spec: LaunchSpec) -> None:
    for name in spec.flags:  # argparse takes any unambiguous beginning of a flag's name
        if taken := [ours for ours in _OURS if ours.startswith(_flag(name))]:
            raise LaunchFailed(f"launch.flags: {name} is set by the key of its own ({taken[0]}), not as a flag")
    try:
        loopback = ipaddress.ip_address(spec.host).is_loopback
    except ValueError:
        loopback = spec.host == "localhost"
    if spec.custom_processors and not loopback and not spec.allow_public:
        raise LaunchFailed(f"launch.host: {spec.host} is reachable from other machines, and with custom processors "
                           "every client can run code on the server; listen on 127.0.0.1, or set allow_public: true "
                           "on a network where you trust every machine")


def _model_path(model: str) -> str:
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise LaunchFailed(f"launch.model: there is no folder {path.absolute()}")
    return model


def _flag(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _rendered(options: dict[str, str | int | float | bool | None]) -> list[str]:
    out: list[str] = []
    for name, value in options.items():
        if value is True:
            out.append(f"--{name}")
        elif value is not None and value is not False:
            out.append(f"--{name}={value}")
    return out
