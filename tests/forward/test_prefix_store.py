"""The frozen prefix against its plain twin: the same losses and gradients, computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ptuning
from ptuning.errors import InputError
from ptuning.forward import prefix_store, scoring
from ptuning.forward.kv_pool import KeyValuePool
from ptuning.forward.prefix_store import PrefixStore, budgets
from ptuning.rendering.render import Rendered, Renderer, render_all
from ptuning.training.population import Member, Population
from ptuning.training.settings import parse_size

from .. import tiny

TEMPLATE = "Question about {country} and {more}: [P*3] is [P*2] [MASK]"
ROWS = [
    {"country": "France and the big cities of Europe", "more": "x" * n, "capital": "Paris"}
    for n in (1, 9, 30)
] + [{"country": "It", "more": "", "capital": "Rome is not"}]


def rendered(prompt: ptuning.Prompt, rows: list[Any]) -> tuple[Renderer, list[Rendered]]:
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    return renderer, render_all(renderer, rows, "training")


def losses_and_gradient(
    model: Any, prompt: ptuning.Prompt, rows: list[Any], store: PrefixStore | None
) -> tuple[Tensor, Tensor]:
    """Of two steps: what the store gives when it is empty, and when it is full."""
    renderer, examples = rendered(prompt, rows)
    owner = renderer.owner if renderer.compares else None
    member = Member(prompt, model, 0, [None] * renderer.count)
    with Population(tiny.engine(model, renderer.tokenizer, store), [member], owner) as population:
        losses = []
        for _ in range(2):
            batch = tiny.batch(model, renderer, examples, population.first_ids() * len(examples))
            loss = population.step(batch).sum()
            loss.backward()
            losses.append(loss.detach())
    gradient = torch.cat([p.grad.flatten() for p in member.parameters() if p.grad is not None])
    return torch.stack(losses), gradient


@pytest.mark.parametrize("size", [None, 2**10, 20 * 2**10])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_losses_and_gradients_are_the_plain_ones(family: str, size: int | None) -> None:
    model = tiny.model(family)
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    plain = losses_and_gradient(model, prompt, ROWS, None)
    store = PrefixStore(model, size)
    kept = losses_and_gradient(model, prompt, ROWS, store)
    assert store.computed >= len(ROWS)
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "words", [{"yes": "Paris", "no": "Rome"}, {"yes": "not a city", "no": "Ra"}]
)
def test_label_words_of_one_and_several_tokens(words: dict[str, str]) -> None:
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATE, answer="label", verbalizer=words)
    rows = [{**row, "label": "yes" if n % 2 else "no"} for n, row in enumerate(ROWS)]
    plain = losses_and_gradient(model, prompt, rows, None)
    store = PrefixStore(model)
    kept = losses_and_gradient(model, prompt, rows, store)
    assert store.computed == len(ROWS)
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=0)


def test_each_prefix_is_computed_once_and_never_changed() -> None:
    model = tiny.model("gemma2")  # its layers have windows
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    store = PrefixStore(model)
    losses_and_gradient(model, prompt, ROWS, store)
    assert store.pool is not None
    every = torch.arange(store.pool.capacity, device=store.pool.device)[None]
    kept = store.pool.read(every)
    losses_and_gradient(model, prompt, ROWS, store)
    assert store.computed == len(ROWS)
    assert store.bytes == sum(4 * half[:, :, 1:].numel() for layer in kept for half in layer)
    for before, after in zip(kept, store.pool.read(every), strict=True):
        assert all(map(torch.equal, before, after))


def test_what_was_admitted_first_stays_within_the_size() -> None:
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    store = PrefixStore(model, 20 * 2**10)
    losses_and_gradient(model, prompt, ROWS, store)
    first = list(store._kept)
    losses_and_gradient(model, prompt, ROWS, store)
    assert 0 < len(first) < len(ROWS) and list(store._kept) == first
    assert store.bytes <= 20 * 1024
    assert store.computed == len(ROWS) + 3 * (len(ROWS) - len(first))


def test_what_is_kept_on_the_host_is_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's memory is filled first; what the host keeps is computed once as well."""
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    plain = losses_and_gradient(model, prompt, ROWS, None)
    room = {"device": 20 * 2**10, "host": 2**30}
    monkeypatch.setattr(prefix_store, "budgets", lambda most, device: dict(room))
    store = PrefixStore(model)
    kept = losses_and_gradient(model, prompt, ROWS, store)
    places = [type(place) for place in store._kept.values()]
    assert places.count(int) and places.count(list) and len(places) == len(ROWS) == store.computed
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=0)


