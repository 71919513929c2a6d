"""`longfactory plan`: what a run would need, before it is started. The numbers come from
`longfactory.memory`.
"""

from longfactory.plan.command import main

__all__ = ["main"]
