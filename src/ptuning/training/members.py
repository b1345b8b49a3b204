"""Members of a population with their examples, as their templates render them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

from ..backbone.base_model import BaseModel
from ..errors import DataError
from ..forward.engine import Engine
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.example import Example, answer_column
from ..rendering.lesson import Lesson
from ..rendering.render import Rendered, Renderer, render_all, taught
from ..rendering.short_words import settle_words
from .grid import Named, Variant
from .rates import unit_for
from .starts import left_out, start_of


def with_examples(
    base: BaseModel,
    chosen: Sequence[Named],
    rows: Sequence[Example],
    dev: Sequence[Example],
    learnt: tuple[Sequence[Lesson] | None, Sequence[Lesson] | None] = (None, None),
) -> list[Variant]:
    """The members with their examples; those of one template share them."""
    made: dict[str | None, tuple[Renderer, list[Rendered], list[Rendered]]] = {}
    variants = []
    prompts = settled(base, [prompt for _, prompt, _ in chosen])
    for (name, _, settings), prompt in zip(chosen, prompts, strict=True):
        if prompt.template not in made:
            renderer = Engine(base).renderer(prompt)
            examples = _examples(renderer, rows, "training", learnt[0])
            dev_examples = _examples(renderer, dev, "dev", learnt[1])
            check_answer_lengths(prompt, renderer, examples, "training")
            if settings.refit:  # these are trained on at last
                check_answer_lengths(prompt, renderer, dev_examples, "dev")
            learn_answer_length(prompt, renderer, examples)
            made[prompt.template] = renderer, examples, dev_examples
        renderer, examples, dev_examples = made[prompt.template]
        prompt.answer_tokens = renderer.task.answer_tokens
        prompt.set_count(renderer.count)
        answers = answers_of(prompt, rows, learnt[0])
        init = settings.start_for(prompt.encoder) if prompt.vectors is None else "encoder"
        start = start_of(renderer, rows, answers, init, settings.seed)
        has_rate = settings.learning_rate is not None
        unit = unit_for(base.model, base.tokenizer, prompt.encoder, settings, has_rate)
        seen = left_out(examples, start), dev_examples
        variants.append(Variant(name, prompt, settings, renderer, *seen, start.words, unit))
    return variants


def settled(base: BaseModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Copies of members' prompts (which may be rendered again, with other examples) whose label
    words stand fast: those of one template have the same, and a label has as many in each template,
    since the rows of all are compared side by side."""
    prompts = [copy.copy(prompt) for prompt in prompts]
    words: dict[str | None, dict[str, tuple[str, ...]]] = {}
    for prompt in prompts:
        if prompt.template not in words:
            settle_words(prompt, base.tokenizer, base.kind)
            words[prompt.template] = prompt.labels
    for prompt in prompts:
        prompt.name_words = None
        if own := words[prompt.template]:
            least = {label: min(len(of[label]) for of in words.values()) for label in own}
            prompt.set_words({label: own[label][: least[label]] for label in own})
    return prompts


def _examples(
    renderer: Renderer, rows: Sequence[Example], what: str, lessons: Sequence[Lesson] | None
) -> list[Rendered]:
    """Rows with their own answers, or with a teacher's."""
    if lessons is None:
        return render_all(renderer, rows, what)
    plain = render_all(renderer, rows, what, answered=False)
    labels = renderer.labels
    return [taught(one, lesson, labels) for one, lesson in zip(plain, lessons, strict=True)]


def answers_of(
    task: Task, rows: Sequence[Example], lessons: Sequence[Lesson] | None = None
) -> list[str]:
    """What the rows ask for, as it is compared."""
    if lessons is not None:
        return [lesson.answer for lesson in lessons]
    return [task.label_text(row[answer_column(task, row)]) for row in rows]


def check_answer_lengths(
    prompt: Prompt, renderer: Renderer, examples: Sequence[Rendered], what: str
) -> None:
    """Refuse free answers to train on that are longer than the user's ``answer_tokens``.

    Raises:
        DataError: names the first one.
    """
    given = prompt.answer_tokens
    if prompt.labels or given is None or prompt.vectors is not None:
        return
    for number, example in enumerate(examples, 1):
        length = len(example.sequences[0].answer)
        if length > given:
            ends = renderer.kind == "causal" and prompt.ends_answer
            ending = ", its end included" if ends else ""
            raise DataError(
                f"{what} example {number}: the answer has {length} tokens{ending}, and "
                f"answer_tokens is {given}; raise answer_tokens, or leave it out"
            )


def learn_answer_length(prompt: Prompt, renderer: Renderer, examples: Sequence[Rendered]) -> None:
    """How long free answers may be at inference: the longest seen; for masks, the commonest.

    Args:
        prompt: learns it; it may know of others.
        renderer: of its template.
        examples: that are trained on.
    """
    if prompt.labels:
        return
    lengths = [len(example.sequences[0].answer) for example in examples]
    given = prompt.answer_tokens
    if renderer.kind == "masked":
        prompt.answer_tokens = given or Counter(lengths).most_common(1)[0][0]
    else:
        prompt.answer_tokens = max([*lengths, given or 0])
