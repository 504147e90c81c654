"""Linear attention over a sequence that is spread over the ranks of a group: a scan over segments.

A rank computes its own tokens as if nothing came before them, and sums up each of its runs of consecutive tokens as one
pair (transition, state). One all-gather of these small float32 pairs per pass, and every rank knows the state that
enters each of its runs; it joins in where the outputs are computed. Backward is the same scan the other way round, over
the gradients of the states. With a run's segments cut at document boundaries (`longtrain.parallel.scan`), A the sum of
log_decay over a run and c_t its cumulative sum from the run's start,

    forward:   S_ext = sum_t (exp(A - c_t) k_t) v_t^T,            S_next = exp(A) S + S_ext
    backward:  D_ext = sum_t (scale * q_t exp(c_t)) do_t^T,       dS_previous = exp(A) dS + D_ext

(Katharopoulos et al. 2020, "Transformers are RNNs"; Sun et al. 2024, "Linear Attention Sequence Parallelism", sends
states from rank to rank; here they are gathered, so that no rank waits for the one before it.)

Letters: B batch, T_w tokens on this rank, H heads, G heads of q and k, K query/key width, V value width, W ranks, R the
most runs of any rank, N segments on this rank. The state dtype is float32 (float64 for float64 inputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.kernels import checks
from longtrain.kernels.linear_attention import check_inputs, chosen, stages
from longtrain.kernels.precision import without_autocast
from longtrain.parallel.agreement import agree, check_shard, check_tokens, tensor_signature
from longtrain.parallel.communication import all_gather_stacked
from longtrain.parallel.scan import ScanPlan, Transition, combine_state_gradients, combine_states, scan_plan
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True, eq=False)
class ScanOptions:
    """All that the scan needs besides its tensors."""

    shard: SequenceShard
    plan: ScanPlan
    scale: float
    return_state: bool
    initial_gradient: bool  # the initial state wants its gradient
    backend: str  # "torch" or "triton": what computes a rank's own tokens


def sequence_parallel_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    shard: SequenceShard,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    strategy: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T``, ``o_t = scale * q_t S_t`` over the tokens of all ranks.

    The same numbers as ``linear_attention`` on one device. All ranks of the group make the same call, and all of them
    run its backward pass or none does.

    Args:
        q: ``[B, T_w, G, K]``, this rank's tokens in the order of ``shard.positions``, G a divisor of H; float64,
            float32, bfloat16 or float16. B is 1 where the shard packs several documents.
        k: ``[B, T_w, G, K]``. v: ``[B, T_w, H, V]``.
        log_decay: at most 0: None (no decay), ``[H]`` (the same on every rank), ``[B, T_w, H]`` or ``[B, T_w, H, K]``.
        shard: which tokens this rank holds, in a layout with long segments (contiguous, zigzag).
        scale: multiplies q; None means ``K ** -0.5``.
        initial_state: ``[B, H, K, V]``, the same on every rank: the state before the sequence's first token.
        return_state: also return the state after the last token.
        strategy: ``"allgather"``, which is also what ``"auto"`` means.
        backend: which kernels compute a rank's own tokens, as in ``linear_attention``.

    Returns:
        out ``[B, T_w, H, V]`` in q's dtype, and the state after the sequence's last token, ``[B, H, K, V]`` in the
        state dtype, on every rank (None unless `return_state`); both differentiable. Each rank may use its copy of the
        state in its own loss: their gradients are summed. `initial_state` and an ``[H]`` decay get this rank's own part
        of the gradient, to be summed over ranks; that of the initial state falls to the rank of the first token whole.

    Raises:
        ValueError: what cannot work: at once where this rank can see it alone; on all ranks where they disagree.
    """
    _check_strategy(strategy)
    check_inputs(q, k, v, log_decay)
    if initial_state is not None:
        _check_initial_state(initial_state, q, v)
    check_shard(shard, batch=q.shape[0])
    check_tokens("q", q, shard)
    if not isinstance(return_state, bool):
        raise ValueError(f"return_state: got {return_state!r}, expected True or False")
    backend = chosen(backend, q, k, v)
    if backend == "reference":
        raise ValueError(
            "backend: got 'reference', which has no stages to run over ranks; 'auto', 'torch' and 'triton' do"
        )
    factor = checks.number("scale", scale)
    options = ScanOptions(
        shard=shard,
        plan=scan_plan(shard),
        scale=q.shape[3] ** -0.5 if factor is None else factor,
        return_state=return_state,
        initial_gradient=_wants_gradient(initial_state),
        backend=backend,
    )
    agree(shard, _signature(q, k, v, log_decay, initial_state, options), device=q.device)
    if initial_state is not None:
        initial_state = initial_state.to(_state_dtype(q, k, v))
    out, state = _SegmentScan.apply(q, k, v, log_decay, initial_state, options)
    return out, state if return_state else None


