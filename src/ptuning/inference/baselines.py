"""What a prompt is compared with: templates that anybody would write without training."""

from __future__ import annotations

from ..prompts.task import Task
from ..prompts.template import heading

_UNNAMED = ("answer", "label", "target", "output")
"""Columns whose name says nothing of the answer."""


def automatic_templates(task: Task, answer: str, masked: bool = False) -> list[str]:
    """The task's words alone, and plain ``Key: value`` forms of its columns.

    Args:
        task: with a template.
        answer: the answer's column, whose name asks for it.
        masked: the model is a masked LM, which reads what stands behind the answer.

    Example:
        >>> automatic_templates(Task("[P*3] {country} [MASK]"), "capital")[1]
        'Country: {country}. Capital: [MASK]'
    """
    fields = task.parsed.fields
    asked = "Answer" if answer in _UNNAMED else _key(answer)
    slot = f"{asked}: [MASK]{'.' if masked else ''}"
    pairs = [f"{_key(name)}: {{{name}}}" for name in fields]
    values = [f"{{{name}}}" for name in fields]
    made = [". ".join([*pairs, slot]), "\n".join([*pairs, slot]), "\n".join([*values, slot])]
    return list(dict.fromkeys([task.manual().parsed.text, *made]))


def _key(column: str) -> str:
    """A column's name as a heading."""
    return heading(column.replace("_", " ").strip())
