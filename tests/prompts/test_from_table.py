"""From a table to a prompt: template, label names, and words of one token."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from ptuning import Prompt
from ptuning.data.columns import Columns, columns_of
from ptuning.errors import DataError, InputError, PtuningWarning
from ptuning.inference.baselines import automatic_templates
from ptuning.prompts.from_table import in_two_lines
from ptuning.prompts.label_names import readable, telling_words
from ptuning.prompts.template import parse
from ptuning.rendering.example import right_answer
from ptuning.rendering.render import Renderer
from ptuning.rendering.short_words import one_token_words

from .. import tiny

TEXTS = [f"I was charged twice on day {n}" for n in range(24)]


def prompt_for(answers: list[Any], name: str = "label", **columns: list[Any]) -> Prompt:
    """The prompt for a table of texts with these answers, repeated."""
    table = {"text": TEXTS, **columns, name: (answers * 24)[:24]}
    return Prompt.for_rows(table)


def words_of(prompt: Prompt) -> dict[str, str]:
    return {label: words[0] for label, words in prompt.labels.items()}


def test_virtual_tokens_stand_around_the_text_and_the_answers_name_before_it() -> None:
    prompt = prompt_for(["good", "bad"], "ticket_type")
    assert prompt.template == "[P*20] {text} [P*20] Ticket type: [MASK]"
    assert prompt.answer == "ticket_type" and prompt.num_virtual_tokens == 40


def test_texts_that_are_missing_as_pandas_has_it_are_empty() -> None:
    pandas = pytest.importorskip("pandas")
    prompt = prompt_for(["good", "bad"], title=[*TEXTS[:20], *[pandas.NA] * 4])
    assert "{title}" in prompt.template and words_of(prompt) == {"good": "good", "bad": "bad"}


def test_several_columns_stand_with_their_names() -> None:
    prompt = prompt_for(["good", "bad"], subjectLine=[f"Re: {text}" for text in TEXTS])
    assert prompt.template == "[P*20] Text: {text}\nSubject Line: {subjectLine} [P*20] Type: [MASK]"


def test_names_like_words_of_the_template_language_are_text() -> None:
    table = {"[MASK]": TEXTS, "a\nb": [f"{t} again" for t in TEXTS], "[P*3]": ["x", "y", "z"] * 8}
    prompt = Prompt.for_rows(table)
    assert prompt.template == ("[P*20] [[MASK]]: {[MASK]}\nA b: {a\nb} [P*20] [[P*3]]: [MASK]")
    assert prompt.parsed.fields == ("[MASK]", "a\nb") and prompt.num_virtual_tokens == 40


@pytest.mark.parametrize("name", ["share [P", "[MASK", "x [P:", "[P*2 [P]", "a [P [b]"])
def test_names_that_open_a_bracket_and_do_not_close_it_are_words(name: str) -> None:
    table = {name: TEXTS, "close]": [f"{t} again" for t in TEXTS], "kind": ["x", "y", "z"] * 8}
    prompt = Prompt.for_rows(table, answer="kind")
    assert prompt.parsed.fields == (name, "close]") and prompt.num_virtual_tokens == 40
    for manual in automatic_templates(prompt, "kind"):
        assert parse(manual).fields == (name, "close]")


def test_names_of_columns_that_say_nothing_do_not_stand_before_a_label() -> None:
    said = {
        name: prompt_for(["a", "b"], name).template[20:]
        for name in ("Label", " label", "y", "class", "kind")
    }
    assert said == {"Label": " Type: [MASK]", " label": " Type: [MASK]", "y": " Type: [MASK]",
                    "class": " Type: [MASK]", "kind": " Kind: [MASK]"}  # fmt: skip


@pytest.mark.parametrize(("count", "template"), [
    (1, "{text} [P*1] Type: [MASK]"),
    (5, "[P*2] {text} [P*3] Type: [MASK]"),
])  # fmt: skip
def test_so_many_virtual_tokens_as_are_wanted(count: int, template: str) -> None:
    table = {"text": TEXTS, "label": ["a", "b"] * 12}
    assert Prompt.for_rows(table, num_virtual_tokens=count).template == template


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (["top_up-failed", "changePin"], {"top_up-failed": "top up failed",
                                          "changePin": "change Pin"}),
        ([True, False], {"true": "yes", "false": "no"}),
        (["TRUE", "FALSE"], {"TRUE": "yes", "FALSE": "no"}),
        ([0, 1], {"0": "no", "1": "yes"}),
        (["1", "0"], {"1": "yes", "0": "no"}),
        ([-1, 0, 1], {"-1": "negative", "0": "neutral", "1": "positive"}),
        ([1.0, 2.0, 12.0], {"1": "one", "2": "two", "12": "12"}),
        (["top-up", "top_up"], {"top-up": "top-up", "top_up": "top_up"}),
        (["{x}", "y"], {"{x}": "{{x}}", "y": "y"}),
        (["spam", " spam", "ham "], {"spam": "spam", "ham": "ham"}),
    ],
)  # fmt: skip
def test_labels_have_readable_names(answers: list[Any], words: dict[str, str]) -> None:
    assert words_of(prompt_for(answers)) == words


def test_numbers_are_named_by_a_column_that_says_the_same() -> None:
    prompt = prompt_for([0, 1, 2], label_text=["world", "sport", "business"] * 8)
    assert words_of(prompt) == {"0": "world", "1": "sport", "2": "business"}
    assert prompt.parsed.fields == ("text",)
    unnamed = prompt_for([0, 1, 2], label_text=["world", "", "business"] * 8)
    assert words_of(unnamed) == {"0": "world", "1": "1", "2": "business"}


def test_answers_that_dev_rows_do_not_have_are_no_labels() -> None:
    rows = [{"text": text, "answer": f"person {n}"} for n, text in enumerate(TEXTS)]
    dev = [{"text": f"{text} again"} for text in [*TEXTS, *TEXTS]]
    assert Prompt.for_rows(rows, dev=dev).verbalizer is None


def test_frames_and_data_sets_are_tables_and_class_labels_have_names() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    frame = pandas.DataFrame({"text": TEXTS, "label": [0, 1, None] * 8}).dropna()
    assert words_of(Prompt.for_rows(frame)) == {"0": "no", "1": "yes"}
    kinds = datasets.ClassLabel(names=["world", "sport"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kinds})
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 12}, features=features)
    assert words_of(Prompt.for_rows(data)) == {"world": "world", "sport": "sport"}


@pytest.mark.parametrize("written", ["true", "True", "TRUE"])
def test_truths_of_two_kinds_of_files_are_the_same_labels(written: str) -> None:
    other = {"true": "false", "True": "False", "TRUE": "FALSE"}[written]
    own = [{"text": text, "label": n % 2 == 0} for n, text in enumerate(TEXTS)]
    text = [{"text": text, "label": (written, other)[n % 2]} for n, text in enumerate(TEXTS)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words_of(Prompt.for_rows(own, dev=text)) == {"true": "yes", "false": "no"}
        assert words_of(Prompt.for_rows(text, dev=own)) == {written: "yes", other: "no"}


@pytest.mark.parametrize(
    ("one", "other"),
    [("Spam", "spam"), ("caf\u00e9", "cafe\u0301"), ("top up", "top\u00a0up"), ("a b", "a  b")],
)
def test_labels_that_hardly_differ_are_two_and_said(one: str, other: str) -> None:
    told = re.escape(f"the labels {one!r} and {other!r} differ only in case, spaces or the coding")
    with pytest.warns(UserWarning, match=told):
        prompt = prompt_for([one, other])
    assert words_of(prompt) == {one: one, other: other}


def test_texts_tell_which_word_of_a_name_stands_for_its_label() -> None:
    rows = [
        {"text": "My PIN, please", "label": "change_pin"},
        {"text": "Which pin? Change it", "label": "change_pin"},
        {"text": "The card was stolen", "label": "lost_or_stolen_card"},
        {"text": "Stolen or lost: my card", "label": "lost_or_stolen_card"},
        {"text": "Where is my card?", "label": "card_arrival"},
        {"text": None, "label": "card_arrival"},
    ]
    assert Prompt.for_rows(rows * 3, "label").name_words == {
        "change_pin": ("pin", "change"),
        "lost_or_stolen_card": ("stolen", "lost", "or", "card"),
        "card_arrival": ("arrival", "card"),
    }


def test_a_word_is_compared_with_the_one_other_label_that_has_it_most_often() -> None:
    shares = {"fee_card": (6, 1), "card_tax": (4, 0), "card_sum": (3, 0)}  # of ten: card, fee
    rows = [
        {"text": f"{'card' if n < card else 'it'} {'fee' if n < fee else 'is'}", "label": label}
        for label, (card, fee) in shares.items()
        for n in range(10)
    ]
    columns = Columns("label", ("text",), {})
    names = {"fee_card": "fee card", "card_tax": "tax", "card_sum": "sum"}
    assert telling_words(names, rows, columns)["fee_card"] == ("card", "fee")


def test_labels_of_signs_have_no_words_and_get_letters() -> None:
    prompt = prompt_for(["++", "--"])
    assert prompt.name_words == {"++": (), "--": ()}
    Renderer(tiny.tokenizer(), prompt, "causal", 128)
    assert len(set(words_of(prompt).values())) == 2


def test_words_that_no_text_has_go_by_their_length() -> None:
    labels = ["up_failed", "age_limits"] * 12
    assert prompt_for(labels).name_words == {
        "up_failed": ("failed", "up"),
        "age_limits": ("limits", "age"),
    }


def test_answers_that_never_come_again_are_free_text() -> None:
    prompt = Prompt.for_rows([{"question": f"q {n}", "answer": f"a {n}"} for n in range(9)])
    assert prompt.verbalizer is None
    assert prompt.template == "[P*20] {question} [P*20] Answer: [MASK]"


def test_one_kind_of_answer_is_refused() -> None:
    with pytest.raises(DataError, match="every answer in the column 'label' is 'x'"):
        prompt_for(["x"])


def test_answers_that_are_missing_are_said_by_their_rows() -> None:
    rows = [{"text": f"t {n}", "label": (1, None)[n % 2]} for n in range(8)]
    with pytest.raises(DataError, match="example 2: the answer column 'label' is empty; give"):
        Prompt.for_rows(rows, answer="label")
    with pytest.raises(DataError, match="example 1: the answer column 'label' is empty; give"):
        prompt_for(["", None])


def test_dev_rows_say_nothing_of_what_is_read_or_answered() -> None:
    numbered = [{"id": n, "text": text, "team": "xy"[n % 2]} for n, text in enumerate(TEXTS)]
    prompt = Prompt.for_rows(numbered, dev=numbered)
    assert (prompt.answer, prompt.template) == ("team", "[P*20] {text} [P*20] Team: [MASK]")
    other = {"text": "t", "team": "z"}
    assert words_of(Prompt.for_rows(numbered, dev=[other])) == {"x": "x", "y": "y", "z": "z"}
    rows = [{**row, "title": f"about {row['text']}"} for row in numbered]
    assert "{title}" in Prompt.for_rows(rows).template
    assert "{title}" not in Prompt.for_rows(rows, dev=[other]).template
    with pytest.raises(DataError, match=r"nothing to .* 'text': it is no text in every dev row"):
        Prompt.for_rows(numbered, dev=[{"team": "x", "text": ["t"]}])
    with pytest.raises(DataError, match=r"nothing to .* 'text': not every dev row has it"):
        Prompt.for_rows(numbered, dev=[{"team": "x"}])
    numbers = [{"label": n % 2, "label_text": ("bad", "good")[n % 2]} for n in range(24)]
    graded = [{**row, "text": text} for row, text in zip(numbers, TEXTS, strict=True)]
    dev = [{**graded[0], "label_text": "Bad"}]
    assert words_of(Prompt.for_rows(graded, dev=dev)) == {"0": "bad", "1": "good"}


def test_whole_numbers_are_the_same_labels_as_each_kind_of_file_writes_them() -> None:
    """pandas writes `1.0` into a CSV file where another one has `1`."""
    whole = [{"text": text, "label": str(n % 2)} for n, text in enumerate(TEXTS)]
    fractions = [{**row, "label": f"{row['label']}.0"} for row in whole]
    floats = [{**row, "label": float(row["label"])} for row in whole]
    for dev in (whole, fractions, floats):
        assert words_of(Prompt.for_rows(whole, dev=dev)) == {"0": "no", "1": "yes"}
        assert words_of(Prompt.for_rows(fractions, dev=dev)) == {"0.0": "no", "1.0": "yes"}
    for trained in (whole, fractions):
        prompt = Prompt.for_rows(trained)
        for rows in (whole, fractions, floats):
            said = [right_answer(prompt, row, prompt.labels) for row in rows]
            assert said == [row["label"] for row in trained]


def test_a_first_row_that_is_taken_for_names_is_warned_of() -> None:
    with pytest.warns(PtuningWarning, match=r"column is called 'good', as one of its labels is"):
        prompt_for(["good", "bad"], "good")
    sentence = {"what a joy it was": TEXTS, "good": ["good", "bad"] * 12}
    with pytest.raises(DataError, match=r"has no header: .*'good'.*'what a joy it was'; name its"):
        Prompt.for_rows(sentence)


def test_what_is_given_is_not_looked_for() -> None:
    table = {"id": [*range(24)], "label": ["a", "b"] * 12, "kind": ["c", "d", "e"] * 8}
    prompt = Prompt.for_rows(table, "kind", "[P] {id} [MASK]", encoder="none")
    assert (prompt.template, prompt.answer, prompt.encoder) == ("[P] {id} [MASK]", "kind", "none")
    assert Prompt.for_rows(table, "kind", "[P] {id} [MASK]").encoder == "mlp"
    assert Prompt.for_rows(table, "kind").encoder == "none"
    assert Prompt.for_rows(table, "kind", encoder="lstm").encoder == "lstm"
    own = Prompt.for_rows(table, "kind", verbalizer={"c": "x", "d": "y", "e": "z"})
    assert words_of(own) == {"c": "x", "d": "y", "e": "z"} and own.name_words is None
    with pytest.raises(InputError, match="no virtual token"):
        Prompt.for_rows(table, template="{id} [MASK]")


def test_readable_leaves_marks_that_say_something() -> None:
    assert [readable(name) for name in ("C++", "3.14", "_x", "a - b", "and/or", "iPhone")] == [
        "C++", "3.14", "_x", "a b", "and or", "i Phone",
    ]  # fmt: skip


def test_two_lines_say_what_was_chosen() -> None:
    table = {"no": [*range(24)], "text": TEXTS, "label": ["a b", "b"] * 12}
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    first, second = in_two_lines(Prompt.for_rows(rows), columns_of(rows), 5, 24)
    assert first == (
        "answers: 'label' (2 labels); reads: 'text'; left out: 'no' (the row's number)"
    )
    assert second == (
        "template: '[P*20] {text} [P*20] Type: [MASK]'; words: a b=a b, b=b; 5 of 24 examples are "
        "set aside to choose with"
    )


def chosen(*names: str, known: str) -> dict[str, tuple[str, ...]] | None:
    """Words for labels of these names, with a tokenizer that knows some words, else letters."""
    numbers = {word: n for n, word in enumerate(known.split())}
    letters = {chr(n): 1000 + n for n in range(0x10000)}

    def tokens(word: str) -> tuple[int, ...]:
        return (numbers[word],) if word in numbers else tuple(letters[c] for c in word)

    texts = {number: word for word, number in {**letters, **numbers}.items()}
    of = {name: name for name in names}
    columns = columns_of([{"text": "t", "label": "l"}], "label")
    parts = telling_words(of, [], columns)
    return one_token_words(of, parts, tokens, texts.__getitem__)


@pytest.mark.parametrize(
    ("names", "known", "words"),
    [
        (["good", "bad"], "good bad", ["good", "bad"]),
        (["Good", "bad"], "good bad", ["good", "bad"]),
        (["card lost", "card"], "card lost", ["lost", "card"]),
        (["top up failed", "top up"], "top up failed", ["failed", "top"]),
        (["card arrival", "card linking"], "card arrival", ["arrival", "card"]),
        (["Spam", "spam"], "Spam spam", ["Spam", "spam"]),
        (["old Card", "Card"], "Card card", ["card", "Card"]),
        (["cash or card fee", "lost card"], "cash card fee or lost", ["cash|fee", "lost"]),
        (["lost luggage", "luggage"], "lost luggage", ["lost", "luggage"]),
        (["red blue grey teal"], "red blue grey teal", ["blue|grey|teal"]),
        (["東京", "京都"], "good", ["A", "B"]),
        # Letters are for labels that can have no word, not for those of which another must move.
        (
            ["status card", "status 京", "card flight", "京都"],
            "status card flight",
            ["card", "status", "flight", "A"],
        ),
    ],
)
def test_each_label_gets_words_of_one_token(names: list[str], known: str, words: list[str]) -> None:
    assert ["|".join(of) for of in (chosen(*names, known=known) or {}).values()] == words


def test_of_a_name_in_capitals_and_in_small_letters_that_counts_which_begins_with_more() -> None:
    ids = {"NEUTRAL": (1,), "ENTAILMENT": (2, 9), "EN": (2,)}
    ids |= {"entailment": (3, 4), "entail": (3,)}
    texts = {1: "NEUTRAL", 2: "EN", 3: "entail"}
    names = {label: label for label in ("ENTAILMENT", "NEUTRAL")}
    parts = {label: (label,) for label in names}
    words = one_token_words(names, parts, lambda word: ids.get(word, ()), texts.__getitem__)
    assert words == {"ENTAILMENT": ("entail",), "NEUTRAL": ("NEUTRAL",)}


def test_labels_that_begin_alike_stay_apart_and_many_find_words() -> None:
    many = [f"intent {n}" for n in range(77)]
    pairs = " ".join(f"{a}{b}" for a in "ABC" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    words = chosen(*many, known=f"intent {pairs}") or {}
    assert list(words) == many and len(set(words.values())) == 77
    assert chosen(*many, known="intent") is None


def test_what_a_tokenizer_does_not_know_stands_for_no_label() -> None:
    """WordPiece has one id for all that it does not know."""
    tokenizer, prompt = tiny.tokenizer("wordpiece"), prompt_for(["☃☃", "paris"])
    Renderer(tokenizer, prompt, "masked", 128)
    ids = [
        tokenizer(word, add_special_tokens=False)["input_ids"] for (word,) in prompt.labels.values()
    ]
    assert all(len(of_word) == 1 and of_word[0] != tokenizer.unk_token_id for of_word in ids)


def test_a_tokenizer_settles_the_words_once() -> None:
    prompt = prompt_for(["paris", "rome italy"])
    assert words_of(prompt)["rome italy"] == "rome italy"
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    words = words_of(prompt)
    assert list(words) == ["paris", "rome italy"] and words["rome italy"] != "rome italy"
    example = renderer({"text": "x", "label": "paris"})
    assert len(example.sequences) == 1 and len(set(example.label_ids)) == 2
    other = Renderer(tiny.tokenizer("wordpiece"), prompt, "masked", 128)
    assert words_of(prompt) == words and len(other.labels) == 2


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_words_of_every_kind_of_tokenizer_are_one_row(kind: str) -> None:
    prompt = prompt_for(["rain_in_oslo", "capital", "naïve", "москва"])
    renderer = Renderer(tiny.tokenizer(kind), prompt, "causal", 128)
    assert len(renderer({"text": "x", "label": "capital"}).sequences) == 1


def test_a_label_with_spaces_around_is_the_label() -> None:
    prompt = prompt_for(["spam", "ham"])
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    assert renderer({"text": "x", "label": " spam "}).label == 0
