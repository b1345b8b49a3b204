"""LAMA knowledge probing: what a frozen model says of facts, asked by hand and by a trained prompt.

For each relation: LAMA's manual template, the best manual template on dev, the majority answer, and
P-tuned prompts that answer together. All choices are made on dev, all figures are from test
(protocol: `relations`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from ...backbone.base_model import BaseModel
from ...backbone.kinds import ModelKind, kind_of
from ...data import Row
from ...errors import InputError
from ...prompts.prompt import Prompt
from ...prompts.task import Task, majority_answer
from ...rendering.render import Renderer
from ...training.ensemble import drop_far
from ...training.progress import Progress
from ...training.train import train
from .options import LamaOptions
from .ranking import metrics, ranks
from .relations import (
    OBJECT,
    Facts,
    Relation,
    UnusableRelationError,
    is_one_token,
    one_token,
)
from .templates import (
    all_manual,
    anchored_template,
    manual_template,
    plain_template,
    worded_template,
)

MEASURED = ("manual_p1", "best_manual_p1", "majority_p1", "ptuned_p1", "ptuned_p10", "ptuned_mrr")


def probe(
    model: nn.Module,
    tokenizer: Any,
    relation: Relation,
    facts: Facts,
    options: LamaOptions,
    candidates: Sequence[str] = (),
    listener: Callable[[Progress], None] | None = None,
    running: Path | None = None,
) -> tuple[dict[str, Any], Prompt]:
    """Measure one relation.

    Args:
        model: causal or masked; stays as it is.
        tokenizer: the model's.
        relation: gives the manual templates.
        facts: of the relation.
        options: the population.
        candidates: answers that compete; by default the whole vocabulary.
        listener: hears the training.
        running: folder for checkpoints; the training goes on from the newest, if there is one.

    Returns:
        the relation's figures as plain values (fractions), and the trained prompt.

    Raises:
        InputError, UnusableRelationError: as `check`.
    """
    started = time.monotonic()
    kind = kind_of(model)
    by_hand = {text: _manual(text) for text in check(model, tokenizer, relation, facts, options)}
    ranked = partial(ranks, model, tokenizer, candidates=_ids(tokenizer, candidates, facts))

    def measured(tasks: dict[str, Task], rows: list[Row]) -> dict[str, dict[str, float]]:
        return dict(zip(tasks, map(metrics, ranked([*tasks.values()], rows)), strict=True))

    on_dev = measured(by_hand, facts.dev)
    best = max(on_dev, key=lambda text: (on_dev[text]["p1"], on_dev[text]["mrr"]))
    own = manual_template(relation, kind)
    own = own if own in by_hand else None
    majority = majority_answer(str(row[OBJECT]) for row in facts.train)
    templates = _with_virtual_tokens(options, own or best, best, kind)
    grid = {"template": templates, **options.grid}
    members = options.population * prod(map(len, grid.values()))
    settings = options.settings_for(facts)
    encoder = options.grid["encoder"][0]
    prompt = Prompt(templates[0], answer=OBJECT, encoder=encoder, answer_end=False)
    result = train(
        model,
        tokenizer,
        prompt,
        facts.train,
        facts.dev,
        settings=replace(settings, ensemble=members if options.together else 1),
        population=options.population,
        grid=grid,
        listener=listener,
        verbose=False,
        output=running,
        resume=running is not None,
    )
    drop_far(prompt, result)
    asked: dict[str, Task] = {"": prompt, **{text: by_hand[text] for text in (own, best) if text}}
    on_test = measured(asked, facts.test)
    manual: dict[str, float] = on_test[own] if own else {}
    best_manual, ptuned = on_test[best], on_test[""]
    figures = {
        **{f"manual_{name}": manual.get(name) for name in ("p1", "p10", "mrr")},
        **{f"best_manual_{name}": value for name, value in best_manual.items()},
        "majority_p1": mean(str(row[OBJECT]) == majority for row in facts.test),
        **{f"ptuned_{name}": value for name, value in ptuned.items()},
        "label": relation.label,
        "train_examples": len(facts.train),
        "dev_examples": len(facts.dev),
        "test_examples": len(facts.test),
        "manual_template": own,
        "best_manual_template": best,
        "majority_answer": majority,
        "together": [member.template for member in prompt.members],
        "template": prompt.template,
        "encoder": prompt.encoder,
        "dev_p1": measured({"": prompt}, facts.dev)[""]["p1"],
        "epoch": result.best["epoch"],
        "members": result.members,
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, prompt


def check(
    model: nn.Module,
    tokenizer: Any,
    relation: Relation,
    facts: Facts,
    options: LamaOptions,
    candidates: Sequence[str] = (),
) -> list[str]:
    """Refuse what `probe` could not measure, before anything is trained.

    Returns:
        the manual templates in which every object is the token that it is behind a space.

    Raises:
        InputError: the model is an encoder-decoder, or objects have several tokens in a template.
        UnusableRelationError: there is no manual template, or a fact's object is no candidate.
    """
    base = BaseModel.of(model, tokenizer)
    kind = base.kind
    if kind is ModelKind.SEQ2SEQ:
        raise InputError("LAMA asks for one token at [MASK]; give a causal or masked LM")
    _ids(tokenizer, candidates, facts)
    rows = {str(row[OBJECT]): row for row in (*facts.train, *facts.dev, *facts.test)}

    def is_askable(template: str) -> bool:
        if " [MASK]" in template:
            return True
        render = Renderer(tokenizer, _manual(template), kind, base.context)
        return all(
            [*render(row).sequences[0].answer] == [one_token(tokenizer, word)]
            for word, row in rows.items()
        )

    for template in options.own_templates:
        if not is_askable(template):
            raise InputError(
                f"--template {template!r}: objects such as {next(iter(rows))!r} are not one token "
                "there; write a space before [MASK]"
            )
    found = [template for template in all_manual(relation, kind) if is_askable(template)]
    if not found:
        raise UnusableRelationError(
            f"{relation.name}: no manual template asks for one token behind the subject; give the "
            "relation a label"
        )
    return found


def summary(relations: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Means over the relations, each counted once; None where no relation has the figure."""
    found = {
        name: [r[name] for r in relations.values() if r[name] is not None] for name in MEASURED
    }
    return {name: mean(values) if values else None for name, values in found.items()}


def _manual(text: str) -> Task:
    return Task(text, answer=OBJECT, answer_end=False)


def _with_virtual_tokens(options: LamaOptions, own: str, best: str, kind: str) -> list[str]:
    """The population's templates, each once."""
    size = options.virtual_tokens
    forms = {
        "own": anchored_template(own, kind, size),
        "best": anchored_template(best, kind, size),
        "own-words": worded_template(own, kind, size),
        "best-words": worded_template(best, kind, size),
        "plain": plain_template(kind, size),
    }
    chosen = [forms.get(template, template) for template in dict.fromkeys(options.templates)]
    if len(set(chosen)) < len(chosen):  # LAMA's own template is the best one
        chosen.append(forms["plain"])
    return list(dict.fromkeys(chosen))


def _ids(tokenizer: Any, candidates: Sequence[str], facts: Facts) -> list[int] | None:
    """The ids of the candidates that are one token; None where all of the vocabulary competes."""
    if not candidates:
        return None
    words = [word for word in dict.fromkeys(candidates) if is_one_token(tokenizer, word)]
    missing = {str(row[OBJECT]) for row in (*facts.dev, *facts.test)} - set(words)
    if missing:
        raise UnusableRelationError(
            f"the object {min(missing)!r} is not among the candidates (--candidates); add it"
        )
    return [one_token(tokenizer, word) for word in words]
