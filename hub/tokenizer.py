"""tokenizer.json and its configs: the tokenizer of a model with the model's own ids, `<eos>` in front of every text.

A model without a tokenizer gets one that splits at white space, as its corpus is read. A newline becomes `<eos>`, which
is what ends every line of a corpus.
"""

import json
from typing import Any

from corpus.read import EOS, UNK
from utils import UserError

WHITE = r"[\s\x1c-\x1f\x85]+"  # what Python's `str.split` splits at
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
LONGEST = 1_000_000  # tokens; the model has no limit, and programs want a number


def pad_name(vocab: list[str]) -> str:
    """A name for the padding that no word has."""
    name = "<pad>"
    while name in vocab:
        name = f"<{name}>"
    return name


def special_tokens(vocab: list[str], pad: str) -> dict[str, str]:
    unknown = {"unk_token": UNK} if UNK in vocab else {}
    return {"bos_token": EOS, "eos_token": EOS, **unknown, "pad_token": pad}


def make_tokenizer(tokenizer: str | None, vocab: list[str], pad: str, place: str) -> dict[str, Any]:
    """tokenizer.json, for the package `tokenizers`, as its contents.

    Raises:
        UserError: the tokenizer is damaged, or has pieces that the model's vocabulary lacks.
    """
    ids = {word: i for i, word in enumerate([*vocab, pad])}
    if tokenizer is None:
        made = word_tokenizer(ids)
    else:
        try:
            made = json.loads(tokenizer)
            made["model"] = with_ids(made["model"], ids, place)
            made["normalizer"] = newlines_first(made["normalizer"], EOS)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{place}: holds no tokenizer that can be read; train the model again") from None
    front = {"SpecialToken": {"id": EOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    made["post_processor"] = {
        "type": "TemplateProcessing", "single": [front, first], "pair": [front, first, second],
        "special_tokens": {EOS: {"id": EOS, "ids": [ids[EOS]], "tokens": [EOS]}},
    }  # fmt: skip
    special = sorted({EOS, UNK, pad} & {*ids}, key=ids.__getitem__)
    made["added_tokens"] = [added_token(word, ids[word], alone=tokenizer is None) for word in special]
    return made


def added_token(word: str, number: int, alone: bool) -> dict[str, Any]:
    """`<eos>` is looked for after newlines have become one. `alone`: not within a word."""
    flags = {"single_word": alone, "lstrip": False, "rstrip": False, "normalized": word == EOS, "special": True}
    return {"id": number, "content": word, **flags}


def newlines_first(normalizer: dict[str, Any] | None, end: str) -> dict[str, Any]:
    """The normalizer, after newlines were replaced by `end`."""
    replace = {"type": "Replace", "pattern": {"String": "\n"}, "content": end}
    return {"type": "Sequence", "normalizers": [replace, *([normalizer] if normalizer else [])]}


def word_tokenizer(ids: dict[str, int]) -> dict[str, Any]:
    """Of words with white space between them."""
    split = {"type": "Split", "pattern": {"Regex": WHITE}, "behavior": "Removed", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": newlines_first(None, f" {EOS} "),
        "pre_tokenizer": split, "decoder": None, "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNK},
    }  # fmt: skip


def with_ids(model: dict[str, Any], ids: dict[str, int], place: str) -> dict[str, Any]:
    """A tokenizer's model with the ids of the language model; words that this one lacks become `<unk>`."""
    lacking = [piece for piece in model["vocab"] if piece not in ids]
    if lacking and model["type"] != "WordLevel":
        raise UserError(
            f"{place}: its vocabulary lacks pieces of its tokenizer ({lacking[0]!r}), which cannot be exported; train "
            "a model without --vocab_size and --min_count"
        )
    return {**model, "vocab": ids}


def tokenizer_config(tokens: dict[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": TOKENIZER_CLASS, **tokens, "clean_up_tokenization_spaces": False,
        "model_max_length": LONGEST, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