def test_what_comes_from_the_host_stands_behind_what_only_passes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    plain = losses_and_gradient(model, prompt, ROWS, None)
    room = {"device": 0, "host": 2**30}
    monkeypatch.setattr(prefix_store, "budgets", lambda most, device: dict(room))
    store = PrefixStore(model)
    losses_and_gradient(model, prompt, ROWS[:2], store)
    store._budgets = dict.fromkeys(room, 0)  # nothing more is kept
    both = losses_and_gradient(model, prompt, ROWS, store)
    assert [type(place) for place in store._kept.values()] == [list, list]
    torch.testing.assert_close(both, plain, atol=1e-5, rtol=0)


def test_room_for_what_is_expected_is_made_once() -> None:
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    stores = [PrefixStore(model), PrefixStore(model)]
    examples = rendered(prompt, ROWS)[1]
    tiny.engine(model, store=stores[1]).expect(examples)
    for store in stores:
        for row in ROWS:
            losses_and_gradient(model, prompt, [row], store)
    unexpected, expected = (store.pool for store in stores)
    assert unexpected is not None and expected is not None
    assert unexpected.version > expected.version == 1
    assert expected.capacity == 1 + stores[1].expected


@pytest.mark.parametrize(
    "template", ["[P*3] {country} and {more}: [MASK]", "Go: [P] {more} [MASK]"]
)
def test_a_short_prefix_is_not_worth_it(template: str) -> None:
    model = tiny.model("llama")
    store = PrefixStore(model)
    losses_and_gradient(model, ptuning.Prompt(template, answer="capital"), ROWS, store)
    assert store.computed == 0


def test_memory_that_ends_while_slots_are_made_leaves_none_too_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = KeyValuePool([(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 6))])  # two forms
    original, asked = Tensor.new_empty, []

    def short(self: Tensor, *size: int) -> Tensor:
        asked.append(size)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *size)

    monkeypatch.setattr(Tensor, "new_empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        pool.reserve(8, 1)
    assert pool.version == 1  # a plane has moved
    pool.reserve(8, 1)
    assert [plane.shape[1] for plane in pool.planes] == [8, 8]


def test_gradient_checkpointing_takes_the_plain_path() -> None:
    model = tiny.model("llama")
    model.gradient_checkpointing_enable()
    store = PrefixStore(model)
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    losses_and_gradient(model, prompt, ROWS, store)
    assert store.computed == 0


def test_training_and_evaluation_give_the_same_with_and_without() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = []
    for cache in ("off", "auto"):
        prompt = ptuning.Prompt(TEMPLATE, answer="capital")
        ptuning.train(
            model, tokenizer, prompt, ROWS, dev=ROWS, epochs=6, batch_size=3, prefix_cache=cache,
            gradient_accumulation=2,
        )  # fmt: skip
        prompts.append(prompt)
    off, auto = prompts
    torch.testing.assert_close(auto.vectors, off.vectors, atol=1e-5, rtol=0)
    assert auto.training == pytest.approx(off.training, abs=1e-5)


def test_scores_are_the_plain_ones() -> None:
    model = tiny.model("gpt2")
    prompt = ptuning.Prompt(TEMPLATE, answer="capital")
    renderer, examples = rendered(prompt, ROWS)
    member = Member(prompt, model, 0, [None] * renderer.count)
    with Population(tiny.engine(model, renderer.tokenizer), [member]) as population:
        first = population.first_ids()[0]
        store = PrefixStore(model)
        plain = tiny.score(model, renderer, examples, first, 2)
        engine = tiny.engine(model, renderer.tokenizer, store)
        got = scoring.score(engine, renderer, examples, first, 2)
        assert got == pytest.approx(plain)
        assert store.computed == len(ROWS)


def test_sizes_are_read_and_wrong_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_size("500M") == 500 * 2**20 and parse_size("2 GiB") == parse_size("2g") == 2**31
    assert parse_size("123") == 123 and parse_size("1.5K") == 1536
    assert budgets(1024, torch.device("cpu")) == {"device": 1024}
    assert budgets(None, torch.device("cpu"))["device"] > 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 2**20, 9 * 2**20))
    on_gpu = torch.device("cuda")
    assert budgets(2**20, on_gpu) == {"device": 2**20, "host": 0}
    assert budgets(10 * 2**20, on_gpu) == {"device": 4 * 2**20, "host": 6 * 2**20}
    assert budgets(None, on_gpu)["device"] == 4 * 2**20
    for wrong in ("much", "-1", "2X", ""):
        with pytest.raises(InputError, match="auto, off, or bytes"):
            ptuning.TrainSettings(prefix_cache=wrong)


