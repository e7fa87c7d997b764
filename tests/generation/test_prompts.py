from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.config import ModelRef, RunConfig
from tasks.core.errors import InputError, StorageError
from tasks.core.identity import prompt_id
from tasks.core.store import Store
from tasks.core.tokenizer import load_tokenizer
from tasks.generation import prompts as module
from tasks.generation.prompts import read_prompts, read_shard, write_prompts


def config(*sources: dict, **more) -> RunConfig:
    return RunConfig.model_validate({"run": "r", "model": {"path": "m"}, "sources": list(sources),
                                     "heuristics": {"family": "qwen"}} | more)


def jsonl(path, *rows, raw: str = ""):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) + raw, encoding="utf-8")
    return str(path)


def test_equal_rows_fold_and_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}, {"prompt": "x"})
    prompts = read_prompts(config({"name": "a", "path": path}))
    assert [(p.messages[-1]["content"], p.copies, p.origin) for p in prompts] == [("x", 3, f"{path}:1"), ("y", 1, f"{path}:2")]
    counts = prompts.sources
    assert (counts["a"].rows, counts["a"].prompts, counts["a"].copies) == (4, 2, 2)


def test_the_same_text_in_two_sources_is_two_prompts(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"})
    prompts = read_prompts(config({"name": "a", "path": path}, {"name": "b", "path": path}))
    assert len({p.prompt_id for p in prompts}) == 2


def test_ids_do_not_depend_on_order_or_on_the_files_format(tmp_path):
    rows = [{"prompt": "x", "n": 1}, {"prompt": "y", "n": 2}]
    a = jsonl(tmp_path / "a.jsonl", *rows)
    b = jsonl(tmp_path / "b.jsonl", *({k: r[k] for k in reversed(r)} for r in reversed(rows)))
    c = str(tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(rows), c)
    ids = [{p.prompt_id for p in read_prompts(config({"name": "s", "path": p}))} for p in (a, b, c)]
    assert ids[0] == ids[1] == ids[2]
    assert ids[0] == {"13e99f1109009c8e77bd07a9c09edb4c", "be7ca84498c1d1a77828c56d94ca11ba"}


def test_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "one\u2028two\x85three"})
    prompts = read_prompts(config({"name": "a", "path": path}))
    assert next(iter(prompts)).messages[0]["content"] == "one\u2028two\x85three"


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
    prompts = read_prompts(config(source | {"on_malformed": "skip"}))
    assert (len(prompts), prompts.sources["a"].malformed_count) == (1, 4)


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
        prompts = read_prompts(config(source))
        assert [p.messages[0]["content"] for p in prompts] == texts
    with pytest.raises(InputError, match="cannot load dataset"):
        read_prompts(config({"name": "a", "path": str(folder), "split": "nowhere", "prompt_key": "text"}))


def test_a_limit_takes_the_first_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(9)))
    prompts = read_prompts(config({"name": "a", "path": path, "limit": 4}))
    assert [p.messages[0]["content"] for p in prompts] == list("0123")


# what a line of a source can be: a prompt, the same prompt with its keys the other way round, or no prompt
LINES = st.one_of(
    st.builds(lambda text, n: json.dumps({"prompt": text, "n": n}), st.sampled_from("xyz"), st.integers(0, 2)),
    st.builds(lambda text, n: json.dumps({"n": n, "prompt": text}), st.sampled_from("xyz"), st.integers(0, 2)),
    st.sampled_from(['{"prompt": 1}', "[]", "{", '{"prompt": "\\ud800"}', '{"promt": "x"}', "", '{"prompt": "u\\u2028\\u0000\u2029"}']))


def naive(files: dict[str, str]) -> tuple[dict, dict]:
    """Prompts and counts of sources by name and path, everything in memory."""
    seen: dict[str, list] = {}
    counts = {}
    for name, path in files.items():
        rows = prompts = malformed = 0
        bad = []
        for n, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if not line:
                continue
            rows += 1
            try:
                row = json.loads(line)
                text = row["prompt"]
                text.encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                malformed += 1
                bad.append(f"{path}:{n}")
                continue
            key = prompt_id(name, row)
            prompts += key not in seen
            seen.setdefault(key, [name, text, f"{path}:{n}", 0])[3] += 1
        counts[name] = (rows, prompts, rows - prompts - malformed, malformed, bad[:5])
    return seen, counts


@given(st.lists(st.lists(LINES, min_size=1, max_size=20), min_size=1, max_size=3))
def test_a_set_on_disk_is_what_a_dict_in_memory_is(tmp_path_factory, sources):
    folder = tmp_path_factory.mktemp("sources")
    files = {}
    for n, lines in enumerate(sources):
        path = folder / f"{n}.jsonl"
        path.write_text("".join(f"{line}\n" for line in ['{"prompt": "first"}', *lines]), encoding="utf-8")
        files[f"s{n}"] = str(path)
    seen, counts = naive(files)
    made = config(*({"name": name, "path": path, "on_malformed": "skip"} for name, path in files.items()))
    with read_prompts(made) as prompts:
        assert {p.prompt_id: [p.source, p.messages[0]["content"], p.origin, p.copies] for p in prompts} == seen
        assert [p.prompt_id for p in prompts] == list(seen)
        assert len(prompts) == len(seen)
    assert {name: (c.rows, c.prompts, c.copies, c.malformed_count, [m.split(": ")[0] for m in c.malformed])
            for name, c in prompts.sources.items()} == counts


