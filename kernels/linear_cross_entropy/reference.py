"""Cross-entropy of a linear head with all logits at once, in plain PyTorch: it defines what is right.

    z_nv = sum_d hidden_nd weight_vd, with a softcap c: c tanh(z_nv / c)
    lse_n = log sum_v exp(z_nv)
    loss_n = lse_n - z_n,target(n) + z_loss lse_n^2, and 0 where target(n) is to be ignored

Softcap: "Gemma 2: Improving Open Language Models at a Practical Size" (2024, section 2). The term in lse^2 keeps logits
from drifting: "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al. 2022, section 5). Autograd
differentiates it.
"""

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int, z_loss: float, softcap: float | None
) -> Tensor:
    """The loss of each token, [N], in float64 where hidden or weight is, otherwise in float32.

    hidden [N, D], weight [vocabulary, D], targets int64 [N].
    """
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    counts = targets != ignore_index
    own = logits.gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
    loss = lse - own + z_loss * lse.square() if z_loss else lse - own
    return torch.where(counts, loss, 0)
