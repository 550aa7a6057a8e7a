"""Secrets do not leave the process: what is printed or written passes through here."""

import os
import re
from typing import Any

HIDDEN = "***"
NAMES = re.compile(r"(key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
CREDENTIALS_IN_URL = re.compile(r"(\w+://)[^\s'\"]+@")
IN_HEADER = (
    re.compile(r"(\bAuthorization['\"]?\s*[:=]\s*['\"]?(?:Bearer|Basic)\s+)\S+", re.IGNORECASE),
    re.compile(r"(\bBearer\s+)(?=\S*\d|\S*[a-z][A-Z])[\w+/=.~-]{8,}"),
    re.compile(r"(\bBasic\s+)(?=\S*\d|\S*[a-z][A-Z])(?:[A-Za-z0-9+/=]{4}){3,}(?![\w+/=.-])"),
)
"""Without the header's name only what looks like a token: a file may be called `Basic reviews.csv`."""
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
    for pattern in IN_HEADER:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return NAMED_VALUE.sub(rf"\1{HIDDEN}", text)


def redact_values(content: Any) -> Any:
    """Redact every text in dictionaries and lists; numbers stay what they are."""
    if isinstance(content, dict):
        return {name: redact_values(value) for name, value in content.items()}
    if isinstance(content, list):
        return [redact_values(value) for value in content]
    return redact(content) if isinstance(content, str) else content
