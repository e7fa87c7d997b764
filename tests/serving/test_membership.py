from __future__ import annotations

import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tasks.core.store import Store
from tasks.serving import membership

CONFIG: list[membership.Address] = [("http://a", 8), ("http://b", None)]
moves = st.lists(st.tuples(st.sampled_from(["join", "leave"]), st.sampled_from(["http://a", "http://b", "http://c"]),
                           st.sampled_from([None, 1, 9]), st.sampled_from([["generator"], ["judge"], ["generator", "judge"]])))


def now(store: Store, role: str = "generator") -> list[membership.Address]:
    return membership.apply(CONFIG, membership.read(store), role)


@given(moves)
def test_who_moved_last_counts_for_each_role_alone(tmp_path_factory, steps):
    store = Store(str(tmp_path_factory.mktemp("run")))
    expected: dict[str, dict[str, int | None]] = {role: dict(CONFIG) for role in ("generator", "judge")}
    for move, url, limit, roles in steps:
        for role in roles:
            if move == "join":
                expected[role][url] = limit
            else:
                expected[role].pop(url, None)
        if move == "join":
            membership.join(store, roles, url, limit)
        else:
            membership.leave(store, roles, url)
    for role, servers in expected.items():
        found = now(store, role)
        assert {url for url, _ in found} == set(servers)
        for url, limit in found:
            changed = [m for m in steps if m[1] == url and role in m[3]]
            # what an earlier join said of a limit is forgotten by a leave, what the config says is not
            assert limit == (servers[url] if changed else dict(CONFIG)[url])
        again = membership.apply(found, membership.read(store), role)
        assert sorted(again) == sorted(found)


def test_a_run_that_nobody_joined_has_the_servers_of_its_config(tmp_path):
    assert now(Store(str(tmp_path))) == CONFIG


def test_a_file_that_is_being_written_changes_nothing_yet(tmp_path):
    (tmp_path / membership.PATH).write_text('{"generator": {"jo')
    assert now(Store(str(tmp_path))) == CONFIG


def test_of_many_that_join_at_once_none_is_forgotten(tmp_path: Path):
    urls = [f"http://10.0.0.{n}" for n in range(24)]
    threads = [threading.Thread(target=membership.join, args=(Store(str(tmp_path)), ["generator"], url, n or None))
               for n, url in enumerate(urls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(now(Store(str(tmp_path)))) == dict(CONFIG) | {url: n or None for n, url in enumerate(urls)}
