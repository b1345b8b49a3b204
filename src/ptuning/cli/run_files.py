"""Run files: a command's options as YAML, read by ``--config`` and written beside each result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
import yaml
from yaml.constructor import BaseConstructor, SafeConstructor

from ..data.text import read_text
from ..errors import InputError, PromptFileError, repeated, unreadable
from ..places import at_home

_BETWEEN = {"template": "|", "population_grid": " "}
_MOST_BYTES, _MOST_LEVELS, _MOST_VALUES = 10**6, 20, 10**5
"""Of a run file; the template in it has a limit of its own."""
_NOT_SAVED = ("config", "resume", "overwrite", "json_output")


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a run file's values the defaults of this command; given options come first.

    Raises:
        InputError: the file is missing, no mapping, or has a key that is no option.
    """
    if path is None:
        return None
    values = read(path)
    names: dict[str | None, Any] = {
        p.name: p for p in context.command.params if p.name not in _NOT_SAVED
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            known = ", ".join(sorted(n for n in names if n))
            raise InputError(f"run file {path}: unknown option {key!r}; there are {known}")
        if name in defaults:  # `dev-share` beside `dev_share`
            raise InputError(f"run file {path}: {key!r} stands there twice; keep one of them")
        if value is not None:
            flag = isinstance(value, bool) and getattr(names[name], "is_flag", False)
            defaults[name] = value if flag else _as_option(name, value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


_NULL = "tag:yaml.org,2002:null"


class _Scalars(yaml.SafeLoader):
    """YAML 1.2's true and false, and null; all else is text, as on the command line: PyYAML would
    read ``010`` as 8, ``1:30`` as 90, and ``yes`` as true."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in kinds if tag == _NULL]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Scalars.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)


def read(path: Path) -> dict[str, Any]:
    """Option -> value: text as it stands there, true, false, a list or mapping; labels are text.

    Raises:
        InputError: missing, no mapping, a key twice, or larger than any run file.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"run file {path} has more than {_MOST_BYTES:,} bytes; is it another?")
        text = read_text(path, _MOST_BYTES)
        _check_size(text)
        root = yaml.compose(text, Loader=_Scalars)
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"run file {path} must be a list of 'option: value' lines")
        _check_keys(root)
        values: dict[str, Any] = {}
        for key, value in root.value:
            as_text = key.value == "labels" and isinstance(value, yaml.MappingNode)
            kind = BaseConstructor if as_text else SafeConstructor
            values[str(key.value)] = kind().construct_document(value)
    except OSError as error:
        raise InputError(unreadable(f"run file {path}", error)) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"run file {path} is no valid YAML: {reason}") from None
    return values


def _check_size(text: str) -> None:
    """Refuse what unfolds to far more than is written, before it is built."""
    level = 0
    for count, event in enumerate(yaml.parse(text)):
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias (*name); write the value itself")
        if level > _MOST_LEVELS or count > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_LEVELS} levels or {_MOST_VALUES:,} values")
        if isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # raises for half a surrogate pair


def _check_keys(node: yaml.Node) -> None:
    """Refuse a key that stands twice: the last would win."""
    if not isinstance(node, yaml.CollectionNode):
        return
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) < len(node.value):
            raise ValueError("a key that is a list or a mapping")
        if (twice := repeated(keys)) is not None:
            raise ValueError(f"the key {twice!r} stands there twice; keep one of them")
    pairs = isinstance(node, yaml.MappingNode)
    for inner in (value for _, value in node.value) if pairs else node.value:
        _check_keys(inner)


def _as_option(name: str, value: Any) -> Any:
    """A value as the command line would have it: lists and mappings as text, ``~`` as a folder.

    And true and false, which to Python are numbers: as text they are refused where one is wanted.
    """
    if isinstance(value, dict | bool):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return _BETWEEN.get(name, ",").join(map(str, value))
    return at_home(value) if isinstance(value, str) else value


def settings_of(context: typer.Context) -> dict[str, Any]:
    """All options of this run by name, as ``--config`` reads them."""
    values = {k: v for k, v in context.params.items() if k not in _NOT_SAVED}
    if context.args:  # a grid's parts that were typed without quotes
        values["population_grid"] = " ".join([values["population_grid"], *context.args])
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def as_yaml(settings: dict[str, Any]) -> bytes:
    """A run file's text."""
    return yaml.dump(settings, Dumper=_Writer, sort_keys=False, allow_unicode=True).encode()


class _Writer(yaml.SafeDumper):
    """Writes U+0085 as an escape: PyYAML reads it as a line's end, also inside of quotes."""


def _write_text(writer: _Writer, text: str) -> yaml.Node:
    style = '"' if "\x85" in text else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style)


_Writer.add_representer(str, _write_text)


def parse_labels(text: str | None) -> dict[str, list[str]] | None:
    """``yes=Yes,no=No|Nope`` (or a JSON object) as label -> words.

    Raises:
        InputError: a part has no ``=``.
    """
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        from ..formats import parse_json

        try:
            values = parse_json(text, "--labels")
        except PromptFileError as error:
            raise InputError(f"--labels is no valid JSON: {error}") from None
        return {label: v if isinstance(v, list) else [v] for label, v in values.items()}
    labels: dict[str, list[str]] = {}
    for part in text.split(","):
        label, separator, words = part.partition("=")
        if not separator or not label.strip():
            raise InputError(
                f"--labels: {part!r} is not LABEL=WORD; write for example yes=Yes,no=No"
            )
        if label.strip() in labels:
            raise InputError(
                f"--labels: {label.strip()!r} stands there twice; several words of one label are "
                "separated by '|'"
            )
        labels[label.strip()] = [word.strip() for word in words.split("|")]
    return labels
