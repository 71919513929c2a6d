"""The reference of a preference loss: `model` (what it is), `cache` (its numbers on disk), `attach`
(makes a run's own).
"""

from longfactory.train.reference.cache import (
    ReferenceCache,
    cache_file,
    document_check,
    load,
    load_or_precompute,
    precompute,
    save,
    weights_fingerprint,
)
from longfactory.train.reference.model import (
    Numbers,
    Reference,
    adapter_is_reference,
    as_reference,
    check_reference,
    disable_dropout,
)

__all__ = [
    "Numbers",
    "Reference",
    "ReferenceCache",
    "adapter_is_reference",
    "as_reference",
    "cache_file",
    "check_reference",
    "disable_dropout",
    "document_check",
    "load",
    "load_or_precompute",
    "precompute",
    "save",
    "weights_fingerprint",
]
