"""The prompts that a server offers: found in folders, checked, renewed while it runs.

    found       a folder that was named, or one inside a folder that was named (a collection)
    served      loaded and taken on by the backend
    refused     damaged, of another model, without a template: the reason is kept and told

A prompt whose files go is taken off; one whose files become unreadable is served on as it was
loaded, and looked at again each time. Neither touches the others. Reasons are for clients too, so
they name folders by their last part; whoever runs the server is told the whole. Knows nothing of
HTTP and of how answers are made.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import places
from ..errors import InputError, PromptFileError, PtuningError, briefly
from ..prompts import peft_files, prompt_files
from ..prompts.prompt import Prompt
from ..rendering.example import all_columns

_FILES = tuple(dict.fromkeys([*prompt_files.NAMES, *peft_files.NAMES]))


class NoPrompt(InputError):
    """There is no prompt of that name."""


@dataclass(frozen=True)
class Served:
    """A prompt that is offered.

    Attributes:
        name: in addresses.
        folder: where its files are.
        prompt: as it was loaded.
        fields: columns that a row must have.
        handle: what the backend made of it.
    """

    name: str
    folder: Path
    prompt: Prompt
    fields: tuple[str, ...]
    handle: Any


@dataclass(frozen=True)
class _Look:
    """What a look at the folders finds.

    Attributes:
        prompts: folders by name.
        unseen: the same, of what may be there and cannot be read now.
        astray: name -> why what bears it is no prompt, or not the one that is served.
    """

    prompts: dict[str, Path]
    unseen: dict[str, Path]
    astray: dict[str, str]

    def add(self, name: str, folder: Path) -> None:
        """A prompt, unless another has its name."""
        first = self.prompts.get(name) or self.unseen.get(name)
        if first is None:
            self.prompts[name] = folder
            self.astray.pop(name, None)
        elif places.real(first) != places.real(folder):
            self.astray[name] = (
                f"{first} and {folder} have one name, {name!r}, and the first is served; rename "
                f"the other, or serve it as OTHER={folder}"
            )

    def add_unseen(self, name: str, folder: Path, error: OSError, kept: str) -> None:
        """What may be a prompt, and what is told of it beside the error."""
        if name not in self.prompts:
            self.unseen.setdefault(name, folder)
            self.astray.setdefault(name, f"{folder} {_unreadable(error)}{kept}")


class Registry:
    """Prompts by name.

    Args:
        folders: saved prompts and folders of such, each as ``DIR`` or ``NAME=DIR``.
        take_on: the backend's: makes a handle of a name and its prompt, or raises a `PtuningError`.
        let_go: the backend's: a handle is not asked any more.
        tell: hears what changes, in a line.

    Attributes:
        served: what is offered now; replaced as a whole, never changed.
        refused: name -> why it is not offered, or not in its newest version, as `shown`.

    Raises:
        InputError: two folders have one name, or one is neither a prompt nor a folder, or cannot
            be read.
    """

    def __init__(
        self,
        folders: Iterable[str],
        take_on: Callable[[str, Prompt], Any],
        let_go: Callable[[Any], None],
        tell: Callable[[str], None] = lambda line: None,
    ):
        self._take_on, self._let_go, self._tell = take_on, let_go, tell
        self._changing = threading.Lock()
        self._given: list[tuple[str | None, Path]] = []
        self._withheld: set[str] = set()
        self._tried: dict[str, tuple[Any, ...]] = {}
        self._failed: dict[str, str] = {}
        self._astray: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self.served: dict[str, Served] = {}
        self.refused: dict[str, str] = {}
        for text in folders:
            self._name(text)

    def _name(self, text: str) -> None:
        name, separator, rest = text.partition("=")
        given = bool(separator) and not Path(text).exists()
        folder = places.local_folder(rest if given else text)
        try:
            there = is_prompt(folder)
        except OSError as error:
            raise InputError(f"{folder} {_unreadable(error)}; let the server read it") from None
        if not there and not given and Path(text).is_dir():
            self._given.append((None, places.real(folder)))
            return
        name = name if given else places.real(text).name
        places.entry(folder.parent, name)
        if name in self._named:
            raise InputError(
                f"{self._named[name]} and {folder} have one name, {name!r}; give another to one of "
                f"them: OTHER={folder}"
            )
        self._given.append((name, folder))

    @property
    def _named(self) -> dict[str, Path]:
        return {name: folder for name, folder in self._given if name is not None}

    def base_model(self) -> str:
        """The model that the first prompt that can be read was trained on, in the order given.

        Raises:
            InputError: there is no prompt, or none says it.
        """
        reasons = []
        look = self._found()
        found = look.prompts
        for given, place in self._given:
            for name, folder in found.items():
                if name != given and (given is not None or folder.parent != place):
                    continue
                try:
                    saved = Prompt.load(folder).base_model.get("name")
                except (PtuningError, OSError) as error:
                    reasons.append(f"{name}: {error}")
                    continue
                if saved:
                    return str(saved)
        if not found:
            nowhere = ", ".join(str(place) for _, place in self._given)
            reasons = [*look.astray.values()] or [
                f"there is no saved prompt in {nowhere}; give one or more of them, or say with "
                "--model which model those are for that will be put there"
            ]
        raise InputError("; ".join(reasons) or "no prompt says which model it is for; give --model")

    def check_named(self) -> None:
        """Refuse to begin where a prompt that was named itself cannot be served.

        Raises:
            InputError: names it, and why.
        """
        for name, folder in self._named.items():
            if name not in self.served:
                raise InputError(f"{folder}: {self._reasons.get(name, 'no saved prompt is there')}")

    def rescan(self) -> None:
        """Look at the folders again: new prompts are taken on, changed ones renewed."""
        with self._changing:
            look = self._found()
            found = {n: f for n, f in look.prompts.items() if n not in self._withheld}
            for name in [n for n in self.served if n not in found and n not in look.unseen]:
                self._drop(name, "taken off: its files are gone")
            for name in {*self._tried, *self._failed} - {*found, *look.unseen}:
                self._tried.pop(name, None)
                self._failed.pop(name, None)
            for name, folder in sorted(found.items()):
                stamp = _stamp(folder)
                if self._tried.get(name) != stamp:
                    self._load(name, folder, stamp)
            self._astray = look.astray
            self._publish()

    def put(self, name: str) -> Served:
        """Take on the prompt of this name in a collection, or renew it, now.

        Raises:
            NoPrompt: there is none.
            InputError: the name leads elsewhere, or the prompt cannot be served.
        """
        with self._changing:
            try:
                folder = self._named.get(name) or self._in_collection(name)
            except OSError as error:
                raise InputError(f"{name}: {_unreadable(error)}") from None
            self._withheld.discard(name)
            self._load(name, folder, _stamp(folder))
            self._publish()
            if name in self._failed:
                raise InputError(self._failed[name])
            return self.served[name]

    def drop(self, name: str) -> None:
        """Offer a prompt no more, until it is put again; its files stay.

        Raises:
            NoPrompt: it is not offered.
        """
        with self._changing:
            if name not in self.served:
                raise NoPrompt(f"there is no prompt {briefly(name)} here")
            self._withheld.add(name)
            self._failed.pop(name, None)
            self._drop(name, "taken off, as was asked")
            self._publish()

    def shown(self, reason: str) -> str:
        """A reason as clients see it: of folders that are served only the last part."""
        folders = {folder for _, given in self._given for folder in (given, places.real(given))}
        for folder in sorted(map(str, folders), key=len, reverse=True):
            if os.sep in folder and Path(folder).name:
                reason = reason.replace(folder, Path(folder).name)
        return re.sub(r"'/[^'\n]*?([^'/\n]+)/?'", r"'\1'", reason)

    def _found(self) -> _Look:
        """What is in the folders now; what was named comes first, and is preferred."""
        look = _Look({}, {}, {})
        for given, place in sorted(self._given, key=lambda one: one[0] is None):
            try:
                names = [given] if given is not None else _entries(place)
            except OSError as error:
                look.astray[place.name] = f"{place} {_unreadable(error)}"
                inside = {n: s.folder for n, s in self.served.items() if s.folder.parent == place}
                for name, folder in inside.items():
                    look.add_unseen(name, folder, error, self._kept(name))
                continue
            for name in names:
                try:
                    folder = place if given is not None else _inside(place, name)
                    if is_prompt(folder):
                        look.add(name, folder)
                except InputError as error:
                    look.astray.setdefault(name, str(error))
                except OSError as error:
                    look.add_unseen(name, folder, error, self._kept(name))
        return look

    def _in_collection(self, name: str) -> Path:
        for given, collection in self._given:
            if given is None:
                folder = _inside(collection, name)
                if is_prompt(folder):
                    return folder
        raise NoPrompt(
            f"there is no saved prompt {name!r} in the folders that are served; put one there first"
        )

    def _load(self, name: str, folder: Path, stamp: tuple[Any, ...]) -> None:
        self._tried[name] = stamp
        try:
            prompt = Prompt.load(folder)
            fields = all_columns(prompt)
            handle = self._take_on(name, prompt)
        except Exception as error:  # whatever it is, the other prompts go on
            known = isinstance(error, PtuningError | OSError)
            kind = "" if known else f"{type(error).__name__}: "
            self._failed[name] = f"{kind}{error}{self._kept(name)}"
            if _may_pass(error):
                del self._tried[name]
            return
        before = self.served.get(name)
        self.served = {**self.served, name: Served(name, folder, prompt, fields, handle)}
        self._failed.pop(name, None)
        self._tell(f"{name}: {'renewed' if before else 'served'}, from {folder}")
        if before:
            self._let_go(before.handle)

    def _kept(self, name: str) -> str:
        return " (its version of before is served on)" if name in self.served else ""

    def _drop(self, name: str, what: str) -> None:
        gone = self.served[name]
        self.served = {n: s for n, s in self.served.items() if n != name}
        self._tell(f"{name}: {what}")
        self._let_go(gone.handle)

    def _publish(self) -> None:
        """Say what is refused now, and tell what is new of it."""
        reasons = {**self._astray, **self._failed}
        if reasons == self._reasons:
            return
        for name, reason in reasons.items():
            if self._reasons.get(name) != reason:
                self._tell(f"{name}: refused: {reason}")
        self._reasons = reasons
        self.refused = {name: self.shown(reason) for name, reason in reasons.items()}


def is_prompt(folder: Path) -> bool:
    """The folder holds files of a saved prompt, of ours or of PEFT's.

    Raises:
        OSError: the system cannot say it now.
    """
    ours = [folder / name for name in prompt_files.NAMES if name != prompt_files.CARD]
    return any(map(_exists, ours)) or all(_exists(folder / name) for name in peft_files.NAMES)


def _exists(path: Path) -> bool:
    """As `Path.exists`, which in some Pythons takes what cannot be read for what is not there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _entries(collection: Path) -> list[str]:
    """The names in a folder; none where it is gone.

    Raises:
        OSError: the system cannot say them now.
    """
    try:
        return sorted(name for name in os.listdir(collection) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unreadable(error: OSError) -> str:
    return f"cannot be read now: {error.strerror or error}"


def _may_pass(error: BaseException) -> bool:
    """The system or the device has failed, not the prompt: the next look may find it otherwise."""
    if not isinstance(error, PtuningError | OSError):
        return True
    found: BaseException | None = error
    while found is not None:
        gone = isinstance(found, FileNotFoundError | NotADirectoryError)
        if isinstance(found, OSError) and not gone:
            return True
        found = found.__cause__ or found.__context__
    return False


def _inside(collection: Path, name: str) -> Path:
    """The folder of an entry of a collection, which no link may lead out of."""
    folder = places.entry(collection, name)
    if not places.real(folder).is_relative_to(collection):
        raise PromptFileError(f"{name!r} leads out of {collection}; copy the prompt there instead")
    return folder


def _stamp(folder: Path) -> tuple[Any, ...]:
    """What changes when the files do."""
    stamp: list[Any] = [str(folder)]
    for name in _FILES:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        stamp.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(stamp)
