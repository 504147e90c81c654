"""NAtS-L token by token ("Neural Attention Search Linear", arXiv 2602.03681; what is ours is said in the mixer)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, normed, silu, softplus, unit
from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "chunk": 4},
    {"heads": 2, "attention_heads": 4, "key_width": 8, "value_width": 12, "chunk": 5, "conv_width": 3},
    {"heads": 4, "chunk": 1, "rope_base": None},
]


def choices(mixer: Any, x: Tensor) -> Tensor:
    """For each whole chunk and head 1 and 0 for the way it goes, softmax or delta rule, with the soft gradient of the
    chosen one: [n, H, 2]."""
    length, found = mixer.chunk, []
    for c in range(len(x) // length):
        soft = torch.softmax(mixer.scores @ x[c * length : (c + 1) * length].mean(0) / x.shape[1] ** 0.5, 1)
        hard = torch.stack((soft[:, 0] > soft[:, 1], soft[:, 0] <= soft[:, 1]), 1).to(x.dtype)
        found.append(hard + hard * (soft - soft.detach()))
    return torch.stack(found) if found else x.new_zeros(0, mixer.heads, 2)


def softmax_head(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, length: int) -> Tensor:
    """One softmax head, q, k [T, K'], v [T, V'], chosen [n]."""
    rows = []
    for t in range(len(q)):
        terms = []
        for j in range(t + 1):
            weight = torch.exp(q[t] @ k[j] / q.shape[1] ** 0.5)
            if j // length < t // length:
                if float(chosen[j // length].detach()) == 0:
                    continue
                weight = weight * chosen[j // length]
            terms.append((weight, j))
        total = sum(weight for weight, _ in terms)
        rows.append(sum(weight * v[j] for weight, j in terms) / total)
    return torch.stack(rows)


def delta_head(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chosen: Tensor, length: int) -> Tensor:
    """One head of the delta rule, q, k [T, K], v [T, V], beta, decay [T], chosen [n]: 1 where a chunk writes."""
    passed = inside = q.new_zeros(q.shape[1], v.shape[1])
    rows, identity = [], torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        if t % length == 0:
            inside = passed
        key = unit(k[t])

        def written(state: Tensor, strength: Tensor, key: Tensor = key, t: int = t) -> Tensor:
            kept = identity - strength * torch.outer(key, key)
            return kept @ (decay[t] * state) + strength * torch.outer(key, v[t])

        inside = written(inside, beta[t])
        if t // length < len(chosen):
            passed = written(passed, beta[t] * chosen[t // length])
        rows.append(q.shape[1] ** -0.5 * unit(q[t]) @ inside)
    return torch.stack(rows)


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, key, value, parts = mixer.heads, mixer.key_width, mixer.value_width, mixer.softmax_heads // mixer.heads
    qkv = convolved(mixer.convolution, x @ mixer.qkv.weight.T)
    q, k, v = qkv.split((heads * key, heads * key, heads * value), dim=1)
    gate, chosen = silu(x @ mixer.gate.weight.T), choices(mixer, x)
    weights = torch.softmax((q @ mixer.weights.weight.T).view(len(x), -1, 2), 2)
    outputs = []
    for head in range(heads):
        mine, own = slice(key * head, key * (head + 1)), slice(value * head, value * (head + 1))
        beta = torch.sigmoid(x @ mixer.rates.weight[head])
        step = softplus(x @ mixer.rates.weight[heads + head] + mixer.decay.dt_bias[head])
        decay = (-mixer.decay.A_log[head].exp() * step).exp()
        remembered = delta_head(q[:, mine], k[:, mine], v[:, own], beta, decay, chosen[:, head, 1], mixer.chunk)
        for part in range(parts):
            number = head * parts + part
            width, out = key // parts, value // parts
            mine, own = slice(width * number, width * (number + 1)), slice(out * number, out * (number + 1))
            normal = [
                torch.stack([normed(row, norm.weight) for row in z[:, mine]])
                for z, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
            ]
            if mixer.rope_base is not None:
                normal = [torch.stack([turned(row, t, mixer.rope_base) for t, row in enumerate(z)]) for z in normal]
            attended = softmax_head(*normal, v[:, own], chosen[:, head, 0], mixer.chunk)
            rest = remembered[:, out * part : out * (part + 1)]
            joined = [
                weights[t, number, 0] * normed(attended[t], mixer.softmax_norm.weight)
                + weights[t, number, 1] * normed(rest[t], mixer.delta_norm.weight)
                for t in range(len(x))
            ]
            outputs.append(torch.stack(joined) * gate[:, own])
    return torch.cat(outputs, 1) @ mixer.out.weight.T
