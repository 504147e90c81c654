"""How results on ranks are compared with the truth on whole tensors."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_group() -> dist.ProcessGroup:
    """The group of all ranks of a test."""
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return group


def relative_error(result: Tensor, local: Tensor, whole: Tensor) -> float:
    """The error of a rank's `result`, in units of the truth: `local`, this rank's part of `whole`.

    What is -inf must be -inf. A rank may hold a few nearly-zero rows only: so the unit is at least a small part of the
    whole tensor's size.
    """
    assert result.shape == local.shape, (result.shape, local.shape)
    assert torch.equal(result == -torch.inf, local == -torch.inf)
    difference = torch.where(local == -torch.inf, 0, result.double() - local).norm()
    local, whole = (x.masked_fill(x == -torch.inf, 0) for x in (local, whole))
    size = max(local.norm(), 1e-3 * whole.norm())
    return float(difference / size) if size else float(difference)


def squared_errors(result: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Each tensor's squared errors summed up, to be summed over ranks."""
    return {name: float((result[name].double() - truth[name]).square().sum()) for name in truth}
