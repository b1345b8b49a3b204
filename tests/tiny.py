"""Tiny random models and tokenizers trained on a few sentences: real classes, no download."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ptuning.backbone.base_model import BaseModel
from ptuning.forward import scoring
from ptuning.forward.batching import Batching
from ptuning.forward.engine import Engine
from ptuning.rendering.collate import Batch
from ptuning.rendering.render import Rendered, Renderer

TEXTS = [
    "The capital of France is Paris. The capital of Italy is Rome!",
    "Question: does it rain in Oslo? Answer: yes, it does.",
    "Berlin, Madrid, Lisbon and Vienna are cities of Europe; Ottawa is not.",
    "She wrote [P] and {braces} and <|odd|> marks in 2024, e.g. 3.14 or 100%.",
    "naïve café Zürich São Paulo 東京 москва",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
TOKENIZERS = ("byte_bpe", "metaspace_always", "metaspace_first", "metaspace_never", "wordpiece")


@functools.cache
def _trained(kind: str) -> Tokenizer:
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS)
    else:
        scheme = kind.removeprefix("metaspace_")
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


def tokenizer(kind: str = "byte_bpe", *, bos: bool = False, around: bool = False) -> Any:
    """A fast tokenizer; `bos` puts ``<s>`` in front, `around` ``<s> … </s>`` as BERT does."""
    inner = Tokenizer.from_str(_trained(kind).to_str())
    ids = [(name, inner.token_to_id(name)) for name in ("<s>", "</s>")]
    if bos or around:
        single = "<s> $A </s>" if around else "<s> $A"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )


class WithoutTokens:
    """A tokenizer to which nothing can be added, as mistral-common's in transformers."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.eos_token_id = inner.eos_token_id

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)

    def __len__(self) -> int:
        return len(self.inner)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.inner.get_vocab())

    def add_tokens(self, *args: Any, **options: Any) -> int:
        raise NotImplementedError("`add_tokens` is not implemented")


_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SMALL, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _SMALL),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_SMALL, "max_position_embeddings": 130, "type_vocab_size": 1},
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_SMALL, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1}
        | {"sep_token_id": 2, "initializer_range": 0.2, "initializer_cutoff_factor": 3.0},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
}
CAUSAL = ("llama", "gpt2", "gemma2", "opt")
MASKED = ("bert", "roberta", "modernbert")
SEQ2SEQ = ("t5", "bart")


@contextmanager
def on_cpu() -> Iterator[None]:
    """All runs on the CPU meanwhile though there is a GPU, here and in processes that start: for
    what only a CPU promises, such as equal bits."""
    change = {"ACCELERATE_USE_CPU": "true", "PTUNING_DEVICE": "cpu"}
    before = {name: os.environ.get(name) for name in change}
    os.environ.update(change)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        AcceleratorState._reset_state(reset_partial_state=True)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a model's weights on the CPU: a training may have moved the model to a GPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def model(family: str = "llama", *, vocab_size: int = 400, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in eval mode; dropout stays on in its config, as in real ones."""
    config_name, model_name, values = FAMILIES[family]
    config = getattr(transformers, config_name)(vocab_size=vocab_size, **{**values, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, model_name)(config).eval()


def engine(model: Any, tokenizer: Any = None, store: Any = None, plain: bool = False) -> Engine:
    """An engine that keeps prefixes in `store`, if there is one."""
    made = Engine(BaseModel.of(model, tokenizer), 0, plain=plain)
    made.store = store
    return made


def batch(model: Any, renderer: Renderer, examples: list[Rendered], first_ids: list[int]) -> Batch:
    """Examples of one member as a batch, each with the first id of its own prompt."""
    base = BaseModel.of(model, renderer.tokenizer)
    made = Batching.of(base)([(e, n) for n, e in enumerate(examples)], first_ids)
    return replace(made, member=torch.zeros_like(made.member)).to(base.device)


def score(
    model: Any, renderer: Renderer, examples: list[Rendered], first_id: int, size: int
) -> tuple[float, float]:
    """Accuracy and loss of a prompt, every row computed as a whole."""
    return scoring.score(
        engine(model, renderer.tokenizer, plain=True), renderer, examples, first_id, size
    )
