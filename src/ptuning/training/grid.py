"""The members of a population before they train: seeds, and the values of a grid.

population=3, grid={"learning_rate": [1e-3, 3e-3]}      six members: each rate with three seeds
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.values import plain
from ..errors import InputError
from ..prompts.prompt import Prompt
from ..prompts.task import at_least_one
from ..prompts.template import ESCAPED
from ..rendering.example import all_columns
from ..rendering.render import Rendered, Renderer
from .settings import TrainSettings

OF_SETTINGS = ("learning_rate", "weight_decay", "max_grad_norm", "schedule", "warmup", "init")
OF_PROMPT = ("encoder", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "template")
KEYS = (*OF_SETTINGS, *OF_PROMPT, "virtual_tokens")
"""What a grid may vary."""
_GROUP = re.compile(rf"{ESCAPED.pattern}|\{{\{{|\{{[^{{}}]*\}}|(?P<group>\[P(?:\*\d+)?\])")
"""What a template's text has as it is read: only some of it are virtual tokens."""


Named = tuple[dict[str, Any], Prompt, TrainSettings]
"""A member before it has examples: name, prompt and settings."""


@dataclass(frozen=True)
class Variant:
    """One member's prompt and settings, and the examples as its template renders them.

    Attributes:
        name: what distinguishes it: grid key -> value, and its seed.
        prompt: its own; another member's never changes it.
        settings: its own.
        renderer: of its template.
        examples: training examples.
        dev: examples that choose.
        words: for each virtual token the id of the word that it begins at, or None (`starts`).
        unit: in which it learns (`rates`).
    """

    name: dict[str, Any]
    prompt: Prompt
    settings: TrainSettings
    renderer: Renderer
    examples: list[Rendered]
    dev: list[Rendered]
    words: list[int | None]
    unit: float

    @property
    def has_start(self) -> bool:
        """Its virtual tokens begin as something: as trained vectors, or as words."""
        begun = any(None not in group for group in self.renderer.groups)
        meant = self.settings.init in ("labels", "examples")  # random words are no result yet
        return begun or self.prompt.vectors is not None or meant


def choices(
    prompt: Prompt,
    settings: TrainSettings,
    population: int,
    grid: Mapping[str, Sequence[Any]] | None,
) -> list[Named]:
    """Name, prompt and settings of each member; the first is what was asked for, if alone.

    Raises:
        InputError: no member, an unknown key of the grid, or a value that cannot be used.
    """
    if population is None:
        raise InputError("population is None; give a whole number of at least 1, or leave it out")
    at_least_one("population", population)
    grid = checked_grid(grid)
    if population == 1 and not grid:
        return [({"seed": settings.seed}, prompt, settings)]
    result = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        for seed in range(settings.seed, settings.seed + population):
            own = {key: chosen[key] for key in OF_SETTINGS if key in chosen}
            changed = replace(settings, **own, seed=seed)
            result.append(({**chosen, "seed": seed}, _prompt(prompt, chosen), changed))
    return result


def checked_grid(grid: Mapping[str, Sequence[Any]] | None) -> dict[str, list[Any]]:
    """What members differ in: key -> values.

    Raises:
        InputError: it is none, has an unknown key, or no list of values for one.
    """
    if grid is not None and not isinstance(grid, Mapping):
        raise InputError(f"the grid is {grid!r}; give key -> list of values")
    grid = grid or {}
    unknown = sorted(set(grid) - set(KEYS))
    if unknown:
        raise InputError(f"the grid has {unknown[0]!r}; it may vary {', '.join(KEYS)}")
    found = {}
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"the grid gives {values!r} for {key}; give a list of values")
        found[key] = [plain(value) for value in values]  # numpy's, which names are written of
    return found


def columns_read(members: Iterable[Named]) -> tuple[str, ...]:
    """The columns that any member's template or label words name.

    Raises:
        InputError: one has no template.
    """
    return tuple(dict.fromkeys(name for _, prompt, _ in members for name in all_columns(prompt)))


def _prompt(prompt: Prompt, chosen: dict[str, Any]) -> Prompt:
    """A copy of the prompt with the grid's values."""
    changes = {key: chosen[key] for key in OF_PROMPT if key in chosen}
    template = changes.get("template", prompt.template)
    if "virtual_tokens" in chosen:
        template = resized(template, chosen["virtual_tokens"])
        changes["template"] = template
    if changes:
        changes["encoder_weights"] = None
        if template != prompt.template:
            changes |= {"num_virtual_tokens": None, "vectors": None, "label_matrix": None}
    return prompt.checked(**changes)


def resized(template: str | None, count: int) -> str:
    """The template with `count` virtual tokens in each of its groups.

    Raises:
        InputError: no template, or no group of a plain number of virtual tokens.
    """
    found = _GROUP.finditer(template or "")
    if template is None or not any(match["group"] for match in found):
        raise InputError(
            "virtual_tokens in the grid sets the size of each [P*n]; the template has none: "
            f"{template}"
        )
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"virtual_tokens in the grid is {count}; give whole numbers from 1 on")
    return _GROUP.sub(lambda match: f"[P*{count}]" if match["group"] else match[0], template)


def parse_grid(parts: Iterable[str]) -> dict[str, list[Any]]:
    """``learning_rate=1e-3,3e-3`` and the like as key -> values.

    Raises:
        InputError: a part is not KEY=VALUE,VALUE.
    """
    grid: dict[str, list[Any]] = {}
    for part in itertools.chain.from_iterable(map(_split, parts)):
        key, separator, values = part.partition("=")
        if not separator or not key or not values:
            raise InputError(
                f"the grid's {part!r} is not KEY=VALUE,VALUE; write for example "
                "learning_rate=1e-3,3e-3 encoder=mlp,lstm"
            )
        if key in grid:
            raise InputError(f"the grid names {key} twice; give all its values together")
        separators = "|" if key == "template" else ","
        grid[key] = [_value(text.strip()) for text in values.split(separators)]
    return grid


def _split(text: str) -> list[str]:
    """Parts at the spaces before a key; a template's own spaces stay."""
    return re.split(rf"\s+(?=(?:{'|'.join(KEYS)})=)", text.strip())


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
