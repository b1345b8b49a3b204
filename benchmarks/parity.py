"""``ptuning.peft_compat`` against PEFT in one process: every family, task and side of padding.

Tiny random models (`families`) with the same weights in both libraries. Writes ``PARITY.md`` beside
this file, and every figure with ``--json``. The exit status is 1 if a difference that counts is
above 1e-5 or generated tokens differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import peft
import torch
import transformers
from families import FAMILIES, LENGTHS, VIRTUAL, batch, in_front, placed, short, trained
from parity_tables import Row, report
from torch import Tensor

from ptuning import peft_compat

LIMIT = 1e-5
TASKS = tuple(families.AUTO)
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def values_of(output: Any) -> list[Tensor]:
    """The task's outputs: several for question answering, and for models with a pooler."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return [output[name] for name in names if output.get(name) is not None]


def real_of(inputs: dict[str, Tensor]) -> Tensor:
    """Where the reference's layout has no padding ``(B, virtual tokens + T)``."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return in_front(mask, 1).bool()


def largest(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().nan_to_num(float("inf")).max()) if one.numel() else 0.0


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Outputs, loss (without labels: of the outputs at real tokens) and the encoder's gradients."""
    model.zero_grad()
    output = model(**inputs)
    values, real = values_of(output), real_of(inputs)
    loss: Any = output.get("loss")
    if loss is None:
        kept = [v[real] if v.shape[:2] == real.shape else v for v in values]
        loss = torch.stack([v.pow(2).mean() for v in kept]).sum()
    loss.backward()
    encoder = {n: p.grad for n, p in trained(model).items() if n.startswith("prompt_encoder.")}
    return [v.detach() for v in values], loss.detach(), encoder


def compared(ours: Any, theirs: Any, task: str, inputs: dict[str, Tensor]) -> Row:
    """Largest differences of one batch; labels of the text's length must give the same loss."""
    values, loss, gradients = run(ours, placed(task, inputs))
    if theirs is None:
        tensors = [*values, loss, *gradients.values()]
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        return {"runs": finite and any(bool(g.any()) for g in gradients.values())}
    expected, their_loss, their_gradients = run(theirs, placed(task, inputs))
    real, logits, pads = real_of(inputs), [0.0], [0.0]
    for value, other in zip(values, expected, strict=True):
        if value.shape[:2] == other.shape[:2] == real.shape:
            logits.append(largest(value[real], other[real]))
            pads.append(largest(value[~real], other[~real]))
        else:
            logits.append(largest(value, other))
    losses = [loss, run(ours, inputs)[1]]
    return {
        "logits": max(logits),
        "pads": max(pads),
        "loss": max(largest(own, their_loss) for own in losses),
        "gradient": max(largest(g, their_gradients[n]) for n, g in gradients.items()),
    }


@torch.no_grad()
def alone(
    model: Any, name: str, task: str, side: str, behind: bool, drop: bool = False
) -> tuple[float, Tensor]:
    """The largest difference between a padded batch's rows and the same rows alone; losses too.

    Args:
        model: either library's.
        name: the family.
        task: the task.
        side: of the padding.
        behind: virtual tokens stand behind left padding, else in front of it.
        drop: without virtual positions; the text then stands where the caller has it.

    Returns:
        The difference, and the batch's loss (0 without labels).
    """
    longest, options = max(LENGTHS), {"drop_virtual_positions": True} if drop else {}

    def outputs(row: int | None) -> tuple[list[Tensor], Tensor]:
        inputs = batch(name, task, side, row)
        for key in ("start_positions", "end_positions"):
            if drop and key in inputs:
                inputs[key] = inputs[key] - VIRTUAL
        output = model(**(inputs if drop else placed(task, inputs)), **options)
        return values_of(output), torch.zeros(()) if output.get("loss") is None else output["loss"]

    (whole, loss), result = outputs(None), 0.0
    singles = [outputs(row) for row in range(len(LENGTHS))]
    if task != "QUESTION_ANS":  # its loss is a softmax over the padding too
        # A mean over labels: as many as tokens, or the same number in each row.
        tokens = LENGTHS if task in ("CAUSAL_LM", "TOKEN_CLS", "none") else (1,) * len(LENGTHS)
        parts = [n * part for n, (_, part) in zip(tokens, singles, strict=True)]
        result = largest(loss, torch.stack(parts).sum() / sum(tokens))
    for row, length in enumerate(LENGTHS):
        for value, single in zip(whole, singles[row][0], strict=True):
            mine, virtual = value[row], len(value[row]) - longest
            if virtual in (0, VIRTUAL) and task != "SEQ_CLS":  # per token
                at = torch.arange(virtual + length)
                lead = longest - length if side == "left" else 0
                mine = mine[at + lead * (behind | (at >= virtual))]
            result = max(result, largest(mine, single[0]))
    return result, loss


def generated(model: Any, inputs: dict[str, Tensor], beams: int = 1) -> Tensor:
    text = {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}
    return model.generate(**text, max_new_tokens=6, do_sample=False, num_beams=beams)


def same_alone(model: Any, name: str, task: str, side: str) -> bool:
    """Whether each row of a padded batch generates what it generates alone."""
    inputs, result = batch(name, task, side), True
    skip = max(LENGTHS) if task == "CAUSAL_LM" else 0
    new = generated(model, inputs)[:, skip:]
    for row, length in enumerate(LENGTHS):
        single = generated(model, batch(name, task, side, row))[0, length if skip else 0 :]
        result &= torch.equal(new[row, : len(single)], single)  # alone it may end earlier
    return result


