"""`run.json` alone is enough to run again, id for id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.prepare import Plan, check, open_run
from tasks.context import Context, release
from tasks.core.errors import InputError
from tasks.core.generation import RoleGeneration
from tasks.core.resolve import load_config, recorded_run
from tasks.generation.grid import Grid
from tests.runs import make_config

JUDGE = {"user": "{prompt}\n1: {a}\n2: {b}\nBest?", "verdicts": ["1", "2"], "assistant_prefix": ""}


@pytest.fixture
def recorded(tmp_path, tiny_model) -> Path:
    """A run over files of every kind; the path of its run.json."""
    model = tmp_path / "model/tiny"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [256, 7]}')
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(JUDGE))
    raw = make_config(tmp_path, model, ["http://127.0.0.1:9"])
    raw["heuristics"] |= {"family": "qwen"}
    raw["generation"] = {"generator": {"chat_template": str(tmp_path / "chat.jinja"), "max_new_tokens": 9},
                         "judge": {"system_prompt": "Judge well."}}
    raw["quality"] |= {"template": str(tmp_path / "judge.yaml")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    _, ctx = opened(path, ["generation.generator.min_p=0.05", "seeds=[3, 4]"])
    release(ctx.url)
    return Path(ctx.store.path("run.json"))


def opened(path: Path, sets: list[str] | None = None, run: str | None = None) -> tuple[Plan, Context]:
    config, origins = load_config(path, sets, run)
    plan = check(config, origins, recorded_run(path))
    with plan.prompts:
        return plan, open_run(plan)


def ids(ctx: Context) -> list[tuple[Any, ...]]:
    return [(c.candidate_id, c.request_seed, c.prompt["prompt_ids"], c.heuristic)
            for shard in range(ctx.shards) for grid in [Grid(ctx, shard)] for c in map(grid.cell, range(len(grid)))]


def spoil(recorded: Path, *names: str) -> None:
    """Change the files that the config names."""
    folder = recorded.parents[2]
    texts = {"heuristics.yaml": json.dumps({"sampling_pipelines": [{"name": "x", "processors": []}]}),
             "model/tiny/generation_config.json": '{"temperature": 0.1, "max_new_tokens": 3}',
             "chat.jinja": "{{ messages }}", "judge.yaml": "not a template"}
    for name in names or texts:
        (folder / name).write_text(texts[name])


def test_it_gives_the_same_plan_id_for_id_although_every_file_changed(recorded):
    before = Context(str(recorded.parent))
    wanted = ids(before)
    spoil(recorded)
    plan, again = opened(recorded, run="again")
    assert ids(again) == wanted and len(wanted) == plan.requests > 2000
    same = {k for k in before.raw if before.raw[k] == again.raw[k]}
    assert {"identity", "heuristics", "generation", "templates", "inputs", "prompts_digest", "config_digest"} <= same
    assert again.config.run == "again"
    assert again.judge_template["user"] == JUDGE["user"]
    assert RoleGeneration.from_recorded(again.raw["generation"]["generator"]).values_from["min_p"].layer == "set"


def test_under_its_own_name_it_is_the_same_run(recorded):
    before = json.loads(recorded.read_text())
    spoil(recorded)
    opened(recorded)
    assert json.loads(recorded.read_text()) == before


def test_what_is_set_anew_is_read_anew(recorded):
    folder = recorded.parents[2]
    spoil(recorded, "heuristics.yaml")
    (folder / "own.yaml").write_text(json.dumps({"sampling_pipelines": [{"name": "own", "processors": []}]}))
    _, ctx = opened(recorded, [f"heuristics.files=[{folder / 'own.yaml'}]", "heuristics.family=null",
                               "generation.generator.min_p=null", "generation.judge.system_prompt=null"], "other")
    assert [(h.name, h.describe()) for h in ctx.heuristics] == [("own", "temperature 0.6 > top_k 20")]
    assert ctx.raw["templates"]["judge"]["system_prompt"] is None
    assert ctx.generation("generator")["max_new_tokens"] == 9  # of the recorded config


def test_prompts_that_are_others_now_are_refused(recorded):
    with (recorded.parents[2] / "stories.jsonl").open("a") as file:
        file.write('{"prompt": "Tell of snow."}\n')
    with pytest.raises(InputError, match=r"the prompts are not those of the recorded run \(6 now, 5 then"):
        opened(recorded, run="again")
    (recorded.parents[2] / "more.jsonl").write_text('{"prompt": "Tell of snow."}\n')
    opened(recorded, [f"sources=[{{name: more, path: {recorded.parents[2] / 'more.jsonl'}}}]"], "again")


def test_another_tokenizer_is_refused(recorded):
    from tasks.core import tokenizer

    path = recorded.parents[2] / "model/tiny/tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": len(raw["model"]["vocab"]) + 9, "content": "<new>"})
    path.write_text(json.dumps(raw))
    tokenizer._load.cache_clear()
    with pytest.raises(InputError, match="is not that of the recorded run"):
        opened(recorded, run="again")


def test_an_edited_template_in_it_is_noticed(recorded):
    raw = json.loads(recorded.read_text())
    raw["inputs"]["chat_templates"]["generator"]["content"]["source"] += " "
    recorded.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="was edited"):
        opened(recorded, run="again")


def test_another_json_file_is_no_run(tmp_path):
    (tmp_path / "x.json").write_text('{"run": 3}')
    with pytest.raises(InputError, match="the key 'model' is missing"):
        load_config(tmp_path / "x.json")
