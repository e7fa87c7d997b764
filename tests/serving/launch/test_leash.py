"""The leash: a command ends with the process that started it, and so does everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.serving.launch import leash
from tasks.serving.launch.leash import start_leashed
from tests.serving.launch.stand_in import alive, within

# a command with a grandchild in a session of its own; both write their pids
FAMILY = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code, str(folder / "grandchild")], start_new_session=True)
(folder / "child").write_text(str(os.getpid()))
time.sleep(600)
"""
PARENT = """
import os, pathlib, sys, time
from tasks.serving.launch.leash import start_leashed
folder = pathlib.Path(sys.argv[1])
held = start_leashed([sys.executable, str(folder / "family.py"), str(folder)], env=dict(os.environ),
                     log_path=folder / "log")
(folder / "leash").write_text(str(held.pid))
time.sleep(600)
"""


def read_pid(path: Path) -> int:
    assert within(10, lambda: path.is_file() and bool(path.read_text())), f"{path.name} never started"
    return int(path.read_text())


@pytest.fixture
def family(tmp_path: Path) -> list[str]:
    (tmp_path / "family.py").write_text(FAMILY)
    return [sys.executable, str(tmp_path / "family.py"), str(tmp_path)]


def test_kill_nine_of_the_parent_leaves_nothing_behind(tmp_path: Path, family: list[str]) -> None:
    root = Path(leash.__file__).resolve().parents[3]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=root)
    pids = [read_pid(tmp_path / name) for name in ("leash", "child", "grandchild")]
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    assert within(10, lambda: not any(alive(pid) for pid in pids))


def test_a_fork_that_still_holds_the_pipe_does_not_keep_the_command_alive(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from tasks.serving.launch.leash import start_leashed
held = start_leashed(["sleep", "600"], env=dict(os.environ), log_path=Path(sys.argv[1]) / "log")
fork = os.fork()
if fork:
    (Path(sys.argv[1]) / "fork").write_text(str(fork))
    (Path(sys.argv[1]) / "leash").write_text(str(held.pid))
time.sleep(600)
"""
    root = Path(leash.__file__).resolve().parents[3]
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    fork, held = read_pid(tmp_path / "fork"), read_pid(tmp_path / "leash")
    parent.kill()
    parent.wait()
    try:
        assert within(10, lambda: not alive(held))
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_stop_ends_the_command_and_its_descendants(tmp_path: Path, family: list[str]) -> None:
    held = start_leashed(family, env=dict(os.environ), log_path=tmp_path / "log")
    pids = [read_pid(tmp_path / name) for name in ("child", "grandchild")]
    assert held.poll() is None
    held.stop(grace_s=5)
    assert held.poll() is not None
    assert not any(alive(pid) for pid in [held.pid, *pids])


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    code = (f"import pathlib, os, signal, time; signal.signal(signal.SIGTERM, lambda *a: print('TERM', flush=True));"
            f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(os.getpid()))\nwhile True: time.sleep(1)")
    held = start_leashed([sys.executable, "-c", code], env=dict(os.environ), log_path=tmp_path / "log", grace_s=60)
    child = read_pid(tmp_path / "child")
    began = time.monotonic()
    held.stop(grace_s=0.5)
    assert not alive(child)
    assert 0.4 < time.monotonic() - began < 5
    assert "TERM" in (tmp_path / "log").read_text()


def test_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('said'); sys.exit(7)"]
    held = start_leashed(command, env=dict(os.environ), log_path=tmp_path / "log")
    assert within(10, lambda: held.poll() is not None)
    assert held.poll() == 7
    assert "said" in (tmp_path / "log").read_text()


def test_what_a_command_leaves_behind_ends_when_it_ends_by_itself(tmp_path: Path) -> None:
    script = FAMILY.removesuffix("time.sleep(600)\n") + "while not (folder / 'grandchild').exists(): time.sleep(.01)"
    held = start_leashed([sys.executable, "-c", script, str(tmp_path)], env=dict(os.environ),
                         log_path=tmp_path / "log")
    grandchild = read_pid(tmp_path / "grandchild")
    assert within(10, lambda: held.poll() == 0)
    assert not alive(grandchild)


def test_the_leash_and_its_command_sit_outside_the_parents_session(tmp_path: Path, family: list[str]) -> None:
    held = start_leashed(family, env=dict(os.environ), log_path=tmp_path / "log")
    try:
        child = read_pid(tmp_path / "child")
        assert len({os.getsid(0), os.getsid(held.pid), os.getsid(child)}) == 3
    finally:
        held.stop(grace_s=2)


def test_a_leash_killed_itself_takes_the_command_along(tmp_path: Path) -> None:
    code = (f"import pathlib, os, time; pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(os.getpid()));"
            "time.sleep(600)")
    held = start_leashed([sys.executable, "-c", code], env=dict(os.environ), log_path=tmp_path / "log")
    child = read_pid(tmp_path / "child")
    os.kill(held.pid, signal.SIGKILL)
    assert within(5, lambda: not alive(child))
    held.stop(1)


def test_the_cry_of_a_worker_that_lost_its_parent_ends_the_command_in_order(tmp_path: Path, family: list[str]) -> None:
    held = start_leashed(family, env=dict(os.environ), log_path=tmp_path / "log")
    pids = [read_pid(tmp_path / name) for name in ("child", "grandchild")]
    os.kill(held.pid, signal.SIGQUIT)  # what SGLang's workers send to their parent when they fail
    assert within(10, lambda: held.poll() is not None)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("command", ["/no/such/program", "/etc/passwd"])
def test_a_command_that_cannot_be_run_is_said_in_one_line(tmp_path: Path, command: str) -> None:
    held = start_leashed([command], env=dict(os.environ), log_path=tmp_path / "log")
    assert within(10, lambda: held.poll() == 127)
    assert "leash: [Errno" in (tmp_path / "log").read_text() and "Traceback" not in (tmp_path / "log").read_text()


def test_the_leash_imports_nothing_heavy() -> None:
    code = ("import sys; import tasks.serving.launch.leash;"
            "print([m for m in ('torch', 'numpy', 'aiohttp') if m in sys.modules])")
    root = Path(leash.__file__).resolve().parents[3]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"
