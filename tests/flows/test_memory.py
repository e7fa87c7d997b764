"""A run of any length takes the memory of a short one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.context import Context
from tests.generation.nursery import ROOT, Nursery
from tests.runs import make_config

pytestmark = pytest.mark.slow


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
            for count in (2000, 6000):
                raw = long_run(tmp_path / str(count), tiny_model, url, count)
                ended = nursery.run(raw)
                assert ended.code == 0, ended.said
                made = Context(f"{raw['runs_dir']}/test").store.manifest("verified/shard-0000.parquet")
                assert made is not None and made.facts["usable"] == made.facts["planned"] == count
                grown[count] = ended.grown_mib
    finally:
        fake.kill()
        fake.wait()
    # four thousand rows as Python objects would be 35 MiB and more; the libraries' own arenas come and go
    assert grown[6000] - grown[2000] < 25, grown