def test_the_digest_is_of_what_is_asked_and_checked_in_order(tmp_path):
    def made(*rows: dict, **source: object) -> str:
        source = {"name": "a", "path": jsonl(tmp_path / "a.jsonl", *rows)} | source
        return read_prompts(config(source)).digest

    x, y = {"prompt": "x", "a": "#### 1"}, {"prompt": "y", "a": "#### 2"}
    checked = {"answer_key": "a", "verifier": "gsm8k"}
    same = made(x, y)
    assert made(x, y, x) == same, "a copy asks nothing new"
    others = [made(y, x), made(x), made(x, y, system_prompt="be kind"), made(x, y, **checked), made(x, y, diversity=True),
              made(x, y, name="b"), made(x | {"a": "#### 3"}, y)]
    assert len({same, *others}) == 8


def peak(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path, ends):
    def read(count: int) -> int:
        path, rows = tmp_path / f"{count}{ends}", [{"prompt": f"{n} " + "word " * 20} for n in range(count)]
        jsonl(path, *rows) if ends == ".jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
        made = config({"name": "a", "path": str(path)})

        def work() -> None:
            with read_prompts(made) as prompts:
                assert sum(1 for _ in prompts) == count

        return peak(work)

    read(10)  # what is loaded at first use
    few, many = read(1000), read(8000)
    assert many - few < 150_000, "the texts alone are 0.7 MB"


def test_memory_does_not_grow_when_prompts_are_written(tmp_path, tiny_model):
    tokenizer = load_tokenizer(ModelRef(path=str(tiny_model)))

    def write(count: int) -> int:
        path = jsonl(tmp_path / f"{count}.jsonl", *({"prompt": f"{n} " + "word " * 200} for n in range(count)))
        made = config({"name": "a", "path": path}, model={"path": str(tiny_model)}, engine={"shard_prompts": 16})
        with read_prompts(made) as prompts:
            return peak(lambda: write_prompts(Store(str(tmp_path / f"run{count}")), made, prompts, tokenizer))

    write(10)
    few, many = write(50), write(600)
    assert many - few < 1_500_000, "the token ids alone take 4.4 MB; the file is digested in blocks of 1 MiB"


def test_nothing_is_left_in_the_temporary_directory(tmp_path, monkeypatch):
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    good = jsonl(tmp_path / "a.jsonl", {"prompt": "x"})
    with read_prompts(config({"name": "a", "path": good})) as prompts:
        assert list(aside.iterdir()) == [], "not even while it is read: a kill leaves nothing either"
        assert len(list(prompts)) == 1
    with pytest.raises(InputError):
        read_prompts(config({"name": "a", "path": jsonl(tmp_path / "b.jsonl", {"prompt": 1})}))
    assert list(aside.iterdir()) == []


def test_a_full_disk_is_said_with_the_way_out(tmp_path, monkeypatch):
    nameless = module._nameless_database

    def small():
        database = nameless()
        database.execute("PRAGMA max_page_count=20")
        return database

    monkeypatch.setattr(module, "_nameless_database", small)
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": f"{n} " + "word " * 20} for n in range(2000)))
    with pytest.raises(StorageError, match=r"full; make room, or set TMPDIR"):
        read_prompts(config({"name": "a", "path": path}))


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_shards_hold_every_prompt_once_in_order(tmp_path_factory, tiny_model, count, size, groups):
    folder = tmp_path_factory.mktemp("shards")
    path = jsonl(folder / "a.jsonl", *({"prompt": str(n)} for n in range(count)))
    made = config({"name": "a", "path": path}, engine={"shard_prompts": size}, model={"path": str(tiny_model)})
    store = Store(str(folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROW_GROUPS", groups)
        shards = write_prompts(store, made, read_prompts(made), load_tokenizer(made.model))
    assert pq.ParquetFile(folder / "run" / module.PATH).num_row_groups <= groups
    tables = [read_shard(store, n) for n in range(shards)]
    assert [t.num_rows for t in tables[:-1]] == [size] * (shards - 1)
    assert 0 < tables[-1].num_rows <= size
    assert [r["prompt"] for t in tables for r in t.to_pylist()] == [str(n) for n in range(count)]


def test_a_shard_is_a_row_group_unless_there_are_thousands(tmp_path, tiny_model):
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(7)))
    made = config({"name": "a", "path": path}, engine={"shard_prompts": 3}, model={"path": str(tiny_model)})
    write_prompts(Store(str(tmp_path / "run")), made, read_prompts(made), load_tokenizer(made.model))
    file = pq.ParquetFile(tmp_path / "run" / module.PATH)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 3, 1]


def test_prompts_that_stand_are_not_rendered_again(tmp_path, tiny_model, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y"})
    made = config({"name": "a", "path": path}, model={"path": str(tiny_model)})
    store, tokenizer = Store(str(tmp_path / "run")), load_tokenizer(made.model)
    write_prompts(store, made, read_prompts(made), tokenizer)
    monkeypatch.setattr(module, "render", lambda *_: pytest.fail("rendered again"))
    assert write_prompts(store, made, read_prompts(made), tokenizer) == 1


def test_a_batch_is_rendered_as_its_chats_one_by_one(tiny_model):
    tokenizer = load_tokenizer(ModelRef(path=str(tiny_model)))
    chats = [[{"role": "user", "content": text}] for text in ("hi", "", "a longer one\nof two lines", "é")]
    assert module.render(tokenizer, chats) == [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def test_the_template_is_applied_once(tmp_path, tiny_model):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi"})
    made = config({"name": "a", "path": path}, model={"path": str(tiny_model)}, generation={"system_prompt": "be kind"})
    store = Store(str(tmp_path / "run"))
    write_prompts(store, made, read_prompts(made), load_tokenizer(made.model))
    ids = read_shard(store, 0).column("prompt_ids")[0].as_py()
    start, end = 257, 256
    assert ids == [start, *b"system\nbe kind", end, *b"\n", start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"]


def test_a_folder_without_tokenizer_or_template_is_said_before_anything_else(tmp_path):
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
