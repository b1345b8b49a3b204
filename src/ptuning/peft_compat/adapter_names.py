"""Adapter names of any spelling, as keys of modules and as folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import nn

from ..errors import InputError


class AdapterDict(nn.ModuleDict):
    """A ``ModuleDict`` by adapter name.

    A module's name can hold no dot, and none that ``nn.Module`` uses itself (``training``); such
    names are escaped inside, and given and returned as they are.
    """

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(_escaped(name))

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(_escaped(name), module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(_escaped(name))

    def __contains__(self, name: str) -> bool:
        return super().__contains__(_escaped(name))

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
        InputError: it is empty, absolute, or leaves the folder.
    """
    leaves = any(".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    nowhere = not name.strip() or not PurePosixPath(name).parts
    if nowhere or leaves or absolute or "\0" in name or name == "__base__":
        raise InputError(f"the adapter name {name!r} cannot be a folder's name; give another name")


def folder_of(directory: str | Path, name: str) -> Path:
    """Where an adapter is saved: ``default`` in the folder itself, others below it."""
    return Path(directory) if name == "default" else Path(directory) / name


def _escaped(name: str) -> str:
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%_{key}" if not key or hasattr(nn.ModuleDict(), key) else key


def _unescaped(key: str) -> str:
    return key.removeprefix("%_").replace("%2E", ".").replace("%25", "%")
