"""Options that fill a dataclass: name, type, default and help text stand once, in the dataclass.

    @filled(settings=Fields(TrainSettings, "Training"))
    def train(model: Model, settings: dict[str, Any]) -> None: ...

has an option for each field of `TrainSettings`, and gets what was chosen, field -> value.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..errors import InputError
from . import console

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Say nothing but results, warnings and errors.",
        callback=console.be_quiet,
        is_eager=True,
        expose_value=False,
    ),
]


def _choose_device(name: str | None) -> None:
    if name is None:
        return
    if not re.fullmatch(r"cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"--device is {name!r}; give cpu, cuda, cuda:1, mps or xpu")
    os.environ["PTUNING_DEVICE"] = name


Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, mps or xpu. [default: a GPU where there is one]",
        callback=_choose_device,
        expose_value=False,
    ),
]


@dataclass(frozen=True)
class Fields:
    """The fields of a dataclass that are options of a command.

    Args:
        owner: the dataclass; its docstring's ``Args`` are the help texts.
        panel: the heading in ``--help`` under which they stand, where no other is given.
        named: field -> the option's name, where it has one of its own.
        written: field -> how it is written on a command line: the option's type, default and help
            text, where these cannot be the field's.
        defaults: field -> this command's default, where it is another one.
        left_out: field -> why this command has no option for it.
    """

    owner: type
    panel: str
    named: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, str]:
        """Option -> field."""
        names = [f.name for f in dataclasses.fields(self.owner) if f.name not in self.left_out]
        return {self.named.get(name, name): name for name in names}

    def parameters(self) -> list[inspect.Parameter]:
        """What a command's signature has for them."""
        kinds, helps = get_type_hints(self.owner), help_texts(self.owner)
        defaults = {f.name: f.default for f in dataclasses.fields(self.owner)} | {**self.defaults}
        made = []
        for option, name in self.options().items():
            kind, default, text = kinds[name], defaults[name], helps[name]
            if name in self.written:
                kind, default, text = self.written[name]
            shown = typer.Option(help=text, rich_help_panel=self.panel)
            made.append(_parameter(option, Annotated[kind, shown], default))
        return made

    def given(self, context: typer.Context) -> list[str]:
        """The fields that the user chose."""
        return [name for option, name in self.options().items() if is_given(context, option)]

    def taken(self, values: dict[str, Any]) -> dict[str, Any]:
        """Take this dataclass's values out of those of all options: field -> value."""
        return {name: values.pop(option) for option, name in self.options().items()}


def is_given(context: typer.Context, option: str) -> bool:
    """The user chose it: typed, or named in a run file."""
    return getattr(context.get_parameter_source(option), "name", "DEFAULT") != "DEFAULT"


def filled(
    panels: Mapping[str, tuple[str, ...]] | None = None,
    loads_model: bool = True,
    **groups: Fields,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of dataclasses, ``--quiet``, and ``--device``.

    Args:
        panels: heading in ``--help`` -> the options that stand under it, in this order.
        loads_model: False for a command that needs no device.
        groups: parameter of the command -> the fields whose options stand in its place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters: list[inspect.Parameter] = []
        for parameter in own:
            made = groups[parameter.name].parameters() if parameter.name in groups else [parameter]
            parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in made]
        if loads_model:
            parameters.append(_parameter("device", Device, None))
        parameters.append(_parameter("quiet", Quiet, False))
        if panels:
            parameters = _in_panels(parameters, panels)

        @wraps(command)
        def run(quiet: bool = False, device: str | None = None, **values: Any) -> None:
            chosen = {name: fields.taken(values) for name, fields in groups.items()}
            command(**values, **chosen)

        run.__annotations__ = {p.name: p.annotation for p in parameters}
        vars(run)["__signature__"] = inspect.Signature(parameters)
        return run

    return decorate


def help_texts(owner: type) -> dict[str, str]:
    """Field -> its text in the docstrings of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(owner.__mro__):
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
        for entry in re.finditer(
            r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M
        ):
            words = " ".join(entry[2].split()).replace("``", "`").removesuffix(".")
            found[entry[1]] = words[:1].upper() + words[1:] + "."
    return found


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _in_panels(
    parameters: list[inspect.Parameter], panels: Mapping[str, tuple[str, ...]]
) -> list[inspect.Parameter]:
    """The parameters with their headings; a heading's own ones first, in its order."""
    place = {name: (panel, n) for panel, names in panels.items() for n, name in enumerate(names)}
    order = list(panels)
    placed = []
    for parameter in parameters:
        panel, number = place.get(parameter.name, (None, len(place)))
        if typer.Context in (parameter.annotation, *get_args(parameter.annotation)):
            placed.append((-1, 0, parameter))
            continue
        kind, option = get_args(parameter.annotation)
        option = copy(option)
        option.rich_help_panel = panel or option.rich_help_panel or order[0]
        placed.append(
            (
                order.index(option.rich_help_panel),
                number,
                parameter.replace(annotation=Annotated[kind, option]),
            )
        )
    return [parameter for *_, parameter in sorted(placed, key=lambda entry: entry[:2])]
