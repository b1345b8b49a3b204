"""Options equal the fields that they fill."""

from __future__ import annotations

import dataclasses
from io import StringIO
from typing import Any

import pytest
import typer.main
from rich.console import Console
from rich.markdown import Markdown

from ptuning.cli import options
from ptuning.cli.app import app
from ptuning.cli.fields import Fields, help_texts
from ptuning.experiments.lama.options import LamaOptions
from ptuning.experiments.superglue.options import SuperGlueOptions
from ptuning.prompts.prompt import Prompt
from ptuning.prompts.prompt_settings import PromptSettings
from ptuning.training.settings import TrainSettings

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FILLED = [
    ("train", options.OF_PROMPT),
    ("train", options.OF_TRAINING),
    ("distill", options.OF_LEARNER),
    ("distill", options.OF_DISTILLING),
    ("lama", options.OF_LAMA),
    ("lama", options.OF_LAMA_TRAINING),
    ("superglue", options.OF_SUPERGLUE),
    ("superglue", options.OF_SUPERGLUE_TRAINING),
]
EARLIER = {
    "train": "model data output template dev answer labels encoder encoder-hidden-size "
    "encoder-dropout num-virtual-tokens special-tokens label-mode chat no-chat max-length "
    "answer-tokens epochs learning-rate batch-size gradient-accumulation schedule warmup "
    "weight-decay max-grad-norm choose-by patience seed population population-grid halving "
    "no-halving dtype mixed-precision prefix-cache tune-model model-learning-rate graphs tracker "
    "keep-encoder no-keep-encoder init-from config resume overwrite json",
    "lama": "model data output relations template encoder virtual-tokens population epochs "
    "learning-rate batch-size seed candidates dtype config overwrite json",
    "superglue": "model task output data train dev test max-examples seeds seed template "
    "best-templates encoder population epochs learning-rate batch-size choose-by dtype config "
    "overwrite json",
}
"""Options of the first release: none may change its name."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_is_written_and_takes_none_of_it_for_markup(command: str) -> None:
    for param in COMMANDS[command].params:
        shown = StringIO()
        Console(file=shown, width=2000).print(Markdown(param.help or ""))
        assert shown.getvalue().strip() == (param.help or "").replace("`", ""), param.name


def _params(command: str) -> dict[str, Any]:
    return {param.name: param for param in COMMANDS[command].params}


@pytest.mark.parametrize(("command", "of"), FILLED)
def test_each_field_is_an_option_or_left_out_with_a_reason(command: str, of: Fields) -> None:
    fields = {f.name: f for f in dataclasses.fields(of.owner)}
    assert {*of.options().values(), *of.left_out} == set(fields)
    assert all(len(why) > 10 for why in of.left_out.values())
    assert {*of.named, *of.written, *of.defaults, *of.left_out} <= set(fields)
    params, texts = _params(command), help_texts(of.owner)
    for option, name in of.options().items():
        if name in of.written:
            continue
        assert params[option].help == texts[name] and not params[option].required
        assert params[option].default == of.defaults.get(name, fields[name].default)


def test_all_that_a_user_may_choose_is_offered() -> None:
    """The dataclasses of `FILLED` are all there are, and a prompt's other fields are results."""
    chosen = {f.name for f in dataclasses.fields(PromptSettings)}
    results = {f.name for f in dataclasses.fields(Prompt)} - chosen
    assert results == {
        "vectors", "encoder_weights", "base_model", "training", "modules", "peft_config",
        "others", "label_matrix", "name_words", "nameless",
    }  # fmt: skip
    owners = {of.owner for _, of in FILLED}
    assert owners == {PromptSettings, TrainSettings, LamaOptions, SuperGlueOptions}
    assert list({**options.OF_PROMPT.left_out, **options.OF_TRAINING.left_out}) == ["label_bias"]


@pytest.mark.parametrize("command", EARLIER)
def test_no_option_lost_its_name(command: str) -> None:
    names = {n for p in _params(command).values() for n in (*p.opts, *p.secondary_opts)}
    assert {f"--{name}" for name in EARLIER[command].split()} <= names


@pytest.mark.parametrize("command", [*EARLIER, "distill"])
def test_every_option_stands_under_a_heading(command: str) -> None:
    assert {p.rich_help_panel for p in _params(command).values()} <= set(options.PANELS)


def test_headings_name_options_that_there_are() -> None:
    there = {name for command in (*EARLIER, "distill") for name in _params(command)}
    assert {name for names in options.PANELS.values() for name in names} <= there


def test_every_command_can_be_quiet() -> None:
    assert all("quiet" in _params(command) for command in COMMANDS)


def test_help_texts_come_from_the_docstrings_of_all_that_a_class_extends() -> None:
    texts = help_texts(PromptSettings)
    assert texts["answer"] == "Column of the right answer; by default `answer`, else `label`."
    assert texts["encoder_num_layers"] == "LSTM layers."
    assert "\n" not in texts["num_virtual_tokens"]
