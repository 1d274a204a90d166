"""Seeds for torch's generators, from a run's seed and what tells one use from another."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *parts: int) -> int:
    """A seed in [0, 2**63), the same for the same whole numbers under every interpreter and on every machine.

    The first eight bytes, little-endian, of the SHA-256 digest of the numbers in decimal, separated by commas; without
    their highest bit, so that the seed also fits a signed integer. `hash` of a tuple would promise none of this.
    """
    text = ",".join(str(int(part)) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % 2**63


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's order of the prompts: seed * 1,000,003 + epoch.

    Two runs share no order before their epoch 1,000,003, and the bounds of `seed` keep it within 63 bits. It is not
    made a `derived_seed`, since the prompts of every run follow from it: a run would no longer repeat the metrics of an
    earlier one, and one that was saved would go on with other prompts than it was to have.
    """
    return seed * 1_000_003 + epoch
