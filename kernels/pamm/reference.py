"""Point-approximate matrix multiplication token by token; it defines what is right."""

import torch
from torch import Tensor


def summary(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept rows c [k, D], and of each token of x [N, D] the index f [N] and the number a [N]."""
    kept = x[rows]
    index, scale = [], []
    for token in x:
        length = kept.norm(dim=1)
        likeness = torch.where(length > 0, (kept @ token).abs() / length, 0)
        chosen = int(likeness.argmax())
        square = kept[chosen] @ kept[chosen]
        index.append(chosen)
        scale.append(kept[chosen] @ token / square if square > 0 else square)
    return kept, torch.tensor(index, dtype=torch.int64), torch.stack(scale) if scale else x.new_zeros(0)


def weight_gradient(dy: Tensor, kept: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """sum_i a_i dy_i c_f(i)^T, [O, D], from dy [N, O]."""
    total = dy.new_zeros(dy.shape[1], kept.shape[1])
    for i in range(dy.shape[0]):
        total = total + scale[i] * torch.outer(dy[i], kept[index[i]])
    return total
