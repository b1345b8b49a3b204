"""The prompts that a server offers: found in folders, checked, renewed while it runs.

    found       a folder that was named, or one inside a folder that was named (a collection)
    served      loaded and taken on by the backend
    refused     damaged, of another model, without a template: the reason is kept and told

A prompt whose files go is taken off; one whose files become unreadable is served on as it was
loaded. Neither touches the others. Knows nothing of HTTP and of how answers are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import places
from ..errors import InputError, PromptFileError, PtuningError
from ..prompts import peft_files, prompt_files
from ..prompts.prompt import Prompt
from ..prompts.task import named_fields

_FILES = tuple(dict.fromkeys([*prompt_files.NAMES, *peft_files.NAMES]))


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


class Absent(InputError):
    """There is no prompt of that name."""


class Registry:
    """Prompts by name.

    Args:
        folders: saved prompts and folders of such, each as ``DIR`` or ``NAME=DIR``.
        take_on: the backend's: makes a handle of a name and its prompt, or raises a `PtuningError`.
        let_go: the backend's: a handle is not asked any more.
        tell: hears what changes, in a line.

    Attributes:
        served: what is offered now; replaced as a whole, never changed.
        refused: name -> why it is not offered, or not in its newest version.

    Raises:
        InputError: two folders have one name, or one is neither a prompt nor a folder.
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
        self._named: dict[str, Path] = {}
        self._collections: list[Path] = []
        self._withheld: set[str] = set()
        self._tried: dict[str, tuple[Any, ...]] = {}
        self.served: dict[str, Served] = {}
        self.refused: dict[str, str] = {}
        for text in folders:
            self._name(text)

    def _name(self, text: str) -> None:
        name, separator, rest = text.partition("=")
        given = bool(separator) and not Path(text).exists()
        folder = places.local_folder(rest if given else text)
        if not is_prompt(folder) and not given and Path(text).is_dir():
            self._collections.append(places.real(folder))
            return
        name = name if given else places.real(text).name
        places.entry(folder.parent, name)
        if name in self._named:
            raise InputError(
                f"{self._named[name]} and {folder} have one name, {name!r}; give another to one of "
                f"them: OTHER={folder}"
            )
        self._named[name] = folder

    def base_model(self) -> str:
        """The model that the first prompt that can be read was trained on.

        Raises:
            InputError: no prompt says it.
        """
        reasons = []
        for name, folder in self._found()[0].items():
            try:
                saved = Prompt.load(folder).base_model.get("name")
            except (PtuningError, OSError) as error:
                reasons.append(f"{name}: {error}")
                continue
            if saved:
                return str(saved)
        raise InputError("; ".join(reasons) or "no prompt says which model it is for; give --model")

    def check_named(self) -> None:
        """Refuse to begin where a prompt that was named itself cannot be served.

        Raises:
            InputError: names it, and why.
        """
        for name, folder in self._named.items():
            if name not in self.served:
                raise InputError(f"{folder}: {self.refused.get(name, 'no saved prompt is there')}")

    def rescan(self) -> None:
        """Look at the folders again: new prompts are taken on, changed ones renewed."""
        with self._changing:
            found, astray = self._found()
            found = {n: f for n, f in found.items() if n not in self._withheld}
            for name in [n for n in self.served if n not in found]:
                self._drop(name, "taken off: its files are gone")
            for name in [n for n in self.refused if n not in found and n not in astray]:
                del self.refused[name]
                self._tried.pop(name, None)
            for name, reason in astray.items():
                self._refuse(name, reason)
            for name, folder in sorted(found.items()):
                stamp = _stamp(folder)
                if self._tried.get(name) != stamp:
                    self._load(name, folder, stamp)

    def put(self, name: str) -> Served:
        """Take on the prompt of this name in a collection, or renew it, now.

        Raises:
            Absent: there is no such prompt.
            InputError: the name leads elsewhere, or the prompt cannot be served.
        """
        with self._changing:
            folder = self._named.get(name) or self._in_collection(name)
            self._withheld.discard(name)
            self._load(name, folder, _stamp(folder))
            if name in self.refused:
                raise InputError(self.refused[name])
            return self.served[name]

    def drop(self, name: str) -> None:
        """Offer a prompt no more, until it is put again; its files stay.

        Raises:
            InputError: it is not offered.
        """
        with self._changing:
            if name not in self.served:
                raise InputError(f"there is no prompt {name!r} here")
            self._withheld.add(name)
            self._drop(name, "taken off, as was asked")

    def _found(self) -> tuple[dict[str, Path], dict[str, str]]:
        """Folders of prompts by name, in the order in which they were given, and why others are
        none. What cannot be looked at now stays where it was served from."""
        found = {name: folder for name, folder in self._named.items() if self._is_there(folder)}
        astray: dict[str, str] = {}
        for collection in self._collections:
            try:
                entries = sorted(e.name for e in collection.iterdir() if not e.name.startswith("."))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                known = [served.folder for served in self.served.values()]
                entries = [folder.name for folder in known if collection in folder.parents]
            for name in entries:
                try:
                    folder = _inside(collection, name)
                except InputError as error:
                    astray[name] = str(error)
                    continue
                if not self._is_there(folder):
                    continue
                if places.real(found.setdefault(name, folder)) != places.real(folder):
                    astray[f"{collection.name}/{name}"] = (
                        f"another folder that is served has a prompt {name!r}; rename one of them"
                    )
        return found, {name: why for name, why in astray.items() if name not in found}

    def _is_there(self, folder: Path) -> bool:
        try:
            return _holds_prompt(folder)
        except OSError:
            return any(folder == served.folder for served in self.served.values())

    def _in_collection(self, name: str) -> Path:
        for collection in self._collections:
            folder = _inside(collection, name)
            if is_prompt(folder):
                return folder
        raise Absent(
            f"there is no saved prompt {name!r} in the folders that are served; put one there first"
        )

    def _load(self, name: str, folder: Path, stamp: tuple[Any, ...]) -> None:
        self._tried[name] = stamp
        try:
            prompt = Prompt.load(folder)
            fields = fields_of(prompt)
            handle = self._take_on(name, prompt)
        except Exception as error:  # of whatever kind: the others are served on
            if not isinstance(error, PtuningError):  # may pass: memory, a file system
                self._tried.pop(name, None)
                error = PtuningError(f"{type(error).__name__}: {error}")
            kept = " (its version of before is served on)" if name in self.served else ""
            self._refuse(name, f"{error}{kept}", folder)
            return
        before = self.served.get(name)
        self.served = {**self.served, name: Served(name, folder, prompt, fields, handle)}
        self.refused.pop(name, None)
        self._tell(f"{name}: {'renewed' if before else 'served'}, from {folder}")
        if before:
            self._let_go(before.handle)

    def _drop(self, name: str, what: str) -> None:
        gone = self.served[name]
        self.served = {n: s for n, s in self.served.items() if n != name}
        self._tried.pop(name, None)
        self._tell(f"{name}: {what}")
        self._let_go(gone.handle)

    def _refuse(self, name: str, reason: str, folder: Path | None = None) -> None:
        """Clients are told why, but not where the files are."""
        shown = reason if folder is None else reason.replace(str(folder), name)
        if self.refused.get(name) != shown:
            self._tell(f"{name}: refused: {reason}")
        self.refused[name] = shown


def is_prompt(folder: Path) -> bool:
    """The folder holds files of a saved prompt, of ours or of PEFT's."""
    try:
        return _holds_prompt(folder)
    except OSError:
        return False


def _holds_prompt(folder: Path) -> bool:
    """The same, with the system's error where nobody can tell."""
    theirs = all(_exists(folder / name) for name in peft_files.NAMES)
    return theirs or any(_exists(folder / name) for name in prompt_files.NAMES[:2])


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def fields_of(prompt: Prompt) -> tuple[str, ...]:
    """The columns that a row for this prompt must have.

    Raises:
        InputError: the prompt has no template.
    """
    words = [word for of_label in prompt.labels.values() for word in of_label]
    named = [name for word in words for name in named_fields(word)]
    return tuple(dict.fromkeys([*prompt.columns, *named]))


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
