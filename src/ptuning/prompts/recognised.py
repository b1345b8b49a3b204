"""``isinstance`` against PEFT's classes holds for ours, and PEFT is never imported.

transformers' and trl's trainers ask ``isinstance(model, peft.PeftModel)`` before they save a small
adapter folder, and ``isinstance(config, peft.PeftConfig)`` before they take a configuration.
``isinstance`` looks at ``type(x)`` first and at ``x.__class__`` after that. The former stays what
it is; the latter is a class of both kinds from the moment on that somebody has imported PEFT.
Before that nobody can ask. Nothing is inherited: attributes are looked up in ``type(x)``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar


class Recognised:
    """An object that PEFT's users take for one of PEFT's.

    Attributes:
        peft_names: PEFT's class of the same meaning, by name; the first that the release has.
    """

    peft_names: ClassVar[tuple[str, ...]] = ()

    def _get_class(self) -> type:
        kind: Any = type(self)
        rooms = [sys.modules.get(name) for name in ("peft", "peft.utils")]
        found = (getattr(room, name, None) for name in kind.peft_names for room in rooms)
        theirs = next((other for other in found if isinstance(other, type)), None)
        return kind if theirs is None else _both(kind, theirs)

    def _set_class(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)  # as FSDP changes a module's class

    __class__ = property(_get_class, _set_class)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The default would find that ``__class__`` is not the type that it makes anew.
        return _blank, (type(self),), self.__getstate__()


def _blank(kind: type) -> Any:
    return object.__new__(kind)


@functools.cache
def _both(ours: Any, theirs: Any) -> Any:
    names = {"__module__": ours.__module__, "__qualname__": ours.__qualname__}
    try:
        return type(ours.__name__, (ours, theirs), names)
    except TypeError:  # a release whose class cannot stand beside ours: then it is not recognised
        return ours
