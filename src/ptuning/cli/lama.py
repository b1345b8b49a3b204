"""``ptuning lama``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, InputError
from . import console, loading, run_files, run_folder, saved_prompt
from .fields import filled
from .options import (
    OF_LAMA,
    OF_LAMA_TRAINING,
    PANELS,
    Config,
    Dtype,
    Encoders,
    Frozen,
    Json,
    LearningRates,
    Model,
    Overwrite,
    competing,
    parts,
)

if TYPE_CHECKING:
    from ..experiments.lama.options import LamaOptions
    from ..experiments.lama.relations import Facts, Relation
    from ..experiments.ledger import Ledger


@filled(PANELS, wanted=OF_LAMA, settings=OF_LAMA_TRAINING)
def lama(
    context: typer.Context,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    model: Model,
    data: Annotated[Path, typer.Option(help="LAMA's folder: relations.jsonl and `P*.jsonl`.")],
    output: Annotated[Path, typer.Option(help="Folder for figures, picture and prompts.")],
    relations: Annotated[
        str | None, typer.Option(help="Such as P36,P19. [default: all that have facts]")
    ] = None,
    encoder: Encoders = "none",
    learning_rate: LearningRates = None,
    candidates: Annotated[
        Path | None,
        typer.Option(help="File of answers that compete, one per line. [default: all tokens]"),
    ] = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    config: Config = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Probe a model's knowledge of facts: by manual templates and by P-tuned prompts.

    For each relation of LAMA: its manual template, the best manual template on dev, the majority
    answer, and a population of prompts that answer together; P@1, P@10 and MRR on test. The same
    command goes on where it stopped, inside a training too. --output gets lama.json, lama.png,
    run.yaml and the prompts.

    Example:

        ptuning lama --model smollm2 --data lama/ --relations P36,P19 --output out/
    """
    from .. import distributed
    from ..backbone.load import load_model
    from ..experiments.lama.options import LamaOptions
    from ..experiments.lama.probe import check, summary
    from ..experiments.lama.relations import UnusableRelationError, read_facts, read_relations
    from ..experiments.ledger import Ledger, format_of_run
    from ..training.settings import CHANGE_NO_RESULT, TrainSettings

    options = LamaOptions(
        **{**wanted, "templates": parts(wanted["templates"], "|", "--template")},
        grid=competing(encoder, learning_rate),
        settings=TrainSettings(**settings, patience=0, init="encoder"),
    )
    given = run_files.settings_of(context)
    elsewhere = ("output", "data", "relations", "candidates", *CHANGE_NO_RESULT)
    decisive = {name: value for name, value in given.items() if name not in elsewhere}
    with distributed.together(), distributed.locked(output):
        console.speak_if(distributed.state().is_main_process)
        named = () if relations is None else parts(relations, ",", "--relations")
        chosen = read_relations(data, named)
        words = _words(candidates)
        begun_in = None if overwrite else format_of_run(output, decisive)
        dtype = loading.chosen(model, dtype, begun_in, usual=True, frozen=frozen)
        decisive["dtype"] = given["dtype"] = dtype
        ledger = Ledger(output, decisive, overwrite)
        base, tokenizer = load_model(model, dtype=dtype, frozen=frozen)
        facts: dict[str, Facts] = {}
        left_out: dict[str, str] = {}
        for relation in chosen:
            try:
                usable = read_facts(data, relation, tokenizer)
                check(base, tokenizer, relation, usable, options, words)
            except UnusableRelationError as error:
                if named or len(chosen) == 1:
                    raise
                left_out[relation.name] = str(error)
                console.warn(f"{relation.name} is left out: {error}")
            else:
                facts[relation.name] = usable
        if not facts:
            raise DataError(f"no relation of {data} can be asked of {model}")
        asked = [relation for relation in chosen if relation.name in facts]
        console.on_stop(lambda: run_folder.how_an_experiment_goes_on(overwrite))
        found = _probe_all(base, tokenizer, asked, facts, options, words, ledger)
        report = {
            "relations": found,
            "mean": summary(found),
            "left_out": left_out,
            "settings": given,
        }
        distributed.from_main(lambda: _save(output, report))
        if json_output:
            distributed.from_main(lambda: console.print_json(report))
            return
    _tell(found, summary(found))
    console.tell(f"lama.json, lama.png and the prompts are in {output}")


def _probe_all(
    model: Any,
    tokenizer: Any,
    relations: list[Relation],
    facts: dict[str, Facts],
    options: LamaOptions,
    candidates: list[str],
    ledger: Ledger,
) -> dict[str, dict[str, Any]]:
    """The figures of each relation: those of an earlier run, or measured now."""
    from .. import distributed
    from ..experiments.lama.probe import probe
    from ..experiments.ledger import digest

    found = {}
    with console.PartsBar(len(relations)) as bar:
        for relation in relations:
            own = facts[relation.name]
            made_of = digest(asdict(relation), asdict(own), candidates)
            figures = ledger.get(relation.name, made_of)
            measured = figures is None
            if figures is None:
                bar.begin(f"{relation.name} {relation.label}")
                running = ledger.running(relation.name)
                figures, prompt = probe(
                    model, tokenizer, relation, own, options, candidates, bar.listener, running
                )
                folder = ledger.prompt(relation.name)
                distributed.from_main(partial(prompt.save, folder, keep_encoder=False))
                ledger.put(relation.name, made_of, figures)
            found[relation.name] = figures
            bar.end(f"{relation.name:>6}  {_line(figures)}", measured)
    return found


def _save(output: Path, report: dict[str, Any]) -> None:
    from ..formats import pack_json
    from ..reporting import shares, versions
    from ..storage import write_folder

    found = report["relations"]
    rows = {name: [f[key] for f in found.values()] for name, key in _SHOWN.items()}
    files = {
        "lama.json": pack_json({**report, "versions": versions()}),
        "lama.png": shares(list(found), rows, "P@1 on test (%)"),
        "run.yaml": run_files.as_yaml(report["settings"]),
    }
    write_folder(output, files)


_SHOWN = {
    "manual": "manual_p1",
    "best manual": "best_manual_p1",
    "majority": "majority_p1",
    "P-tuned": "ptuned_p1",
}


def _tell(found: dict[str, dict[str, Any]], means: dict[str, Any]) -> None:
    keys = [*_SHOWN.values(), "ptuned_p10", "ptuned_mrr"]
    rows = [
        [f"{name} {figures['label']}", *(_share(figures[key]) for key in keys)]
        for name, figures in found.items()
    ]
    rows.append(["mean", *(_share(means[key]) for key in keys)])
    title = "P@1 on test (%); P@10 and MRR of the P-tuned prompt"
    console.table(title, ["relation", *_SHOWN, "P@10", "MRR"], rows)


def _line(figures: dict[str, Any]) -> str:
    shown = (f"{name} {_share(figures[key])}" for name, key in _SHOWN.items())
    return "  ".join(shown) + f"  ({figures['label']})"


def _share(value: float | None) -> str:
    return "-" if value is None else console.percent(value)


def _words(path: Path | None) -> list[str]:
    if path is None:
        return []
    words = saved_prompt.lines_of(path)
    if not words:
        raise InputError(f"--candidates {path} is empty; give an answer per line")
    return words
