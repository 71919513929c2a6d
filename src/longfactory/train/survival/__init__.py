"""How a run stops, restarts, and ends where it stands still (docs/stopping.md).

`signals` and `lock` need no torch and work from the first moment of a process; `board` is what
processes write for each other; `stopping` agrees on the step to stop at, `watch` is the thread that
looks after a process, `agreement` compares the ranks before anything is loaded, `callback` tells
the watch what the Trainer does.
"""
