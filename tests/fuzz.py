"""Damaged files for every reader: only this package's own errors may come, and no odd number.

    python -m tests.fuzz --seed 7 --seconds 300

Each case is a function of the seed and its number, so a failure's line repeats it. `test_fuzz` runs
the first few; `make fuzz` runs as many as there is time for.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import gzip
import io
import json
import lzma
import random
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

import ptuning
from ptuning.cli import run_files
from ptuning.peft_compat import PeftModel
from ptuning.prompts.label_matrix import LabelMatrix
from ptuning.training import checkpoint

from . import tiny

ROWS = [{"country": c, "capital": a} for c, a in (("France", "Paris"), ("Italy", "Rome"))]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, 1e308, float("nan"), float("inf"), 10**12, 10**30),
    *("", "x", "\0", "\ud800", "none", "[P]", "{", "[P*999999]", "../../x", "/", "é" * 300),
    *(
        "\x1b[2J",
        "a" * 10_000,
        [],
        [1],
        [[]],
        [None],
        {},
        {"a": 1},
        {"a": ["b"]},
        {"a": {"b": "c"}},
    ),
]
PIECES = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b'"',
        b",",
        b"\n",
        b"\r",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"<<: ",
    ),
    *(
        b"[" * 3000,
        b'{"a":' * 2000,
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"\\ud800",
        b"\x1b[2J",
        b"yes: ",
    ),
]
TEXTS = {
    "csv": b"country,capital\nFrance,Paris\n",
    "tsv": b"country\tcapital\nFrance\tParis\n",
    "json": json.dumps(ROWS).encode(),
    "jsonl": b"\n".join(json.dumps(row).encode() for row in ROWS),
    "yaml": b"model: x\ntemplate: '[P] {a} [MASK]'\nepochs: 3\nlabels: {a: b, c: d}\n",
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
COLUMNS = {
    "country": pa.array(["France", "Italy", None]),
    "capital": pa.array(["Paris", "Rome", "Paris"]).dictionary_encode(),
    "bytes": pa.array([b"a", b"\xff", None]),
    "number": pa.array([1, None, -(2**63)]),
    "share": pa.array([0.5, float("nan"), None]),
    "whether": pa.array([True, None, False]),
    "day": pa.array([date(2020, 1, 1), None, date(1, 1, 1)]),
    "moment": pa.array([datetime(2020, 1, 1), None, None], pa.timestamp("us", "UTC")),
    "span": pa.array([1, None, 2**62], pa.duration("us")),
    "price": pa.array([Decimal("1.50"), None, Decimal("-9.99")]),
    "words": pa.array([["a", None], [], None]),
    "about": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    "pairs": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
}


class Fuzz:
    """Whole files in a folder, and what happens to readers of damaged copies.

    Attributes:
        counts: cases by how they ended: taken, or refused.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.counts = {"taken": 0, "refused": 0}
        self.tokenizer = tiny.tokenizer(bos=True)
        self.model = tiny.model()
        prompt = ptuning.Prompt("[P*3]{country}: [MASK]", answer="capital", special_tokens="after")
        options: dict[str, Any] = {"epochs": 1, "checkpoint_seconds": 0, "verbose": False}
        ptuning.train(
            self.model, self.tokenizer, prompt, ROWS, output=folder / "training", **options
        )
        prompt.save(folder / "both")
        self._ensemble(prompt).save(folder / "ensemble")
        shutil.copytree(folder / "both", folder / "peft", ignore=shutil.ignore_patterns("prompt.*"))
        _ensemble().save(folder / "ensemble")

    @staticmethod
    def _ensemble(trained: ptuning.Prompt) -> ptuning.Prompt:
        """Two members that compare labels, with a bias and a label matrix."""
        words: Any = {"a": "Paris", "b": ["Rome", "it is"]}
        first, other = (
            ptuning.Prompt(
                "[P*3]{country}: [MASK]",
                verbalizer=words,
                vectors=trained.vectors,
                base_model=trained.base_model,
            )
            for _ in range(2)
        )
        other.label_matrix = LabelMatrix(("Paris", "Rome", "it is"), torch.eye(3))
        return replace(first, others=[other], label_bias={"a": 0.5, "b": -1.0})

    def case(self, number: int) -> str | None:
        """What is wrong with a case, or None."""
        numbers = random.Random(self.seed * 1_000_003 + number)
        prompts, data = [self._prompt] * 3, [self._text, self._packed, self._parquet]
        work = numbers.choice([*prompts, self._state, *data])
        name = work.__name__
        place = self.folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                name = work(place, numbers)
            self.counts["taken"] += 1
        except ptuning.PtuningError:
            self.counts["refused"] += 1
        except Exception as error:
            return f"case {number} of seed {self.seed}: {name}: {type(error).__name__}: {error}"
        return None

    def _prompt(self, place: Path, numbers: random.Random) -> str:
        shutil.copytree(self.folder / numbers.choice(["both", "ensemble", "peft"]), place)
        damaged = numbers.choice(sorted(p for p in place.iterdir() if p.suffix != ".md"))
        content = damaged.read_bytes()
        if damaged.suffix == ".json":
            text = _edited(content.decode(), numbers)
            damaged.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            damaged.write_bytes(_with_other_header(content, numbers))
        refusals = []
        for read in (self._use, self._adapt):
            try:
                read(place)
            except ptuning.PtuningError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        return damaged.name

    def _use(self, place: Path) -> None:
        prompt = ptuning.Prompt.load(place)
        assert prompt.vectors is not None and prompt.vectors.dtype == torch.float32
        assert torch.isfinite(prompt.vectors).all()
        if prompt.template and (prompt.answer_tokens or 0) < 100:
            for made in ptuning.predict_details(self.model, self.tokenizer, prompt, ROWS):
                assert 0 <= made.probability <= 1

    def _adapt(self, place: Path) -> None:
        PeftModel.from_pretrained(tiny.model(), place, tokenizer=self.tokenizer)

    def _state(self, place: Path, numbers: random.Random) -> str:
        """A checkpoint: damaged bytes, or another state under a marker without a checksum."""
        shutil.copytree(self.folder / "training", place)
        path = numbers.choice(sorted(p for p in place.rglob("*") if p.is_file()))
        if path.name == "state.pt" and numbers.random() < 0.5:
            state = io.BytesIO()
            torch.save(numbers.choice([*ODD, torch.zeros(3), {"step": 1, "identity": 5}]), state)
            path.write_bytes(state.getvalue())
            (path.parent / "DONE").write_bytes(b"")
        else:
            path.write_bytes(_flipped(path.read_bytes(), numbers))
        checkpoint.load_for_all(place, {"a": "1"})
        return path.name

    def _text(self, place: Path, numbers: random.Random) -> str:
        place.mkdir()
        kind = numbers.choice(sorted(TEXTS))
        text, at = TEXTS[kind], numbers.randrange(len(TEXTS[kind]))
        path = place / f"damaged.{kind}"
        path.write_bytes(text[:at] + numbers.choice(PIECES) + text[at + numbers.randrange(3) :])
        if kind == "yaml":
            options = [SimpleNamespace(name=n) for n in ("model", "template", "epochs", "labels")]
            context: Any = SimpleNamespace(
                command=SimpleNamespace(params=options), default_map={}, params={}
            )
            run_files.use_config(context, path)
            run_files.parse_labels(context.default_map.get("labels"))
        else:
            ptuning.read_examples(path)
        return path.name

    def _packed(self, place: Path, numbers: random.Random) -> str:
        """A packed file: damaged as it is, or with damage inside."""
        place.mkdir()
        kind, packing = (
            numbers.choice(["csv", "tsv", "json", "jsonl"]),
            numbers.choice(list(PACKERS)),
        )
        whole, inside = TEXTS[kind] * numbers.choice([1, 1, 2000]), numbers.random() < 0.4
        packed = PACKERS[packing](_damaged(whole, numbers) if inside else whole)
        path = place / f"damaged.{kind}.{packing}"
        path.write_bytes(packed if inside else _damaged(packed, numbers))
        ptuning.read_examples(path)
        return path.name

    def _parquet(self, place: Path, numbers: random.Random) -> str:
        place.mkdir()
        path = place / "damaged.parquet"
        path.write_bytes(_damaged(_parquet_file(numbers), numbers))
        ptuning.read_examples(path)
        return path.name


