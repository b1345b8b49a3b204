"""Members of a population with their examples, as their templates render them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

from ..backbone.base_model import BaseModel
from ..errors import DataError
from ..prompts.prompt import Prompt
from ..rendering.example import Example, answer_column
from ..rendering.lesson import Lesson
from ..rendering.render import Rendered, Renderer, render_all, taught
from .grid import Named, Variant
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
    for name, given, settings in chosen:
        prompt = copy.copy(given)  # which may be rendered again, with other examples
        if prompt.template not in made:
            longest = base.longest_answer
            renderer = Renderer(base.tokenizer, prompt, base.kind, base.context, None, longest)
            examples = _examples(renderer, rows, "training", learnt[0])
            dev_examples = _examples(renderer, dev, "dev", learnt[1])
            later = dev_examples if settings.refit else ()
            learn_answer_length(prompt, renderer, examples, later)
            made[prompt.template] = renderer, examples, dev_examples
        renderer, examples, dev_examples = made[prompt.template]
        task = renderer.task
        prompt.answer_tokens, prompt.verbalizer = task.answer_tokens, task.verbalizer
        prompt.set_count(renderer.count)
        answers = answers_of(prompt, rows, learnt[0])
        start = start_of(renderer, rows, answers, settings.start_for(prompt.encoder), settings.seed)
        own = left_out(examples, start)
        variants.append(Variant(name, prompt, settings, renderer, own, dev_examples, start.words))
    return variants


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
    prompt: Prompt, rows: Sequence[Example], lessons: Sequence[Lesson] | None
) -> list[str]:
    """What the rows ask for, as it is compared."""
    if lessons is not None:
        return [lesson.answer for lesson in lessons]
    return [prompt.label_text(row[answer_column(prompt, row)]) for row in rows]


def learn_answer_length(
    prompt: Prompt, renderer: Renderer, examples: list[Rendered], later: Sequence[Rendered] = ()
) -> None:
    """How long free answers may be at inference: the longest seen; for masks, the commonest.

    Args:
        prompt: learns it.
        renderer: of its template.
        examples: that are trained on.
        later: that are trained on behind them.

    Raises:
        DataError: an answer is longer than the ``answer_tokens`` that the user gave.
    """
    if prompt.labels:
        return
    lengths = [len(example.sequences[0].answer) for example in examples]
    given = prompt.answer_tokens
    if given is not None and prompt.vectors is None and max(lengths) > given:
        number = next(n for n, length in enumerate(lengths, 1) if length > given)
        ending = ", its end included" if renderer.kind == "causal" and prompt.ends_answer else ""
        raise DataError(
            f"training example {number}: the answer has {lengths[number - 1]} tokens{ending}, and "
            f"answer_tokens is {given}; raise answer_tokens, or leave it out"
        )
    if renderer.kind == "masked":
        prompt.answer_tokens = given or Counter(lengths).most_common(1)[0][0]
    else:
        lengths += [len(example.sequences[0].answer) for example in later]
        prompt.answer_tokens = max([*lengths, given or 0])
