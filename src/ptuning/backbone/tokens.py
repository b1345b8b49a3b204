"""What a tokenizer's vocabulary is: its hash, its first free id, and whether it is what it was.

A vocabulary of 150,000 words takes a third of a second to go through, so what was seen of it is
kept as long as it stays the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ..errors import InputError, briefly
from ..threads import CHANGING

_OF_MODELS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"),
    *("byte_fallback", "ignore_merges", "max_input_chars_per_word"),
)
"""What changes the ids that a vocabulary gives."""


class _Seen(NamedTuple):
    """Of a tokenizer in some state."""

    state: str
    digest: str
    first_free: int


_seen: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, such as the model.

    Raises:
        InputError: says what came.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(
            f"tokenizer is {briefly(tokenizer)}; give the model's (ptuning.load_model gives "
            "model and tokenizer)"
        )


def takes_tokens(tokenizer: Any) -> bool:
    """Whether tokens can be added to a tokenizer. All of transformers' say whether they are fast
    but mistral-common's, whose ``add_tokens`` is not implemented (5.23)."""
    return hasattr(tokenizer, "is_fast")


def first_free_id(tokenizer: Any) -> int:
    """One past the tokenizer's highest id (its length, unless its ids have holes)."""
    return 0 if tokenizer is None else _looked_at(tokenizer).first_free


def tokenizer_hash(tokenizer: Any, without: Collection[int] = ()) -> str:
    """SHA-256 over the vocabulary with its ids, shortened to 32 hexadecimal digits."""
    return _digest(tokenizer, without) if without else _looked_at(tokenizer).digest


def _looked_at(tokenizer: Any) -> _Seen:
    check_tokenizer(tokenizer)
    state = tokenizer_state(tokenizer)
    with CHANGING:
        seen = None if state is None else _seen.get(tokenizer)
    if seen is None or seen.state != state:
        highest = max(tokenizer.get_vocab().values(), default=-1)
        first_free = max(len(tokenizer), highest + 1)
        seen = _Seen(state or "", _digest(tokenizer, ()), first_free)
        if state is not None:
            with CHANGING:
                _seen[tokenizer] = seen
    return seen


def _digest(tokenizer: Any, without: Collection[int]) -> str:
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        if index in without:
            continue
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def tokenizer_state(tokenizer: Any) -> str | None:
    """What tells a tokenizer from what its owner makes of it, such as by adding tokens.

    None where it cannot be told: without a backend whose parts write themselves down. Padding and
    truncation are whatever the last call asked for. A vocabulary as a whole takes a tenth of a
    second to write, so of that there are the size and some tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    plain = (bool, int, str, list, tuple, type(None))
    own = {name: value for name, value in vars(tokenizer).items() if isinstance(value, plain)}
    parts = backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder
    size = backend.get_vocab_size(with_added_tokens=False)
    try:
        state = (
            *(own, type(backend.model), size, str(backend.get_added_tokens_decoder())),
            *(part if part is None else part.__getstate__() for part in parts),
            *(getattr(backend.model, name, None) for name in _OF_MODELS),
            *(backend.id_to_token(i) for i in range(0, size, max(1, size // 99))),
        )
    except Exception:  # a part that is written in Python
        return None
    return hashlib.sha256(repr(state).encode("utf-8", "surrogatepass")).hexdigest()