def _ensemble() -> ptuning.Prompt:
    """Two members with labels and a label bias."""
    members = []
    for template in ("[P*2] {country} [MASK]", "{country} [P] is [MASK]"):
        words = {"yes": ["Paris", "the Rome"], "no": ["Oslo"]}
        member = ptuning.Prompt(template, answer="label", verbalizer=words)
        member.vectors = torch.randn(member.num_virtual_tokens or 0, 32)
        members.append(member)
    first, *others = members
    return dataclasses.replace(first, others=others, label_bias={"yes": 0.5, "no": -0.5})


def _parquet_file(numbers: random.Random) -> bytes:
    """A table of one to four columns of any kinds, written in any of Parquet's ways."""
    table = pa.table({name: COLUMNS[name] for name in numbers.sample(list(COLUMNS), 4)})
    written = io.BytesIO()
    parquet.write_table(
        table,
        written,
        compression=numbers.choice(["none", "snappy", "gzip", "zstd"]),
        use_dictionary=numbers.random() < 0.5,
        row_group_size=numbers.choice([1, 2, 100]),
        data_page_version=numbers.choice(["1.0", "2.0"]),
        write_statistics=numbers.random() < 0.5,
    )
    return written.getvalue()


def _damaged(content: bytes, numbers: random.Random) -> bytes:
    """Bytes with some bits flipped, cut off, or with a piece put in or over them."""
    if numbers.random() < 0.4:
        return _flipped(content, numbers)
    at = numbers.randrange(len(content))
    if numbers.random() < 0.3:
        return content[:at]
    piece = numbers.choice([*PIECES, bytes(8), b"\xff" * 8])
    return content[:at] + piece + content[at + numbers.choice([0, len(piece)]) :]


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [at] * bool(at) + [place for key, v in inner for place in _places(v, (*at, key))]


