from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ptuning.data import read_examples, text
from ptuning.errors import DataError


def written(folder: Path, table: Any, **options: Any) -> Path:
    pyarrow.parquet.write_table(table, folder / "a.parquet", **options)
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ["dictionary", "repeated", "packed"])
def test_a_few_bytes_that_stand_for_very_much_are_refused(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array(["A" * 1_000_000] * 300)
    if kind == "dictionary":
        column = column.dictionary_encode()
    options = {"compression": "zstd", "use_dictionary": kind != "packed"}
    path = written(tmp_path, pyarrow.table({"a": column}), **options)
    assert path.stat().st_size < 20_000
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(DataError, match="small and holds more than"):
        read_examples(path)
    assert pyarrow.default_memory_pool().max_memory() - before < 2**30


@pytest.fixture
def pool() -> Iterator[Any]:
    """Counts what pyarrow takes from here on."""
    usual = pyarrow.default_memory_pool()
    counting = pyarrow.proxy_memory_pool(usual)
    pyarrow.set_memory_pool(counting)
    yield counting
    pyarrow.set_memory_pool(usual)


def test_a_long_text_that_is_the_same_in_every_row_takes_its_size_once(
    tmp_path: Path, pool: Any
) -> None:
    column = pyarrow.array(["A" * 2**24]).dictionary_encode().take(pyarrow.array([0] * 64))
    path = written(tmp_path, pyarrow.table({"a": column}), compression="zstd", store_schema=False)
    with pytest.raises(DataError, match="longer than 4,194,304"):
        read_examples(path)
    assert pool.max_memory() < 2**28


def test_a_text_of_very_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, pyarrow.table({"a": ["A" * 100_000_000]}), compression="zstd")
    with pytest.raises(DataError, match="small and holds more than"):
        read_examples(path)


INSIDE: dict[str, Any] = {
    "list": pyarrow.list_(pyarrow.string()),
    "large": pyarrow.large_list(pyarrow.string()),
    "fixed": pyarrow.list_(pyarrow.string(), 1),
    "struct": pyarrow.struct([("a", pyarrow.string())]),
    "map": pyarrow.map_(pyarrow.string(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_texts_inside_of_others_are_counted_once(tmp_path: Path, kind: str) -> None:
    """And not, as a dictionary of all, with every 64 rows."""
    texts = [f"{'w' * 1000} {number}" for number in range(4000)]
    around = {"struct": lambda text: {"a": text}, "map": lambda text: [("a", text)]}
    cells = [around.get(kind, lambda text: [text])(text) for text in texts]
    column = pyarrow.array(cells, INSIDE[kind])
    path = written(tmp_path, pyarrow.table({"a": column}), compression="zstd")
    assert path.stat().st_size < 64_000
    assert [row["a"] for row in read_examples(path)] == cells


def test_texts_inside_of_others_that_stand_for_very_much_are_refused(tmp_path: Path) -> None:
    column = pyarrow.array([["A" * 1_000_000] * 2, [], None] * 60)
    path = written(tmp_path, pyarrow.table({"a": column}), compression="zstd")
    with pytest.raises(DataError, match="small and holds more than"):
        read_examples(path)


def test_very_many_rows_of_nothing_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, pyarrow.table({"a": pyarrow.nulls(10_000_000, pyarrow.int8())}))
    with pytest.raises(DataError, match="small and holds more than"):
        read_examples(path)


def test_a_cell_that_is_too_long_is_refused(tmp_path: Path) -> None:
    long = "".join(random.Random(0).choices("abcd", k=text.LONGEST_CELL + 1))
    path = written(tmp_path, pyarrow.table({"a": ["x", long]}))
    with pytest.raises(DataError, match="longer than 4,194,304"):
        read_examples(path)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, pyarrow.table([["a"], ["b"]], names=["country", "country"]))
    with pytest.raises(DataError, match="column 'country' twice"):
        read_examples(path)


@pytest.mark.parametrize("group", [300, 100, 1])
def test_nested_and_repeated_values_come_back(tmp_path: Path, group: int) -> None:
    rows = [{"l": ["a", "b"], "d": {"k": "v"}, "n": n, "w": "ab"[n % 2]} for n in range(300)]
    path = written(tmp_path, pyarrow.Table.from_pylist(rows), row_group_size=group)
    assert read_examples(path) == rows


def test_bytes_that_are_no_text_are_a_data_error(tmp_path: Path) -> None:
    column = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    with pytest.raises(DataError, match="Parquet"):
        read_examples(written(tmp_path, pyarrow.table({"a": column})))


@pytest.mark.parametrize("seed", [*range(40), 1408])  # the last: a place in no dictionary
def test_damaged_parquet_is_rows_or_a_data_error(tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    # pyarrow ends the process where what stands about a single column is damaged and asked for.
    table = pyarrow.table({"a": ["x", "y"] * 50, "b": list(range(100)), "c": [["z"]] * 100})
    path = written(tmp_path, table, compression=numbers.choice(["none", "snappy", "zstd"]))
    content = bytearray(path.read_bytes())
    for _ in range(numbers.randrange(1, 5)):
        content[numbers.randrange(4, len(content))] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(isinstance(row, dict) for row in read_examples(path))


def test_class_labels_of_data_sets_are_their_names(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    columns = {"text": ["a", "b", "c", "d"], "label": [0, 1, -1, None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in read_examples(tmp_path / "a.parquet")] == [
        *("bad", "good", None, None)
    ]
    metadata = pyarrow.parquet.read_schema(tmp_path / "a.parquet").metadata
    table = pyarrow.table({"text": ["a"], "label": [2]}).replace_schema_metadata(metadata)
    with pytest.raises(DataError, match="class label 2, and the data set names 2 classes"):
        read_examples(written(tmp_path, table))


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("[" * 100_000, id="deep"),
        *("{", "[]", '{"info": {"features": null}}', '{"info": {"features": {"label": 1}}}'),
        '{"info": {"features": {"label": {"names": "no"}}}}',
        '{"info": {"features": {"label": {"names": [1]}}}}',
        '{"info": {"features": {"other": {"names": ["no"]}}}}',
    ],
)
def test_what_else_stands_beside_a_schema_changes_nothing(said: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "label": [0]})
    path = written(tmp_path, table.replace_schema_metadata({"huggingface": said, "more": "x"}))
    assert read_examples(path) == [{"text": "a", "label": 0}]
