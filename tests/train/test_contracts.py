"""What is overridden of transformers' Trainer is what the installed one has."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from longfactory.errors import UserError
from longfactory.train.checkpoint.trainer import ResumableTrainer
from longfactory.train.contracts import OVERRIDDEN, check_trainer, signature_of
from longfactory.train.trainer import RowTrainer


def test_every_overridden_method_has_a_contract() -> None:
    overridden = {
        name
        for owner in (RowTrainer, ResumableTrainer)
        for name, value in vars(owner).items()
        if callable(value) and callable(getattr(Trainer, name, None)) and name[:2] != "__"
    }
    assert overridden == set(OVERRIDDEN)


def test_the_installed_trainer_is_accepted() -> None:
    check_trainer(Trainer)
    assert signature_of(Trainer._clip_grad_norm) == "model"


def test_a_changed_signature_is_refused_by_name() -> None:
    class Changed(Trainer):
        def _clip_grad_norm(self, model: Any, max_norm: Any = None) -> Any: ...

    with pytest.raises(
        UserError,
        match=r"got Trainer\._clip_grad_norm\(model, max_norm=\), "
        r"expected Trainer\._clip_grad_norm\(model\)",
    ):
        check_trainer(Changed)


def test_a_missing_method_is_refused_by_name() -> None:
    methods = {
        name: getattr(Trainer, name)
        for name in dir(Trainer)
        if not name.startswith("__") and name != "_load_best_model"
    }
    renamed = type("Renamed", (), methods)
    with pytest.raises(UserError, match=r"Trainer\._load_best_model is missing"):
        check_trainer(renamed)
