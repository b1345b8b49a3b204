"""`attach`: prompts on a model, for as long as you need them.

with ptuning.attach(model, tokenizer, prompt) as attached:
    model(attached.prepend(prompt, input_ids)["input_ids"])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..backbone.identity import check_same
from ..backbone.injection import Injector
from ..backbone.modes import eval_mode
from ..backbone.placement import Placement
from ..backbone.tokens import first_free_id
from ..backbone.upstream import uncompiled
from ..devices import on_cpu_by_default
from ..errors import InputError
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..threads import CHANGING


class Attachment:
    """Prompts attached to a model: each has a range of virtual token ids.

    Usable as a context manager, or as an object with `detach`. Attachments may be nested and leave
    in any order. The model's weights, state dict and outputs on plain text stay as they are.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompts: tuple[Prompt, ...]):
        self._model = model = uncompiled(model)
        for prompt in prompts:
            check_kind(prompt, Prompt)
        at_least = first_free_id(tokenizer)
        members = [member for prompt in prompts for member in prompt.members]
        for prompt in members:
            prompt.checked().trained_vectors()
            if prompt.modules:
                raise InputError(
                    f"this prompt was trained together with {', '.join(sorted(prompt.modules))} "
                    "and means nothing without them; load it with ptuning.peft_compat"
                )
            check_same(prompt.base_model, model, tokenizer)
        with CHANGING:
            self._injector = Injector.on(model)
            vectors = [prompt.trained_vectors() for prompt in members]
            spans = self._injector.add_all(vectors, at_least)
        self._spans = list(zip(members, spans, strict=True))

    def first_id(self, prompt: Prompt) -> int:
        """The id of a prompt's first virtual token.

        Raises:
            InputError: the prompt is not attached here, or is an ensemble, of which each member
                (`Prompt.members`) has ids of its own.
        """
        prompt.check_alone("read as one range of ids")
        self._injector.follow(self._model)  # the embedding may be larger, or another one
        for attached, span in self._spans:
            if attached is prompt or attached.vectors is prompt.trained_vectors():
                return span.first
        raise InputError("this prompt is not attached here; pass it to attach")

    def ids(self, prompt: Prompt) -> range:
        """The ids of a prompt's virtual tokens."""
        first = self.first_id(prompt)
        return range(first, first + len(prompt.trained_vectors()))

    def prepend(
        self,
        prompt: Prompt,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Put a prompt in front of each row, behind its left padding: ``[pad pad v v text]``.

        Args:
            prompt: an attached prompt.
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``; all ones by default.
            labels: ``(B, T)``, extended with -100.

        Returns:
            ``input_ids`` and ``attention_mask`` (and ``labels``) ``(B, n + T)``.
        """
        ids = torch.tensor(self.ids(prompt), device=input_ids.device).expand(len(input_ids), -1)
        rows, count = ids.shape
        place = Placement(
            input_ids.shape[1], [count] * rows, [0] * rows, attention_mask, device=input_ids.device
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        result = {"input_ids": place(input_ids, ids), "attention_mask": place(attention_mask, 1)}
        if labels is not None:
            result["labels"] = place(labels, -100)
        return result

    def detach(self) -> None:
        """Take the prompts off; with the last attachment the model is as it was."""
        with CHANGING:
            self._injector.remove(*(span for _, span in self._spans))
            self._spans.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


@on_cpu_by_default
def attach(model: nn.Module, tokenizer: Any, *prompts: Prompt) -> Attachment:
    """Attach prompts to a model.

    Args:
        model: a transformers model; only its input embedding gets two hooks.
        tokenizer: its length decides where virtual ids start; may be None.
        prompts: trained prompts, in any number; of an ensemble all members are attached.

    Raises:
        PromptFileError, InputError: a prompt's width is not the model's, it has no vectors, or
            what came is no prompt, such as a list of them.
    """
    if not prompts:
        raise InputError("no prompt to attach; give at least one")
    return Attachment(model, tokenizer, prompts)


@contextmanager
def placed(model: nn.Module, tokenizer: Any, task: Task) -> Iterator[int]:
    """The first id of a prompt, which is attached meanwhile if it is not; 0 for a manual task.

    Raises:
        InputError: an ensemble, whose members stand in places of their own; a manual task with
            virtual tokens.
    """
    if not isinstance(task, Prompt):
        task.check_manual()
        yield 0
        return
    task.check_alone("read as one range of ids")
    with CHANGING:
        injector = Injector.of(model)
        span = injector.borrow(task.trained_vectors()) if injector else None
    if injector and span:
        try:
            yield span.first
        finally:
            injector.remove(span)
        return
    with attach(model, tokenizer, task) as attachment:
        yield attachment.first_id(task)


@contextmanager
def all_placed(model: nn.Module, tokenizer: Any, tasks: Iterable[Task]) -> Iterator[list[int]]:
    """The first id of each task (`placed`), and the model in eval mode meanwhile."""
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        yield [stack.enter_context(placed(model, tokenizer, task)) for task in tasks]
