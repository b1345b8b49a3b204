"""JSON that every client can read, whatever a prompt's files or a model's numbers hold."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse


class Json(JSONResponse):
    """A response in ASCII: half a surrogate pair is an escape, and what is not finite is null."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(_finite(content), separators=(",", ":")).encode()


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(_finite(value))}\n\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
