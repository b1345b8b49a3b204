"""Prompts' vectors in a copy of a model, and an output head that never says a virtual token.

    embedding[id] = vector / scale        of an embedding that scales its rows (Gemma, BART)
    logit(id)     = logit + bias          where the model adds a bias to its logits: one of -10000
                  = h . mean(some rows)   else: a mean of logits, so never the largest of them

The rows are those of tokens that the model hardly ever says. The copy shares every tensor with the
model but those that grow. A head that is the embedding itself gets a matrix of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import device_of
from ..backbone.injection import SAFE_ID, Injector
from ..backbone.kinds import ModelKind, kind_of
from ..backbone.lookups import check_fits, input_embedding, second_table
from ..backbone.modes import eval_mode
from ..backbone.traits import (
    embedding_scale,
    engines_tie_the_head,
    output_bias,
    output_head,
    rows_beyond,
)
from ..backbone.upstream import is_offloaded, uncompiled
from ..errors import InputError

_NEVER = -1e4
"""A bias that float16 can hold and whose exponential is 0."""
_FEW, _ASKED = 64, 256
"""Tokens whose rows are averaged, and tokens behind which they are the least likely."""


@torch.no_grad()
def with_rows(
    model: nn.Module, ids: Sequence[int], vectors: Tensor, real: Sequence[int]
) -> tuple[Any, bool]:
    """A copy of a model whose embedding has `vectors` at `ids`; it shares all other weights.

    Args:
        model: stays as it is; attached prompts are not in the copy.
        ids: of the virtual tokens.
        vectors: ``(len(ids), embedding width)``, as a prompt has them.
        real: ids of the tokenizer's other tokens.

    Returns:
        The copy; and whether its head stays the embedding, so that engines have to be told which
        ids to suppress.

    Raises:
        InputError: embedding or head are quantized or offloaded, or not of one vocabulary.
    """
    _check(model)
    unlikely = [] if output_bias(model) is not None and _is_tied(model) else _unlikely(model, real)
    twin = _twin(uncompiled(model))
    modules = Injector(twin).modules
    head: Any = output_head(twin)
    embedding = modules[0]
    beyond = rows_beyond(model)
    known = embedding.num_embeddings - beyond
    rows = max(known, max(ids) + 1)
    where = torch.tensor(ids, device=embedding.weight.device)
    _grow(embedding.weight, rows + beyond)
    for module in modules:
        module.num_embeddings = rows + beyond
        values = vectors.to(embedding.weight.device) / embedding_scale(module)
        check_fits(values, embedding.weight.dtype)
        embedding.weight[where] = values.to(embedding.weight.dtype)
    _check_rows(modules, where, vectors)
    _second_lookups(twin, rows, where)
    _tell_size(twin, rows, [*modules, head])
    new = {*range(known, rows)}  # tokens that the tokenizer had and the model had not, too
    quiet = torch.tensor(sorted({*ids, *new}))
    if _quiet_head(twin, embedding, head, rows, quiet, unlikely):
        lost = sorted(new.difference(ids))
        embedding.weight[lost] = _mean(embedding.weight, unlikely)
        return twin, True
    return twin, False


def _check(model: nn.Module) -> None:
    places: dict[str, Any] = {
        "embedding": input_embedding(model),
        "output head": output_head(model),
    }
    if isinstance(places["output head"], nn.Embedding):
        raise InputError(
            f"{type(model).__name__} answers with its embedding itself and has no head that could "
            "be kept from saying virtual tokens, so prompts cannot be merged into it, only attached"
        )
    for what, module in places.items():
        weight = module.weight
        if is_offloaded(module) or (isinstance(weight, Tensor) and weight.is_meta):
            raise InputError("the model is offloaded; load it into memory to merge prompts into it")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise InputError(
                f"the model's {what} is quantized ({type(weight).__name__}), so that it takes no "
                f"new rows; quantize it without its embedding and its output head"
            )
    read, said = (len(module.weight) for module in places.values())
    if said != read - rows_beyond(model):
        raise InputError(
            f"the model reads {read} ids and answers with {said}: its answers have a vocabulary of "
            "their own, so prompts cannot be merged into it, only attached"
        )


def _twin(model: nn.Module) -> Any:
    """A copy of the modules around the same storages; no tensor is copied.

    They are objects of their own, so that the copy's can grow.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        own = nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = own if type(tensor) is nn.Parameter else tensor
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    injector = Injector.of(twin)
    while injector is not None and injector.spans:
        injector.remove(injector.spans[0])
    _forget_gguf(twin)
    return twin


def _forget_gguf(twin: Any) -> None:
    """A model read from a GGUF file counts as quantized, though its weights are plain: then it
    could not be saved."""
    quantized: Any = getattr(twin.config, "quantization_config", None) or {}
    told = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if told.get("quant_method") == "gguf":
        del twin.config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(twin).pop(name, None)


