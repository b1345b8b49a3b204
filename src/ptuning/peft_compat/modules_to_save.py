"""Modules that are trained with a prompt, such as a classifier: a copy for each adapter.

The wrapper takes the module's place in the model. Names of parameters are the reference's, so code
that looks for ``modules_to_save`` in them goes on working.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import Cache

from ..backbone.upstream import checkpointing_of, offloading_of, set_checkpointing
from ..errors import InputError, a_kind, warn
from ..prompts.recognised import Recognised
from .adapter_names import AdapterDict, escaped


class ModulesToSaveWrapper(Recognised, nn.Module):
    """A module of the base model, and a trainable copy of it for each adapter.

    PEFT's functions take it for theirs, so that state dicts of launchers have what is trained.

    Attributes:
        original_module: the base model's own, frozen.
        modules_to_save: adapter name -> copy.
        active_adapter: whose copy is used, or None for the original.
    """

    peft_names: ClassVar[tuple[str, ...]] = ("ModulesToSaveWrapper",)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = AdapterDict()
        self.active_adapter: str | None = None
        self._local = threading.local()

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter in a list, as the reference has it."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def add(self, name: str) -> None:
        """A trainable copy of the original for an adapter; of offloaded weights a real one.

        Warns:
            UserWarning: another `PeftModel` on the same model has one of that name, which is lost.
        """
        if name in self.modules_to_save:
            warn(
                f"another PeftModel on this base model has trained modules for adapter {name!r}, "
                "which are replaced by new ones; to keep both give another adapter_name, or add "
                "the adapter to that PeftModel (add_adapter, load_adapter)"
            )
        with ExitStack() as stack:
            parts = list(self.original_module.modules())
            for part in parts:
                stack.enter_context(align_module_device(part))
            hooks = {id(hook): hook for hook in map(offloading_of, parts)}
            # What offloads it has the whole model's weights, which must not be copied.
            made = copy.deepcopy(self.original_module, hooks)
        remove_hook_from_module(made, recurse=True)
        self.modules_to_save[name] = made.requires_grad_(False)

    def adapter_state_dict(self, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's copy out of the wrapper's state dict, under the original's names."""
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(name).items()}

    def adapter_state_dict_load_map(self, name: str) -> dict[str, str]:
        """The original's names -> those of an adapter's copy in the wrapper's state dict."""
        if name not in self.modules_to_save:
            return {}
        prefix = f"modules_to_save.{escaped(name)}."
        return {key: f"{prefix}{key}" for key in self.modules_to_save[name].state_dict()}

    def activate(self, name: str | None, trainable: bool) -> None:
        """Use an adapter's copy, and train it and no other."""
        self.modules_to_save.requires_grad_(False)
        self.active_adapter = None
        if name is not None and name in self.modules_to_save:
            self.active_adapter = name
            self.modules_to_save[name].requires_grad_(trainable)

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """In this thread each row of a batch gets the copy of its own adapter meanwhile."""
        before, self._local.names = self.names, list(names)
        try:
            yield
        finally:
            self._local.names = before

    @property
    def names(self) -> list[str | None] | None:
        """In this thread the adapter of each row, inside `using`."""
        return getattr(self._local, "names", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter's copy gives, or each row's own."""
        names = self.names or [self.active_adapter]
        if len(set(names)) == 1:
            return self._of(names[0])(*args, **kwargs)
        return self._each(names, *args, **kwargs)

    def _of(self, name: str | None) -> nn.Module:
        if name is None or name not in self.modules_to_save:
            return self.original_module
        return self.modules_to_save[name]

    def _each(self, names: list[str | None], *args: Any, **kwargs: Any) -> Any:
        size = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 0
        if not size or size % len(names):
            raise InputError(
                f"rows with different trained modules need {len(names)} rows in the module's "
                "input; run them in a batch of their own"
            )
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise InputError(
                "rows with different trained layers would share the keys and values of one cache; "
                "give use_cache=False, or run them in batches of their own"
            )
        # A row's beams and sequences stand beside one another, its tokens too.
        names = [name for name in names for _ in range(size // len(names))]
        parts: list[Any] = []
        places: list[Tensor] = []
        for name in dict.fromkeys(names):
            own_rows = [n for n, other in enumerate(names) if other == name]
            rows = torch.tensor(own_rows, device=args[0].device)
            first, *own = (_of_rows(value, rows, size) for value in args)
            options = {key: _of_rows(value, rows, size) for key, value in kwargs.items()}
            parts.append(self._of(name)(first, *own, **options))
            places.append(rows)
        return _together(parts, torch.cat(places).argsort())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self._of(self.active_adapter), name)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._local = threading.local()


def _of_rows(value: Any, rows: Tensor, size: int) -> Any:
    """Of what a module is called with the part of some rows; what is not of rows stays whole."""
    if type(value) in (tuple, list):
        return type(value)(_of_rows(inner, rows, size) for inner in value)
    is_batched = isinstance(value, Tensor) and value.dim() > 1 and len(value) == size
    return value[rows.to(value.device)] if is_batched else value


def _together(parts: list[Any], order: Tensor) -> Any:
    """The parts of some rows each as one output, the rows in `order`; of layers tuples of such."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if type(first) in (tuple, list):
        return type(first)(_together(list(own), order) for own in zip(*parts, strict=True))
    if first is None:
        return None
    raise InputError(
        f"rows with different trained modules would share one that gives {a_kind(first)}; "
        "run them in batches of their own"
    )


class Remembering:
    """A layer's checkpointing that computes the layer again with the rows' own modules."""

    def __init__(self, checkpoint: Any, wrapped: list[ModulesToSaveWrapper]):
        self.checkpoint, self.wrapped = checkpoint, wrapped

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `layer`, which is called again in the backward pass."""
        names = [(wrapper, wrapper.names) for wrapper in self.wrapped]

        def again(*inputs: Any, **options: Any) -> Any:
            with ExitStack() as stack:
                for wrapper, own in names:
                    if own is not None:
                        stack.enter_context(wrapper.using(own))
                return layer(*inputs, **options)

        return self.checkpoint(again, *args, **kwargs)


def remember(model: nn.Module) -> None:
    """Let checkpointed layers with trained modules in them remember whose modules a call used."""
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        checkpoint = checkpointing_of(layer)
        wrapped = [] if checkpoint is None else list(wrappers(layer).values())
        if isinstance(checkpoint, Remembering):
            checkpoint.wrapped = wrapped  # another adapter may have brought others
        elif wrapped:
            set_checkpointing(layer, Remembering(checkpoint, wrapped))


def wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The wrapped modules of a model, by their names in it."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def find(model: nn.Module, names: Sequence[str], embedding: nn.Module) -> list[str]:
    """The names in the model of the modules whose names end with one of `names`.

    As in the reference the end need not be a whole name: ``pre_classifier`` ends with a classifier.

    Raises:
        InputError: one of them holds the input embedding, is never called, or holds or stands in
            one of which another adapter has its own.
    """
    wrapped = wrappers(model)
    named = {
        path: module
        for path, module in model.named_modules()
        if path.replace(".original_module", "").endswith(tuple(names))
        and ".modules_to_save." not in path
        and not path.endswith(".original_module")
    }
    outer = {p: m for p, m in named.items() if not any(_holds(o, p) for o in named)}
    for path, module in outer.items():
        other = next((o for o in wrapped if _holds(o, path) or _holds(path, o)), None)
        if other is not None:
            raise InputError(
                f"modules_to_save names {path.replace('.original_module', '')}, and another "
                f"adapter of this base model trains {other}; name one of the two in both"
            )
        inner = getattr(module, "original_module", module)
        if any(part is embedding for part in inner.modules()):
            raise InputError(
                f"modules_to_save names the input embedding ({path}); prompts are written behind "
                "it, and it cannot be trained with them: leave it out"
            )
        if isinstance(inner, nn.ModuleList | nn.ModuleDict):
            raise InputError(
                f"modules_to_save names {path}, {a_kind(inner)}, which is never called; "
                "name the modules in it"
            )
    return list(outer)


def _holds(outer: str, path: str) -> bool:
    return path.startswith(f"{outer}.")


def wrap(model: nn.Module, paths: Sequence[str]) -> list[ModulesToSaveWrapper]:
    """Put wrappers in the place of the modules that are not wrapped yet."""
    result = []
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        result.append(module)
    return result


def unwrap(model: nn.Module, path: str, wrapper: ModulesToSaveWrapper) -> None:
    """Give the model its own module back."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, wrapper.original_module)
