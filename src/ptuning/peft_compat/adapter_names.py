"""Adapter names of any spelling, as keys of modules and as folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from ..places import entry


class AdapterDict(nn.ModuleDict):
    """A ``ModuleDict`` by adapter name.

    A module's name can hold no dot, and none that ``nn.Module`` uses itself (``training``); such
    names are escaped inside, and given and returned as they are.
    """

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(escaped(name))

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(escaped(name), module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(escaped(name))

    def __contains__(self, name: str) -> bool:
        return super().__contains__(escaped(name))

    def __iter__(self) -> Iterator[str]:
        return map(_unescaped, super().__iter__())

    def keys(self) -> Any:
        """The names."""
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        """The names with their modules."""
        return {name: self[name] for name in self}.items()


def check_name(name: str) -> None:
    """Refuse a name that cannot be a folder below the one that is saved to.

    Raises:
        InputError: it is no name, or one that leads elsewhere.
    """
    try:
        if not isinstance(name, str) or name == "__base__":
            raise InputError("it means rows without a prompt")
        folder_of(Path(), name)
    except InputError as error:
        raise InputError(
            f"the adapter name {name!r} cannot be a folder's name; give another name"
        ) from error


def folder_of(directory: str | Path, name: str) -> Path:
    """Where an adapter is saved: ``default`` in the folder itself, others below it; a slash makes a
    folder in a folder.

    Raises:
        InputError: a part of the name can be no folder's.
    """
    folder = Path(directory)
    for part in name.split("/") if name != "default" else ():
        folder = entry(folder, part)
    return folder


def escaped(name: str) -> str:
    """A name as a module's."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%_{key}" if not key or hasattr(nn.ModuleDict(), key) else key


def _unescaped(key: str) -> str:
    return key.removeprefix("%_").replace("%2E", ".").replace("%25", "%")
