"""A run's arguments: typed, checked, with LLaMA-Factory's names. Imports neither torch nor
transformers.
"""

from longfactory.config.arguments import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    MemoryArguments,
    ModelArguments,
    OutputArguments,
    ParallelArguments,
)
from longfactory.config.folder import RUN_FILE, last_checkpoint
from longfactory.config.load import from_mapping, load_config
from longfactory.config.run import RunConfig
from longfactory.config.show import resolved
from longfactory.errors import ConfigError

__all__ = [
    "RUN_FILE",
    "ConfigError",
    "DataArguments",
    "FinetuningArguments",
    "GeneratingArguments",
    "MemoryArguments",
    "ModelArguments",
    "OutputArguments",
    "ParallelArguments",
    "RunConfig",
    "from_mapping",
    "last_checkpoint",
    "load_config",
    "resolved",
]