def _edited(text: str, numbers: random.Random) -> str:
    """JSON with one value changed, taken away or doubled; or no JSON any more."""
    broken: list[Callable[[], str]] = [
        lambda: "[" * 50_000,
        lambda: '{"a":' * 3000 + "1" + "}" * 3000,
        lambda: text[: numbers.randrange(len(text))],
        lambda: numbers.choice(["", "null", "[1]", '"x"', "9" * 5000]),
        lambda: "\ufeff" + text,
        lambda: text.replace(",", ",\0", 1),
        lambda: text.replace("{", '{"template": "[P] {b} [MASK]",', 1),
    ]
    if numbers.random() < 0.15:
        return numbers.choice(broken)()
    value = json.loads(text)
    *path, last = numbers.choice(_places(value))
    at = value
    for key in path:
        at = at[key]
    if numbers.random() < 0.25:
        del at[last]
    else:
        at[last] = numbers.choice(ODD)
    return json.dumps(value)


def _with_other_header(content: bytes, numbers: random.Random) -> bytes:
    """A safetensors file whose metadata lie, or with bits flipped."""
    size = struct.unpack("<Q", content[:8])[0]
    if numbers.random() < 0.5:
        return _flipped(content, numbers)
    header = json.loads(content[8 : 8 + size])
    about = header.get("__metadata__", {})
    inner = numbers.choice(["{", "[]", "5", "[" * 50_000])
    if "prompt" in about and numbers.random() < 0.7:
        inner = _edited(about["prompt"], numbers)
    header["__metadata__"] = {**about, "prompt": inner}
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + content[8 + size :]


def _flipped(content: bytes, numbers: random.Random) -> bytes:
    changed = bytearray(content or b"{}")
    for _ in range(4):
        changed[numbers.randrange(len(changed))] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def main() -> None:
    """As many cases as there is time for; exit code 1 at the first that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz, number, end = Fuzz(Path(folder), options.seed), 0, time.monotonic() + options.seconds
        wrong = []
        while time.monotonic() < end and len(wrong) < 10:
            if found := fuzz.case(number):
                print(found[:300], flush=True)
                wrong.append(found)
            number += 1
    print(f"{number} cases: {fuzz.counts}, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
