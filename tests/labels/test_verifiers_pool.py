from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.labels.verifiers import Verdict, VerifierPool, WorkerStartError, names, verify

ROOT = Path(__file__).parents[2]
RIGHT = Verdict(1.0, "72", None)
EASY = ("gsm8k", "#### 72", "72")
# A real hang, inside the regular expression engine, which holds the interpreter lock.
HANG = (
    "ifeval",
    "a" * 60 + "!",
    json.dumps({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a+)+$"]}]}),
)


@pytest.fixture
def odd_command(tmp_path: Path) -> tuple[str, ...]:
    """A worker that also knows the kind `odd`, whose texts are Python statements."""
    (tmp_path / "odd_verifier.py").write_text(
        textwrap.dedent("""
        import os, resource, signal, sys, time
        from tasks.labels.verifiers.base import Verdict

        def verify(text, ground_truth):
            exec(text)
            return Verdict(1.0, str(os.getpid()), None)
        """)
    )
    start = tmp_path / "start.py"
    start.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from tasks.labels.verifiers import base, worker
        base.MODULES["odd"] = "odd_verifier"
        worker.main()
        """)
    )
    return (sys.executable, str(start))


@pytest.fixture
def odd_pool(odd_command: tuple[str, ...]) -> Iterator[VerifierPool]:
    with VerifierPool(2, 1.0, command=odd_command) as pool:
        yield pool


def test_verdicts_come_in_the_order_of_the_jobs() -> None:
    jobs = [("gsm8k", f"#### {number}", str(number - number % 2)) for number in range(200)]
    with VerifierPool(2, 10.0) as pool:
        verdicts = pool.run(jobs)
        assert pool.run([]) == []
    assert verdicts == [verify(*job) for job in jobs]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0] * 100


def test_a_hang_is_killed_at_the_limit_and_costs_one_verdict() -> None:
    with VerifierPool(2, 1.0) as pool:
        pool.run([EASY, EASY])
        began = time.monotonic()
        verdicts = pool.run([EASY, HANG, EASY, EASY])
        took = time.monotonic() - began
    assert verdicts == [RIGHT, Verdict(None, None, "timeout"), RIGHT, RIGHT]
    assert 1.0 <= took < 10.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed: SIGSEGV"),
        ("os._exit(3)", "crashed: exit 3"),
        ("raise KeyError('gone')", "error: KeyError: 'gone'"),
        ("raise SystemExit(4)", "crashed: exit 4"),
        ("x = bytearray(8 << 30)", "error: MemoryError"),
        ("time.sleep(60)", "timeout"),
    ],
)
def test_a_crash_costs_one_verdict_and_the_worker_is_replaced(odd_pool: VerifierPool, text: str, reason: str) -> None:
    bad = ("odd", text, "")
    verdicts = odd_pool.run([EASY, bad, EASY, bad, EASY, EASY])
    assert verdicts == [RIGHT, Verdict(None, None, reason), RIGHT, Verdict(None, None, reason), RIGHT, RIGHT]


def test_a_library_that_prints_or_reads_does_no_harm(odd_pool: VerifierPool) -> None:
    verdicts = odd_pool.run([("odd", "print('noise'); os.write(1, b'noise')", ""), EASY])
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0]


def test_a_worker_serves_many_jobs_and_many_runs(odd_pool: VerifierPool) -> None:
    pids = {verdict.extracted for _ in range(3) for verdict in odd_pool.run([("odd", "pass", "")] * 20)}
    assert 1 <= len(pids) <= 2


@pytest.mark.slow
def test_texts_of_ten_megabytes_and_broken_characters_survive() -> None:
    long = "é" * 10_000_000 + "\n#### 72"
    odd = "\ud800 \x00 \u2028 \U0001d7df #### 72"
    with VerifierPool(2, 60.0) as pool:
        assert pool.run([("gsm8k", long, "72"), ("gsm8k", odd, "72"), ("math", long, "72")])[:2] == [RIGHT, RIGHT]


def test_only_the_jobs_in_hand_are_read_from_the_sequence() -> None:
    class Watched(list):
        taken = 0

        def __getitem__(self, position):
            Watched.taken += 1
            return super().__getitem__(position)

    jobs = Watched([HANG] + [EASY] * 5)
    with VerifierPool(1, 1.5) as pool:
        thread = threading.Thread(target=lambda: pool.run(jobs))
        thread.start()
        time.sleep(0.5)
        assert Watched.taken == 1
        thread.join()
    assert Watched.taken == 6


def test_several_threads_share_the_workers() -> None:
    results: dict[int, list[Verdict]] = {}
    with VerifierPool(2, 10.0) as pool:

        def ask(number: int) -> None:
            results[number] = pool.run([("gsm8k", f"#### {number}", str(number))] * 50)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: [Verdict(1.0, str(number), None)] * 50 for number in range(4)}


def test_an_unknown_kind_is_a_verdict_that_names_the_known_ones() -> None:
    with VerifierPool(1, 5.0) as pool:
        (verdict,) = pool.run([("gsm9k", "72", "72")])
    assert verdict.reason == f"error: ValueError: unknown verifier 'gsm9k'; there are {', '.join(names())}"


def test_a_worker_that_cannot_start_is_an_error_not_a_verdict() -> None:
    with (
        VerifierPool(2, 5.0, command=(sys.executable, "-c", "raise SystemExit(7)")) as pool,
        pytest.raises(WorkerStartError, match="exit 7"),
    ):
        pool.run([EASY] * 3)


def test_closing_ends_the_workers_and_refuses_further_runs() -> None:
    before = set(psutil.Process().children())
    pool = VerifierPool(2, 5.0)
    pool.run([EASY] * 4)
    workers = set(psutil.Process().children()) - before
    assert workers
    pool.close()
    pool.close()
    assert not {child.pid for child in workers} & {child.pid for child in psutil.Process().children()}
    with pytest.raises(RuntimeError, match="closed"):
        pool.run([EASY])


@pytest.mark.parametrize(("workers", "limit"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_a_pool_without_workers_or_time_is_refused(workers: int, limit: float) -> None:
    with pytest.raises(ValueError, match="workers must be"):
        VerifierPool(workers, limit)


@pytest.mark.slow
def test_workers_idle_or_hung_do_not_outlive_a_killed_parent() -> None:
    script = textwrap.dedent(f"""
        import os, signal, threading, time
        import psutil
        from tasks.labels.verifiers import VerifierPool
        pool = VerifierPool(2, 3.0)
        pool.run([{EASY!r}] * 50)
        threading.Thread(target=pool.run, args=([{HANG!r}],), daemon=True).start()
        time.sleep(1.5)
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pids = [int(pid) for pid in re.findall(r"\d+", done.stdout)]
    assert pids, done.stderr
    deadline = time.monotonic() + 15.0
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
