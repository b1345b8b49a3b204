"""Run files: a command's options as YAML, read by ``--config`` and written beside each result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
import yaml

from ..errors import InputError

_BETWEEN = {"template": "|", "population_grid": " "}
_NOT_SAVED = ("config", "resume", "overwrite", "json_output")


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a run file's values the defaults of this command; given options come first.

    Raises:
        InputError: the file is missing, no mapping, or has a key that is no option.
    """
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"run file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"run file {path} is no valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"run file {path} must be a list of 'option: value' lines")
    names = {p.name: p for p in context.command.params if p.name not in _NOT_SAVED}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            known = ", ".join(sorted(n for n in names if n))
            raise InputError(f"run file {path}: unknown option {key!r}; there are {known}")
        if value is not None:
            defaults[name] = _as_option(name, value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _as_option(name: str, value: Any) -> Any:
    """A value as the command line would have it: lists and mappings as text."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return _BETWEEN.get(name, ",").join(map(str, value))
    return value


def settings_of(context: typer.Context) -> dict[str, Any]:
    """All options of this run by name, as ``--config`` reads them."""
    values = {k: v for k, v in context.params.items() if k not in _NOT_SAVED}
    if context.args:  # a grid's parts that were typed without quotes
        values["population_grid"] = " ".join([values["population_grid"], *context.args])
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def as_yaml(settings: dict[str, Any]) -> bytes:
    """A run file's text."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()


def parse_labels(text: str | None) -> dict[str, list[str]] | None:
    """``yes=Yes,no=No|Nope`` (or a JSON object) as label -> words.

    Raises:
        InputError: a part has no ``=``.
    """
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"--labels is no valid JSON: {error}") from None
        return {str(k): [v] if isinstance(v, str) else list(v) for k, v in values.items()}
    labels = {}
    for part in text.split(","):
        label, separator, words = part.partition("=")
        if not separator or not label.strip():
            raise InputError(
                f"--labels: {part!r} is not LABEL=WORD; write for example yes=Yes,no=No"
            )
        labels[label.strip()] = [word.strip() for word in words.split("|")]
    return labels
