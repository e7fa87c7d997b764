"""A model folder with nothing but a byte tokenizer and a chat template: token id = byte, 256.. special."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tiny_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write the folder; ids 0-255 are bytes, 256 is <|im_end|>, 257 <|im_start|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   additional_special_tokens=["<|im_start|>"])
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def _byte_alphabet() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the rest move up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    out, extra = {b: chr(b) for b in plain}, 0
    for byte in range(256):
        if byte not in out:
            out[byte] = chr(256 + extra)
            extra += 1
    return out
