"""A saved prompt to a repository of the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from ..errors import PtuningError


def upload(
    save: Callable[[str], None], repository: str, *, private: bool | None, **options: Any
) -> str:
    """Upload what `save` writes into a folder; gives the address of the commit.

    Raises:
        PtuningError: no connection, no permission, or no such name.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        try:
            api = HfApi(**options)
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=name, folder_path=folder))
        except Exception as error:  # the hub's, httpx's and the system's many kinds
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise PtuningError(
                f"cannot upload to {repository!r} ({type(error).__name__}: {reason}); check "
                "the connection, the name and who is logged in (hf auth whoami)"
            ) from error
