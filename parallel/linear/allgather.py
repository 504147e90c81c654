"""Every rank gets all summaries in one message and combines them itself: fewest steps, volume in proportion to W.

Letters: R slots, the most runs of any rank; see `mixers.py` for states and transitions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longtrain.parallel.communication import all_gather_stacked
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.mixers import carry
from longtrain.parallel.scan import combine_state_gradients, combine_states


def states(
    transition: Tensor, state: Tensor, initial: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
    """What enters each of this rank's runs, by slot, the state after the last token, and what backward needs.

    transition ``[R, B, H, *transition]``, state ``[R, B, H, rows, columns]``: what this rank's runs sum up to, zeros
    for no run. initial: ``[B, H, rows, columns]`` or None. meanwhile: called while the message is under way. What
    backward needs: all transitions, `kept_shape`.
    """
    plan, parts = call.plan, (transition, state)
    gathering = all_gather_stacked(torch.cat([x.flatten() for x in parts]), call.shard.group)
    meanwhile()
    received = gathering.wait().split([x.numel() for x in parts], dim=1)
    transitions, states = (x.unflatten(1, own.shape) for x, own in zip(received, parts, strict=True))
    entering, final = combine_states(
        plan,
        states,
        lambda run, x: carry(transitions[run.rank, run.slot], x),
        initial,
        ranks=(plan.rank,),
    )
    return [entering[plan.rank, slot] for slot in range(len(plan.first))], final, transitions


def gradients(
    own: Tensor, kept: Tensor, dfinal: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of what leaves each of this rank's runs, by slot, and this rank's part of the initial state's.

    own ``[R, B, H, rows, columns]``: of what enters this rank's runs, from their own outputs. kept: see `states`.
    dfinal: of this rank's copy of the last state, where the call returns it; the copies' are summed in the order of
    the ranks.
    """
    plan = call.plan
    message = own if dfinal is None else torch.cat([own, dfinal.unsqueeze(0)])
    gathering = all_gather_stacked(message, call.shard.group)
    meanwhile()
    received = gathering.wait()
    final = None if dfinal is None else received[:, -1].sum(0)
    leaving, dinitial = combine_state_gradients(
        plan,
        received,
        lambda run, x: carry(kept[run.rank, run.slot], x, backward=True),
        final,
        ranks=(plan.rank,),
    )
    # Every rank knows the initial state's gradient; one hands it on.
    return [leaving[plan.rank, slot] for slot in range(len(plan.first))], dinitial if plan.starts else None


def kept_shape(call: ScanCall) -> tuple[int, ...]:
    """``[W, R, B, H, *transition]``."""
    sizes = call.sizes
    return call.shard.world, call.plan.slots, sizes.batch, sizes.heads, *sizes.transition
