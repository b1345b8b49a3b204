"""Loading a base model by hub name, folder, GGUF file, or the name of a fetched small model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..devices import best_device, device_called
from ..errors import InputError, PtuningError, in_one_line
from ..formats import read_json
from ..places import named
from ..storage import one_save, settle
from . import eight_bits
from .number_format import FULL, Choice, fastest
from .tokens import takes_tokens

AUTO, OWN = "auto", "own"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    AUTO: None,
    OWN: "auto",
}


def cache_folder() -> Path:
    """Where converted models are kept: ``PTUNING_CACHE``, else ``ptuning`` in the user's cache."""
    if own := os.environ.get("PTUNING_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptuning"


def load_model(
    name: str,
    *,
    dtype: str = FULL,
    device: str | None = None,
    frozen: str = eight_bits.OWN,
    gradients: bool = True,
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer.

    Args:
        name: hub name, local folder, local ``.gguf`` file, or a model that ``ptuning fetch`` knows.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``own`` for the checkpoint's own, or ``auto``
            for the one that the device multiplies fastest in (`choose_dtype`).
        device: such as ``cuda``; by default a GPU where there is one (`best_device`).
        frozen: ``int8`` or ``fp8`` puts the layers' weights into eight bits (`quantize`); ``own``
            leaves them in `dtype`.
        gradients: prompts are trained; without, a model in eight bits takes half of the memory.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        InputError: there is no such model, it has no language-model head, or it or the device is
            not made for eight bits; or there is no such device here.
    """
    import transformers

    named(name)
    name = os.fspath(name)  # as it is written: a hub name's slash stays one on Windows
    place = best_device() if device is None else device_called(device)
    eight_bits.check_frozen(frozen, place)
    chosen = choose_dtype(name, dtype, device=place).dtype
    source = _resolve(name)
    with _readable(name):
        # The model's own code never runs, whatever a prompt names as its base model.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = _auto_class(config)
        tokenizer = _extensible(
            transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False), source
        )
        _take_older_template(tokenizer, source, config)
        model = loader.from_pretrained(
            source, config=config, dtype=DTYPES[chosen], trust_remote_code=False
        )
    model.config.name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    eight_bits.quantize(model.eval(), frozen, gradients=gradients)  # what moves is small then
    return model.to(place), tokenizer


def load_as_saved(name: str, dtype: str = AUTO) -> tuple[Any, Any]:
    """As `load_model`, on the CPU, for what is written again: ``auto`` is the checkpoint's own.

    Args:
        name: of the model.
        dtype: another format.
    """
    return load_model(name, dtype=OWN if dtype == AUTO else dtype, device="cpu")


def choose_dtype(name: str, dtype: str = AUTO, *, device: torch.device | None = None) -> Choice:
    """The number format to load a model in; its weights are not read.

    Args:
        name: of the model, as for `load_model`.
        dtype: ``auto``, or another, which it is then.
        device: that will compute it; by default the best one.

    Raises:
        InputError: there is no such model or format.
    """
    import transformers

    check_dtype(dtype)
    if dtype != AUTO:
        return Choice(dtype)
    source = _resolve(name)
    with _readable(name):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = _auto_class(config)
        try:
            with torch.device("meta"):
                shapes = loader.from_config(config, trust_remote_code=False)
        except Exception:  # an architecture that cannot be made without its weights
            return Choice(FULL, "the sizes of this model are not known before it is loaded")
    return fastest(shapes, device or best_device(), cache_folder())


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say in one line why a model cannot be read.

    Raises:
        InputError: for every error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers, its tokenizers and torch have many kinds
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the model {name!r} needs code of its own, which is never run here; if you trust "
                "it, load it in Python with from_pretrained(..., trust_remote_code=True) and give "
                "model and tokenizer to ptuning.train or ptuning.predict"
            ) from error
        reason = in_one_line(error)
        # Of such a file safetensors says that it is not there.
        hidden = [path for path in Path(name).glob("*") if not os.access(path, os.R_OK)]
        if hidden:
            raise InputError(
                f"cannot load the model {name!r}: {hidden[0]} cannot be read; let this user read it"
            ) from error
        raise InputError(
            f"cannot load the model {name!r} ({reason}); give smollm2 or minilm (ptuning fetch), a "
            "folder with a transformers model, a .gguf file, or a hub name"
        ) from error


def check_dtype(dtype: str) -> None:
    """Refuse a name that is none of `DTYPES`.

    Raises:
        InputError: it is none.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def _resolve(name: str) -> str:
    path = Path(name).expanduser()
    for folder in (path, path.parent):  # a model trained with a prompt is part of that one's save
        settle(folder)
    if path.is_file():
        if not _is_gguf(path):
            raise InputError(f"{name} is a file and no GGUF file; give a model's whole folder")
        return str(converted_gguf(path))
    if path.suffix.lower() == ".gguf":
        raise InputError(f"{name} does not exist; give the path of a GGUF file")
    fetched = cache_folder() / name
    if not path.exists() and "/" not in name and (fetched / "config.json").is_file():
        return str(fetched)
    if not path.exists() and name in ("smollm2", "minilm"):
        raise InputError(f"{name} is not here yet; run: ptuning fetch {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            f"{name} is a folder without config.json; give the folder of a transformers model"
        )
    return str(path) if path.exists() else name


def _auto_class(config: Any) -> Any:
    """Of a model that reads images or sounds, too, the whole one, so that merging keeps what reads
    them."""
    import transformers

    kind, names = type(config), getattr(config, "architectures", None) or []
    in_two_parts = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    encodes = getattr(config, "is_encoder_decoder", False)
    known = in_two_parts if encodes else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    own: Any = known.get(kind, None)
    whole: Any = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING.get(kind, None)
    saved_own, saved_whole = (getattr(one, "__name__", None) in names for one in (own, whole))
    reads_more = whole is not None and (own is None or saved_whole)
    if not reads_more and (encodes or (own is None and kind in in_two_parts)):
        return transformers.AutoModelForSeq2SeqLM
    told = " ".join(names)
    masked = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and own is None
    if "ForMaskedLM" in told or "ForPreTraining" in told or masked:
        return transformers.AutoModelForMaskedLM
    answers = saved_own or saved_whole or any(p in told for p in ("LM", "Causal", "Conditional"))
    if told and not answers:
        raise InputError(
            f"the model is saved as {told}, which has no language-model head to answer with; give "
            "a causal, masked or encoder-decoder language model"
        )
    if reads_more:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def _extensible(tokenizer: Any, source: str) -> Any:
    """The tokenizer, or that of ``tokenizer.json``: where mistral-common is installed, transformers
    prefers its tokenizer, which takes no virtual tokens."""
    import transformers
    from transformers.utils.hub import cached_file

    if not takes_tokens(tokenizer):
        with suppress(OSError):  # there is none
            cached_file(source, "tokenizer.json")
            return transformers.PreTrainedTokenizerFast.from_pretrained(
                source, trust_remote_code=False
            )
    return tokenizer


def _take_older_template(tokenizer: Any, source: str, config: Any) -> None:
    """Older models that read images have their chat template in a file of the processor's."""
    import transformers
    from transformers.utils.hub import cached_file

    read = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if read and getattr(tokenizer, "chat_template", None) is None:
        with suppress(OSError):  # there is none
            found = Path(str(cached_file(source, "chat_template.json")))
            tokenizer.chat_template = read_json(found)["chat_template"]


def _is_gguf(path: Path) -> bool:
    """By its ending, or by its first bytes: Ollama's files have no ending."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def converted_gguf(path: Path) -> Path:
    """The folder of a GGUF file's weights in safetensors; converted once, then kept.

    It is in the cache under the file's name and a hash of its place, size and time.
    """
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    folder = cache_folder() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return made_once(folder, lambda staged: convert_gguf(path, staged))


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's weights and tokenizer as a transformers model into `folder`.

    Raises:
        InputError: gguf or transformers cannot read the file.
    """
    import transformers

    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
    except Exception as error:  # gguf and transformers raise many kinds for a file they cannot read
        raise InputError(f"cannot read the GGUF file {path}: {error}") from error
    # The loaded model counts as quantized and cannot be saved: move its weights to a plain one.
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    values["_name_or_path"] = path.stem
    plain = type(loaded)(type(loaded.config).from_dict(values))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    for name, number in _special_tokens(path).items():  # transformers 5.17 takes some for others
        if number < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    tokenizer.save_pretrained(folder)


def _special_tokens(path: Path) -> dict[str, int]:
    """The ids of those that a GGUF file names, by their names in transformers."""
    from gguf import GGUFReader

    named = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
    fields = GGUFReader(path).fields
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in named.items()}
    return {name: int(field.contents()) for name, field in found.items() if field is not None}


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made if it is not here: it takes its place only as a whole.

    Of several processes that want it at once one makes it, and the others wait.

    Args:
        folder: of a model, in the cache.
        make: fills a temporary folder.

    Raises:
        PtuningError: the cache cannot be written to.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not (folder / "config.json").is_file():
                with one_save(folder) as staged:
                    make(staged)
    except OSError as error:
        raise PtuningError(
            f"cannot write to the cache {folder.parent}: {error.strerror or error}; set "
            "PTUNING_CACHE to a folder with room"
        ) from error
    return folder
