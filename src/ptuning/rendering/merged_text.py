"""A prompt as text: what the tokenizer of a merged model turns into the prompt's ids.

    template    [P*2] {country} [P] [MASK]
    text        <|NAME:0|><|NAME:1|> {country}<|NAME:2|>

``{column}`` is a field and doubled braces are braces, as in label words: `task.fill` fills it.
Where special tokens stand is settled here too, and the text is held to the ids of the attached
prompt before anybody gets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..prompts.prompt import Prompt
from ..prompts.task import Task, fill, named_fields
from .layout import spaced
from .render import Renderer
from .virtual_ids import NamedTokenizer

_FIELD_MARK = re.compile("\ue000([0-9]+)\ue001")
_PROBES = ("France", "it rains, doesn't it?", "São Paulo 東京 2024", "one\ntwo 3.14")


@dataclass(frozen=True)
class MergedText:
    """What to tokenize for a merged prompt.

    Attributes:
        text: with fields in braces.
        add_special_tokens: as tokenizers take it; False: all of them stand in `text`.
        labels: label -> its word or words as they continue the text; None for free answers.
        turn: for a chat what the user says: text, field, text, … in turn; else None.
    """

    text: str
    add_special_tokens: bool
    labels: dict[str, str | list[str]] | None
    turn: list[str] | None


def names_of(name: str, count: int) -> list[str]:
    """How a merged prompt's virtual tokens are spelled."""
    return [f"<|{name}:{index}|>" for index in range(count)]


def merged_text(
    prompt: Prompt, name: str, kind: str, tokenizer: Any, merged: Any, ids: Sequence[int]
) -> MergedText:
    """The text of a prompt, held to the ids of the attached prompt on a few fillings.

    Args:
        prompt: trained.
        name: of the merged prompt.
        kind: of the model, as `kinds.kind_of` says.
        tokenizer: the base model's.
        merged: the same with the virtual tokens in it.
        ids: of the prompt's virtual tokens in `merged`.

    Raises:
        InputError: no text has the prompt's ids in this tokenizer; says why.
    """
    task = _with_masks(_templated(prompt, len(ids)), kind, tokenizer)
    renderer = Renderer(tokenizer, task, kind)
    named = NamedTokenizer(merged, f"<|{name}:", {}, by_group=False)
    fields = task.parsed.fields
    marks = {field: f"\ue000{index}\ue001" for index, field in enumerate(fields)}
    whole, _, space = renderer.layout.string(marks, named)
    before, _, after = whole.partition(named.slot)
    if kind == "masked":
        before += tokenizer.mask_token * (task.answer_tokens or 1)
    string = before if kind == "causal" else before + after
    examples = [{field: probe for field in fields} for probe in (_PROBES if fields else ("",))]
    wanted = []
    for example in examples:
        rendered = renderer.layout(example, None).ids
        wanted.append([i if i >= 0 else ids[-1 - i] for i in rendered])
    names = names_of(name, len(ids))
    candidates = [
        (_in_braces(candidate, fields), special)
        for candidate, special in _candidates(string, task, kind, names, tokenizer)
    ]

    def first(**how: bool) -> tuple[str, bool] | None:
        """The first candidate that has the ids, tokenized in such a way."""
        for text, special in candidates:
            filled = [fill(text, example) for example in examples]
            if wanted == [
                merged(t, add_special_tokens=special, **how)["input_ids"] for t in filled
            ]:
                return text, special
        return None

    if found := first():
        turn = _parts(renderer.layout.turn(marks, named), fields) if task.chat else None
        continues = space and kind != "seq2seq"
        return MergedText(*found, _labels(task, continues), turn)
    splits = getattr(merged, "split_special_tokens", False)
    if splits and (unsplit := first(split_special_tokens=False)):
        spelled = " and ".join(token for token in merged.all_special_tokens if token in unsplit[0])
        raise InputError(
            f"the prompt {name!r} cannot be merged: its text has {spelled} in it, and this "
            "tokenizer splits the special tokens of a text; load it with "
            "split_special_tokens=False (a folder says it in tokenizer_config.json), or attach the "
            "prompt (ptuning.attach)"
        )
    raise InputError(
        f"the prompt {name!r} cannot be merged: no text has its ids in this tokenizer, since what "
        f"stands beside its virtual tokens or its answer slot merges otherwise: {task.template}; "
        "attach it (ptuning.attach), or train it with another template"
    )


def _templated(prompt: Prompt, count: int) -> Task:
    """The prompt as a task; one without a template stands in front of a field ``text``."""
    settings = Task.settings(prompt)
    if prompt.template is None:
        settings |= {"template": f"[P*{count}]{{text}}", "special_tokens": "after"}
    return Task(**settings)


def _with_masks(task: Task, kind: str, tokenizer: Any) -> Task:
    """In a masked LM the text has as many masks as the label words have tokens at the most."""
    if kind != "masked" or not task.labels or task.answer_tokens:
        return task
    space = task.parsed.slot is not None and task.parsed.slot.space
    words = [w for words in task.labels.values() for w in words]
    spelled = [spaced(fill(w, {n: n for n in named_fields(w)}), space) for w in words]
    lengths = [len(tokenizer(w, add_special_tokens=False)["input_ids"]) for w in spelled]
    return Task(**{**task.settings(), "answer_tokens": max(1, *lengths)})


def _candidates(
    string: str, task: Task, kind: str, names: list[str], tokenizer: Any
) -> Iterator[tuple[str, bool]]:
    """Ways to write the string, with whether the tokenizer is to add its special tokens."""
    start, end = special_tokens_around(tokenizer)
    end = "" if kind == "causal" else end  # what a causal model reads ends before the answer
    front = "".join(names) if task.special_tokens == "after" else ""
    if task.chat:  # the chat has its own beginning and end
        start = end = ""
        yield string.removeprefix(special_tokens_around(tokenizer)[0]), True
    for space in ("", " "):  # some tokenizers put one in front of a text's first word alone
        yield front + space + string, True
        yield front + start + space + string + end, False


def special_tokens_around(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer puts in front of a text and behind it."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    extra = len(around) - len(inner)
    at = next((n for n in range(extra + 1) if around[n : n + len(inner)] == inner), 0)
    parts = around[:at], around[at + len(inner) :]
    start, end = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in parts)
    return start, end


def _in_braces(marked: str, fields: Sequence[str]) -> str:
    """Text with marks for fields -> with names in braces, and its own braces doubled."""
    doubled = marked.replace("{", "{{").replace("}", "}}")
    return _FIELD_MARK.sub(lambda mark: f"{{{fields[int(mark[1])]}}}", doubled)


def _parts(marked: str, fields: Sequence[str]) -> list[str]:
    """Text with marks for fields -> text, field, text, … in turn."""
    parts = _FIELD_MARK.split(marked)
    return [fields[int(part)] if index % 2 else part for index, part in enumerate(parts)]


def _labels(task: Task, space: bool) -> dict[str, str | list[str]] | None:
    labels: dict[str, str | list[str]] = {}
    for label, words in task.labels.items():
        spelled = [spaced(w, space) for w in words]
        labels[label] = spelled[0] if len(spelled) == 1 else spelled
    return labels or None
