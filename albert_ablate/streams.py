"""Named streams of random numbers: seeds that depend on the run's seed and a name, and nothing else.

Every random number of a run comes from a stream that is a function of the run's seed and a name: `init/<parameter>`,
`data/order/<pass>`, `dropout/<site>`. Arms of one seed therefore share every draw whose name and shape they share, and
a resumed run needs no saved generator state.
"""

from hashlib import blake2b

MASK = (1 << 63) - 1  # 63 bits: a nonnegative signed 64-bit integer, which every generator takes as a seed


def stream_seed(seed: int, *name: object) -> int:
    """63-bit seed of the stream `name` of run seed `seed`: the first 8 bytes of blake2b("seed/name/...")."""
    # a hash, not Python's hash() or a running counter: the same number in every process and release, and adding a
    # stream moves no other one
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") & MASK


def digest(*parts: bytes, size: int = 16) -> str:
    """Hex blake2b of the concatenated parts, `size` bytes long."""
    h = blake2b(digest_size=size)
    for part in parts:
        h.update(part)
    return h.hexdigest()
