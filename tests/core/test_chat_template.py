from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.core.chat_template import DEFAULT_DATE, ChatTemplate, apply, chat_template, system_turns
from tasks.core.config import ModelRef
from tasks.core.errors import InputError
from tasks.core.tokenizer import load_tokenizer, render

KEY = "generation.judge.chat_template"
USER = [{"role": "user", "content": "Why?"}]
BOTH = [{"role": "system", "content": "Be brief."}, *USER]
LONGER = [*USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]

_LLAMA_TURNS = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA_31 = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n" + _LLAMA_TURNS
LLAMA_32 = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
""" + _LLAMA_TURNS
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
GEMMA = """\
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral. The current date is " + today + "." %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}{%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {{- '[INST]' + message['content'] + '[/INST]' if message['role'] == 'user' else message['content'] + eos_token }}
{%- endfor %}"""
GPT_OSS = """\
{%- macro system_text() %}{{ "Current date: " + strftime_now(format="%Y-%m-%d") }}{% endmacro -%}
<|start|>system<|message|>{{ system_text() }}<|end|>
{%- for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor -%}
<|start|>assistant"""
DROPS = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
FILL_IN = "{% if date_string is defined %}It is {{ date_string }}. {% endif %}{% for m in messages %}[{{ m.content }}]{% endfor %}"
CLOCK = "{{ strftime_now('%H:%M') }} {% for m in messages %}[{{ m.content }}]{% endfor %}"
ON_THIRD_TURN = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if messages | length > 2 %}{{ strftime_now('%j') }}{% endif %}"

STAMPED = {"llama 3.1": LLAMA_31, "llama 3.2": LLAMA_32, "mistral": MISTRAL, "gpt-oss": GPT_OSS, "clock": CLOCK,
           "third turn": ON_THIRD_TURN}
DATELESS = {"smollm2": SMOLLM2, "gemma": GEMMA, "drops": DROPS, "fill in": FILL_IN}


@pytest.fixture
def tokenizer(tiny_model) -> Any:
    return load_tokenizer(ModelRef(path=str(tiny_model)))


@pytest.fixture
def no_clock(monkeypatch) -> None:
    """Whoever asks transformers for the time fails."""
    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            raise AssertionError("somebody looked at the clock")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Stopped)


def test_the_stopped_clock_is_the_one_that_transformers_reads(tokenizer, no_clock):
    with pytest.raises(AssertionError, match="looked at the clock"):
        tokenizer.apply_chat_template(USER, chat_template=MISTRAL, tokenize=False)


@pytest.mark.parametrize("name", STAMPED | DATELESS)
def test_no_template_reads_the_clock_whatever_the_chat(tokenizer, no_clock, name):
    template = chat_template(tokenizer, (STAMPED | DATELESS)[name])
    for chat in (USER, LONGER, *([BOTH] if name != "gemma" else [])):
        assert apply(tokenizer, [chat], template)
    unseen = ChatTemplate(template.source, "config", DEFAULT_DATE, stamps_date=False)  # as if the samples had missed it
    assert apply(tokenizer, [LONGER], unseen)


def test_without_a_template_it_is_the_tokenizers_own_told_the_default_date(tiny_model, no_clock):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_model)
    own.chat_template = LLAMA_32
    (ids,) = render(own, [USER])
    assert "Today Date: 26 Jul 2024\n" in own.decode(ids)
    assert chat_template(own) == ChatTemplate(LLAMA_32, "tokenizer", DEFAULT_DATE, True)
    assert (apply(own, []), render(own, [])) == ([], [])


@pytest.mark.parametrize(("name", "said"), [
    ("llama 3.1", "Today Date: 03 Feb 2001\n"), ("llama 3.2", "Today Date: 03 Feb 2001\n"),
    ("mistral", "The current date is 2001-02-03."), ("gpt-oss", "Current date: 2001-02-03<|end|>"),
    ("clock", "00:00 [Why?]")])
def test_a_stamped_date_is_the_given_one(tokenizer, name, said):
    template = chat_template(tokenizer, STAMPED[name], datetime.date(2001, 2, 3))
    text = apply(tokenizer, [USER], template)[0]
    assert said in text
    today = datetime.datetime.now()
    assert not any(today.strftime(form) in text for form in ("%Y-%m-%d", "%d %b %Y", "%d %B %Y"))


def test_found_out_by_rendering_which_templates_stamp_a_date(tokenizer):
    found = {name: chat_template(tokenizer, text).stamps_date for name, text in (STAMPED | DATELESS).items()}
    assert found == dict.fromkeys(STAMPED, True) | dict.fromkeys(DATELESS, False)
    # words in a comment, or in what nobody asked for, are no stamp
    assert not chat_template(tokenizer, "{# strftime_now date_string #}" + DROPS).stamps_date
    assert not chat_template(tokenizer, "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + DROPS).stamps_date


@pytest.mark.parametrize("name", DATELESS)
def test_a_dateless_template_renders_as_transformers_alone_does(tokenizer, name):
    template = chat_template(tokenizer, DATELESS[name], datetime.date(2001, 2, 3))
    plain = tokenizer.apply_chat_template([USER, LONGER], chat_template=template.source, tokenize=False,
                                          add_generation_prompt=True)
    assert apply(tokenizer, [USER, LONGER], template) == plain
    assert render(tokenizer, [USER, LONGER], template) == tokenizer(plain)["input_ids"]


def test_llamas_default_date_renders_as_transformers_alone_does(tokenizer):
    plain = tokenizer.apply_chat_template([USER], chat_template=LLAMA_31, tokenize=False, add_generation_prompt=True)
    assert apply(tokenizer, [USER], chat_template(tokenizer, LLAMA_31)) == plain


def test_the_digest_is_of_text_and_stamped_date_not_of_the_origin(tokenizer, tmp_path):
    day = datetime.date(2001, 2, 3)
    stamped = chat_template(tokenizer, LLAMA_32)
    assert chat_template(tokenizer, LLAMA_32, day).digest != stamped.digest
    assert chat_template(tokenizer, LLAMA_31).digest != stamped.digest
    assert chat_template(tokenizer, GEMMA, day) == chat_template(tokenizer, GEMMA)
    file = tmp_path / "mine.jinja"
    file.write_text(LLAMA_32)
    given = chat_template(tokenizer, str(file))
    assert (given.digest, given.origin) == (stamped.digest, f"config: {file}")


def test_the_digest_is_the_same_in_another_process(tokenizer):
    template = chat_template(tokenizer, MISTRAL)
    code = ("import json, sys; from tasks.core.chat_template import ChatTemplate;"
            "print(ChatTemplate.from_recorded(json.load(sys.stdin)).digest)")
    out = subprocess.run([sys.executable, "-c", code], input=json.dumps(template.recorded()), text=True, check=True,
                         capture_output=True, cwd=Path(__file__).parents[2])
    assert out.stdout.strip() == template.digest


@pytest.mark.parametrize("name", STAMPED | DATELESS)
def test_a_template_is_made_again_from_its_record(tokenizer, name):
    template = chat_template(tokenizer, (STAMPED | DATELESS)[name], datetime.date(2001, 2, 3))
    record = json.loads(json.dumps(template.recorded()))
    assert record == template.recorded()
    assert record.get("date") == ("2001-02-03" if name in STAMPED else None)
    assert ChatTemplate.from_recorded(record) == template


@pytest.mark.parametrize("edit", [{"source": DROPS}, {"date": "2025-01-01"}])
def test_an_edited_record_is_refused(tokenizer, edit):
    record = chat_template(tokenizer, LLAMA_32).recorded() | edit
    with pytest.raises(InputError, match=r"run\.json: .* edited"):
        ChatTemplate.from_recorded(record)


@pytest.mark.parametrize(("given", "message"), [
    ("{% for m in messages %}\n{{ m.content }}\n{% endfr %}", r"chat_template, line 3: no valid Jinja: .*endfr"),
    ("a\n{{ messages[0]['content'] | shout }}", r"line 2: no valid Jinja: .*shout"),
    ("{% for m in messages %}\n\n{{ m.nothing.at_all }}{% endfor %}", r"line 3: it fails: .*nothing"),
    ("\n{{ raise_exception('never') }}", "line 2: it refuses the chat: never"),
    ("{{ 1 / 0 }}{{ messages[0].content }}", "line 1: it fails: division by zero"),
    ("{% if messages[0].role == 'system' %}\n{{ nobody.here }}{% endif %}{{ messages[-1].content }}",
     "line 2: with a system turn: it fails: 'nobody' is undefined"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the user's text out"),
    ("no/such.jinja", r"no such file 'no/such\.jinja' \(looked in .*/no\)"),
    ("", "no such file ''"),
])
def test_a_template_that_cannot_be_used_is_refused_by_key_and_line(tokenizer, given, message):
    with pytest.raises(InputError, match=message) as error:
        chat_template(tokenizer, given, key=KEY)
    assert str(error.value).startswith(KEY)


def test_a_file_with_a_mistake_is_named(tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("ok\n{% if %}")
    with pytest.raises(InputError, match=r"chat_template: .*mine\.jinja, line 2: no valid Jinja"):
        chat_template(tokenizer, str(file), key=KEY)
    file.write_bytes(b"\xff{")
    with pytest.raises(InputError, match=r"mine\.jinja: cannot be read"):
        chat_template(tokenizer, str(file), key=KEY)


def test_of_several_named_templates_it_is_the_default_one(tiny_model):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_model)
    own.chat_template = {"tool_use": DROPS, "default": SMOLLM2}
    assert chat_template(own).source == SMOLLM2
    own.chat_template = {"tool_use": DROPS}
    with pytest.raises(InputError, match=r"none is named default.*tool_use"):
        chat_template(own)
    own.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        chat_template(own)
    assert chat_template(own, SMOLLM2).origin == "config"


@pytest.mark.parametrize(("text", "fate"), [(SMOLLM2, "keep"), (LLAMA_32, "keep"), (GEMMA, "raise"), (DROPS, "drop")])
def test_what_becomes_of_a_system_turn_is_known_before_any_request(tokenizer, text, fate):
    assert system_turns(tokenizer, chat_template(tokenizer, text)) == fate


def test_a_chat_that_the_template_refuses_is_named_by_its_turns_among_others(tokenizer):
    template = dataclasses.replace(chat_template(tokenizer, GEMMA), origin="config: g.jinja")
    with pytest.raises(InputError, match=r"\(config: g\.jinja\), line 1: .*System role not supported \(turns: system, user\)"):
        render(tokenizer, [USER, LONGER, BOTH, USER], template)


def test_a_model_without_a_template_is_taken_where_the_config_gives_one(tmp_path):
    from tests.tiny_model import make_tiny_model

    model = ModelRef(path=str(make_tiny_model(tmp_path / "base", template=None)))
    with pytest.raises(InputError, match=r"^model\.path: .* has no chat template"):
        load_tokenizer(model)
    base = load_tokenizer(model, needs_template=False)
    assert render(base, [USER], chat_template(base, DROPS)) == [list(b"[Why?]")]


def test_a_template_is_compiled_once(tokenizer):
    from transformers.utils import chat_template_utils as utils

    template = chat_template(tokenizer, MISTRAL)
    before = utils._compile_jinja_template.cache_info().misses
    for _ in range(5):
        render(tokenizer, [USER] * 32, template)
        assert chat_template(tokenizer, MISTRAL) == template
    assert utils._compile_jinja_template.cache_info().misses == before
