"""What tests leave changed is seen, named and put back."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import torch

import process_state


def test_what_is_left_changed_is_named_and_put_back(tmp_path: Path) -> None:
    os.environ["LEFT_AS_IT_IS"] = "1"
    before = process_state.settings()
    log = logging.getLogger("longfactory.of_this_test")
    dtype, folder, threads = torch.get_default_dtype(), os.getcwd(), torch.get_num_threads()
    assert process_state.put_back(before) == []
    before = process_state.settings()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.environ["LEFT"] = "1"
    del os.environ["LEFT_AS_IT_IS"]
    os.chdir(tmp_path)
    logging.disable(logging.WARNING)
    log.setLevel(logging.ERROR)
    log.addHandler(logging.NullHandler())
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads + 1)
    told = process_state.put_back(before)
    assert [each.partition(":")[0] for each in told] == [
        "handler of SIGUSR2",
        "log longfactory.of_this_test",
        "logging.disable",
        "os.environ['LEFT']",
        "os.environ['LEFT_AS_IT_IS']",
        "os.getcwd()",
        "torch's default dtype",
        "torch's threads",
    ]
    assert process_state.put_back(before) == []
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL and "LEFT" not in os.environ
    assert logging.root.manager.disable == 0 and (log.level, log.handlers) == (0, [])
    assert (torch.get_default_dtype(), os.getcwd()) == (dtype, folder)
    assert torch.get_num_threads() == threads and os.environ.pop("LEFT_AS_IT_IS") == "1"
