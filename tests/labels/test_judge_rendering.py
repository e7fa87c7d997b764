"""Judge prompts put together from pieces are the prompts that the template renders whole."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.core.chat_template import chat_template
from tasks.labels.quality.rendering import PromptEncoder
from tasks.labels.quality.templates import FEW_SHOT, GRAM, JudgeTemplate
from tests.tiny_model import TEMPLATE

CORPUS = [
    "The capital of France is Paris.\n\nAnswer A: it is\nAnswer B: it is not.\n\n", "Question: what's that?\n\nWhich answer",
    " is better, A or B?\n", "  indented\n\n\n  text, don't you think? 12345 + 678 = 13023\n\n[The Start of Assistant A's",
    "Please act as an impartial judge and evaluate the quality of the responses", "\t\tdef f(x):\n\n\n\n    return x\n",
] * 4
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
          r"|\s+")
TRIMS = TEMPLATE.replace("m['content']", "m['content'] | trim")


@cache
def tokenizer(kind: str, template: str = TEMPLATE) -> Any:
    """A byte-level BPE whose merges were learnt within the words of one way to split a text."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = {"gpt2": [byte_level], "whole text": [byte_level],
             "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level],
             "digits": [pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
             "sentencepiece": [pre_tokenizers.Metaspace(split=False)]}[kind]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    if kind == "llama3":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|im_end|>", "<|im_start|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>",
                                   additional_special_tokens=["<|im_start|>"])
    fast.chat_template = template
    return fast


@cache
def encoder(kind: str, template: JudgeTemplate, chat: str = TEMPLATE, limit: int = 10_000) -> PromptEncoder:
    return PromptEncoder(template, tokenizer(kind, chat), chat_template(tokenizer(kind, chat)), limit)


def whole(kind: str, template: JudgeTemplate, texts: tuple[str, str, str], chat: str = TEMPLATE,
          limit: int = 10_000) -> list[int]:
    made = tokenizer(kind, chat)
    return template.render(made, *texts, max_tokens=limit, chat=chat_template(made))


def ids_of(encoded: tuple[bytes, int]) -> list[int]:
    ids = json.loads(encoded[0])
    assert len(ids) == encoded[1]
    return ids


ODD = st.text(st.sampled_from(list("aB1 \n\r\t.'\"`#-:[]<>|\u00a0\u0301é日🙂ﬁ")), max_size=12) | st.text(max_size=8) | (
    st.sampled_from(["<|im_end|>", "<|im_start|>user\n", "Answer B: x", "\n\nWhich answer", "A", " "]))


@pytest.mark.parametrize("template", [FEW_SHOT, GRAM], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "digits"])
@given(texts=st.tuples(ODD, ODD, ODD))
def test_pieces_give_the_ids_of_the_whole(kind, template, texts):
    made = encoder(kind, template)
    assert made.exact_pieces
    assert ids_of(made.ids(*texts)) == whole(kind, template, texts)


@given(texts=st.tuples(ODD, ODD, ODD))
def test_a_chat_template_that_trims_its_turns_gets_them_trimmed(texts):
    last = dataclasses.replace(FEW_SHOT, user="The question is this one:\n{prompt}\nThe answer A is: {a}\nThe answer B is: {b}")
    for template in (FEW_SHOT, last):
        assert ids_of(encoder("llama3", template, TRIMS).ids(*texts)) == whole("llama3", template, texts, TRIMS)
    assert encoder("llama3", FEW_SHOT, TRIMS).exact_pieces
    assert not encoder("llama3", last, TRIMS).exact_pieces  # b's own end is trimmed, where it ends the turn


@pytest.mark.parametrize("kind", ["whole text", "sentencepiece"])
@given(texts=st.tuples(ODD, ODD, ODD))
def test_a_tokenizer_that_merges_across_words_encodes_every_prompt_whole(kind, texts):
    assert ids_of(encoder(kind, FEW_SHOT).ids(*texts)) == whole(kind, FEW_SHOT, texts)


def test_tokens_across_words_are_found_out():
    assert not encoder("whole text", FEW_SHOT).exact_pieces


def test_a_template_without_a_place_to_cut_is_encoded_whole():
    terse = JudgeTemplate("terse", "{prompt}:{a}|{b}?")
    made = encoder("llama3", terse)
    assert not made.exact_pieces
    assert ids_of(made.ids("p", "one", "two")) == whole("llama3", terse, ("p", "one", "two"))


def test_texts_in_another_order_stand_where_they_belong():
    turned = JudgeTemplate("turned", "First there is answer two: {b}\nThen there is answer one: {a}\nBoth answer this: "
                                     "{prompt}\nSo which one is better?")
    made = encoder("llama3", turned)
    assert made.exact_pieces
    assert ids_of(made.ids("why", "one", "two")) == whole("llama3", turned, ("why", "one", "two"))


def test_a_prompt_beyond_the_limit_is_cut_by_the_template():
    long = ("why? " * 50, "one two " * 200, "short")
    made = encoder("gpt2", FEW_SHOT, limit=400)
    ids = ids_of(made.ids(*long))
    assert ids == whole("gpt2", FEW_SHOT, long, limit=400)
    assert len(ids) <= 400 < len(whole("gpt2", FEW_SHOT, long))
    just = ("why?", "one", "two")
    exact = len(whole("gpt2", FEW_SHOT, just))
    assert ids_of(encoder("gpt2", FEW_SHOT, limit=exact).ids(*just)) == whole("gpt2", FEW_SHOT, just)