def segment_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, options: ScanOptions
) -> tuple[Tensor, Tensor, list[Tensor | None], Tensor]:
    """The scan over states; the gather is in flight while outputs from within chunks are computed.

    Returns out ``[B, T_w, H, V]`` in q's dtype and the state after the last token ``[B, H, K, V]`` (meaningless unless
    ``options.return_state``); and for backward the state that enters each of this rank's runs, ``[B, H, K, V]`` or None
    for zeros, and transitions ``[W, R, B, H, 1 or K, 1]``, what multiplies a state along each run. States are in the
    state dtype.
    """
    plan, shard = options.plan, options.shard
    state_shape = (plan.slots, v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    logs_shape = (*state_shape[:3], q.shape[3] if log_decay is not None and log_decay.ndim == 4 else 1)
    local = stages(options.backend).forward(q, k, v, log_decay, plan.offsets, scale=options.scale)
    if plan.crosses or options.return_state:
        segment_logs, segment_states = local.summaries()
        summaries = [_of_runs(plan, segment_logs, plan.last), _of_runs(plan, segment_states, plan.last)]
        gathering = all_gather_stacked(torch.cat([x.flatten() for x in summaries]), shard.group)
        local.local()
        logs, states = gathering.wait().split([x.numel() for x in summaries], dim=1)
        logs, states = logs.unflatten(1, logs_shape), states.unflatten(1, state_shape)
    else:  # nobody needs a state of another rank: one rank alone, or documents that end where ranks end
        zero = q.new_zeros((), dtype=_state_dtype(q, k, v))
        logs, states = zero.expand(shard.world, *logs_shape), zero.expand(shard.world, *state_shape)
    transitions = logs.unsqueeze(-1).exp()
    entering, final = combine_states(plan, states, _through(transitions), initial_state)
    out, _ = local.finish(_to_segments(plan, entering, plan.first), return_state=False)
    return out, states.new_zeros(state_shape[1:]) if final is None else final.clone(), entering, transitions


def segment_scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    entering: Sequence[Tensor | None],
    transitions: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
    options: ScanOptions,
    need_decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The scan over the gradients of states: dq, dk, dv, dlog_decay and this rank's part of dinitial_state.

    entering, transitions: what forward returned, so that nothing is sent twice. dout: the gradient of out; dstate: that
    of this rank's copy of the last state, where ``options.return_state``. The copies' gradients travel with the
    summaries and are summed in the order of the ranks. dinitial_state is None unless ``options.initial_gradient``.
    """
    plan, shard = options.plan, options.shard
    state_shape = (plan.slots, v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    local = stages(options.backend).backward(q, k, v, log_decay, plan.offsets, dout, scale=options.scale)
    final = None
    if plan.crosses or options.return_state or options.initial_gradient:
        message = _of_runs(plan, local.summaries(), plan.first)
        if options.return_state:
            own = message.new_zeros(state_shape[1:]) if dstate is None else dstate
            message = torch.cat([message, own.unsqueeze(0)])
        gathering = all_gather_stacked(message, shard.group)
        local.local(need_decay_gradient=need_decay_gradient)
        gradients = gathering.wait()
        final = gradients[:, plan.slots].sum(0) if options.return_state else None
    else:
        gradients = transitions.new_zeros(()).expand(shard.world, *state_shape)
    leaving, dinitial = combine_state_gradients(plan, gradients, _through(transitions), final)
    dq, dk, dv, dlog_decay, _ = local.finish(
        _to_segments(plan, entering, plan.first),
        _to_segments(plan, leaving, plan.last),
        need_decay_gradient=need_decay_gradient,
        need_state_gradient=False,
    )
    if not options.initial_gradient:
        return dq, dk, dv, dlog_decay, None
    # One rank alone hands on what every rank knows: the one with the first token.
    if dinitial is None or plan.rank != (plan.runs[0].rank if plan.runs else 0):
        dinitial = transitions.new_zeros(state_shape[1:])
    return dq, dk, dv, dlog_decay, dinitial


class _SegmentScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        options: ScanOptions,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(q.device):
            out, state, entering, transitions = segment_scan_forward(q, k, v, log_decay, initial_state, options)
        ctx.save_for_backward(q, k, v, log_decay, transitions, *entering)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dstate = gradients
        q, k, v, log_decay, transitions, *entering = ctx.saved_tensors
        with without_autocast(q.device):
            grads = segment_scan_backward(
                q,
                k,
                v,
                log_decay,
                entering=entering,
                transitions=transitions,
                # This rank's loss may use the state alone; the other ranks wait for its part all the same.
                dout=torch.zeros_like(v) if dout is None else dout,
                dstate=dstate,
                options=ctx.options,
                need_decay_gradient=ctx.needs_input_grad[3],
            )
        return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


def _wants_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _state_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32


def _through(transitions: Tensor) -> Transition:
    """How a state, or in backward its gradient, passes through a run: decays are their own transpose."""
    return lambda rank, slot, state: transitions[rank, slot] * state


def _of_runs(plan: ScanPlan, x: Tensor, segments: Sequence[int]) -> Tensor:
    """One entry for each slot, from a segment of each run: x ``[B, N, ...]`` -> ``[R, B, ...]``, zeros for no run."""
    of_runs = x.new_zeros((plan.slots, x.shape[0], *x.shape[2:]))
    for slot, segment in enumerate(segments):
        of_runs[slot] = x[:, segment]
    return of_runs


def _to_segments(plan: ScanPlan, of_runs: Sequence[Tensor | None], segments: Sequence[int]) -> Tensor | None:
    """What belongs to one segment of each run, among zeros for the others: ``[B, N, H, K, V]``; None for all zeros."""
    given = [(segment, x) for segment, x in zip(segments, of_runs, strict=True) if x is not None]
    if not given:
        return None
    batch, *state = given[0][1].shape
    of_segments = given[0][1].new_zeros((batch, len(plan.offsets) - 1, *state))
    for segment, x in given:
        of_segments[:, segment] = x
    return of_segments


def _check_strategy(strategy: str) -> None:
    if strategy not in ("auto", "allgather"):
        known = "is not there yet" if strategy in ("alltoall", "chain", "ulysses") else "does not exist"
        raise ValueError(f"strategy: got {strategy!r}, which {known}; what works is 'allgather', also as 'auto'")


def _check_initial_state(initial_state: Tensor, q: Tensor, v: Tensor) -> None:
    checks.floating("initial_state", initial_state, "[B, H, K, V]")
    expected = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    checks.sizes("initial_state", initial_state, expected, "[B, H, K, V] (over ranks one state for each row)")
    checks.same_device(q=q, initial_state=initial_state)


def _signature(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, options: ScanOptions
) -> dict[str, object]:
    """What the ranks must agree on before the first message."""
    return {
        "operator": "sequence_parallel_linear_attention",
        "q": tensor_signature(q),
        "k": tensor_signature(k),
        "v": tensor_signature(v),
        "log_decay": tensor_signature(log_decay),
        "initial_state": "None" if initial_state is None else "given",
        "initial_state.requires_grad": options.initial_gradient,
        "shard": options.shard.signature,
        "scale": options.scale,
        "return_state": options.return_state,
        "requires_grad": any(_wants_gradient(x) for x in (q, k, v, log_decay, initial_state)),
    }
