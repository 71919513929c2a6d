"""What a configuration knows of each loss. The losses themselves need torch and stand in `stages/`;
both read these facts, so that a wrong key is told before torch is imported.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longfactory.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PreferenceFacts:
    """What is true of the loss of a pair, whatever its numbers are."""

    reference: bool = True
    """Compares with a reference: without, no second model and no second forward."""
    per_token: bool = False
    """Rewards and log-probabilities are means per trained token in the log, as in LLaMA-Factory."""
    smoothing: Literal["unread", "read", "needed"] = "unread"
    """What `dpo_label_smoothing` is to it."""
    difference: bool = False
    """Sees the difference of the two answers alone: its gradient is 0 where they are the same."""
    ld_alpha: bool = True
    """Whether tokens may weigh less, as `ld_alpha` says."""
    keys: tuple[str, ...] = ()
    """Keys that this loss alone reads."""


PREFERENCE_FACTS = {
    "sigmoid": PreferenceFacts(smoothing="read", difference=True),
    "hinge": PreferenceFacts(difference=True),
    "ipo": PreferenceFacts(per_token=True, difference=True),
    "kto_pair": PreferenceFacts(),
    "orpo": PreferenceFacts(reference=False, per_token=True),
    "simpo": PreferenceFacts(reference=False, per_token=True, keys=("simpo_gamma",)),
    "exo_pair": PreferenceFacts(smoothing="needed", difference=True),
    "nca_pair": PreferenceFacts(),
    "robust": PreferenceFacts(smoothing="read", difference=True),
    "bco_pair": PreferenceFacts(),
    "sppo_hard": PreferenceFacts(),
    "aot": PreferenceFacts(smoothing="read"),
    "aot_unpaired": PreferenceFacts(smoothing="read"),
    "apo_zero": PreferenceFacts(difference=True),
    "apo_down": PreferenceFacts(),
    "discopop": PreferenceFacts(difference=True, keys=("discopop_tau",)),
    "sft": PreferenceFacts(reference=False, ld_alpha=False),
    "sigmoid_norm": PreferenceFacts(difference=True),
}
"""By the values of `pref_loss`, each the name of a function in `stages/losses.py`."""

USER_FACTS = PreferenceFacts(smoothing="read")
"""Of a function that `loss_path` names, unless it says otherwise of itself."""

if TYPE_CHECKING:
    PreferenceName = str
else:
    PreferenceName = Literal[tuple(PREFERENCE_FACTS)]


@dataclasses.dataclass(frozen=True)
class TokenFacts:
    """What is true of the loss of a token."""

    switch: str | None = None
    """The key that chooses it."""
    alpha: str | None = None
    """The key of its number."""
    needs: tuple[str, ...] = ()
    """Fields of `TokenOutputs` beside `logps` that it reads."""


TOKEN_FACTS = {
    "nll": TokenFacts(),
    "dft": TokenFacts("use_dft_loss"),
    "asft": TokenFacts("use_asft_loss", "asft_alpha", ("reference_kl",)),
    "eaft": TokenFacts("use_eaft_loss", "eaft_alpha", ("entropy",)),
    "smoothed": TokenFacts("label_smoothing_factor", "label_smoothing_factor", ("mean_logp",)),
}
"""By name, each a function in `stages/losses.py`."""


def split_loss_path(loss_path: str) -> tuple[Path, str]:
    """The file and the function that `loss_path` names. The file is looked for, and not run.

    Raises:
        ConfigError: it is not file.py:function, or there is no such file.
    """
    file, _, function = loss_path.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ConfigError(
            f"loss_path: got {loss_path!r}, expected file.py:function, for example"
            " losses.py:margin."
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"loss_path: there is no file {path.absolute()}.")
    return path, function