@pytest.fixture
def without_sharing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a prediction on the plain path."""

    def run(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("ptuning.forward.prefix_store._SMALLEST", 10**9)
            return ptuning.predict_details(*args, **options)

    return run


def trained(template: str, width: int = 32, **options: Any) -> ptuning.Prompt:
    prompt = ptuning.Prompt(template, **options)
    prompt.set_count(sum(group.count for group in prompt.parsed.virtual))
    assert prompt.num_virtual_tokens is not None
    prompt.vectors = torch.randn(prompt.num_virtual_tokens, width)
    return prompt


def assert_alike(got: list[Any], expected: list[Any]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.answer == other.answer
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)


@pytest.mark.parametrize("family", tiny.CAUSAL)
@pytest.mark.parametrize(
    "options",
    [
        {"verbalizer": {"yes": "Paris", "no": "Rome"}},
        {"verbalizer": {"yes": "not a city", "no": "Ra"}},
        {"answer_tokens": 5},
    ],
    ids=["words", "several_tokens", "free"],
)
def test_predictions_with_a_shared_head_are_the_plain_ones(
    family: str, options: dict[str, Any], without_sharing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    width = model.get_input_embeddings().embedding_dim
    prompt = trained("[P*9] Is this so [P*2]: {country} and {more} [P] [MASK]", width, **options)
    computed: list[int] = []
    original = PrefixStore._compute

    def compute(self: PrefixStore, prefixes: Any, device: Any) -> Any:
        computed.append(len(prefixes))
        return original(self, prefixes, device)

    monkeypatch.setattr(PrefixStore, "_compute", compute)
    rows = [{k: v for k, v in row.items() if k != "capital"} for row in ROWS]
    got = ptuning.predict_details(model, tokenizer, prompt, rows, batch_size=3)
    assert computed, "the shared part was not used"
    assert_alike(got, without_sharing(model, tokenizer, prompt, rows, batch_size=3))


def prefixes_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Their lengths, as they are computed."""
    seen: list[int] = []
    original = PrefixStore._compute

    def compute(self: PrefixStore, prefixes: Any, device: Any) -> Any:
        seen.extend(map(len, prefixes))
        return original(self, prefixes, device)

    monkeypatch.setattr(PrefixStore, "_compute", compute)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_several_prompts_read_a_document_once(
    family: str, without_sharing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    words = {"yes": "Paris", "no": "Rome"}
    prompts = [
        trained("{more} about {country} [P*3] city? [MASK]", verbalizer=words),
        trained("{more} about {country} [P*5] [MASK]", answer_tokens=3),
        trained("{more} about {country} [P*2] long [P] [MASK]", verbalizer=words),
    ]
    rows = [{"country": "France and Italy and Spain", "more": "word " * n} for n in (3, 8)]
    seen = prefixes_computed(monkeypatch)
    got = ptuning.predict_details(model, tokenizer, prompts, rows)
    assert len(seen) == len(rows)
    for one, prompt in zip(got, prompts, strict=True):
        assert_alike(one, without_sharing(model, tokenizer, prompt, rows))
    answers = ptuning.predict(model, tokenizer, prompts, rows)
    assert answers == [[prediction.answer for prediction in one] for one in got]


def test_words_behind_a_document_that_differ_do_not_have_it_read_again(
    without_sharing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    words = {"yes": "Paris", "no": "Rome"}
    tasks = [
        trained("{more} of {country} city? [P*3] [MASK]", verbalizer=words),
        trained("{more} of {country} capital: [P*2] [MASK]", answer_tokens=2),
        ptuning.Task("{more} of {country} is that so? [MASK]", verbalizer=words),
        ptuning.Task("The text: {more} of {country} [MASK]", verbalizer=words),
    ]
    rows = [{"country": "France", "more": "word " * n} for n in (20, 30)]
    seen = prefixes_computed(monkeypatch)
    got = ptuning.predict_details(model, tokenizer, tasks, rows)
    assert len(seen) == 2 * len(rows)  # the documents, and where one task has words before it
    for one, task in zip(got, tasks, strict=True):
        assert_alike(one, without_sharing(model, tokenizer, task, rows))


def test_instructions_that_only_begin_alike_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task's own is computed once for all rows; their common part would save less."""
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    words = {"yes": "Paris", "no": "Rome"}
    begin = "word " * 10
    tasks = [
        trained(begin + rest * 10 + "[P*2] {country} [MASK]", verbalizer=words)
        for rest in ("city ", "capital ")
    ]
    seen = prefixes_computed(monkeypatch)
    ptuning.predict(model, tokenizer, tasks, [{"country": "France"}, {"country": "Italy"}])
    assert len(seen) == 2 and min(seen) > 11
