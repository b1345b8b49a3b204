"""Templates and verbalizers of SuperGLUE's tasks, in the style of PET and of the paper.

Each template is a prompt whose virtual tokens begin as words, so that with 32 examples training
starts from what the model answers anyway. Its manual template is the same text with those words as
they are. Where it reads well the virtual tokens stand behind the text, whose keys and values are
then computed once for all of a training.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...prompts.prompt import Prompt

Words = dict[str, str]


@dataclass(frozen=True)
class SuperGlueTask:
    """One task.

    Attributes:
        name: as the command line has it.
        folder: of its files.
        templates: with virtual tokens.
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

    def prompts(self) -> list[Prompt]:
        """Every template with every verbalizer, untrained."""
        return [
            Prompt(
                template,
                answer=self.answer,
                verbalizer=words,
                max_length=self.max_length,
                encoder="none",
            )
            for words in (self.verbalizers or (None,))
            for template in self.templates
        ]

    @property
    def labels(self) -> tuple[str, ...]:
        """What the examples' ``label`` may be, as text."""
        return tuple(self.verbalizers[0]) if self.verbalizers else ("true", "false")

    @property
    def generates(self) -> bool:
        """The answer is free text (WSC: its training file has true examples only)."""
        return not self.verbalizers


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
                "{passage}\nQuestion: {question}?[P:\nAnswer:] [MASK]",
                "{passage} Question: {question}? [P:Answer:] [MASK]",
                "{passage} [P:Based on the previous passage,] {question}? [MASK]",
                "Passage: {passage}\nQuestion: {question}? [P:Yes or No?\nAnswer:] [MASK]",
            ),
            (_YES, _TRUE),
            ("accuracy",),
        ),
        SuperGlueTask(
            "cb",
            "CB",
            (
                "{premise}\nQuestion: {hypothesis}? [P:Yes, No or Maybe?\nAnswer:] [MASK]",
                "{premise} Question: {hypothesis}? [P:Answer:] [MASK]",
                "{premise}\nIs it true that {hypothesis}?[P:\nAnswer:] [MASK]",
                '"{premise}" [P:implies] "{hypothesis}": [MASK]',
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
                "[P:This is true:] {premise} {joined} [MASK]",
                "[P:Common sense:] {premise}, {joined} [MASK]",
                '"{choice1}" or "{choice2}"? [P:Answer:] {premise} {joined} [MASK]',
            ),
            ({"0": "{choice1}", "1": "{choice2}"},),
            ("accuracy",),
        ),
        SuperGlueTask(
            "multirc",
            "MultiRC",
            (
                "{passage}\nQuestion: {question}\nIs it {answer_text}?[P:\nAnswer:] [MASK]",
                "{passage} Question: {question} [P:Is the correct answer] {answer_text}? [MASK]",
                "{passage}\n{question}\nProposed answer: {answer_text}[P:\nIs this right?] [MASK]",
            ),
            ({"1": "Yes", "0": "No"}, {"1": "True", "0": "False"}),
            ("f1a", "em"),
            max_length=512,
        ),
        SuperGlueTask(
            "rte",
            "RTE",
            (
                "{premise}\nQuestion: {hypothesis} [P:True or False?\nAnswer:] [MASK]",
                "{premise}\nQuestion: {hypothesis} [P:Yes or No?\nAnswer:] [MASK]",
                "{premise} Question: {hypothesis}? [P:Answer:] [MASK]",
                "{premise}\nIs it true that {hypothesis}[P:\nAnswer:] [MASK]",
            ),
            _ENTAILED,
            ("accuracy",),
        ),
        SuperGlueTask(
            "wic",
            "WiC",
            (
                '"{sentence1}" / "{sentence2}" [P:Similar sense of] "{word}"? [MASK]',
                "{sentence1} {sentence2} Does {word} [P:have the same meaning in both?] [MASK]",
                "{word}: {sentence1}\n{word}: {sentence2}[P:\nThe same sense?] [MASK]",
            ),
            (_YES, _TRUE),
            ("accuracy",),
        ),
        SuperGlueTask(
            "wsc",
            "WSC",
            (
                "{text} The pronoun *{pronoun}* [P:refers to] [MASK]",
                "{text} In the previous sentence, the pronoun *{pronoun}* [P:refers to] [MASK]",
                "{text} Question: who or what is *{pronoun}*? [P:Answer:] [MASK]",
            ),
            (),
            ("accuracy",),
            answer="noun",
        ),
    )
}
