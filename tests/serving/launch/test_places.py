"""Which of our servers stands where another is to start, who may share a GPU, and who is busy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.serving.launch import launcher, places
from tasks.serving.launch.launch_spec import LaunchFailed, LaunchSpec
from tasks.serving.launch.records import ServerRecord
from tests.serving.launch.stand_in import kept_record

GPU = LaunchSpec(model="m", gpu=0)
CPU = LaunchSpec(model="m", device="cpu")
Keep = Callable[..., ServerRecord]


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keep]:
    """Keeps records whose process lives."""
    roots: list[subprocess.Popen[bytes]] = []

    def one(spec: LaunchSpec, **fields: Any) -> ServerRecord:
        roots.append(subprocess.Popen(["sleep", "600"]))
        return kept_record(tmp_path, spec, root=roots[-1].pid, port=31000 + len(roots), **fields)

    yield one
    for root in roots:
        root.kill()
        root.wait()


def spec(base: LaunchSpec, **changes: Any) -> LaunchSpec:
    return dataclasses.replace(base, **changes)


def in_place(spec: LaunchSpec, folder: Path, taken: tuple[str, ...] = ()) -> list[str]:
    return [r.id for r in launcher.in_place_of(spec, folder, taken)]


def test_on_a_gpu_whatever_holds_it_is_in_place(tmp_path: Path, keep: Keep) -> None:
    judge, other = keep(spec(GPU, role="judge", model="other")), keep(spec(GPU, gpu=1))
    keep(CPU)
    assert in_place(GPU, tmp_path) == [judge.id]
    assert in_place(spec(GPU, gpu=None), tmp_path) == [judge.id]  # SGLang begins with GPU 0
    assert in_place(spec(GPU, gpu=1, role="judge", port=7), tmp_path) == [other.id]
    assert in_place(spec(GPU, gpu=2), tmp_path) == []


def test_on_the_cpu_the_role_is_the_place_and_each_is_taken_once(tmp_path: Path, keep: Keep) -> None:
    first, second = keep(spec(CPU, dtype="float32")), keep(CPU)
    judge = keep(spec(CPU, role="judge"))
    keep(GPU)
    assert in_place(CPU, tmp_path) == [second.id, first.id]  # the likeliest first
    assert in_place(CPU, tmp_path, (second.url,)) == [first.id]
    assert in_place(CPU, tmp_path, (second.url, first.url)) == []
    assert in_place(spec(CPU, role="judge"), tmp_path) == [judge.id]


def test_a_given_port_is_a_place(tmp_path: Path, keep: Keep) -> None:
    here, judge = keep(CPU), keep(spec(CPU, role="judge"))
    assert in_place(spec(CPU, port=here.port), tmp_path) == [here.id]
    assert in_place(spec(CPU, port=judge.port), tmp_path) == [judge.id]  # who has the port is in the way
    assert in_place(spec(CPU, port=7), tmp_path) == []


@pytest.mark.parametrize("fields", [{"leashed": True}, {"ready": False}, {"boot": "another"}])
def test_what_may_end_or_was_never_proved_is_not_offered(tmp_path: Path, keep: Keep, fields: dict[str, Any]) -> None:
    keep(CPU, **fields)
    assert in_place(CPU, tmp_path) == []


def test_two_roles_that_name_their_shares_stand_on_one_gpu_together(tmp_path: Path, keep: Keep) -> None:
    judge = keep(spec(GPU, role="judge", mem_fraction=0.4), leashed=False)
    assert in_place(spec(GPU, mem_fraction=0.5), tmp_path) == []
    assert in_place(spec(GPU, mem_fraction=0.7), tmp_path) == [judge.id]
    assert in_place(GPU, tmp_path) == [judge.id]
    assert in_place(spec(GPU, role="judge", mem_fraction=0.5), tmp_path) == [judge.id]  # the same, changed


@pytest.mark.parametrize(("flags", "visible", "expected"), [
    ({}, None, ("2",)), ({"tp-size": 2}, None, ("2", "3")), ({"--tp_size": "2", "pp": 2}, None, ("2", "3", "4", "5")),
    ({"tp-size": 2, "gpu-id-step": 2}, None, ("2", "4")), ({"dp-size": 2, "tp": 2}, None, ("2", "3", "4", "5")),
    ({"dp-size": 2, "tp": 2, "enable-dp-attention": True}, None, ("2", "3")),
    ({"tp-size": 4, "Tensor_Parallel_Size": 2}, None, ("2", "3")),  # one flag: the later counts, as for SGLang
    ({}, "4,5,6,7", ("6",)), ({}, "GPU-a, GPU-b ,GPU-c", ("GPU-c",)), ({}, "0", ()), ({"tp": "x"}, "", ("2",)),
])
def test_the_gpus_of_a_server_are_those_that_its_flags_and_environment_give_it(
        monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], visible: str | None,
        expected: tuple[str, ...]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert places.devices(LaunchSpec(model="m", gpu=2, flags=flags)) == expected
    assert places.devices(LaunchSpec(model="m", device="cpu", flags=flags)) == ()


def never(spec: LaunchSpec, port: int) -> list[str]:
    raise AssertionError("nothing is to start")


def test_a_gpu_that_another_runs_server_holds_is_refused_with_its_whereabouts(tmp_path: Path, keep: Keep) -> None:
    run = subprocess.Popen(["sleep", "601"])
    try:
        held = keep(GPU, leashed=True, owner=run.pid)
        with pytest.raises(LaunchFailed, match=r"GPU 0 is held by a generator server") as refused:
            launcher.start(spec(GPU, role="judge"), tmp_path, leashed=True, build=never)
        said = str(refused.value)
        assert held.url in said and f"process {held.pid}" in said and held.log in said
        assert f"process {run.pid} (sleep 601)" in said
        with pytest.raises(AssertionError):
            launcher.start(spec(GPU, gpu=1), tmp_path, leashed=True, build=never)
        with pytest.raises(AssertionError):
            launcher.start(spec(CPU), tmp_path, leashed=True, build=never)
    finally:
        run.kill()
        run.wait()


def test_two_of_one_config_on_a_gpu_are_left_to_sglang(tmp_path: Path, keep: Keep) -> None:
    keep(GPU, leashed=True)  # this process's own
    with pytest.raises(AssertionError):
        launcher.start(spec(GPU, role="judge"), tmp_path, leashed=True, build=never)


# --- how busy a server is ---


@pytest.fixture
def answering() -> Iterator[Callable[[Any], str]]:
    """A server that answers /v1/loads with what is given; its url."""
    answers: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/loads" else 404)
            self.send_header("Content-Length", str(len(answers[-1])))
            self.end_headers()
            self.wfile.write(answers[-1])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def give(answer: Any) -> str:
        answers.append(json.dumps(answer).encode())
        return f"http://127.0.0.1:{server.server_port}"

    yield give
    server.shutdown()
    server.server_close()


def load(running: Any, waiting: Any) -> dict[str, Any]:
    return {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": waiting, "token_usage": 0.1}


@pytest.mark.parametrize(("answer", "requests"), [
    ({"loads": [load(0, 0)]}, 0), ({"loads": [load(2, 1), load(0, 4)]}, 7), ({"loads": []}, None), ({}, None),
    (None, None), ([], None), ({"loads": [{"num_running_reqs": 1}]}, None), ({"loads": [load(None, 0)]}, None),
])
def test_requests_that_run_or_wait_are_counted_or_unknown(answering: Callable[[Any], str], answer: Any,
                                                          requests: int | None) -> None:
    assert launcher.busy(answering(answer) + "/") == requests


def test_who_does_not_answer_is_not_known_to_be_busy(tmp_path: Path, keep: Keep) -> None:
    assert launcher.busy(keep(CPU)) is None
