from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.config import RunConfig, Source
from tasks.core.errors import InputError
from tasks.core.store import Store
from tasks.core.tokenizer import load_tokenizer
from tasks.generation.prompts import Malformed, parse_row, read_prompts, read_shard, write_prompts


def config(*sources: dict, **more) -> RunConfig:
    return RunConfig.model_validate({"run": "r", "model": {"path": "m"}, "sources": list(sources),
                                     "heuristics": {"family": "qwen"}} | more)


def jsonl(path, *rows, raw: str = ""):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) + raw, encoding="utf-8")
    return str(path)


def test_equal_rows_fold_and_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}, {"prompt": "x"})
    prompts, copies, counts = read_prompts(config({"name": "a", "path": path}))
    assert [p.messages[-1]["content"] for p in prompts] == ["x", "y"]
    assert [copies[p.prompt_id] for p in prompts] == [3, 1]
    assert (counts["a"].rows, counts["a"].prompts, counts["a"].copies) == (4, 2, 2)


def test_the_same_text_in_two_sources_is_two_prompts(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"})
    prompts, _, _ = read_prompts(config({"name": "a", "path": path}, {"name": "b", "path": path}))
    assert len({p.prompt_id for p in prompts}) == 2


def test_ids_do_not_depend_on_order_or_on_the_files_format(tmp_path):
    rows = [{"prompt": "x", "n": 1}, {"prompt": "y", "n": 2}]
    a = jsonl(tmp_path / "a.jsonl", *rows)
    b = jsonl(tmp_path / "b.jsonl", *({k: r[k] for k in reversed(r)} for r in reversed(rows)))
    c = str(tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(rows), c)
    ids = [{p.prompt_id for p in read_prompts(config({"name": "s", "path": p}))[0]} for p in (a, b, c)]
    assert ids[0] == ids[1] == ids[2]
    assert ids[0] == {"13e99f1109009c8e77bd07a9c09edb4c", "be7ca84498c1d1a77828c56d94ca11ba"}


def test_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "one\u2028two\x85three"})
    prompts, _, _ = read_prompts(config({"name": "a", "path": path}))
    assert prompts[0].messages[0]["content"] == "one\u2028two\x85three"


def test_malformed_rows_are_named_by_file_and_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, {"promt": "y"}, {"prompt": 7}, raw='{"prompt": \n[1]\n')
    source = {"name": "a", "path": path}
    with pytest.raises(InputError) as caught:
        read_prompts(config(source))
    message = str(caught.value)
    assert "4 of 5 rows are malformed" in message
    assert f"{path}:2: no key 'prompt', did you mean 'promt'?" in message
    assert f"{path}:3: 'prompt' must be a text, is 7" in message
    assert f"{path}:4: not valid JSON" in message
    assert f"{path}:5: not a JSON object" in message
    prompts, _, counts = read_prompts(config(source | {"on_malformed": "skip"}))
    assert (len(prompts), counts["a"].malformed_count) == (1, 4)