@torch.no_grad()
def exchanged(base: Any, ours: Any, theirs: Any, name: str, task: str) -> Row:
    """Whether each library gives the saved logits with what the other has saved."""
    inputs = placed(task, batch(name, task, "none"))
    result: Row = {}
    layout: dict[str, Any] = {"reference_layout": ours.reference_layout}
    for key, writer, reader, options in (
        ("saved by ours", ours, peft, {}),
        ("saved by PEFT", theirs, peft_compat, layout),
    ):
        with tempfile.TemporaryDirectory() as folder:
            writer.save_pretrained(folder)
            model = copy.deepcopy(base)
            try:
                loaded = reader.PeftModel.from_pretrained(model, folder, **options).eval()
            except Exception as error:
                result |= {key: False, f"{key}, error": short(error)}
                continue
        pairs = zip(values_of(loaded(**inputs)), values_of(writer(**inputs)), strict=True)
        result[key] = all(largest(one, other) <= LIMIT for one, other in pairs)
    return result


@torch.no_grad()
def embeddings_differ(base: Any, name: str, task: str) -> bool:
    """The model gives something else for a text's embeddings, which PEFT passes, than for its ids.

    Marian scales embeddings outside of the embedding, and only where it is given ids.
    """
    inputs = batch(name, task, "none")
    ids = inputs.pop("input_ids")
    embedded = base(inputs_embeds=base.get_input_embeddings()(ids), **inputs)
    pairs = zip(values_of(base(input_ids=ids, **inputs)), values_of(embedded), strict=True)
    return any(largest(one, other) > LIMIT for one, other in pairs)


def measured(name: str, task: str, encoder: str) -> Iterator[Row]:
    """A row for each padding and layout of one family, task and encoder."""
    base = families.model(name, task)
    if base is None:
        return
    theirs, note = families.their_model(base, name, task, encoder)
    ours, apart = families.our_model(base, task, encoder, theirs)
    unlike = theirs is not None and embeddings_differ(base, name, task)
    ours.reference_layout = unlike
    common = {"family": name, "task": task, "encoder": encoder, "note": note, "apart": apart}
    if theirs is not None and task != "none":
        common |= exchanged(base, ours, theirs, name, task)
    for padding in ("none", "right", "left"):
        rows: dict[str, Row] = {}
        for layout in ("default", "reference"):
            ours.reference_layout = layout == "reference"
            row = rows[layout] = {**common, "padding": padding, "layout": layout}
            if layout == "default" and padding != "none":
                whole, loss = alone(ours, name, task, padding, behind=True)
                text, same_loss = alone(ours, name, task, padding, behind=True, drop=True)
                row["alone ours"] = max(whole, text, largest(loss, same_loss))
                row["alone PEFT"] = theirs and alone(theirs, name, task, padding, behind=False)[0]
                if task == "SEQ_2_SEQ_LM" or (task == "CAUSAL_LM" and padding == "left"):
                    row["generates alone"] = same_alone(ours, name, task, padding)
            if theirs is None and layout == "reference":
                continue  # what PEFT does would fail here too
            if theirs is not None and (layout, padding) == ("default", "left"):
                continue  # other columns than PEFT's
            inputs = batch(name, task, padding)
            row |= compared(ours, theirs, task, inputs)
            if (
                theirs is not None
                and task in GENERATING
                and (task, padding) != ("CAUSAL_LM", "right")
            ):
                for how, beams in (("greedy", 1), ("beam", 2)):
                    tokens = [generated(model, inputs, beams) for model in (ours, theirs)]
                    row[how] = torch.equal(*tokens)
        depends = (rows["default"].get("alone PEFT") or 0) > LIMIT
        reason = "PEFT's embeddings are not the model's own" if unlike else ""
        reason = reason or ("PEFT's rows depend on padding" if depends else "")
        for row in rows.values():
            row["differs because"] = reason if row["layout"] == "default" else ""
            yield row


def offences(row: Row) -> list[str]:
    """What is wrong in a row; where PEFT is, only its own layout is compared with it."""
    wrong = []
    if (row["padding"], row["layout"]) == ("none", "default"):
        wrong = [f"only one of the two trains {name}" for name in row["apart"]]
        for key in ("saved by ours", "saved by PEFT"):
            reason = row.get(f"{key}, error", "other logits")
            wrong += [f"{key}: {reason}"] if row.get(key) is False else []
    if row.get("alone ours", 0) > LIMIT:
        wrong.append(f"a row alone gives something else: {row['alone ours']:.1e}")
    if row.get("runs") is False:
        wrong.append("not finite, or no gradient")
    if row.get("generates alone") is False:
        wrong.append("a row alone generates something else")
    if not row["differs because"]:
        keys = [k for k in ("logits", "loss", "gradient", "pads") if row.get(k, 0) > LIMIT]
        wrong += [f"{key} {row[key]:.1e}" for key in keys]
        wrong += [f"{k}: other tokens" for k in ("greedy", "beam") if row.get(k) is False]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--json", type=Path, help="write every row there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # what PEFT drops with a warning is in the tables
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    broken, start = [], time.monotonic()
    for name in given.family:
        for task in given.task:
            for encoder in ("MLP", "LSTM"):
                try:
                    rows += measured(name, task, encoder)
                except Exception as error:
                    broken.append(f"{name} {task} {encoder}: {short(error)}")
    command = " ".join(["python benchmarks/parity.py", *sys.argv[1:]])
    folder = Path(__file__).parent
    text = report(rows, command, time.monotonic() - start)
    if len(given.family) == len(FAMILIES) and len(given.task) == len(TASKS):
        (folder / "PARITY.md").write_text(text, encoding="utf-8")
    if given.json:
        given.json.write_text(json.dumps(rows), encoding="utf-8")
    for row in rows:
        where = [row[key] for key in ("family", "task", "encoder", "padding", "layout")]
        broken += [f"{' '.join(where)}: {what}" for what in offences(row)]
    print(*broken, sep="\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
