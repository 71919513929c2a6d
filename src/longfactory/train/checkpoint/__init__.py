"""Checkpoints: whole or absent (`save`, `manifest`), read wholly before one is chosen (`choose`),
counted and removed (`prune`), and what a run that goes on may have changed (`changes`, `settings`).
"""
