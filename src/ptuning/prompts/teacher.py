"""`Teacher`: a long text in front of the question, which a prompt's virtual tokens are to replace.

    text with columns or [MASK]    a template of its own, without virtual tokens
    any other text                 stands in front of the prompt's template without its virtual
                                   tokens, a blank line between; in a chat it is the system's turn

Both are written in the template language: a brace that is meant as text is doubled.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError, TemplateError, a_kind, excerpt
from .task import Task
from .template import Template, Text, parse


@dataclass(eq=False)
class Teacher(Task):
    """A task whose template says at length what a prompt is to know; takes all that `Task` takes.

    Args:
        system: what the system says first, in a chat.
    """

    system: str | None = None

    @classmethod
    def of(cls, text: str, student: Task) -> Teacher:
        """The teacher that a text makes of a prompt's task.

        Args:
            text: instructions, worked examples, documents.
            student: has answer column, verbalizer and the question's words.

        Raises:
            InputError, TemplateError: the text is empty, has virtual tokens, or names no column.
        """
        parsed = _parsed(text)
        settings = {**Task.settings(student.manual()), "max_length": None}
        if parsed.fields or parsed.slot:
            if not parsed.fields:
                raise InputError(
                    "the teacher has [MASK] and names no column, so it would answer every text "
                    "alike; write {column} where the text stands, or leave [MASK] out: then the "
                    "teacher stands in front of the prompt's own words"
                )
            return cls(**{**settings, "template": text.strip("\n")})
        if student.chat:
            said = "".join(piece.text for piece in parsed.pieces if isinstance(piece, Text))
            return cls(**settings, system=said.strip())
        return cls(**{**settings, "template": f"{text.rstrip()}\n\n{settings['template']}"})

    def turns(self, text: str) -> list[dict[str, str]]:
        """As `Task.turns`, behind the system's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *super().turns(text)]


def _parsed(text: str) -> Template:
    if not isinstance(text, str):
        raise InputError(
            f"the teacher is {a_kind(text)}; give its text (Path(…).read_text() of a file)"
        )
    if not text.strip():
        raise InputError(
            "the teacher is empty; give the text whose effect the virtual tokens are to have"
        )
    try:
        parsed = parse(text)
    except TemplateError as error:
        raise InputError(f"the teacher: {error}") from None
    if parsed.virtual:
        raise InputError(
            f"the teacher has virtual tokens, which only the prompt has: {excerpt(text)}; write "
            "[[P]] for the characters"
        )
    return parsed
