"""A ``forward`` that shows what it takes: the task's arguments, and those of the base model's own.

``transformers.Trainer`` looks at a model's signature to know which columns of its data to keep.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..backbone.upstream import uncompiled

_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_NAMED = inspect.Parameter.KEYWORD_ONLY


class Forward:
    """A method whose signature on an instance names the arguments of its base model too.

    Args:
        call: takes the model and the arguments by name.
        names: of the positional arguments, in their order.
    """

    def __init__(self, call: Callable[[Any, dict[str, Any]], Any], names: tuple[str, ...]):
        self._call, self._names = call, names
        self._of_class = self._method(())
        self._of_base: dict[type, Any] = {}

    def __get__(self, model: Any, kind: Any = None) -> Any:
        if model is None:
            return self._of_class
        base_class = type(uncompiled(model.base_model))
        if base_class not in self._of_base:
            found = inspect.signature(base_class.forward).parameters.values()
            kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            named = [p.name for p in found if p.kind not in kinds and p.name != "self"]
            self._of_base[base_class] = self._method(tuple(named))
        # No bound method: a graph that breaks would look for it here again, without end.
        return functools.partial(self._of_base[base_class], model)

    def _method(self, more: tuple[str, ...]) -> Any:
        call, names = self._call, self._names

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                raise TypeError(f"forward takes at most {len(names)} positional arguments: {names}")
            twice = sorted(set(names[: len(args)]) & set(kwargs))
            if twice:
                raise TypeError(f"forward got {twice[0]} twice, by position and by name")
            return call(self, {**dict(zip(names, args, strict=False)), **kwargs})

        others = [name for name in more if name not in names]
        forward.__doc__ = call.__doc__
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter("self", _POSITIONAL),
                *(inspect.Parameter(name, _POSITIONAL, default=None) for name in names),
                *(inspect.Parameter(name, _NAMED, default=None) for name in others),
                inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
            ]
        )
        return forward
