"""Seeds that follow from the job's."""

import hashlib


def derive_seed(seed: int, *what: object) -> int:
    """A seed in [0, 2^31) for one purpose, from the job's seed and what names the purpose."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
