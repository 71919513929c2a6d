"""Known vulnerabilities of the packages of this environment, by pip-audit.

    python -m longfactory_dev.audit

Needs a network. Without one it says so and ends with 0: it is left out, not passed.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys

HOST = "pypi.org"


def reachable(host: str, seconds: float = 5.0) -> bool:
    """Whether a connection to a host can be made."""
    try:
        socket.create_connection((host, 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def main() -> int:
    """Returns pip-audit's exit status: 1 where something is known."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: SKIPPED: pip-audit is not installed. Run: pip install pip-audit")
        return 0
    if not reachable(HOST):
        print(f"audit: SKIPPED: {HOST} cannot be reached, which pip-audit asks.")
        return 0
    return subprocess.run(
        [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner=off"],
        check=False,
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
