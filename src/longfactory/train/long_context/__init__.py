"""`longfactory eval`: what a model finds in long texts, and how well it predicts them, by length
and place. `tasks` makes the texts, `measure` runs them under sequence parallelism, `report` shows
it.
"""

from longfactory.train.long_context.measure import LongContext, evaluate
from longfactory.train.long_context.report import as_json, draw, table
from longfactory.train.long_context.tasks import TASKS

__all__ = ["TASKS", "LongContext", "as_json", "draw", "evaluate", "table"]
