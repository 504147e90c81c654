"""The causal convolution over a sequence that is spread over the ranks of a group: only the halo travels.

A rank convolves its own tokens as if nothing came before its runs, while the `width - 1` tokens before each run are
under way; then it computes the first tokens of these runs once more, with them. Backward first finds the gradients of
the halos, sends them to the ranks whose tokens they are, and computes all others meanwhile.

The registered operators `longtrain::sequence_parallel_conv1d` and `..._backward` make each pass one step to selective
checkpointing, torch.compile and fake tensors; see `parallel/attention/operators.py`.

Letters: B batch, T_w tokens on this rank, D channels, E runs of this rank that have a halo, N its segments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.causal_conv1d import check_inputs, check_options, operators, state_dtype
from longtrain.parallel.agreement import agree, check_shard, check_tokens, tensor_signature
from longtrain.parallel.halo import HaloExchange, HaloGradientExchange, HaloPlan, halo_plan
from longtrain.parallel.shard import SequenceShard, shard_of

NAME = "longtrain::sequence_parallel_conv1d"
_INPUTS = "Tensor x, Tensor weight, Tensor? bias"
_OPTIONS = "SymInt shard, str? activation, str backend"
_NAMES = [option.split()[1] for option in _OPTIONS.split(", ")]


def sequence_parallel_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shard: SequenceShard,
    *,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix each token with the few before it, channel by channel, wherever these are held.

    The same numbers as ``causal_conv1d`` on one device. All ranks of the group make the same call, and all of them run
    its backward pass or none does.

    Args:
        x: ``[B, T_w, D]``, this rank's tokens in the order of ``shard.positions``. B is 1 where the shard packs several
            documents.
        weight: ``[D, width]``, the same on every rank; ``weight[:, -1]`` multiplies the current token.
        bias: ``[D]`` or None. Both get this rank's own part of the gradient, to be summed over ranks.
        shard: which tokens this rank holds, in a layout with long segments (contiguous, zigzag).
        activation: None or ``"silu"``.
        backend: which kernels compute a rank's own tokens, as in ``causal_conv1d``.

    Returns:
        y ``[B, T_w, D]`` in x's dtype.

    Raises:
        ValueError: what cannot work: at once where this rank can see it alone; on all ranks where they disagree.
    """
    check_inputs(x, weight, bias)
    if not isinstance(shard, SequenceShard):
        raise ValueError(f"shard: got {type(shard).__name__}, expected a SequenceShard")
    if backend == "reference":
        raise ValueError("backend: got 'reference', which cannot run over ranks; 'auto', 'torch' and 'triton' can")
    check_options(x, weight, activation=activation, backend=backend)
    gradients = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))
    out, _ = _forward(
        x,
        weight,
        bias,
        shard=shard.handle,
        activation=activation,
        backend=backend,
        gradients=gradients,
        # Halos are small: they may be saved wherever they can be, so that no message brings them again.
        keep=gradients and not torch.compiler.is_compiling(),
    )
    return out


@dataclass(frozen=True, eq=False)
class _Strip:
    """Some pieces [start, stop) of this rank's tokens side by side: each a segment, maybe with one of the halos."""

    pieces: tuple[tuple[int, int], ...]
    halos: tuple[int | None, ...]
    plan: HaloPlan

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in self.pieces]

    @property
    def offsets(self) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *self.sizes], dtype=np.int64))

    @property
    def counts(self) -> Tensor:
        return torch.tensor([0 if n is None else self.plan.counts[n] for n in self.halos], dtype=torch.int64)

    def tokens(self, x: Tensor) -> Tensor:
        """``[B, T_w, D] -> [B, sum(sizes), D]``."""
        return torch.cat([x[:, start:stop] for start, stop in self.pieces], dim=1)

    def before(self, halo: Tensor) -> Tensor:
        """What stands before each piece: ``[B, E, width - 1, D] -> [B, pieces, width - 1, D]``."""
        nothing = halo.new_zeros(()).expand(halo.shape[0], *halo.shape[2:])
        return torch.stack([nothing if n is None else halo[:, n] for n in self.halos], dim=1)


