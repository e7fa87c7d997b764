"""What the benchmarks of the fan-out share: fake servers, runs of ours, other clients, tables.

Every figure is a ratio against a baseline measured in the same run, rounds interleaved; absolute times are of the
machine at hand. Clients and servers are processes of their own, on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
HERE = ROOT / "benchmarks"
DEMO_MODEL = ROOT / "data/models/SmolLM2-135M-Instruct"
WORDS = ("Tell", "a", "story", "of", "the", "lamp", "that", "sings", "while", "rain", "falls", "on", "red", "kites",
         "and", "explain", "why", "birds", "rest", "in", "shade", "before", "night")

# one thread a library, no hub, no telemetry: for this process's children as well
for _key, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1",
                     "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_key, _value)


def options(doc: str | None, *, rounds: int = 0, tokens: int = 64, **more: Any) -> argparse.Namespace:
    """The command line of a benchmark, without --rounds if it has none; `more`: its own integers, (default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and longer rounds")
    if rounds:
        parser.add_argument("--rounds", type=int, help=f"rounds ({rounds}; with --full {2 * rounds + 1})")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"tokens of an answer ({tokens})")
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} ({default})")
    chosen = parser.parse_args()
    if rounds and chosen.rounds is None:
        chosen.rounds = 2 * rounds + 1 if chosen.full else rounds
    return chosen


# -- servers -----------------------------------------------------------------------------------------


class FakeServer:
    """A fast fake server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, Any]:
        """What it saw; see fast_answers.Stats."""
        with urllib.request.urlopen(self.url + "/stats", timeout=30) as answer:
            return json.load(answer)

    def reset(self) -> None:
        """Forget what it saw."""
        urllib.request.urlopen(self.url + "/reset", data=b"", timeout=30).close()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def fake(**settings: Any) -> Iterator[FakeServer]:
    """A fast fake server; settings as its command line has them: latency_s=0.05, faults="500=0.1"."""
    command = [sys.executable, str(HERE / "fast_fake.py"), "--until-stdin-ends"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server = FakeServer(process)
    try:
        yield server
    finally:
        server.stop()


def span_s(*stats: dict[str, Any]) -> float:
    """Seconds from the first request at any of the servers to the last answer of any."""
    return max(s["last_answer"] for s in stats) - min(s["first_request"] for s in stats)


# -- runs of ours ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def model_folder() -> Path:
    """A model folder with a tokenizer: the demo's where it is there, else a byte tokenizer."""
    if (DEMO_MODEL / "tokenizer.json").exists():
        return DEMO_MODEL
    from tests.tiny_model import make_tiny_model

    return make_tiny_model(Path(_folders.enter_context(tempfile.TemporaryDirectory(prefix="winnow-model-"))))


_folders = contextlib.ExitStack()


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for the benchmark's runs, removed at the end."""
    with _folders, tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        yield Path(folder)


def make_config(folder: Path, servers: Sequence[tuple[str, int]], *, prompts: int, heuristics: int, seeds: int = 1,
                shard_requests: int = 500, tokens: int = 64, workers: int = 4, name: str = "run") -> dict[str, Any]:
    """A raw config of a grid; `servers` are (url, most in flight). Runs of one grid share their input files."""
    sources, grid = folder / f"prompts-{prompts}.jsonl", folder / f"heuristics-{heuristics}.yaml"
    if not sources.exists():
        with sources.open("w") as file:
            for n in range(prompts):
                words = (WORDS[(n * 7 + k * (k + n % 5)) % len(WORDS)] for k in range(60))
                file.write(json.dumps({"prompt": f"{n}: {' '.join(words)}"}) + "\n")
    if not grid.exists():
        grid.write_text(json.dumps({"sampling_pipelines": [_heuristic(n) for n in range(heuristics)]}))  # JSON is YAML
    return {
        "run": name, "runs_dir": str(folder / "runs"), "model": {"path": str(model_folder())},
        "servers": {"generator": [{"url": url, "max_in_flight": limit} for url, limit in servers]},
        "sources": [{"name": "bench", "path": str(sources)}], "heuristics": {"files": [str(grid)]},
        "seeds": list(range(seeds)), "generation": {"generator": {"max_new_tokens": tokens}}, "labels": [],
        "limits": {"wait_for_servers_s": 30, "request_timeout_s": 120},
        "engine": {"shard_prompts": max(1, shard_requests // (heuristics * seeds)), "max_workers": workers},
    }


def _heuristic(n: int) -> dict[str, Any]:
    """One in four is a temperature alone; the rest cut, in all the ways there are."""
    cuts = [None, ("top_p", {"top_p": 0.9}), ("min_p", {"min_p": 0.05}), ("typical", {"mass": 0.9})]
    steps = [("temperature", {"temperature": round(0.5 + 0.01 * (n // 4), 2)}), cuts[n % 4]]
    return {"name": f"heuristic {n}", "processors": [{"name": s[0], "params": s[1]} for s in steps if s]}


class Ours:
    """A process that builds runs with our stages; started early, as its imports take seconds."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "ours.py"), str(model_folder())], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        self._ready: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Wait for its imports; what they took."""
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def begin(self, raw: dict[str, Any]) -> None:
        """Hand it a config and return at once."""
        self.ready()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(raw) + "\n")
        self.process.stdin.flush()

    def run(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Build a config; what it took (see ours.build)."""
        self.begin(raw)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"ours.py ended with exit code {self.process.wait()}; what it said is above")
        return json.loads(line)

    finish = _answer

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def ours(count: int = 1) -> Iterator[list[Ours]]:
    """Processes for runs of ours, ended with the block."""
    workers = [Ours() for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def warm_up(worker: Ours, folder: Path, tokens: int, name: str = "warm", prompts: int = 8) -> Path:
    """A small run, so that what is loaded late is loaded; the requests it sent, for the other clients."""
    recorded = folder / f"{name}.payloads"
    with fake(latency_s=0, tokens=tokens, model_path=model_folder(), record=recorded) as server:
        worker.run(make_config(folder, [(server.url, 16)], prompts=prompts, heuristics=20, tokens=tokens, name=name))
    return recorded


def other(how: str, urls: Sequence[str], payloads: Path, requests: int, in_flight: int, folder: Path) -> dict[str, Any]:
    """Run another client (see clients.py); what it took."""
    job = {"how": how, "urls": list(urls), "payloads": str(payloads), "requests": requests, "in_flight": in_flight,
           "out": str(folder / f"{how}.jsonl"), "model": str(model_folder())}
    done = subprocess.run([sys.executable, str(HERE / "clients.py"), json.dumps(job)], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


# -- tables ------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def verdict(met: bool) -> str:
    """Whether a goal is met, for a table."""
    return "met" if met else "missed"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """Print a table and what to know about it."""
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    print(title)
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())
    for note in notes:
        print(note)
