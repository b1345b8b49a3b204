"""One call of a model with adapters: ``forward`` and ``generate``, for every task.

Each row may name its own adapter, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import generation
from .inputs import place
from .modules_to_save import remember, wrappers
from .outputs import restored
from .seats import Base, Seat, placed_ids

BASE = "__base__"
"""In ``adapter_names`` a row without a prompt, as in the reference; None means the same."""


def forward(model: Any, arguments: dict[str, Any]) -> Any:
    """The base model's output for inputs with prompts in them.

    Args:
        model: a ``PeftModel``.
        arguments: of the call; ``adapter_names`` gives each row its adapter,
            ``drop_virtual_positions`` overrides the model's own setting.
    """
    arguments = {k: v for k, v in arguments.items() if v is not None}
    arguments.pop("task_ids", None)
    drop = arguments.pop("drop_virtual_positions", model.drop_virtual_positions)
    names = arguments.pop("adapter_names", None)
    base = model.base()
    if model._adapters_disabled:
        with _modules_of(model, [None]):
            return model.base_model(**arguments)
    rows = _rows(model, names, arguments)
    with _written(model, rows) as seats, ExitStack() as stack:
        inputs, where = place(base, seats, arguments, stack, of_text=drop)
        as_tuple = inputs.pop("return_dict", base.model.config.return_dict) is False
        output = model.base_model(**inputs, return_dict=True)
        output = restored(output, where, decoder=base.logits_of_decoder, text_only=drop)
        return output.to_tuple() if as_tuple else output


def generate(model: Any, arguments: dict[str, Any]) -> Any:
    """``generate`` of the base model.

    Args:
        model: a ``PeftModel``.
        arguments: of the call; ``adapter_names`` gives each row its adapter.

    Raises:
        InputError: no ``input_ids``, or an option that does not go with prompts.
    """
    arguments.pop("task_ids", None)
    names = arguments.pop("adapter_names", None)
    base = model.base()
    if model._adapters_disabled:
        with _modules_of(model, [None]):
            return model.base_model.generate(**arguments)
    ids = arguments.pop("input_ids", None)
    ids = arguments.pop("inputs", None) if ids is None else ids
    if ids is None:
        raise InputError("input_ids must be provided for Peft model generation")
    generation.check_options(model.generation_config, arguments)
    rows = _rows(model, names, {"input_ids": ids})
    with _written(model, rows, grad=False) as seats:
        how = _from_encoder if base.encodes_and_decodes else _from_text
        return how(base, model, seats, ids, arguments)


def _from_text(
    base: Base, model: Any, seats: Sequence[Seat], ids: Tensor, arguments: dict[str, Any]
) -> Any:
    if arguments.get("inputs_embeds") is not None:
        raise InputError("generate takes input_ids; leave inputs_embeds out")

    def begin(text: Tensor, mask: Tensor | None) -> generation.Start:
        own = [seat for seat in seats for _ in range(len(text) // len(seats))]
        placed, placed_mask, where = placed_ids(base, own, text, mask)
        return generation.Start(placed, placed_mask, where, not base.reference_layout)

    inserted = max(0 if seat is None else seat[0].length for seat in seats)
    view = generation.view(model.base_model, begin, ids.shape[1], inserted)
    view.generation_config = model.generation_config
    return view.generate(input_ids=ids, **arguments)


def _from_encoder(
    base: Base, model: Any, seats: Sequence[Seat], ids: Tensor, arguments: dict[str, Any]
) -> Any:
    """The encoder reads the prompts; the generation loop gets its output, and the text's ids."""
    if arguments.pop("encoder_outputs", None) is not None:
        raise InputError(
            "encoder_outputs were made without the prompt; give input_ids and leave them out"
        )
    given = {name: arguments.pop(name, None) for name in ("attention_mask", "token_type_ids")} | {
        "input_ids": ids
    }
    with ExitStack() as stack, torch.no_grad():
        inputs, _ = place(base, seats, given, stack)
        config = arguments.get("generation_config") or model.generation_config
        for name in ("output_attentions", "output_hidden_states"):
            inputs[name] = bool(arguments.get(name, getattr(config, name, False)))
        encoded = model.base_model.get_encoder()(**inputs, return_dict=True)
    mask = inputs.get("attention_mask")
    if mask is not None:
        arguments["attention_mask"] = mask
    return model.base_model.generate(input_ids=ids, encoder_outputs=encoded, **arguments)


def _rows(model: Any, names: Sequence[str | None] | None, inputs: dict[str, Any]) -> list[Any]:
    """Each row's adapter, or one for all alike."""
    if names is None:
        if not model.active_adapters:
            raise InputError("no adapter is left on this model; add one, or call base_model")
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
def _written(model: Any, rows: Sequence[str | None], grad: bool = True) -> Iterator[list[Seat]]:
    """Let the rows' virtual ids stand for what their encoders give now, in this thread alone;
    yields the rows' seats."""
    used = {name: model.adapter(name) for name in dict.fromkeys(rows) if name is not None}
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        tables = {a.span: a.vectors(model.prompt_encoder[name]) for name, a in used.items()}
    with model._injector.serving(tables), _modules_of(model, rows):
        yield [None if n is None else (used[n].frame, used[n].span) for n in rows]


@contextmanager
def _modules_of(model: Any, rows: Sequence[str | None]) -> Iterator[None]:
    """Let each row meet the modules that were trained with its adapter."""
    with ExitStack() as stack:
        found = wrappers(model.base_model)
        if found and torch.is_grad_enabled():
            remember(model.base_model)
        for wrapper in found.values():
            stack.enter_context(wrapper.using(rows))
        yield
