"""How the kernels of `triton_softmax` are launched, and how large a tile is: by architecture and width only."""

from longtrain.kernels.launching import Config

# Both kernels only stream a tile through, so one program's block is what a card's memory likes: 16 bytes a thread and
# load, several loads in flight. All architectures alike.
_CONFIGS = {
    "sum_up": Config({"BLOCK": 4096}, num_warps=8, num_stages=1),
    "differentiate": Config({"BLOCK": 2048}, num_warps=4, num_stages=1),
}
_WIDE = 2048  # D from which on tiles are large


def config(architecture: str, kernel: str) -> Config:
    """The configuration of "sum_up" or "differentiate" for one of `launching.ARCHITECTURES`."""
    return _CONFIGS[kernel]


def tile_sizes(width: int) -> tuple[int, int]:
    """Tokens and vocabulary of a tile, at most, for D = `width`.

    Each tile adds float32 blocks of both gradients to what was summed up before: 16 D (tokens + vocabulary) bytes moved
    for 6 D tokens vocabulary operations. At 8192 x 8192 that takes an H200 4 % of the matrix products' time; a tile's
    float32 logits and half-precision gradients hold 400 MB. Where D is small, so is what the gradients move beside the
    logits; there 100 MB do.
    """
    side = 8192 if width >= _WIDE else 4096
    return side, side
