"""Whether a server answers at all, asked before something waits for it for long."""

import socket
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

CONNECT_SECONDS = 5.0


def why_unreachable(url: str) -> str | None:
    """Return why the host of an address does not answer, or None if it does.

    Behind a proxy nobody knows before asking: None.
    """
    parts = urlparse(url)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return None
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
    except OSError as error:
        return f"{parts.hostname} does not answer ({error.strerror or error})"
    return None
