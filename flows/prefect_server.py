"""The Prefect API a run reports to: the one that is configured, or a private one for the run's length.

The private server is a child on a leash: it ends with the run, also when the run is killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.core.errors import UnreachableError
from tasks.serving.launch.leash import start_leashed

# a quarter of the server's CPU at many task runs, and a UI that keeps up
_TUNING = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}


@contextlib.contextmanager
def prefect_api(log_path: Path, notice: Callable[[str], None], debug: bool = False) -> Iterator[str]:
    """The API's URL, set in the environment; call before anything imports prefect.

    Raises UnreachableError when the configured API does not answer or the private one does not start.
    """
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "winnow")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "DEBUG" if debug else "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if url := _configured():
        if not _answers(url, 10):
            raise UnreachableError(f"PREFECT_API_URL: no Prefect server answers at {url}; start it (prefect server "
                                   "start), or unset PREFECT_API_URL to use a private one")
        notice(f"Prefect at {url.removesuffix('/api')}")
        yield url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    # the module, not the script: a moved virtual environment has scripts with dead first lines
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | _TUNING | {"PREFECT_API_URL": url, "PREFECT_UI_API_URL": url}
    server = start_leashed(command, env=environment, log_path=log_path)
    try:
        deadline = time.monotonic() + 120
        while not _answers(url, 2):
            if server.poll() is not None or time.monotonic() > deadline:
                raise UnreachableError(f"the private Prefect server did not start; see {log_path}")
            time.sleep(0.2)
        notice(f"watch the run at http://127.0.0.1:{port} (Prefect UI, while the run lasts)")
        os.environ["PREFECT_API_URL"] = url
        yield url
    finally:
        _drain()
        os.environ.pop("PREFECT_API_URL", None)
        server.stop(grace_s=5)


def _drain() -> None:
    """Hand over logs and events still queued in this process: the server that they are for is about to end."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=5)


def _configured() -> str | None:
    """PREFECT_API_URL of the environment or of the active profile, without importing prefect."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")).expanduser()
    try:
        import tomllib

        profiles = tomllib.loads((home / "profiles.toml").read_text())
    except (OSError, ValueError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return url.rstrip("/") if url else None


def _answers(url: str, timeout_s: float) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False