@dataclass(frozen=True, eq=False)
class _ConvPlan:
    """What a call does besides the convolution of its own tokens.

    offsets: int64 [N+1] and counts: int64 [N], as of `causal_conv1d.passes`; segments: the segment of each halo. edges:
    the tokens that see a halo. ends: what the gradients of the tokens depend on that stand in others' halos, these
    included; tails: which tokens those are, [start, stop), for each piece of `ends`.
    """

    halo: HaloPlan
    offsets: Tensor
    counts: Tensor
    segments: tuple[int, ...]
    edges: _Strip
    ends: _Strip
    tails: tuple[tuple[int, int], ...]


def _plan(shard: SequenceShard, width: int) -> _ConvPlan:
    kept, key = shard.plans.setdefault(shard, {}), ("conv1d", width)
    if key not in kept:
        kept[key] = _new_plan(halo_plan(shard, width - 1))
    return kept[key]


def _new_plan(halo: HaloPlan) -> _ConvPlan:
    reach, scan = halo.reach, halo.scan
    bounds = scan.offsets.tolist()
    segments = tuple(scan.first[slot] for slot in halo.slots)
    counts = np.zeros(len(bounds) - 1, dtype=np.int64)
    counts[list(segments)] = halo.counts
    edges = tuple((bounds[n], min(bounds[n] + reach, bounds[n + 1])) for n in segments)
    ends, halos, tails = [], [], []
    for segment in scan.last:
        start, stop = bounds[segment], bounds[segment + 1]
        sent = [piece.start for piece in halo.sends if start <= piece.start < stop]
        if not sent:
            continue
        tails.append((min(sent), stop))
        begin = max(min(sent) - reach, start)  # the tokens that the tail itself sees
        ends.append((begin, stop))
        halos.append(segments.index(segment) if begin == start and segment in segments else None)
    return _ConvPlan(
        halo=halo,
        offsets=torch.from_numpy(scan.offsets),
        counts=torch.from_numpy(counts),
        segments=segments,
        edges=_Strip(edges, tuple(range(len(edges))), halo),
        ends=_Strip(tuple(ends), tuple(halos), halo),
        tails=tuple(tails),
    )


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # gradients: backward will follow. keep: hold the halo for it.
    schema=f"({_INPUTS}, *, {_OPTIONS}, bool gradients, bool keep) -> (Tensor out, Tensor[] held)",
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    shard: int,
    activation: str | None,
    backend: str,
    gradients: bool,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    _check(x, shard)
    spread, plan = shard_of(shard), _plan(shard_of(shard), weight.shape[1])
    options = {"activation": activation, "backend": backend}
    stated = {**options, "requires_grad": gradients, "kept for backward": keep}
    agree(spread, _signature(x, weight, bias, spread, stated), device=x.device)
    exchange = HaloExchange(x, plan.halo, spread.group)
    out, halo = _convolved(x, weight, bias, plan, exchange.wait, options)
    return out, [halo] if keep else []