@pytest.mark.parametrize(("messages", "said"), [
    ([], "a list of {role, content}"), ("hi", "a list of {role, content}"),
    ([{"role": "robot", "content": "x"}], "message 0 must be"), ([{"role": "user"}], "message 0 must be"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the last message must be the user's"),
])
def test_messages_are_checked(messages, said):
    with pytest.raises(Malformed, match=said):
        parse_row({"m": messages}, Source(name="s", path="p", messages_key="m"), None, "o")


def test_a_system_prompt_goes_in_front_unless_the_row_brings_one():
    source = Source(name="s", path="p", messages_key="m")
    own = parse_row({"m": [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]}, source, "ours", "o")
    ours = parse_row({"m": [{"role": "user", "content": "x"}]}, source, "ours", "o")
    assert [p.messages[0]["content"] for p in (own, ours)] == ["own", "ours"]
    other = Source(name="s", path="p", messages_key="m", system_prompt="the source's")
    assert parse_row({"m": [{"role": "user", "content": "x"}]}, other, "ours", "o").messages[0]["content"] == "the source's"


def test_a_row_whose_answer_no_verifier_understands_is_malformed():
    source = Source(name="s", path="p", answer_key="a", verifier="gsm8k")
    with pytest.raises(Malformed, match="gsm8k"):
        parse_row({"prompt": "x", "a": "no number here"}, source, None, "o")
    with pytest.raises(Malformed, match="no key 'a'"):
        parse_row({"prompt": "x"}, source, None, "o")
    ifeval = Source(name="s", path="p", verifier="ifeval")
    with pytest.raises(Malformed, match="ifeval"):
        parse_row({"prompt": "x", "instruction_id_list": ["no:such"], "kwargs": [{}]}, ifeval, None, "o")


def test_a_missing_file_and_an_empty_one_are_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_prompts(config({"name": "a", "path": str(tmp_path / "no.jsonl")}))
    with pytest.raises(InputError, match="has no rows"):
        read_prompts(config({"name": "a", "path": jsonl(tmp_path / "e.jsonl")}))
    with pytest.raises(InputError, match=r"must end in \.jsonl or \.parquet"):
        read_prompts(config({"name": "a", "path": "./data.csv"}))


def test_a_folder_is_loaded_as_datasets_loads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["x", "y"], "n": [1, 2]}), folder / "train-0.parquet")
    pq.write_table(pa.table({"text": ["z"], "n": [3]}), folder / "test-0.parquet")
    for split, texts in (("train", ["x", "y"]), ("test", ["z"])):
        source = {"name": "a", "path": str(folder), "split": split, "prompt_key": "text"}
        prompts, _, _ = read_prompts(config(source))
        assert [p.messages[0]["content"] for p in prompts] == texts
    with pytest.raises(InputError, match="cannot load dataset"):
        read_prompts(config({"name": "a", "path": str(folder), "split": "nowhere", "prompt_key": "text"}))


def test_a_limit_takes_the_first_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(9)))
    prompts, _, _ = read_prompts(config({"name": "a", "path": path, "limit": 4}))
    assert [p.messages[0]["content"] for p in prompts] == list("0123")


@given(st.integers(1, 12), st.integers(1, 5))
def test_shards_hold_every_prompt_once_in_order(tmp_path_factory, tiny_model, count, size):
    folder = tmp_path_factory.mktemp("shards")
    path = jsonl(folder / "a.jsonl", *({"prompt": str(n)} for n in range(count)))
    made = config({"name": "a", "path": path}, engine={"shard_prompts": size}, model={"path": str(tiny_model)})
    store = Store(str(folder / "run"))
    shards = write_prompts(store, made, *read_prompts(made), load_tokenizer(made.model))
    tables = [read_shard(store, n) for n in range(shards)]
    assert all(0 < t.num_rows <= size for t in tables)
    assert [r["prompt"] for t in tables for r in t.to_pylist()] == [str(n) for n in range(count)]


def test_the_template_is_applied_once(tmp_path, tiny_model):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi"})
    made = config({"name": "a", "path": path}, model={"path": str(tiny_model)}, generation={"system_prompt": "be kind"})
    store = Store(str(tmp_path / "run"))
    write_prompts(store, made, *read_prompts(made), load_tokenizer(made.model))
    ids = read_shard(store, 0).column("prompt_ids")[0].as_py()
    start, end = 257, 256
    assert ids == [start, *b"system\nbe kind", end, *b"\n", start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"]


def test_a_folder_without_tokenizer_or_template_is_said_before_anything_else(tmp_path):
    from tasks.core.config import ModelRef
    from tests.tiny_model import make_tiny_model

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"model\.path: .*empty has no tokenizer"):
        load_tokenizer(ModelRef(path=str(empty)))
    with pytest.raises(InputError, match=r"model\.path: no model folder at .*nowhere"):
        load_tokenizer(ModelRef(path=str(tmp_path / "nowhere")))
    bare = make_tiny_model(tmp_path / "bare", template=None)
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(ModelRef(path=str(bare)))
