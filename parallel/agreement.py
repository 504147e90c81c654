"""The handshake: ranks that disagree about a call are all told so, instead of waiting for each other for ever.

A rank sees by itself that its tensors do not fit its shard. That its options or shapes differ from those of the other
ranks it cannot see, and the messages that follow would not match. So, before the first message of a kind of call, the
ranks compare a digest of what each was given: one all-gather of 32 bytes. On a CPU every call is compared, so that no
disagreement ever hangs. On a GPU the host would wait for it: there the first call of each signature on a shard is, and
further ones only under `longtrain.debug.checks()`; with a new shard for every batch the host waits once a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from longtrain import debug
from longtrain.parallel.communication import all_gather_bytes, all_gather_stacked, rank_and_size
from longtrain.parallel.mesh import is_fake
from longtrain.parallel.shard import SequenceShard


def agree(shard: SequenceShard, signature: Mapping[str, object], *, device: torch.device) -> None:
    """Raise the same ValueError on every rank of the shard's group where their signatures differ.

    signature: what this rank was given, by name; the values' `str` is compared. Every rank of the group calls this.
    device: where the call's tensors live, for groups that can only send from there (NCCL); the host waits for it.
    The error says for each name that differs which ranks gave what. The shard remembers what its ranks agreed on; so on
    a GPU a rank that changes its mind while the others repeat an earlier call is found only under
    `longtrain.debug.checks()`.
    """
    if shard.world == 1 or is_fake(shard.group):
        return
    text = "\n".join(f"{name}: {value}" for name, value in signature.items())
    if text in shard.agreed and device.type != "cpu" and not debug.enabled():
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.int64)
    gathered = all_gather_stacked(torch.tensor(digest, device=device), shard.group).wait().cpu()
    if not torch.equal(gathered, gathered[:1].expand_as(gathered)):
        texts = [data.decode() for data in all_gather_bytes(text.encode(), shard.group, device=device)]
        raise ValueError(_disagreement(texts))
    if device.type != "cpu" and not shard.agreed:
        # NCCL wants all ranks of a group in its first message, and in a ring some have nothing to send.
        for group in (shard.grid.inner, shard.grid.outer):
            if group is not None and group is not shard.group:
                all_gather_stacked(torch.zeros(1, device=device), group).wait()
    shard.agreed.add(text)


def check_shard(shard: SequenceShard, *, batch: int) -> None:
    """Refuse what cannot share a sequence of `batch` rows over ranks; a rank sees it alone, before any message."""
    if not isinstance(shard, SequenceShard):
        raise ValueError(f"shard: got {type(shard).__name__}, expected a SequenceShard")
    if rank_and_size(shard.group) != (shard.rank, shard.world):
        raise ValueError(f"shard: got {shard}, which sends nothing; make it with SequenceShard(..., group=group)")
    if batch > 1 and shard.documents > 1:
        raise ValueError(
            f"shard: got {shard.documents} packed documents with {batch} batch rows, expected one row, B = 1 (rows are "
            "separate documents anyway)"
        )


def check_tokens(argument: str, x: Tensor, shard: SequenceShard, *, name: str = "shard") -> None:
    """Refuse an x ``[B, T_w, ...]`` that does not hold the tokens that this rank has in the shard called `name`."""
    if x.shape[1] != shard.local_length:
        raise ValueError(
            f"{argument}: got {x.shape[1]} tokens in shape {tuple(x.shape)}, expected {name}.local_length = "
            f"{shard.local_length}, this rank's part of {shard.length} (rank {shard.rank} of {shard.world}, layout "
            f"{shard.layout.name!r})"
        )


def tensor_signature(x: Tensor | None) -> str:
    """What the ranks must agree on in a tensor ``[B, T_w, ...]``: all but its tokens, whose number the shards know."""
    if x is None:
        return "None"
    sizes = ["T_w" if dim == 1 else str(size) for dim, size in enumerate(x.shape)]
    return f"[{', '.join(sizes)}] {str(x.dtype).removeprefix('torch.')} on {x.device.type}"


def _disagreement(texts: Sequence[str]) -> str:
    """One message from all ranks' signatures, the same on every rank."""
    given = [dict(line.split(": ", 1) for line in text.split("\n")) for text in texts]
    names = list(dict.fromkeys(name for entries in given for name in entries))
    lines = ["the ranks of this group were given different arguments; they must all make the same call"]
    for name in names:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, entries in enumerate(given):
            ranks_by_value.setdefault(entries.get(name, "nothing"), []).append(rank)
        if len(ranks_by_value) > 1:
            told = "; ".join(f"rank{_ranks(ranks)} got {value}" for value, ranks in ranks_by_value.items())
            lines.append(f"{name}: {told}")
    return "\n  ".join(lines)


def _ranks(ranks: list[int]) -> str:
    return f" {ranks[0]}" if len(ranks) == 1 else "s " + ", ".join(map(str, ranks))
