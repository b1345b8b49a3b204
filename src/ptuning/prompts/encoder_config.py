"""``PromptEncoderConfig``: the settings of a prompt encoder, with the reference's names and JSON.

Field names, order, defaults and the file ``adapter_config.json`` equal those of PEFT 0.21.2, so a
configuration written by either library is read by the other. The encoder types ``NONE``
(embeddings only), ``RESIDUAL`` and ``MIXTURE`` are this project's own; `reference_dict` writes them
in the form that PEFT reads.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from .. import formats, places, storage
from ..data.values import plain
from ..errors import InputError, PromptFileError, warn
from .prompt_settings import MOST, share
from .recognised import Recognised
from .task import at_least_one, check_type, one_of

CONFIG_NAME = "adapter_config.json"
REFERENCE_VERSION = "0.21.2"
"""The PEFT release whose files and behaviour this package reproduces."""
_HUB_OPTIONS = (
    "revision",
    "cache_dir",
    "token",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
)
_COUNTS = (
    "num_virtual_tokens",
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
    "encoder_hidden_size",
    "encoder_num_layers",
)
_TEXTS = ("peft_version", "base_model_name_or_path", "revision")


class PeftType(enum.StrEnum):
    """The adaptation method; P-tuning is the only one here."""

    P_TUNING = "P_TUNING"


class TaskType(enum.StrEnum):
    """What the base model is used for (the reference's names)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network behind the encoder's embedding; ``NONE`` trains the embedding itself."""

    MLP = "MLP"
    LSTM = "LSTM"
    NONE = "NONE"
    RESIDUAL = "RESIDUAL"
    MIXTURE = "MIXTURE"


@dataclass
class PromptEncoderConfig(Recognised):
    """Configuration of a `PromptEncoder` (fields and JSON of the reference).

    Args:
        task_type: a `TaskType` or its name.
        peft_type: always ``P_TUNING``; another method's name is an error.
        auto_mapping: names the base model's class for custom models; kept as it is.
        peft_version: version that wrote the file; by default the reference release.
        base_model_name_or_path: hub name or folder of the base model.
        revision: revision of the base model.
        inference_mode: build only the embedding, without the network behind it.
        num_virtual_tokens: virtual tokens per submodule.
        token_dim: width of the base model's input embedding.
        num_transformer_submodules: 2 for encoder-decoder models in the reference, else 1.
        num_attention_heads: of the base model; kept as it is.
        num_layers: of the base model; kept as it is.
        modules_to_save: further modules that are trained and saved.
        encoder_reparameterization_type: ``MLP``, ``LSTM``, ``NONE``, ``RESIDUAL`` or ``MIXTURE``.
        encoder_hidden_size: width of the network; of a mixture the number of words.
        encoder_num_layers: layers of the LSTM; an MLP always has three linear layers.
        encoder_dropout: dropout between LSTM layers.

    Raises:
        InputError: a field has a value that no encoder can be built from.
    """

    peft_names: ClassVar[tuple[str, ...]] = ("PromptEncoderConfig",)

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        kind = getattr(self.peft_type, "value", self.peft_type)
        if kind not in (None, PeftType.P_TUNING):
            raise InputError(
                f"peft_type is {kind!s}, and this package has only P_TUNING: "
                "load that adapter with the library that made it"
            )
        self.peft_type = PeftType.P_TUNING
        if self.task_type is not None:
            self.task_type = _task_type(self.task_type)
        head, heads = self.encoder_reparameterization_type, PromptEncoderReparameterizationType
        head = one_of("encoder_reparameterization_type", head, tuple(heads))
        self.encoder_reparameterization_type = heads(head)
        if self.peft_version is None:
            self.peft_version = REFERENCE_VERSION
        for name in _COUNTS:
            setattr(self, name, plain(getattr(self, name)))
            at_least_one(name, getattr(self, name), MOST.get(name, 10**6))
        stacked = self.encoder_reparameterization_type is heads.LSTM
        at_least_one("encoder_num_layers", self.encoder_num_layers, optional=not stacked)
        check_type(self, str, *_TEXTS, optional=True)
        check_type(self, bool, "inference_mode")
        check_type(self, dict, "auto_mapping", optional=True)
        self.encoder_dropout = share("encoder_dropout", self.encoder_dropout)
        modules = self.modules_to_save or []
        if not isinstance(modules, list | tuple | set) or not all(
            isinstance(name, str) for name in modules
        ):
            raise InputError(f"modules_to_save is {modules!r}; expected a list of modules' names")
        if isinstance(modules, tuple | set):
            self.modules_to_save = list(modules)

    @property
    def is_prompt_learning(self) -> bool:
        """Always true: the base model's weights stay as they are."""
        return True

    @property
    def is_adaption_prompt(self) -> bool:
        """Always false; the reference's name of another method."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as plain JSON values where they are enumerations."""
        return {
            key: value.value if isinstance(value, enum.Enum) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def reference_dict(self) -> dict[str, Any]:
        """Like `to_dict`, with types that PEFT does not know written as ``MLP``.

        In inference mode it builds no network for ``MLP`` either, so the file means the same.
        """
        values = self.to_dict()
        if values["encoder_reparameterization_type"] not in ("MLP", "LSTM"):
            values["encoder_reparameterization_type"] = "MLP"
        return values

    def to_json(self) -> str:
        """The text of ``adapter_config.json``: the reference's keys, sorted, indented by two."""
        return json.dumps(self.reference_dict(), indent=2, sort_keys=True)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        auto_mapping_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if need be.

        Args:
            save_directory: the folder.
            auto_mapping_dict: written as ``auto_mapping`` if given.
            options: the reference's further arguments, without effect.
        """
        saved = self if auto_mapping_dict is None else self.replace(auto_mapping=auto_mapping_dict)
        storage.write_folder(places.named(save_directory), {CONFIG_NAME: saved.to_json().encode()})

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{**values, **changes})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Read ``adapter_config.json`` from a folder or a hub repository.

        Args:
            path: folder or repository.
            subfolder: of it.
            options: ``revision``, ``token``, ``cache_dir`` and so on for the hub; fields of the
                configuration, which take precedence over the file's; others have no effect.

        Raises:
            PromptFileError: there is no such file, or it is not a configuration of this method.
        """
        file = places.named(path) / (subfolder or "") / CONFIG_NAME
        storage.settle(file.parent)
        if not file.is_file():
            hub = {k: v for k, v in options.items() if k in _HUB_OPTIONS}
            file = _download(str(path), subfolder, hub)
        own = {f.name for f in dataclasses.fields(cls)} - set(_HUB_OPTIONS)
        changes = {k: v for k, v in options.items() if k in own}
        return cls.from_dict({**cls.from_json_file(file), **changes})

    @classmethod
    def from_json_file(cls, path: str | Path) -> dict[str, Any]:
        """The values in a configuration's file.

        Raises:
            PromptFileError: it is not readable, or holds no JSON object.
        """
        values = formats.read_json(Path(path))
        values.pop("runtime_config", None)  # never belongs in a file, says the reference
        return values

    @classmethod
    def from_peft_type(cls, **values: Any) -> Self:
        """Build a configuration from its fields (the reference's name for `from_dict`)."""
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a configuration; unknown keys (a newer version's) are ignored with a warning.

        Raises:
            PromptFileError: unknown keys and no ``peft_type``: another program's file.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and "peft_type" not in values:
            raise _NoConfigurationError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                f"{{'peft_type'}}. It has {sorted(values)}; give the folder of a saved adapter"
            )
        config = cls(**{key: value for key, value in values.items() if key in known})
        if unknown:
            warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are "
                "ignored. A newer version may have written them: upgrade to use them"
            )
        return config


class _NoConfigurationError(PromptFileError, TypeError):
    """Also a ``TypeError``, which the reference raises."""


def _task_type(value: str) -> TaskType:
    try:
        return TaskType(value)
    except ValueError:
        raise InputError(
            f"Invalid task type: '{value}'. Must be one of the following task types: "
            f"{', '.join(TaskType)}."
        ) from None


def _download(repository: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, CONFIG_NAME, subfolder=subfolder, **options))
    except Exception as error:
        raise PromptFileError(
            f"Can't find '{CONFIG_NAME}' at '{repository}', neither as a folder nor on the hub: "
            f"{error}"
        ) from error
