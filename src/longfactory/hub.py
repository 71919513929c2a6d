"""Whether the Hugging Face hub can be reached at all, so that a machine without a network is told
at once.
"""

from __future__ import annotations

import errno
import functools
import socket
import time

_REFUSED = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_WAITS = (1.0, 2.0)


@functools.cache
def unreachable() -> str | None:
    """Why no connection to the hub can be made; None where there is one, or where it is only slow.

    A name that nobody knows and a connection that is refused are tried three times in 3 s;
    huggingface_hub would try a file that is not in its cache six times in 24 s. Whatever merely
    takes long is left to that library's own time limits. The answer is kept: one question a
    process.
    """
    import huggingface_hub

    begun = time.monotonic()
    for wait in (*_WAITS, None):
        try:
            huggingface_hub.get_session().head(huggingface_hub.HfApi().endpoint, timeout=2.0)
            return None
        except Exception as error:  # httpx's or httpx2's own, by the version of huggingface_hub
            reason = _refusal(error)
        if reason is None or wait is None or time.monotonic() - begun > sum(_WAITS):
            return reason
        time.sleep(wait)
    return None


def _refusal(error: BaseException | None) -> str | None:
    """What the system said, if it said that there is no way to the other machine."""
    while error is not None:
        if isinstance(error, socket.gaierror) or (
            isinstance(error, OSError) and error.errno in _REFUSED
        ):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
