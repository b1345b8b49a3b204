"""A tokenizer as GGUF holds it: byte-level BPE, such that llama.cpp finds the same ids.

A file names one of llama.cpp's ways to cut text into words, and says of each token what it is. A
virtual token is a control token: text becomes one only where special tokens are parsed in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import gguf

from ..errors import InputError
from ..rendering.merged_text import special_tokens_around
from ..rendering.spaces import WORDS

_BYTES = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip


def describe_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Any, rows: int, texts: Iterable[str] = ()
) -> None:
    """Put a tokenizer into a file that is being written.

    Args:
        writer: of the file.
        tokenizer: of the merged model.
        rows: of its embedding; there is a token for each.
        texts: of the merged prompts, which llama.cpp is to read as it does.

    Raises:
        InputError: llama.cpp would find other ids than this tokenizer.
    """
    told = _parts(tokenizer)
    model = told["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_way_to_cut(told))
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    _check_added(added.values(), [*texts, str(tokenizer.chat_template or "")])
    tokens, types = [], []
    for index in range(rows):
        kind = gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED
        if index in added:
            special = added[index].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        types.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    _special_tokens(writer, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _parts(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    kind = told["model"].get("type", type(tokenizer).__name__)
    if kind != "BPE":
        raise InputError(f"its tokenizer is {kind}; expected a byte-level BPE")
    return told


def _check_added(tokens: Iterable[Any], texts: Sequence[str]) -> None:
    """llama.cpp finds such tokens wherever they stand, and leaves the spaces beside them. Special
    ones that no template has are never read."""
    for token in tokens:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name)]
        read = not token.special or any(token.content in text for text in texts)
        if flags and read:
            raise InputError(
                f"its token {token.content!r} has {' and '.join(flags)}, which llama.cpp does not "
                "heed"
            )


def _way_to_cut(told: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer cuts text into words before it merges bytes."""
    if (told["normalizer"] or {}).get("type", "NFC") == "NFC":  # of text that is NFC, as most is
        for name, (steps, whole_words) in _WAYS.items():
            same = _plain(told["pre_tokenizer"]) == steps
            if same and bool(told["model"].get("ignore_merges")) == whole_words:
                return name
    raise InputError(
        "its tokenizer does not cut text into words as one of the byte-level BPEs does that were "
        f"compared with llama.cpp's ({', '.join(_WAYS)})"
    )


def _plain(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    whole = pre_tokenizer or {}
    steps = whole.get("pretokenizers", [whole])
    return [{**step, "trim_offsets": True} if "trim_offsets" in step else step for step in steps]


def _cut_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**_BYTES, "use_regex": False}]


_WAYS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTES], False),
    "qwen2": (_cut_by(WORDS % ""), False),
    "llama-bpe": (_cut_by(WORDS % "{1,3}"), True),
}
"""llama.cpp's name -> the steps of transformers' tokenizer; whether a word that is a token is never
cut."""


def _special_tokens(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    start, end = special_tokens_around(tokenizer)
    begins, ends = start == tokenizer.bos_token, end == tokenizer.eos_token
    if (start and not begins) or (end and not ends):
        known: Sequence[str] = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])
        raise InputError(f"its tokenizer puts special tokens around a text: {' '.join(known)}")
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
