"""One tile of each kind, and the kinds of calls that a self-test tries."""

from __future__ import annotations

from longfactory.sp.tiles import Tile

TILES = {
    "full": Tile(slice(0, 12), slice(0, 20), "full"),
    "causal": Tile(slice(0, 24), slice(0, 24), "causal"),
    "varlen": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 1, 9, 24)),
    "causal window": Tile(slice(0, 24), slice(0, 24), "causal", window=5),
    "varlen window": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 3, 24), window=5),
    "window, more keys": Tile(slice(0, 12), slice(0, 20), "full", window=3),
    "window, more queries": Tile(slice(0, 20), slice(0, 12), "full", window=9),
}


KINDS = [
    ("full", False),
    ("full", True),
    ("causal", False),
    ("causal", True),
    ("varlen", False),
    ("varlen", True),
]
