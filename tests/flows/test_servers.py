from __future__ import annotations

from flows.seats import seats_of
from tasks.core.config import RunConfig
from tasks.serving.launch.launch_spec import LaunchSpec


def config(**more) -> RunConfig:
    return RunConfig.model_validate({
        "run": "r", "model": {"path": "org/writer", "revision": "w1"}, "sources": [{"name": "s", "path": "p.jsonl"}],
        "heuristics": {"family": "qwen"}} | more)


def launched(made: RunConfig) -> list[LaunchSpec]:
    return [seat.spec for seat in seats_of(made, []) if seat.spec]


def test_each_role_serves_its_own_model_at_its_own_revision():
    made = config(servers={"generator": [{"launch": {"gpus": [0, 1]}}], "judge": [{"launch": {"gpus": [2]}}]},
                  quality={"model": {"path": "org/judge", "revision": "j1"}})
    found = [(s.role, s.model, s.revision, s.gpu) for s in launched(made)]
    assert found == [("generator", "org/writer", "w1", 0), ("generator", "org/writer", "w1", 1),
                     ("judge", "org/judge", "j1", 2)]


def test_a_model_named_at_launch_has_no_revision_of_another():
    made = config(servers={"judge": [{"launch": {"model": "org/other"}}]})
    (spec,) = [s for s in launched(made) if s.role == "judge"]
    assert (spec.model, spec.revision) == ("org/other", None)
