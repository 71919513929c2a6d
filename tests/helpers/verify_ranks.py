"""`longfactory verify` on a rank, with an engine that is exact or broken."""

from __future__ import annotations

import os
from typing import Any

from longfactory.shard.settings import in_words

ZERO = {
    stage: {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }
    for stage in (2, 3)
}
"""What a user's file may say; the optimizer is no part of the comparison."""


def sharded(
    keys: dict[str, Any], more: list[dict[str, Any]], sharding: str, fault: str = ""
) -> list[tuple[bool, str]]:
    """Body of a rank of a pool of its own: FSDP2 or ZeRO on a CPU, which a run refuses."""
    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.train import prepare
    from longfactory.train.verify import verify
    from planted import planted

    cpu_sharding.start("fsdp2" if sharding == "fsdp2" else "zero")
    prepare.choose_sharding = lambda *args: sharding  # type: ignore[assignment]
    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    reports = []
    for changes in more:
        cpu_sharding.reset()
        given = {**keys, **changes}
        cfg = from_mapping({k: v for k, v in given.items() if k != "cache"})
        with planted(fault):
            report = verify(cfg, rows=2, tokens=160)
        assert f"parameters {in_words(sharding)}" in report.title
        reports.append((report.exact, report.table()))
    return reports


def verified(keys: dict[str, Any], broken: str = "") -> tuple[bool, str, dict[str, float]]:
    """Body of a rank. `broken` scales the gradient of values in the engine, lets documents see each
    other, or lets routers choose anew.
    """
    import cpu_sharding
    from longfactory import sp
    from longfactory.config import from_mapping
    from longfactory.sp import hf, routers
    from longfactory.train import trainer as trainer_module
    from longfactory.train.verify import Comparison, verify, watch

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    cfg = from_mapping({k: v for k, v in keys.items() if k != "cache"})
    engine, plan, choices = hf.engine, trainer_module.sp.plan, watch.row_choices
    own_report = Comparison.report

    def report_of_a_clean_trainer(self: Comparison) -> Any:
        assert not {"training_step", "token_outputs"} & set(vars(self.trainer))
        hooks = hf.unwrap(self.trainer.model_wrapped)._forward_pre_hooks.values()
        assert "before_forward" not in [getattr(hook, "__name__", "") for hook in hooks]
        return own_report(self)

    def scaled(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return engine(q, k, v + 0.01 * (v - v.detach()), *args, **kwargs)

    try:
        if broken == "gradient":
            hf.engine = scaled
        if broken == "isolation":
            trainer_module.sp.plan = lambda length, segments, ctx: plan(
                length, (sp.Segment(0, length),), ctx
            )
        if broken == "routers":
            watch.row_choices = lambda row, choices: routers.Choices({})
        Comparison.report = report_of_a_clean_trainer  # type: ignore[method-assign]
        report = verify(cfg, rows=2, tokens=160)
    finally:
        Comparison.report = own_report  # type: ignore[method-assign]
        hf.engine, trainer_module.sp.plan, watch.row_choices = engine, plan, choices
    return (
        report.exact,
        report.table(),
        {name: m.difference for name, m in report.parameters.items()},
    )
