"""Rows of prediction: many texts classified by one prompt or by several mixed, and generation.

Both sides begin with text and end with answers: tokenizing, batches and reading the device count.
PEFT's side is the loop that its users write: batches of one adapter, padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import peft
import torch
from limits import Part
from sides import VIRTUAL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from workloads import Workload

import ptuning
from ptuning import Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.forward.engine import Engine
from ptuning.inference.answering import Question, answers

WORDS = {"yes": "w330", "no": "w441"}
Rows = list[dict[str, str]]


class Attached:
    """Prompts on a model until `close`; what `bench` asks of a side."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt]):
        self._stack = ExitStack()
        self.attachment = self._stack.enter_context(ptuning.attach(model, tokenizer, *prompts))
        self.population, self.notes = self, list[str]()

    def close(self) -> None:
        self._stack.close()


class Adapters:
    """PEFT's prompts on a model, with those vectors as prompts of ours."""

    def __init__(self, base: Any, tokenizer: Any, count: int):
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=VIRTUAL,
            encoder_hidden_size=base.config.hidden_size,
        )
        self.model = peft.get_peft_model(base, config, adapter_name="p0")
        for number in range(1, count):
            self.model.add_adapter(f"p{number}", config)
        self.model.to(base.device).eval()
        self.tokenizer = tokenizer

    def prompts(self, **options: Any) -> list[Prompt]:
        """The same as prompts of ours."""
        made = []
        for name in self.model.prompt_encoder:
            prompt = Prompt(f"[P*{VIRTUAL}] {{text}} [MASK]", **options)
            prompt.vectors = self.model.get_prompt_embedding_to_save(name).detach().float().cpu()
            made.append(prompt)
        return made

    def inputs(self, rows: Rows) -> Any:
        """A batch on the device."""
        texts = [row["text"] for row in rows]
        return self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)

    @torch.no_grad()
    def shares(self, rows: Rows, adapter: str, size: int) -> list[list[float]]:
        """The labels' probabilities for each text."""
        self.model.set_adapter(adapter)
        ids = self.tokenizer.convert_tokens_to_ids(list(WORDS.values()))
        found = []
        for at in range(0, len(rows), size):
            logits = self.model(**self.inputs(rows[at : at + size])).logits[:, -1, ids]
            found += logits.float().softmax(-1).tolist()
        return found

    @torch.no_grad()
    def written(self, rows: Rows, tokens: int) -> list[str]:
        """Text behind each."""
        given = self.inputs(rows)
        pad = self.tokenizer.pad_token_id
        ids = self.model.generate(
            **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=pad
        )
        new = ids[:, given["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))


def made_up_tokenizer(vocabulary: int) -> Any:
    """Every word ``w17`` is one token."""
    words = {"<pad>": 0, "<end>": 1, **{f"w{n}": n for n in range(2, vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def made_up_rows(vocabulary: int, texts: int, tokens: int) -> Rows:
    """Texts of so many random words."""
    numbers = torch.randint(100, vocabulary - 100, (texts, tokens)).tolist()
    return [{"text": " ".join(f"w{n}" for n in row)} for row in numbers]


def classify_many(
    base: Any, copy: Any, texts: int, tokens: int = 64, prompts: int = 1, size: int = 32
) -> Workload:
    """Texts with two labels; of several prompts each has its share of the texts, mixed."""
    tokenizer = made_up_tokenizer(base.config.vocab_size)
    rows = made_up_rows(base.config.vocab_size, texts, tokens)
    theirs = Adapters(copy, tokenizer, prompts)
    ours = theirs.prompts(verbalizer=WORDS)
    side = Attached(base, tokenizer, ours)

    def mine() -> list[list[float]]:
        if prompts == 1:
            found = ptuning.predict_details(base, tokenizer, ours[0], rows, batch_size=size)
            return [list(prediction.probabilities.values()) for prediction in found]
        engine = Engine(BaseModel.of(base, tokenizer))
        questions: list[Any] = [None] * texts
        for number, prompt in enumerate(ours):
            renderer, first_id = engine.renderer(prompt), side.attachment.first_id(prompt)
            rendered = renderer.each(rows[number::prompts], "prediction", answered=False)
            questions[number::prompts] = [Question(renderer, one, first_id) for one in rendered]
        shares: list[list[float]] = [[]] * texts
        for number, prediction in answers(engine, questions, size):
            shares[number] = list(prediction.probabilities.values())
        return shares

    def other() -> list[list[float]]:
        shares: list[list[float]] = [[]] * texts
        for number in range(prompts):
            shares[number::prompts] = theirs.shares(rows[number::prompts], f"p{number}", size)
        return shares

    with torch.no_grad():
        difference = (torch.tensor(mine()) - torch.tensor(other())).abs().max()
    length = VIRTUAL + tokens
    return Workload(
        mine,
        other,
        float(difference),
        "both sides' probabilities",
        [
            Part(prompts * VIRTUAL, VIRTUAL / 2, 0, False),
            Part(texts * tokens, VIRTUAL + tokens / 2, 0, False),
        ],
        [Part(texts * length, length / 2, texts * length, False)],
        size * tokens,
        side,
    )


def generate(base: Any, copy: Any, texts: int = 8, tokens: int = 64, new: int = 32) -> Workload:
    """Greedy text behind a prompt and a text."""
    tokenizer = made_up_tokenizer(base.config.vocab_size)
    rows = made_up_rows(base.config.vocab_size, texts, tokens)
    theirs = Adapters(copy, tokenizer, 1)
    (prompt,) = theirs.prompts(answer_end=False, answer_tokens=new)
    side = Attached(base, tokenizer, [prompt])

    def mine() -> list[str]:
        return list(ptuning.predict(base, tokenizer, prompt, rows, batch_size=texts))

    def other() -> list[str]:
        return theirs.written(rows, new)

    unlike = [a != b.strip() for a, b in zip(mine(), other(), strict=True)]
    length = VIRTUAL + tokens
    steps = Part(texts * (new - 1), length + new / 2, texts * new, False)
    return Workload(
        mine,
        other,
        sum(unlike) / len(unlike),
        "both sides' texts (share of unlike ones)",
        [Part(texts * tokens, VIRTUAL + tokens / 2, 0, False), steps],
        [Part(texts * length, length / 2, texts * length, False), steps],
        texts * tokens,
        side,
    )
