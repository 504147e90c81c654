"""The block sizes of the Triton kernels: a small table by architecture, head width and dtype kind, and nothing else.

kind: "half" where q, k and v are all bfloat16, "wide" otherwise. Widths fall into buckets: "narrow" (up to 64),
"middle" (up to 128) and "broad" (up to 256); powers of two, which blocks are anyway.
"""

from longtrain.kernels.launching import Config

# Programs that a card runs at a time, two for each multiprocessor: so many parts of sequences it takes to fill it. More
# would cost bytes: all parts of a segment but the last are read twice.
PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608}
# Tokens of a part: so few that writing and reading its state, 12 K V bytes, costs little beside reading its tokens.
SHORTEST_PART = 1024
# With a gradient of the decays, running sums start anew at each part: short ones keep rounding errors from adding up.
LONGEST_PART_WITH_DECAY_GRADIENT = 4096


def bucket(key_width: int, value_width: int) -> str:
    """The bucket of the wider one."""
    widest = max(key_width, value_width)
    return "narrow" if widest <= 64 else "middle" if widest <= 128 else "broad"


# (architecture, kind, bucket) -> C. gfx942 has 64 KiB of shared memory, and float32 takes twice the room.
def chunk_size(architecture: str, kind: str, width: str) -> int:
    """C, the same for all kernels of a call."""
    if kind == "wide":
        return 16
    if architecture in ("gfx942", "sm_80"):
        return 16 if width == "broad" else 32
    return 64


def part_states(architecture: str, kind: str, width: str) -> Config:
    """Blocks of the state [K, V]: BK x BV."""
    if kind == "wide":
        return Config({"BK": 64, "BV": 32}, 4, 3)
    if width == "narrow":
        return Config({"BK": 64, "BV": 64}, 4, 3)
    if architecture == "gfx942":
        return Config({"BK": 64, "BV": 64}, 4, 2)
    return Config({"BK": 128, "BV": 64 if architecture == "sm_80" else 128}, 8, 3)


def sweep(architecture: str, kind: str, width: str, *, by_channel: bool = False) -> Config:
    """Blocks of outputs: BO columns of them beside all of the contracted width. by_channel: decays per channel."""
    if kind == "wide":
        return Config({"BO": 16}, 8, 1)
    if architecture == "gfx942":
        return Config({"BO": 64}, 4, 2) if width == "narrow" else Config({"BO": 32}, 4, 1)
    if architecture == "sm_80":
        return Config({"BO": 16 if width == "broad" else 32}, 8, 1 if width == "broad" else 2)
    if width == "broad":
        return Config({"BO": 32}, 8, 2)
    stages = 3 if width == "narrow" else 2
    # At 8 warps and decays per channel some widths (96) spill a few bytes.
    return Config({"BO": 64}, 4 if by_channel and (architecture, width) == ("sm_100", "middle") else 8, stages)


def keys_values(architecture: str, kind: str, width: str) -> Config:
    """The sweeps for the gradients of k and of v in one launch: blocks as of `sweep`, registers for both."""
    config = sweep(architecture, kind, width)
    return Config(config.constants, 8 if kind == "half" and width != "narrow" else config.num_warps, config.num_stages)


def narrow_enough(architecture: str, kind: str, width: str, precision: str) -> bool:
    """Whether a product of matrices with a state has room for its operands.

    In full float32 they stay in registers: wider sweeps go token by token (`triton_tokens.py`), those for decays per
    channel by rows (`times_state`).
    """
    if (architecture, kind, width) == ("sm_100", "wide", "broad"):  # a few bytes spill at any number of warps
        return False
    return not (kind == "wide" and precision == "ieee") or width == "narrow"


def tokens(architecture: str, kind: str, width: str, *, products: bool, fixed: bool) -> Config:
    """The sweeps token by token, with the blocks of `sweep`; for products they keep two states. fixed: one decay."""
    if architecture == "sm_100" and fixed and not products:
        return Config({}, 2, 1)
    if architecture == "sm_100" and (kind, width) == ("half", "narrow"):  # 8 warps spill 8 bytes
        return Config({}, 4, 1)
    return Config({}, 8 if products and (kind, width) not in (("wide", "narrow"), ("wide", "middle")) else 4, 1)


def channels(architecture: str, kind: str, width: str) -> Config:
    """The kernels within chunks for decays per channel: BK channels at a time."""
    return Config({"BK": 16}, 8, 1)


def decay_gradient(architecture: str, kind: str, width: str) -> Config:
    """One decay per head: numbers of a chunk, and whole states in blocks of BK * BV numbers."""
    return Config({"BK": 16, "BV": 64}, 2, 1)


def small(architecture: str, kind: str, width: str) -> Config:
    """Kernels that only add up: the carry between parts, the gradients of decays per channel."""
    return Config({"BK": 16, "BV": 64}, 4, 1)
