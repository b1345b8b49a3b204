"""The folder of a merged model: an ordinary model's, with ``prompts.json`` in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import nn
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils.hub import cached_file

from .. import formats, places, storage
from ..backbone.eight_bits import frozen_format
from ..backbone.load import load_as_saved
from ..errors import InputError, PromptFileError, PtuningError
from ..rendering.merged_text import names_of
from .merged_tokenizer import free_names

PROMPTS, LOGIT_BIAS = "prompts.json", "logit_bias.json"
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_SETTINGS = "generation_config.json"
_NOT_OF_ALL = (
    _SETTINGS,
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
    *_PROCESSORS,
)
"""What not every model or tokenizer writes, and what engines read where it lies."""
_TOKENIZER_BYTES = 64 * 2**20
"""What is reckoned for tokenizer and descriptions."""


class Merged(NamedTuple):
    """A model with prompts in it.

    Attributes:
        model: with the prompts' rows; it shares all other weights with the model it was made from.
        tokenizer: with the prompts' virtual tokens, ``<|NAME:0|>`` and so on.
        prompts: what ``prompts.json`` says: name -> ``text`` (its fields in braces),
            ``virtual_ids``, ``labels`` and ``vectors`` (`merging.fingerprint`), and what a client
            has to make of the label words' log-probabilities (`merging.scaling`).
    """

    model: Any
    tokenizer: Any
    prompts: dict[str, dict[str, Any]]

    def save(self, folder: str | Path) -> None:
        """Write an ordinary model folder with ``prompts.json`` in it, as one save.

        Raises:
            InputError: the folder holds something else than a merged model, or nobody can write
                the model's quantized weights.
            PtuningError: there is no room, or it cannot be written.
        """
        folder = places.real(folder)
        check_free(folder)
        check_room(self.model, folder)
        old = [path.name for path in folder.glob("model*.safetensors*")] if folder.is_dir() else []
        old += [PROMPTS, LOGIT_BIAS, *_NOT_OF_ALL]
        try:
            with storage.one_save(folder, remove=old) as staged:
                _write_weights(self.model, staged)
                self.tokenizer.save_pretrained(staged)
                _copy_processors(self.model, staged)
                (staged / PROMPTS).write_bytes(formats.pack_json(self.prompts))
                if suppressed := _suppressed(self):
                    told = {str(index): -100 for index in suppressed}
                    (staged / LOGIT_BIAS).write_bytes(formats.pack_json(told))
        except safetensors.SafetensorError as error:
            raise PtuningError(f"cannot write to {folder}: {error}; free space there") from error

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "auto") -> Merged:
        """Read a merged model's folder, to add prompts to it or remove some.

        Raises:
            PromptFileError: it holds no merged model, or a damaged one.
        """
        folder = places.named(folder)
        if not holds_merged(folder):
            raise PromptFileError(
                f"{folder} holds no merged model ({PROMPTS} and config.json); give a folder that "
                "ptuning merge wrote"
            )
        with storage.reading(folder):
            table = formats.read_json(folder / PROMPTS)
            model, tokenizer = load_as_saved(str(folder), dtype)
        check_table(table, tokenizer, str(folder / PROMPTS))
        return cls(model, tokenizer, table)


def check_table(table: Mapping[str, Any], tokenizer: Any, place: str) -> None:
    """Refuse merged prompts whose virtual tokens the tokenizer has not where the table says.

    Args:
        table: `Merged.prompts`.
        tokenizer: the merged model's.
        place: where the table is from, for messages.

    Raises:
        PromptFileError: one has other ids, or no text or ids at all.
    """
    vocabulary = tokenizer.get_vocab()
    for name, entry in table.items():
        whole = isinstance(entry, Mapping) and isinstance(entry.get("text"), str)
        ids: Any = entry.get("virtual_ids") if whole else None
        tokens = names_of(name, len(ids)) if isinstance(ids, list) else []
        if not isinstance(ids, list) or ids != [vocabulary.get(token) for token in tokens]:
            raise PromptFileError(
                f"{place}: the prompt {name!r} and the tokenizer do not belong together; merge "
                "again"
            )


def holds_merged(folder: str | Path) -> bool:
    """The folder is a merged model's."""
    storage.settle(Path(folder))
    return (Path(folder) / PROMPTS).is_file() and (Path(folder) / "config.json").is_file()


def check_free(folder: str | Path) -> None:
    """Refuse a folder that holds something else than a merged model.

    Raises:
        InputError: it does.
    """
    if storage.holds_something(folder) and not holds_merged(folder):
        raise InputError(f"{folder} is not empty and holds no merged model; choose another folder")


def check_room(model: nn.Module, folder: Path) -> None:
    """Refuse a disk that cannot hold a model: it is written beside what is there before it takes
    its place.

    Raises:
        PtuningError: there is no room.
    """
    needed = sum(map(_bytes, [*model.parameters(), *model.buffers()])) + _TOKENIZER_BYTES
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PtuningError(
            f"the merged model needs {needed / 1e9:.1f} GB, and {folder} has room for "
            f"{free / 1e9:.1f} GB; free space there or choose another place"
        )


def _bytes(tensor: Any) -> int:
    """Of a tensor; a quantized one is made of others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _write_weights(model: Any, folder: Path) -> None:
    refused = InputError(
        "the model's quantized weights cannot be written; merge into the model without "
        "quantization, and quantize the merged folder when you load it"
    )
    if _is_packed(model) or frozen_format(model):
        raise refused
    settings = model.generation_config if model.can_generate() else None
    try:
        if settings is not None:
            model.generation_config = type(settings)()
        model.save_pretrained(folder)
        if settings is not None:  # as it is: transformers refuses to save some published ones
            settings.to_json_file(folder / _SETTINGS, keys_to_pop=["compile_config"])
    except (NotImplementedError, ValueError) as error:  # as transformers has it for each method
        if getattr(model, "hf_quantizer", None) is None:
            raise
        raise refused from error
    finally:
        if settings is not None:
            model.generation_config = settings


def _copy_processors(model: Any, folder: Path) -> None:
    """What engines prepare images or sounds by, as the base model has it."""
    if type(model.config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return
    for name in _PROCESSORS:
        with suppress(OSError, ValueError):  # it has no such file, or no place at all
            found = cached_file(model.config.name_or_path, name)
            shutil.copyfile(str(found), folder / name)


def _is_packed(model: nn.Module) -> bool:
    """bitsandbytes packs 4-bit weights anew when they first run on a CPU, and what it unpacks to
    save them is not what they were (0.50)."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def _suppressed(merged: Merged) -> list[int]:
    """Virtual ids that have to be suppressed: the head is tied."""
    config = getattr(merged.model, "generation_config", None)
    named = set(getattr(config, "suppress_tokens", None) or [])
    virtual = {i for entry in merged.prompts.values() for i in entry["virtual_ids"]}
    virtual |= set(merged.tokenizer.convert_tokens_to_ids(free_names(merged.tokenizer)))
    return sorted(named & virtual)
