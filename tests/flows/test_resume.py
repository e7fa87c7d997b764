"""A run that lost its disk goes on where it was; a run of any length takes the memory of a short one."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.context import Context
from tests.fake_sglang import FakeSGLang
from tests.flows.test_build import finish, start
from tests.generation.nursery import ROOT, Nursery
from tests.runs import build, make_config

VOLATILE = ["latency_s", "attempts", "server"]


def rows(raw: dict[str, Any]) -> list[list[dict]]:
    store = Context(f"{raw['runs_dir']}/test").store
    return [store.read(path).drop_columns(VOLATILE).to_pylist()
            for path in store.glob("candidates/*/*.parquet") + store.glob("verified/*.parquet")]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="sets another process's limits, which only Linux can")
@pytest.mark.timeout(120)
def test_a_full_disk_ends_a_run_with_a_message_and_130_and_room_lets_it_go_on(tmp_path, tiny_model):
    in_flight = 2
    with FakeSGLang(delay_s=0.1) as server:
        calm = make_config(tmp_path / "calm", tiny_model, [server.url], labels=[])
        build(calm, ["generate", "verify"])
        server.requests.clear()
        server.answered.clear()
        raw = make_config(tmp_path, tiny_model, [server.url], labels=[])
        raw["servers"]["generator"][0]["max_in_flight"] = in_flight
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(raw))

        process = start(config, tmp_path / "prefect")
        while len(server.requests) < 9 and process.poll() is None:
            time.sleep(0.01)
        # no file of the process may grow beyond this: to a writer as a disk that is full
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        code, said = finish(process)
        assert code == 130, said
        assert str(tmp_path / "runs/test/") in said
        assert "make room and run the same command again to go on" in said
        assert "Traceback" not in said
        assert len(server.requests) < 20  # nobody tried it again and again
        folder = tmp_path / "runs/test"
        assert not list(folder.rglob("*.winnow-tmp"))

        build(raw, ["generate", "verify"])
        # each of three shards finds out for itself
        assert sum(n - 1 for n in server.answered.values()) <= in_flight + 3
    assert rows(raw) == rows(calm)
    assert not list(folder.rglob("*.jsonl"))


def long_run(folder: Path, model: Path, url: str, rows: int) -> dict[str, Any]:
    """One shard of so many rows: twenty heuristics, two seeds, the rest prompts."""
    raw = make_config(folder, model, [url], labels=[], generation={"max_new_tokens": 32}, engine={"shard_prompts": rows})
    heuristics, stories = Path(raw["heuristics"]["files"][0]), Path(raw["sources"][1]["path"])
    heuristics.write_text(json.dumps({"sampling_pipelines": [
        {"name": f"h{n}", "processors": [{"name": "temperature", "params": {"temperature": 0.5 + n / 1000}}]}
        for n in range(20)]}))
    stories.write_text("".join(json.dumps({"prompt": f"Tell of lamp {n}."}) + "\n" for n in range(rows // 40)))
    raw["sources"] = raw["sources"][1:]
    raw["servers"]["generator"][0]["max_in_flight"] = 64
    return raw


@pytest.mark.timeout(120)
def test_a_shard_of_many_rows_takes_the_memory_of_one_of_few(tmp_path, tiny_model):
    from subprocess import PIPE, Popen

    fake = Popen([sys.executable, str(ROOT / "benchmarks/fast_fake.py"), "--until-stdin-ends", "--latency-s", "0.005",
                  "--tokens", "32", "--vocab", "256", "--model-path", str(tiny_model)], stdin=PIPE, stdout=PIPE, text=True)
    try:
        assert fake.stdout is not None
        url = f"http://127.0.0.1:{int(fake.stdout.readline())}"
        grown = {}
        with Nursery(tiny_model) as nursery:
            for count in (1000, 4000):
                raw = long_run(tmp_path / str(count), tiny_model, url, count)
                ended = nursery.run(raw)
                assert ended.code == 0, ended.said
                facts = Context(f"{raw['runs_dir']}/test").store.manifest("verified/shard-0000.parquet").facts
                assert facts["usable"] == facts["planned"] == count
                grown[count] = ended.grown_mib
    finally:
        fake.kill()
        fake.wait()
    # three thousand rows as Python objects would be 25 MiB and more; the libraries' own arenas come and go
    assert grown[4000] - grown[1000] < 20, grown
