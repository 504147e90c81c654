"""The public functions: linear mixers over the ranks of a group, the same numbers as on one device."""

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.parallel.linear import operators
from longtrain.parallel.linear.mixers import (
    DELTA_RULE,
    LINEAR_ATTENTION,
    SLOT_ATTENTION,
    Mixer,
    Tensors,
    join_states,
    split_states,
)
from longtrain.parallel.shard import SequenceShard

STRATEGIES = ("auto", "allgather", "alltoall", "chain", "ulysses")
"""What these functions take as their strategy."""


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

    The same numbers as ``linear_attention`` on one device (see there). All ranks of the group make the same call, and
    all of them run its backward pass or none does. Compiled (``torch.compile``), the shard must be kept until then.

    Args:
        q: ``[B, T_w, G, K]``, this rank's tokens in the order of ``shard.positions``, G a divisor of H; float64,
            float32, bfloat16 or float16. B is 1 where the shard packs several documents.
        k: ``[B, T_w, G, K]``. v: ``[B, T_w, H, V]``.
        log_decay: at most 0: None (no decay), ``[H]`` (the same on every rank), ``[B, T_w, H]`` or ``[B, T_w, H, K]``.
        shard: which tokens this rank holds, in a layout with long segments (contiguous, zigzag).
        scale: multiplies q; None means ``K ** -0.5``.
        initial_state: ``[B, H, K, V]``, the same on every rank: the state before the sequence's first token.
        return_state: also return the state after the last token.
        strategy: how what a rank's runs sum up to travels. ``"allgather"``: to all ranks in one message;
            ``"alltoall"``: to ranks that scan some heads each, and back, bytes that do not grow with W; ``"chain"``:
            from run to run; ``"ulysses"``: ranks exchange tokens for heads instead, W must divide H. ``"auto"``: what
            the cost model finds cheapest (``explain_linear_attention``).
        backend: which kernels compute a rank's own tokens, as in ``linear_attention``.

    Returns:
        out ``[B, T_w, H, V]`` in q's dtype, and the state after the sequence's last token, ``[B, H, K, V]`` in the
        state dtype, on every rank (None unless `return_state`); both differentiable. Each rank may use its copy of the
        state in its own loss: their gradients are summed. `initial_state` and an ``[H]`` decay get this rank's own part
        of the gradient, to be summed over ranks.

    Raises:
        ValueError: what cannot work: at once where this rank can see it alone; on all ranks where they disagree.
    """
    tensors = (q, k, v, log_decay)
    LINEAR_ATTENTION.check(tensors)
    _check_state("initial_state", initial_state, q, (v.shape[2], q.shape[3], v.shape[3]), "K, V")
    return _run(
        LINEAR_ATTENTION,
        tensors,
        initial_state,
        shard,
        scale,
        return_state=return_state,
        strategy=strategy,
        backend=backend,
    )


def sequence_parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    shard: SequenceShard,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    strategy: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over the tokens of all ranks: the same numbers as ``gated_delta_rule`` on one device.

        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * q_t S_t

    A run of tokens takes a state through a matrix ``[K, K]`` per head, float32, kept from forward for backward.

    Args:
        q, k, v: as in ``sequence_parallel_linear_attention``. beta: ``[B, T_w, H]``.
        log_decay: at most 0: None, ``[B, T_w, H]`` or ``[B, T_w, H, K]``.
        shard, scale, initial_state, return_state, strategy, backend: as there.

    Returns:
        As there, out ``[B, T_w, H, V]`` and the state ``[B, H, K, V]`` or None.

    Raises:
        ValueError: as there.
    """
    tensors = (q, k, v, beta, log_decay)
    DELTA_RULE.check(tensors)
    _check_state("initial_state", initial_state, q, (v.shape[2], q.shape[3], v.shape[3]), "K, V")
    return _run(
        DELTA_RULE, tensors, initial_state, shard, scale, return_state=return_state, strategy=strategy, backend=backend
    )


def sequence_parallel_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    shard: SequenceShard,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    strategy: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gated slot attention over the tokens of all ranks: the same numbers as ``gated_slot_attention`` on one device.

        A_t = A_{t-1} diag(exp(log_decay_t)) + k_t slot_t^T,  C_t = diag(exp(log_decay_t)) C_{t-1} + slot_t v_t^T
        o_t = softmax(scale * q_t A_t) C_t

    Both states travel in one message in forward; in backward C's gradients first, then A's.

    Args:
        q, k, v: as in ``sequence_parallel_linear_attention``. slot, log_decay (at most 0): ``[B, T_w, H, M]``.
        initial_state: A ``[B, H, K, M]`` and C ``[B, H, M, V]`` before the sequence's first token.
        shard, scale, return_state, strategy, backend: as there.

    Returns:
        As there, out ``[B, T_w, H, V]`` and the state (A, C) after the last token or None.

    Raises:
        ValueError: as there.
    """
    tensors = (q, k, v, slot, log_decay)
    SLOT_ATTENTION.check(tensors)
    heads, slots, initial = v.shape[2], slot.shape[3], None
    if initial_state is not None:
        if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
            raise ValueError(
                f"initial_state: got {type(initial_state).__name__}, expected a pair of tensors (A, C) or None"
            )
        _check_state("initial_state[0]", initial_state[0], q, (heads, q.shape[3], slots), "K, M")
        _check_state("initial_state[1]", initial_state[1], q, (heads, slots, v.shape[3]), "M, V")
        initial = join_states(*initial_state)
    out, state = _run(
        SLOT_ATTENTION, tensors, initial, shard, scale, return_state=return_state, strategy=strategy, backend=backend
    )
    return out, None if state is None else split_states(state, q.shape[3])


def _run(
    mixer: Mixer,
    tensors: Tensors,
    initial: Tensor | None,
    shard: SequenceShard,
    scale: float | None,
    *,
    return_state: bool,
    strategy: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Check what is the same for all mixers, and call the registered operator."""
    if not isinstance(shard, SequenceShard):
        raise ValueError(f"shard: got {type(shard).__name__}, expected a SequenceShard")
    if not isinstance(return_state, bool):
        raise ValueError(f"return_state: got {return_state!r}, expected True or False")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}")
    factor = checks.number("scale", scale)
    backend = mixer.chosen(backend, tensors)
    if backend == "reference":
        raise ValueError(
            "backend: got 'reference', which has no stages to run over ranks; 'auto', 'torch' and 'triton' do"
        )
    if initial is not None:
        initial = initial.to(mixer.sizes(tensors).dtype)
    given = [x for x in (*tensors, initial) if x is not None]
    out, state, _, _ = operators.PAIRS[mixer.name].forward(
        *tensors,
        initial,
        shard=shard.handle,
        scale=tensors[0].shape[3] ** -0.5 if factor is None else factor,
        strategy=strategy,
        backend=backend,
        return_state=return_state,
        initial_gradient=initial is not None and initial.requires_grad and torch.is_grad_enabled(),
        gradients=torch.is_grad_enabled() and any(x.requires_grad for x in given),
    )
    return out, state if return_state else None


def _check_state(name: str, state: Tensor | None, q: Tensor, sizes: tuple[int, int, int], widths: str) -> None:
    if state is None:
        return
    checks.floating(name, state, f"[B, H, {widths}]")
    checks.sizes(name, state, (q.shape[0], *sizes), f"[B, H, {widths}] (over ranks one state for each row)")
    checks.same_device(q=q, **{name: state})
