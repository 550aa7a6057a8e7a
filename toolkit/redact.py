"""Secrets do not leave the process: what is printed or written passes through here."""

import os
import re
from typing import Any

HIDDEN = "***"
NAMES = re.compile(r"(key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
CREDENTIALS_IN_URL = re.compile(r"(\w+://)[^/\s@'\"]+@")
NAMED_VALUE = re.compile(
    r"(\w*(?:api_?key|_key|token|secret|password|passwd)['\"]?(?:\s*[=:]\s*| got )['\"]?)([^\s'\",}&]+)",
    re.IGNORECASE,
)
SHORTEST = 6
"""Shorter values of variables are no secrets, and would blot out ordinary text."""


def redact(text: str) -> str:
    """Hide values of secret variables, credentials in URLs, and values named like a secret."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    text = CREDENTIALS_IN_URL.sub(rf"\1{HIDDEN}@", text)
    return NAMED_VALUE.sub(rf"\1{HIDDEN}", text)


def redact_values(values: dict[str, Any]) -> dict[str, Any]:
    """Redact the texts among a dictionary's values."""
    return {
        name: redact(value) if isinstance(value, str) else value for name, value in values.items()
    }
