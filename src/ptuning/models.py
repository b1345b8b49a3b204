"""Loading a base model by hub name, folder, GGUF file, or the name of a fetched small model."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, PtuningError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


def cache_folder() -> Path:
    """Where converted models are kept: ``PTUNING_CACHE``, else ``ptuning`` in the user's cache."""
    if own := os.environ.get("PTUNING_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptuning"


def load_model(name: str, *, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """Load a language model and its tokenizer.

    Args:
        name: hub name, local folder, local ``.gguf`` file, or a model that ``ptuning fetch`` knows.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        device: such as ``cuda``; by default a GPU where there is one.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        InputError: there is no such model, or it has no language-model head.
    """
    import transformers

    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    source = _resolve(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        loader = _auto_class(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = loader.from_pretrained(source, config=config, dtype=DTYPES[dtype])
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load the model {name!r} ({reason}); give a hub name, a folder with a "
            "transformers model, or a .gguf file"
        ) from error
    model.config._name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    return model.eval().to(device or best_device()), tokenizer


def best_device() -> torch.device:
    """The accelerator (CUDA, MPS, XPU) where there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _resolve(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name} does not exist; give the path of a GGUF file")
        return str(converted_gguf(path))
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
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    names = " ".join(getattr(config, "architectures", None) or [])
    if "ForMaskedLM" in names or "ForPreTraining" in names:
        return transformers.AutoModelForMaskedLM
    if names and not ("LM" in names or "Causal" in names or "Conditional" in names):
        raise InputError(
            f"the model is saved as {names}, which has no language-model head to answer with; give "
            "a causal, masked or encoder-decoder language model"
        )
    return transformers.AutoModelForCausalLM


def converted_gguf(path: Path, folder: Path | None = None) -> Path:
    """The folder of a GGUF file's weights in safetensors; converted once, then kept.

    Args:
        path: the GGUF file.
        folder: where to keep it; by default in the cache, by the file's place, size and time.
    """
    if folder is None:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        folder = cache_folder() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    with staged_folder(folder) as staged:
        _convert(path, staged)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import transformers

    where: dict[str, Any] = {"gguf_file": path.name}
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
    tokenizer.save_pretrained(folder)


class staged_folder:
    """A temporary folder that takes its final place only if all goes well."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.staged = Path(tempfile.mkdtemp(prefix=".", dir=self.folder.parent))
        except OSError as error:
            raise PtuningError(
                f"cannot write to the cache {self.folder.parent}: {error.strerror}; set "
                "PTUNING_CACHE to a folder with room"
            ) from error
        return self.staged

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and not (self.folder / "config.json").is_file():
            self.staged.chmod(0o755)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(self.staged, self.folder)
        shutil.rmtree(self.staged, ignore_errors=True)
