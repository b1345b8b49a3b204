"""Templates and verbalizers of SuperGLUE's tasks, in the style of PET and of the paper.

Each task has several hand-written templates. With virtual tokens in them they are the prompts: a
group in front of the answer and one in front of the text, the words as anchors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..task import Task

Words = dict[str, str]


@dataclass(frozen=True)
class SuperGlueTask:
    """One task.

    Attributes:
        name: as the command line has it.
        folder: of its files.
        templates: hand-written ones.
        verbalizers: which words stand for the labels; none where the answer is free.
        metrics: what is measured, the first decides.
        answer: column of the right answer.
        max_length: of an input in tokens.
    """

    name: str
    folder: str
    templates: tuple[str, ...]
    verbalizers: tuple[Words, ...]
    metrics: tuple[str, ...]
    answer: str = "label"
    max_length: int = 384

    def manual(self) -> list[Task]:
        """Every template with every verbalizer."""
        return [
            Task(
                template,
                answer=self.answer,
                verbalizer=words,
                max_length=self.max_length,
                answer_end=self.generates,
            )
            for words in (self.verbalizers or (None,))
            for template in self.templates
        ]

    @property
    def generates(self) -> bool:
        """The answer is free text (WSC: its training file has true examples only)."""
        return not self.verbalizers


def prompted(template: str, size: int) -> str:
    """A manual template with `size` virtual tokens in front and `size` before the answer."""
    group = f"[P*{size}]"
    before, after = template.split(" [MASK]")
    return f"{group} {before} {group} [MASK]{after}"


_YES: Words = {"true": "Yes", "false": "No"}
_TRUE: Words = {"true": "True", "false": "False"}
_ENTAILED: tuple[Words, ...] = (
    {"entailment": "Yes", "not_entailment": "No"},
    {"entailment": "True", "not_entailment": "False"},
)

TASKS = {
    task.name: task
    for task in (
        SuperGlueTask(
            "boolq",
            "BoolQ",
            (
                "{passage}\nQuestion: {question}?\nAnswer: [MASK]",
                "{passage} Question: {question}? Answer: [MASK]",
                "{passage} Based on the previous passage, {question}? [MASK]",
                "Passage: {passage}\nQuestion: {question}? Yes or No?\nAnswer: [MASK]",
            ),
            (_YES, _TRUE),
            ("accuracy",),
        ),
        SuperGlueTask(
            "cb",
            "CB",
            (
                "{premise}\nQuestion: {hypothesis}? Yes, No or Maybe?\nAnswer: [MASK]",
                "{premise} Question: {hypothesis}? Answer: [MASK]",
                "{premise}\nIs it true that {hypothesis}?\nAnswer: [MASK]",
                '"{premise}" implies "{hypothesis}": [MASK]',
            ),
            (
                {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
                {"entailment": "True", "contradiction": "False", "neutral": "Neither"},
            ),
            ("accuracy", "macro_f1"),
        ),
        SuperGlueTask(
            "copa",
            "COPA",
            (
                "{premise} {joined} [MASK]",
                "{premise}, {joined} [MASK]",
                '"{choice1}" or "{choice2}"? {premise} {joined} [MASK]',
            ),
            ({"0": "{choice1}", "1": "{choice2}"},),
            ("accuracy",),
        ),
        SuperGlueTask(
            "multirc",
            "MultiRC",
            (
                "{passage}\nQuestion: {question}\nIs it {answer_text}?\nAnswer: [MASK]",
                "{passage} Question: {question} Is the correct answer {answer_text}? [MASK]",
                "{passage}\n{question}\nProposed answer: {answer_text}\nIs this right? [MASK]",
            ),
            ({"1": "Yes", "0": "No"}, {"1": "True", "0": "False"}),
            ("f1a", "em"),
            max_length=512,
        ),
        SuperGlueTask(
            "rte",
            "RTE",
            (
                "{premise}\nQuestion: {hypothesis} True or False?\nAnswer: [MASK]",
                "{premise}\nQuestion: {hypothesis} Yes or No?\nAnswer: [MASK]",
                "{premise} Question: {hypothesis}? Answer: [MASK]",
                "{premise}\nIs it true that {hypothesis}\nAnswer: [MASK]",
            ),
            _ENTAILED,
            ("accuracy",),
        ),
        SuperGlueTask(
            "wic",
            "WiC",
            (
                '"{sentence1}" / "{sentence2}" Similar sense of "{word}"? [MASK]',
                "{sentence1} {sentence2} Does {word} have the same meaning in both? [MASK]",
                "{word}: {sentence1}\n{word}: {sentence2}\nThe same sense? [MASK]",
            ),
            (_YES, _TRUE),
            ("accuracy",),
        ),
        SuperGlueTask(
            "wsc",
            "WSC",
            (
                "{text} The pronoun *{pronoun}* refers to [MASK]",
                "{text} In the previous sentence, the pronoun *{pronoun}* refers to [MASK]",
                "{text} Question: who or what is *{pronoun}*? Answer: [MASK]",
            ),
            (),
            ("accuracy",),
            answer="noun",
        ),
    )
}
