"""What is told in more than one place. Imports no torch."""

from __future__ import annotations

from longfactory.train.survival.signals import name_of


def stopped_before_training(signum: int | None) -> str:
    """The end of a run that a signal stopped early."""
    return (
        f"Stopped by {name_of(signum)} before the first step: nothing was trained. Run the "
        "same command to start again."
    )


LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: gloo's and NCCL's words."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
