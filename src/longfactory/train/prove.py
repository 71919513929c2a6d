"""The proof before the first step: this model, wrapped as it is, gives the log-probabilities that
one device would.
"""

from __future__ import annotations

import torch

from longfactory import sp
from longfactory.errors import UserError
from longfactory.model.token_logprobs import TokenLogprobs, check_head
from longfactory.sp import hf, probe
from longfactory.sp.guard import guard
from longfactory.train.trainer import RowTrainer


def prove_exact(trainer: RowTrainer) -> None:
    """Before the first step, on the wrapped model: the guard of the attention, and the check of the
    output layer. Every rank calls it.

    Raises:
        UserError: the model cannot be trained exactly; the message names the reason.
    """
    model = trainer.model_wrapped
    was_training = model.training
    try:
        guard(model, trainer.ctx)
        model.eval()
        with probe.proof(), torch.no_grad(), trainer.compute_loss_context_manager():
            if isinstance(trainer.head, TokenLogprobs):
                length = sp.alignment(trainer.ctx)
                while length < 16:
                    length *= 2
                plan = sp.plan(length, (sp.Segment(0, length),), trainer.ctx)
                positions = torch.arange(length, device=trainer.args.device)
                ids = positions % 97 + 3
                inputs = hf.inputs({"input_ids": ids, "position_ids": positions}, plan)
                check_head(model, trainer.head, inputs, ids.cpu()[plan.index])
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        model.train(was_training)