def convolved_again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    halo: Tensor,
    shard: int,
    activation: str | None,
    backend: str,
) -> Tensor:
    """What the forward operator returned, bit for bit, from the halo that it held: for recompute, without a message."""
    options = {"activation": activation, "backend": backend}
    return _convolved(x, weight, bias, _plan(shard_of(shard), weight.shape[1]), lambda: halo, options)[0]


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: _ConvPlan,
    wait: Callable[[], Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out and the halo, for which it waits when all that needs none is computed."""
    out = operators.forward(x, weight, bias, None, plan.offsets, None, **options)
    halo = wait()
    if edges := plan.edges.pieces:
        strip = plan.edges
        given = (strip.tokens(x), weight, bias, strip.before(halo), strip.offsets, strip.counts)
        parts = operators.forward(*given, **options).split(strip.sizes, dim=1)
        for (start, stop), part in zip(edges, parts, strict=True):
            out[:, start:stop] = part
    return out, halo


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    # dbias is empty [0] where there is no bias: an operator cannot return None.
    schema=f"(Tensor dout, {_INPUTS}, Tensor[] held, *, {_OPTIONS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    held: list[Tensor],
    *,
    shard: int,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    group, plan = shard_of(shard).group, _plan(shard_of(shard), weight.shape[1])
    options = {"activation": activation, "backend": backend}
    halo = held[0] if held else HaloExchange(x, plan.halo, group).wait()
    state = state_dtype(x, weight, bias)
    wide = halo.to(state)

    def of_strip(strip: _Strip) -> tuple[Tensor, Tensor]:
        """dx and dhalo in the state dtype, of the pieces' own outputs alone."""
        given = (strip.tokens(x).to(state), weight, bias, strip.before(wide), strip.offsets, strip.counts)
        dx, _, _, dhalo = operators.backward(strip.tokens(dout), *given, **options)
        return dx, dhalo

    _, dhalo = of_strip(plan.edges) if plan.edges.pieces else (None, wide)
    exchange = HaloGradientExchange(dhalo, plan.halo, group)
    whole, counts = None, None
    if plan.segments:
        # What does not count is never looked at.
        whole, counts = halo.new_empty((x.shape[0], len(plan.counts), *halo.shape[2:])), plan.counts
        for n, segment in enumerate(plan.segments):
            whole[:, segment] = halo[:, n]
    dx, dweight, dbias, _ = operators.backward(dout, x, weight, bias, whole, plan.offsets, counts, **options)
    if plan.tails:  # their gradients have parts on several ranks, which are summed before they are rounded
        own, _ = of_strip(plan.ends)
        received = exchange.wait()
        for (start, stop), part in zip(plan.tails, own.split(plan.ends.sizes, dim=1), strict=True):
            total = part[:, part.shape[1] - (stop - start) :]
            for first, gradient in received:
                if start <= first < stop:
                    total[:, first - start :] += gradient
            dx[:, start:stop] = total
    else:
        exchange.wait()
    return dx, dweight, dbias


def _check(x: Tensor, shard: int) -> None:
    """Refuse what does not fit the shard: what this rank can tell alone, before any message."""
    check_shard(shard_of(shard), batch=x.shape[0])
    check_tokens("x", x, shard_of(shard))
    halo_plan(shard_of(shard), 0)


def _signature(
    x: Tensor, weight: Tensor, bias: Tensor | None, shard: SequenceShard, options: dict[str, Any]
) -> dict[str, object]:
    """What the ranks must agree on before the first message."""
    return {
        "operator": "sequence_parallel_conv1d",
        "x": tensor_signature(x),
        "weight": f"{list(weight.shape)} {weight.dtype}",
        "bias": None if bias is None else f"{list(bias.shape)} {bias.dtype}",
        **options,
        "shard": shard.signature,
    }


@_forward.register_fake
def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, shard: int, keep: bool, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    if isinstance(shard, int):  # not a compiler's symbol
        _check(x, shard)
    held = []
    if keep:
        halos = len(_plan(shard_of(shard), weight.shape[1]).segments)
        held = [x.new_empty((x.shape[0], halos, weight.shape[1] - 1, x.shape[2]))]
    return x.new_empty(x.shape), held


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, held: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, list[Tensor]],
) -> None:
    ctx.save_for_backward(*inputs, *output[1])
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name in _NAMES}
    if not torch.compiler.is_compiling():  # a handle keeps no shard alive
        ctx.shard = shard_of(ctx.options["shard"])


def _differentiate(ctx: Any, dout: Tensor, dheld: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, *held = ctx.saved_tensors
    gradients = _backward(dout, x, weight, bias, held, **ctx.options)
    return tuple(y if needed else None for y, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
