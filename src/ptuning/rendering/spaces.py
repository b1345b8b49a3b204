"""Which tokenizers surely cut a text at the spaces between its words.

Then the tokens of ``one two three`` are those of ``one two`` and of `` three``, whatever stands
around, and what continues a text can be tokenized with the text's last word alone.
"""

from __future__ import annotations

import json
import re
from itertools import dropwhile
from typing import Any

_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
_LOCAL = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
"""Normalizers that keep such a space and look at neither side of it from the other."""
_FINER = {"Digits", "Punctuation"}
"""They cut elsewhere, and look no farther."""
_CUTTING = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words of Llama 3 and Qwen, by how many digits stand together: such a space begins a word or is
one."""


def last_word(text: str, start: int) -> int:
    """Where the last space between two words of ASCII letters and digits stands; -1 without one.

    Args:
        text: any.
        start: look no further to the front.
    """
    at = len(text)
    while (at := text.rfind(" ", start, at)) >= 0:
        if _BETWEEN_WORDS.match(text, at):
            break
    return at


def cuts_at_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer's parts are known to cut at such spaces; others may do it too."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    if any(map(_may_hold_space, tokenizer.added_tokens_decoder.values())):
        return False
    backend = tokenizer.backend_tokenizer
    cutters = _parts(backend.pre_tokenizer)
    first = next(dropwhile(lambda part: part["type"] in _FINER, cutters), None)  # that is decisive:
    # it comes before all that turns spaces into something else, and its pieces are seen alone
    return (
        all(part["type"] in _LOCAL for part in _parts(backend.normalizer))
        and first is not None
        and _cuts(first)
    )


def _may_hold_space(token: Any) -> bool:
    """An added token may be found across a space between words."""
    return token.rstrip or (bool(token.content.strip()) and bool(re.search(r"\s", token.content)))


def _parts(component: Any) -> list[dict[str, Any]]:
    """A tokenizer's component as it is written to its file; those of a sequence one by one."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    parts = []
    while waiting:
        part = waiting.pop(0)
        inner = part.get("normalizers") or part.get("pretokenizers")
        if part["type"] == "Sequence":
            waiting = [*(inner or []), *waiting]
        else:
            parts.append(part)
    return parts


def _cuts(part: dict[str, Any]) -> bool:
    kind = part["type"]
    if kind == "Split":
        isolated = part["behavior"] == "Isolated" and not part["invert"]
        return isolated and part["pattern"].get("Regex") in (WORDS % "", WORDS % "{1,3}")
    return kind in _CUTTING or bool(
        (kind == "ByteLevel" and part.get("use_regex"))
        or (kind == "Metaspace" and part.get("split"))
    )