def _grow(tensor: Tensor, size: int, dim: int = 0) -> None:
    """Give a tensor a storage of its own with `size` entries, wherever it is used."""
    shape = list(tensor.shape)
    shape[dim] = size
    grown = tensor.new_zeros(shape)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    tensor.data = grown


def _check_rows(modules: list[nn.Embedding], ids: Tensor, vectors: Tensor) -> None:
    for module in modules:
        expected = vectors.to(module.weight.device)
        error = (module(ids).float() - expected).abs().max()
        if error > 0.02 * expected.abs().max().clamp(min=1e-6):
            raise InputError(
                f"{type(module).__name__} makes something of its rows that cannot be undone, so "
                "prompts cannot be merged into this model, only attached"
            )


def _second_lookups(twin: Any, rows: int, ids: Tensor) -> None:
    """Gemma 4 and DeepSeek V4 look ids up again: virtual tokens get there what an attached prompt's
    get."""
    for module in Injector(twin).second_lookups:
        table = second_table(module)
        size = max(rows, len(table))
        _grow(table, size)
        table[ids] = table[SAFE_ID].clone()
        if isinstance(module, nn.Embedding):
            module.num_embeddings = size
        config = twin.config.get_text_config()
        if hasattr(config, "vocab_size_per_layer_input"):
            config.vocab_size_per_layer_input = size


def _tell_size(twin: Any, rows: int, grown: Sequence[nn.Module]) -> None:
    """Tell the modules, and the configurations of those around what grew: encoder and decoder may
    have each its own."""
    old = twin.config.get_text_config().vocab_size
    around = [m for m in twin.modules() if any(one in grown for one in m.modules())]
    configs = [twin.config.get_text_config(), *(getattr(m, "config", None) for m in around)]
    for one in [*configs, *twin.modules()]:
        if getattr(one, "vocab_size", None) == old:
            one.vocab_size = rows


def _quiet_head(
    twin: Any, embedding: nn.Embedding, head: Any, rows: int, ids: Tensor, unlikely: list[int]
) -> bool:
    """See to it that these ids are never said; True where the head cannot."""
    tied, bias = _is_tied(twin), output_bias(twin)
    around = twin.get_submodule(_name_in(twin, head).rpartition(".")[0])
    for module in around.children():  # MobileBERT's head has a second part, on its side
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if module.in_features == head.out_features:
            _grow(module.weight, rows, dim=1)
            module.in_features = rows
    if not tied:
        _grow(head.weight, rows)
    head.out_features = rows
    if bias is not None:
        _grow(bias, rows, dim=bias.dim() - 1)
        copies = getattr(around, "bias", None)  # BERT's and RoBERTa's, if not tied
        if isinstance(copies, Tensor) and copies is not bias:
            _grow(copies, rows)
        bias[..., ids.to(bias.device)] = _NEVER
    elif tied and engines_tie_the_head(twin):
        return True
    elif tied:
        _untie(twin, embedding, head)
    if not (tied and bias is not None):
        head.weight[ids.to(head.weight.device)] = _mean(head.weight, unlikely)
    return False


def _mean(weight: Tensor, rows: list[int]) -> Tensor:
    return weight[rows].float().mean(0).to(weight)


def _unlikely(model: Any, real: Sequence[int]) -> list[int]:
    """The tokens that a model thinks least likely wherever they are asked for.

    It is asked behind each of a few hundred of its own tokens, which stand evenly in its
    vocabulary; what is low behind these stays low in real text, and a mean can never win anyway.
    """
    head: Any = output_head(model)
    known = torch.tensor([i for i in real if i < head.weight.shape[0]])
    evenly = torch.linspace(0, len(known) - 1, _ASKED, dtype=torch.float32).long()
    asked = known[evenly].view(-1, 32)
    inputs = {"input_ids": asked.to(device_of(model))}
    if kind_of(model) is ModelKind.SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with eval_mode(model):
        shares = model(**inputs).logits.float().log_softmax(-1)
    most = shares.flatten(0, 1).max(0).values.cpu()[known]
    return known[most.topk(min(_FEW, len(known)), largest=False).indices].tolist()


def _untie(twin: Any, embedding: nn.Embedding, head: nn.Module) -> None:
    """Give the head a matrix of its own.

    Where other embeddings are tied as well (T5) the configuration goes on saying so: transformers
    ties nothing that a file has twice and unlike, and T5 reads its scale there.
    """
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    name = f"{_name_in(twin, head)}.weight"
    twin.all_tied_weights_keys = {k: v for k, v in twin.all_tied_weights_keys.items() if k != name}
    if not twin.all_tied_weights_keys:
        for config in (twin.config, twin.config.get_text_config()):
            config.tie_word_embeddings = False


def _is_tied(model: nn.Module) -> bool:
    return output_head(model).weight is input_embedding(model).weight  # type: ignore[union-attr]


def _name_in(twin: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in twin.named_modules() if other is module)
