"""Ulysses: ranks exchange tokens for heads, so that each works on all tokens of its team and a share of the heads.

A team is `degree` neighbouring ranks. Before a mixer each member sends every other one its tokens' q, k and v of that
one's heads, and afterwards gets its tokens' results of all heads back (Jacobs et al. 2023, "DeepSpeed Ulysses").
With a ring over the teams this is the mesh of Fang & Zhao 2024, "USP: A Unified Sequence Parallelism Approach";
with one team it is Ulysses alone. Where the team has more members than there are key heads, members get copies, and
their gradients are summed in the order of the members.

Letters: B batch, T_w tokens on this rank, H query heads, G key heads, W ranks, P the degree, n the team's tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.parallel.communication import Exchange
from longtrain.parallel.layouts import Merged, positions_in_runs
from longtrain.parallel.moves import HostIndex
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True, eq=False)
class TeamTokens:
    """Where each member's tokens stand among the team's, which are in increasing position."""

    places: tuple[HostIndex, ...]

    @property
    def total(self) -> int:
        return sum(index.array.size for index in self.places)


@dataclass(frozen=True, eq=False)
class TeamPlan:
    """The team's queries and keys."""

    queries: TeamTokens
    keys: TeamTokens


def teams(shard: SequenceShard, degree: int) -> SequenceShard:
    """The shard as `degree` neighbouring ranks at a time hold it together, pretended; itself for degree 1."""
    if degree == 1:
        return shard
    return SequenceShard.pretend(
        shard.length,
        rank=shard.rank // degree,
        world=shard.world // degree,
        layout=Merged(shard.layout, degree),
        cu_seqlens=shard.cu_seqlens,
        rows=shard.grid.outer_size,
    )


def team_plan(shard: SequenceShard, key_shard: SequenceShard, *, degree: int) -> TeamPlan:
    """The team that this rank is in; kept on the shard."""
    kept = shard.plans.setdefault(key_shard, {})
    key = ("team", degree)
    if key not in kept:
        queries = _tokens(shard, degree)
        kept[key] = TeamPlan(queries, queries if key_shard is shard else _tokens(key_shard, degree))
    return kept[key]


def _tokens(shard: SequenceShard, degree: int) -> TeamTokens:
    team, places = teams(shard, degree), []
    first = shard.rank // degree * degree
    for member in range(first, first + degree):
        positions = positions_in_runs(shard.layout.runs(member, shard.world, shard.length, shard.cu_seqlens))
        counted = team.layout.count(positions, team.rank, team.world, team.length, team.cu_seqlens)
        places.append(HostIndex(np.asarray(counted, dtype=np.int64)))
    return TeamTokens(tuple(places))


def key_heads(member: int, *, heads: int, groups: int, degree: int) -> list[int]:
    """The key heads that a member gets for its H/P query heads: as few as groups of one size allow."""
    own, share = heads // degree, heads // groups
    size = math.gcd(own, share)  # query heads to a key head, for every member alike
    return [(member * own + first) // share for first in range(0, own, size)]


class HeadExchange:
    """The exchanges of one call between the members of this rank's team, among H query heads and G key heads."""

    def __init__(self, shard: SequenceShard, key_shard: SequenceShard, *, degree: int, heads: int, groups: int) -> None:
        self._plan = team_plan(shard, key_shard, degree=degree)
        self._degree, self._group = degree, shard.grid.inner
        place = shard.rank % shard.grid.inner_size
        self._member = place % degree
        self._first = place - self._member
        own = heads // degree
        self.query_heads = [list(range(member * own, (member + 1) * own)) for member in range(degree)]
        self.key_heads = [key_heads(member, heads=heads, groups=groups, degree=degree) for member in range(degree)]

    @property
    def tokens(self) -> tuple[int, int]:
        """The team's queries and keys."""
        return self._plan.queries.total, self._plan.keys.total

    @property
    def shares(self) -> tuple[int, int]:
        """How many query and key heads this rank works on."""
        return len(self.query_heads[self._member]), len(self.key_heads[self._member])

    @property
    def own_heads(self) -> slice:
        """The query heads that this rank works on."""
        heads = self.query_heads[self._member]
        return slice(heads[0], heads[-1] + 1)

    def to_heads(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> list[Tensor]:
        """This rank's tokens of all heads ``[B, T_w, H or G, ..]`` -> the team's tokens of its heads ``[B, n, ..]``."""
        jobs = [(x, self._plan.queries, self.query_heads) for x in of_queries]
        jobs += [(x, self._plan.keys, self.key_heads) for x in of_keys]
        sends, receives, arrived = [], [], []
        for x, tokens, heads in jobs:
            sends += [(self._first + member, _heads_of(x, heads[member])) for member in range(self._degree)]
            shape = (len(heads[self._member]), *x.shape[3:])
            parts = [x.new_empty((x.shape[0], index.array.size, *shape)) for index in tokens.places]
            receives += [(self._first + member, part) for member, part in enumerate(parts)]
            arrived.append(parts)
        Exchange(sends, receives, self._group).wait()
        results = []
        for (x, tokens, _), parts in zip(jobs, arrived, strict=True):
            whole = x.new_empty((x.shape[0], tokens.total, *parts[0].shape[2:]))
            for part, index in zip(parts, tokens.places, strict=True):
                whole.index_copy_(1, index.on(x.device), part)
            results.append(whole)
        return results

    def to_tokens(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor], groups: int) -> list[Tensor]:
        """The way back: ``[B, n, heads here, ...]`` -> this rank's tokens of all H or G heads; copies of a key head add
        up.
        """
        jobs = [(x, self._plan.queries, self.query_heads, sum(map(len, self.query_heads))) for x in of_queries]
        jobs += [(x, self._plan.keys, self.key_heads, groups) for x in of_keys]
        sends, receives, arrived = [], [], []
        for x, tokens, heads, _ in jobs:
            sends += [
                (self._first + member, x.index_select(1, index.on(x.device)))
                for member, index in enumerate(tokens.places)
            ]
            own = tokens.places[self._member].array.size
            parts = [x.new_empty((x.shape[0], own, len(given), *x.shape[3:])) for given in heads]
            receives += [(self._first + member, part) for member, part in enumerate(parts)]
            arrived.append(parts)
        Exchange(sends, receives, self._group).wait()
        results = []
        for (x, tokens, heads, count), parts in zip(jobs, arrived, strict=True):
            own = tokens.places[self._member].array.size
            whole = x.new_zeros((x.shape[0], own, count, *x.shape[3:]))
            for part, given in zip(parts, heads, strict=True):
                for index, head in enumerate(given):  # one by one: a member may hold a key head several times
                    whole[:, :, head] += part[:, :, index]
            results.append(whole)
        return results


def _heads_of(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of x, in this order; a view where they are neighbours."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x[:, :, heads[0] : heads[-1] + 1]
    return torch.stack([x.select(2, head) for head in heads], dim=2)  # (a list as an index would wait for the device)
