"""One call of a model with adapters: ``forward`` and ``generate``, for every task.

Each row may name its own adapter, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..backbone.injection import may_look_at_values
from ..backbone.upstream import CACHE, generating_view, uncompiled
from ..errors import InputError
from . import arguments, continuing, generation
from .adapters import Adapter
from .modules_to_save import remember, wrappers
from .outputs import restored
from .placing import Base, Rows, check_mask, drop_token_types, place, twins_vector

BASE = "__base__"
"""In ``adapter_names`` a row without a prompt, as in the reference; None means the same."""


def forward(model: Any, given: dict[str, Any]) -> Any:
    """The base model's output for inputs with the active adapter's prompt in them.

    Args:
        model: a ``PeftModel``.
        given: the base model's arguments. ``adapter_names`` gives each row its own adapter (None or
            ``"__base__"`` for none), ``drop_virtual_positions`` overrides the model's setting.
            ``past_key_values`` (since transformers 5.24 ``cache``) of an earlier call have the
            prompt in them, and get no second one.

    Returns:
        The base model's output; parts per token are ``(B, virtual tokens + T, …)``, and
        ``(B, T, …)`` without virtual positions.

    Raises:
        InputError: an argument that has no room for a prompt, or rows that do not fit.
    """
    inputs = {k: v for k, v in arguments.renamed(given).items() if v is not None}
    inputs.pop("task_ids", None)
    drop = inputs.pop("drop_virtual_positions", model.drop_virtual_positions)
    names = inputs.pop("adapter_names", None)
    base = model.base()
    _check_ids(model, base, inputs)
    if not (base.traits.any_keyword or base.accepts("num_items_in_batch")):
        inputs.pop("num_items_in_batch", None)  # transformers.Trainer gives it
    if model._adapters_disabled:
        with _modules_of(model, [None]):
            return model.base_model(**inputs)
    rows = _rows(model, names, inputs)
    if not base.encodes_and_decodes and continuing.tokens_in(inputs.get(CACHE)):
        return _go_on(model, base, rows, inputs)
    with _written(model, base, rows) as adapters, ExitStack() as stack:
        placed, where = place(base, adapters, inputs, stack, of_text=drop)
        as_tuple = placed.pop("return_dict", base.model.config.return_dict) is False
        output = model.base_model(**placed, return_dict=True)
        if not base.encodes_and_decodes:
            size = len(where.columns)
            held = continuing.Held(
                placed.get("attention_mask"),
                where.length + where.inserted,
                where.length,
                _lengths(adapters) * (size if len(adapters) == 1 else 1),
            )
            continuing.note(output.get(CACHE), held)
        output = restored(output, where, decoder=base.logits_of_decoder, text_only=drop)
        return output.to_tuple() if as_tuple else output


def _go_on(model: Any, base: Base, rows: Sequence[str | None], inputs: dict[str, Any]) -> Any:
    """A call behind a cache that has the prompt already."""
    arguments.check(inputs)
    cache = inputs[CACHE]
    told = base.accepts("position_ids") and not (base.traits.several_axes or base.reference_layout)
    held = continuing.held_by(cache)
    placed, after = continuing.continued(held, inputs, base.traits.first_position, positions=told)
    if base.traits.several_axes:
        continuing.leave_positions_to_the_model(placed)
    with _modules_of(model, rows):
        output = model.base_model(**placed)
    continuing.note(cache, after)
    return output


def generate(model: Any, given: dict[str, Any]) -> Any:
    """``generate`` of the base model.

    Args:
        model: a ``PeftModel``.
        given: the call's arguments; ``adapter_names`` gives each row its adapter.

    Raises:
        InputError: no ``input_ids``, or an argument that does not go with prompts.
    """
    given = arguments.renamed(given)
    given.pop("task_ids", None)
    names = given.pop("adapter_names", None)
    base = model.base()
    _check_ids(model, base, given)
    if model._adapters_disabled:
        with _modules_of(model, [None]):
            return model.base_model.generate(**given)
    ids = given.pop("input_ids", None)
    ids = given.pop("inputs", None) if ids is None else ids
    if ids is None and given.get("inputs_embeds") is None and not base.encodes_and_decodes:
        ids = _beginning(model, given)
    if ids is None:
        raise InputError("input_ids must be provided for Peft model generation")
    if given.get("inputs_embeds") is not None:
        raise InputError("generate takes input_ids; leave inputs_embeds out")
    generation.check_options(model.generation_config, given)
    arguments.check(given)
    check_mask(given.get("attention_mask"), *ids.shape)
    _check_cache(base, ids, given)
    drop_token_types(base, given)
    rows = _rows(model, names, {"input_ids": ids})
    with _written(model, base, rows, grad=False) as adapters, ExitStack() as stack:
        prompts = generation.Prompts(base, adapters, ids, given, stack)
        view = generating_view(uncompiled(model.base_model), prompts)
        view.generation_config = model.generation_config
        result = view.generate(input_ids=ids, **given)
    if not prompts.read:
        raise InputError(
            f"{type(model.base_model).__name__}.generate goes a way of its own and left the prompt "
            "out: put the prompt on its language model, or attach it with ptuning.attach"
        )
    return result


def _check_ids(model: Any, base: Base, inputs: dict[str, Any]) -> None:
    """Refuse ids behind the model's words, which would be taken for the adapters' own."""
    words = base.injector.threshold
    for name in ("input_ids", "inputs", "decoder_input_ids"):
        ids = inputs.get(name)
        if not isinstance(ids, Tensor) or not ids.numel() or not may_look_at_values(ids):
            continue
        highest = int(ids.max())
        if highest >= words and any(
            bool(((ids >= span.first) & (ids < span.end)).any()) for span in model._spans()
        ):
            raise InputError(
                f"{name} have the id {highest}, and the model's embedding has rows for 0 to "
                f"{words - 1}: if tokens were added to the tokenizer, make room for them with "
                "base_model.resize_token_embeddings(len(tokenizer))"
            )


def _beginning(model: Any, given: dict[str, Any]) -> Tensor | None:
    """The id ``(1, 1)`` that a text begins with, where nothing else is to go on from."""
    config = given.get("generation_config") or model.generation_config
    first = given.get("bos_token_id", config.bos_token_id)
    return None if first is None else torch.tensor([[first]], device=model.device)


def _check_cache(base: Base, ids: Tensor, given: dict[str, Any]) -> None:
    """A cache that generation goes on from has the prompt; the ids are those of all the text."""
    cache = given.get(CACHE)
    if base.encodes_and_decodes or not continuing.tokens_in(cache):
        return
    text = continuing.held_by(cache).text
    if ids.shape[1] <= text:
        raise InputError(
            f"past_key_values hold {text} tokens of the text, and input_ids have {ids.shape[1]}: "
            "give the ids and the mask of the whole text, those in the cache too"
        )


def _lengths(rows: Rows) -> tuple[int, ...]:
    return tuple(0 if row is None else row.insertion.length for row in rows)


def _rows(model: Any, names: Sequence[str | None] | None, inputs: dict[str, Any]) -> list[Any]:
    """The name of each row's adapter, or one for all alike."""
    if names is None:
        if not model.active_adapters:
            raise InputError(
                "no adapter is active, since all were deleted; add one and make it active with "
                "set_adapter, or call base_model"
            )
        return [model.active_adapter]
    text = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if text is not None and len(names) != len(text):
        raise InputError(
            f"adapter_names has {len(names)} names, and the batch {len(text)} rows; give each row's"
        )
    for name in set(names) - {None, BASE}:
        model.adapter(name)
    return [None if name == BASE else name for name in names]


@contextmanager
def _written(
    model: Any, base: Base, rows: Sequence[str | None], grad: bool = True
) -> Iterator[list[Adapter | None]]:
    """Let virtual ids stand for what their encoders give now, in this thread alone; yields each
    row's adapter."""
    used = {name: model.adapter(name) for name in dict.fromkeys(rows) if name is not None}
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        tables = {a.span: a.vectors(model.prompt_encoder[name]) for name, a in used.items()}
    if base.twin is not None:
        tables[base.twin] = twins_vector(base)
    with base.injector.serving(tables), _modules_of(model, rows):
        yield [None if name is None else used[name] for name in rows]


@contextmanager
def _modules_of(model: Any, rows: Sequence[str | None]) -> Iterator[None]:
    """Let each row meet the modules that were trained with its adapter."""
    with ExitStack() as stack:
        trained = wrappers(model.base_model)
        if trained and torch.is_grad_enabled():
            remember(model.base_model)
        for wrapper in trained.values():
            stack.enter_context(wrapper.using(rows))
        yield
