"""The scan over ranks, for every linear mixer and every exchange of summaries: a rank's forward and backward.

A rank sums up each of its runs of consecutive tokens as one pair (transition, state). These small pairs travel, and
tell every rank which state enters each of its runs; it joins in where the outputs are computed, and so messages travel
while the rank computes what needs no state (`local`). Backward is the same the other way round over the gradients of
the states: it sends only those, since forward's transitions were kept, and meanwhile computes what needs none of them.
(Katharopoulos et al. 2020, "Transformers are RNNs"; Sun et al. 2024, "Linear Attention Sequence Parallelism".)
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.parallel.linear import allgather, alltoall, chain
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.mixers import Given, Tensors
from longtrain.parallel.scan import ScanPlan

EXCHANGES = {"allgather": allgather, "alltoall": alltoall, "chain": chain}
"""How summaries travel: modules with `states`, `gradients` and `kept_shape`."""


def scan_forward(
    tensors: Tensors, initial: Tensor | None, call: ScanCall
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """out ``[B, T_w, H, V]`` in q's dtype, the state after the last token where the call returns it, and for backward
    what the mixer saves, and `carried`: the states that entered runs and the transitions; both flat.

    initial ``[B, H, rows, columns]``: the state before the first token, or None. States are in the state dtype.
    """
    plan = call.plan
    with without_autocast(tensors[0].device):
        run = call.mixer.forward(tensors, plan.offsets, scale=call.scale, backend=call.backend)
        if call.exchanges:
            transition, state = (_of_runs(plan, x, plan.last) for x in run.summaries())
            exchange = EXCHANGES[call.strategy]
            entering, final, kept = exchange.states(transition, state, initial, call, run.local)
            out, _, saved = run.finish(_to_segments(plan, entering, plan.first), return_state=False)
        else:
            entering = [initial if entered else None for entered in plan.entered(initial=call.initial)]
            given = _to_segments(plan, entering, plan.first)
            out, states, saved = run.finish(given, return_state=call.return_state)
            final = initial if states is None or not plan.last else states[:, plan.last[-1]]
            kept = out.new_empty(0, dtype=call.sizes.dtype)
    carried = torch.cat([*(x.flatten() for x in entering if x is not None), kept.flatten()])
    saved = carried.new_empty(0) if saved is None else saved.flatten()
    if not call.return_state:
        return out, None, saved, carried
    state = carried.new_zeros(call.sizes.state) if final is None else final
    return out, state.clone(memory_format=torch.contiguous_format), saved, carried


def scan_backward(
    tensors: Tensors,
    saved: Tensor,
    carried: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
    call: ScanCall,
    *,
    need_decay: bool,
) -> tuple[Tensors, Tensor | None]:
    """The gradients of the tensors, each like its tensor, and this rank's part of the initial state's (None: nothing).

    saved, carried: what forward returned, so that nothing is sent twice. dout: the gradient of out; dstate: that of
    this rank's copy of the last state (None: nothing).
    """
    plan, sizes = call.plan, call.sizes
    entering, kept = _unpacked(carried, call)
    dinitial: list[tuple[slice, Tensor]] = []
    with without_autocast(tensors[0].device):
        given = Given(saved.view(call.mixer.saved_shape(tensors)), call.scale, call.backend, need_decay)
        run = call.mixer.backward(tensors, plan.offsets, dout, given)
        before = _to_segments(plan, entering, plan.first)
        if dstate is None and call.return_state:  # the other ranks wait for this one's part all the same
            dstate = carried.new_zeros(sizes.state)
        for part in sizes.parts:
            dfinal = None if dstate is None else dstate[..., part]
            if call.exchanges:
                own = _of_runs(plan, run.summaries(), plan.first)
                local = partial(run.local, before)  # which forward has kept, so that no message brings it
                leaving, found = EXCHANGES[call.strategy].gradients(own, kept, dfinal, call, local)
                run.finish(before, _to_segments(plan, leaving, plan.last), need_state=False)
            else:
                leaving: list[Tensor | None] = [None] * len(plan.last)
                leaving[-1:] = [dfinal] * len(leaving[-1:])
                after = _to_segments(plan, leaving, plan.last)
                segments = run.finish(before, after, need_state=call.initial_gradient)
                if plan.runs:  # without a token each rank's part passes through
                    found = segments[:, plan.first[0]] if segments is not None and plan.starts else None
                else:
                    found = dfinal
            if call.initial_gradient and found is not None:
                dinitial.append((part, found))
    return run.gradients(), _joined(dinitial, call) if dinitial else None


def carried_sizes(tensors: Tensors, call: ScanCall) -> tuple[int, int]:
    """The numbers in what forward saves and carries over to backward."""
    entered = sum(call.plan.entered(initial=call.initial))
    kept = math.prod(EXCHANGES[call.strategy].kept_shape(call)) if call.exchanges else 0
    return math.prod(call.mixer.saved_shape(tensors)), entered * math.prod(call.sizes.state) + kept


def _unpacked(carried: Tensor, call: ScanCall) -> tuple[list[Tensor | None], Tensor]:
    """What entered each of this rank's runs, by slot, and the transitions that the exchange kept."""
    size, entering, begin = math.prod(call.sizes.state), [], 0
    for entered in call.plan.entered(initial=call.initial):
        entering.append(carried[begin : begin + size].view(call.sizes.state) if entered else None)
        begin += size * entered
    kept = carried[begin:]
    return entering, kept.view(EXCHANGES[call.strategy].kept_shape(call)) if call.exchanges else kept


def _joined(parts: Sequence[tuple[slice, Tensor]], call: ScanCall) -> Tensor:
    whole = parts[0][1].new_zeros(call.sizes.state)
    for part, x in parts:
        whole[..., part] = x
    return whole


def _of_runs(plan: ScanPlan, x: Tensor, segments: Sequence[int]) -> Tensor:
    """One entry for each slot, from a segment of each run: x ``[B, N, ...]`` -> ``[R, B, ...]``, zeros for no run."""
    of_runs = x.new_zeros((plan.slots, x.shape[0], *x.shape[2:]))
    for slot, segment in enumerate(segments):
        of_runs[slot] = x[:, segment]
    return of_runs


def _to_segments(plan: ScanPlan, of_runs: Sequence[Tensor | None], segments: Sequence[int]) -> Tensor | None:
    """What belongs to one segment of each run, among zeros for the others: ``[B, N, ...]``; None for all zeros."""
    given = [(segment, x) for segment, x in zip(segments, of_runs, strict=True) if x is not None]
    if not given:
        return None
    batch, *state = given[0][1].shape
    of_segments = given[0][1].new_zeros((batch, len(plan.offsets) - 1, *state))
    for segment, x in given:
        of_segments[:, segment] = x
    return of_segments
