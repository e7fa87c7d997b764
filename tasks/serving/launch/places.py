"""Where a server stands (its GPUs, or its port on the CPU), which of ours stands there already, and how busy it is."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from tasks.serving.launch import processes, records
from tasks.serving.launch.flags import LaunchFailed, Value, flag_name
from tasks.serving.launch.launch_spec import LaunchSpec
from tasks.serving.launch.records import ServerRecord

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is not for our own servers


def devices(spec: LaunchSpec) -> tuple[str, ...]:
    """The GPUs that a server takes, as CUDA_VISIBLE_DEVICES names them (index or uuid); none on the CPU."""
    if spec.device != "cuda":
        return ()
    flags = {flag_name(name): value for name, value in spec.flags.items()}
    # with attention DP the replicas share the GPUs of one
    replicas = 1 if flags.get("enable-dp-attention") else _number(flags, "dp-size")
    each = _number(flags, "tp-size") * _number(flags, "pp-size") * replicas
    step = _number(flags, "gpu-id-step")
    numbers = [(spec.gpu or 0) + n * step for n in range(each)]
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        return tuple(map(str, numbers))
    return tuple(visible[n] for n in numbers if n < len(visible))


def in_place_of(spec: LaunchSpec, state_dir: Path, taken: Collection[str] = ()) -> list[ServerRecord]:
    """Our servers that run where `spec` would start: proved, living, and not on another run's leash.

    On a GPU that is what holds one of its GPUs, whatever its role and model; on the CPU what has its role. A given
    port is a place too: what has it stands there, and on the CPU that alone counts. `taken`: urls that are in use
    already (two equal specs are two servers). The likeliest to be what is asked for comes first; what differs (its
    port too, if one is given) is for the caller to see, who then uses it or stops it.
    """
    found = [r for r in records.kept(state_dir)
             if r.ready and not r.leashed and r.url not in taken and _collides(spec, r) and r.root]
    return sorted(found, key=lambda r: (r.spec_digest != spec.digest, r.port != spec.port, r.role != spec.role))


def refuse_held(specs: Iterable[LaunchSpec], state_dir: Path) -> None:
    """Raises LaunchFailed if another process's server of ours holds a GPU that one of these wants.

    Who asks for two on one GPU in one config may: whether they fit, SGLang says.
    """
    this = processes.identify(os.getpid())
    wanted = [(spec, gpus) for spec in specs if (gpus := set(devices(spec)))]
    if not wanted:
        return
    others = [r for r in records.kept(state_dir) if r.devices and r.owner != this]
    alive = records.living(others)
    for record in others:
        for spec, gpus in wanted:
            if alive.get(record.id) and gpus.intersection(record.devices) and not _share(spec, record):
                raise LaunchFailed(_held(spec, record))


def busy(server: ServerRecord | str) -> int | None:
    """Requests that run or wait at a server, by /v1/loads; None if it does not say."""
    url = server if isinstance(server, str) else server.url
    try:
        loads = json.loads(get(url.rstrip("/") + "/v1/loads", 5) or "null")["loads"]
        return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in loads) if loads else None
    except (ValueError, TypeError, KeyError):
        return None


def get(url: str, timeout_s: float) -> bytes | None:
    """What a server of ours answers, or None unless it is a 200."""
    try:
        with _OPENER.open(url, timeout=timeout_s) as response:
            return response.read() if response.status == 200 else None
    except (OSError, ValueError):
        return None


def post(url: str, body: dict[str, object], timeout_s: float) -> int | None:
    """The status that a server of ours answers with, or None if it does not."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def _collides(spec: LaunchSpec, record: ServerRecord) -> bool:
    if spec.port == record.port:
        return True
    if spec.device == "cuda":
        return bool(set(devices(spec)).intersection(record.devices)) and not _share(spec, record)
    return spec.port is None and record.role == spec.role and not record.devices


def _share(spec: LaunchSpec, record: ServerRecord) -> bool:
    """Whether they are meant to stand on one GPU together: two roles that name their shares of its memory."""
    other = record.spec.get("mem_fraction")
    if record.role == spec.role or spec.mem_fraction is None or not isinstance(other, float | int):
        return False
    return spec.mem_fraction + other <= 1


def _held(spec: LaunchSpec, record: ServerRecord) -> str:
    whose, mend = "left running", "stop it (winnow servers down)"
    if record.owned:
        command = "gone"
        with contextlib.suppress(psutil.Error):
            command = " ".join(psutil.Process(record.owner.pid).cmdline())[:120]
        whose, mend = f"started by process {record.owner.pid} ({command})", "wait until that ends"
    which = ", ".join(sorted(set(devices(spec)).intersection(record.devices)))
    return (f"launch.gpus: GPU {which} is held by a {record.role} server, {whose}: {record.url}, process {record.pid}, "
            f"log {record.log}; {mend}, or name another GPU")


def _number(flags: dict[str, Value], name: str) -> int:
    with contextlib.suppress(ValueError, TypeError):
        return max(1, int(flags.get(name, 1)))
    return 1
