from __future__ import annotations

import pytest

from tasks.core.config import Source
from tasks.generation.sources import Malformed, parse_row


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
