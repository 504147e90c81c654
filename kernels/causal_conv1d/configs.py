"""Blocks of the convolution's kernels. All are bound by memory and alike on every architecture."""

from longtrain.kernels.launching import Config


def forward(architecture: str) -> Config:
    """For `convolve`."""
    return Config({"TOKENS": 16, "CHANNELS": 128}, num_warps=4, num_stages=1)


def backward(architecture: str) -> Config:
    """For `convolve_backward`: the sums of BLOCKS * TOKENS tokens are one program's part of the weights' gradient."""
    return Config({"TOKENS": 8, "CHANNELS": 64, "BLOCKS": 16}, num_warps=4, num_stages=1)


def halo_backward(architecture: str) -> Config:
    """For `halo_backward`, whose TOKENS are those that see the halo."""
    return Config({"CHANNELS": 128}, num_warps=4, num_stages=1)
