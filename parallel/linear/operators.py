"""The registered operators `longtrain::sequence_parallel_linear_attention`, `..._delta_rule`, `..._slot_attention`.

Each has its `..._backward`. As registered operators they are single steps to selective checkpointing (a policy that
keeps forward's results repeats none of its messages in backward), to torch.compile and to fake tensors. Shards go in by
handle, as integers that torch.compile may treat as dynamic, so that new documents in every batch compile nothing anew.
Their bodies do the handshake, then all allocations and messages.

What forward hands to backward are results of its own: `saved` of the mixer, `carried` of the scan, both flat or empty.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.parallel.agreement import agree, check_shard, check_tokens, tensor_signature
from longtrain.parallel.linear import engine, ulysses
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.cost import choose, refusal
from longtrain.parallel.linear.mixers import MIXERS, Mixer, Tensors
from longtrain.parallel.scan import scan_plan
from longtrain.parallel.shard import shard_of

_OPTIONS = "SymInt shard, float scale, str strategy, str backend, bool return_state, bool initial_gradient"
_NAMES = [option.split()[1] for option in _OPTIONS.split(", ")]


def _call(mixer: Mixer, tensors: Tensors, *, initial: bool, shard: int, strategy: str, **options: Any) -> ScanCall:
    held = shard_of(shard)
    chosen = choose(strategy, mixer, tensors, held, return_state=options["return_state"])
    return ScanCall(mixer, mixer.sizes(tensors), held, scan_plan(held), initial=initial, strategy=chosen, **options)


def _check(tensors: Tensors, shard: int, strategy: str) -> None:
    """Refuse what does not fit the shard: what this rank can tell alone, before any message."""
    held = shard_of(shard)
    check_shard(held, batch=tensors[0].shape[0])
    check_tokens("q", tensors[0], held)
    scan_plan(held)
    if (reason := refusal(strategy, tensors, held)) is not None:
        raise ValueError(f"strategy: got {strategy!r} {reason}")


def _agree(mixer: Mixer, tensors: Tensors, initial: Tensor | None, gradients: bool, options: dict[str, Any]) -> None:
    """Before the first message: the ranks must have been given the same, but for the tokens that each holds."""
    shard = shard_of(options["shard"])
    signature = {
        "operator": f"sequence_parallel_{mixer.name}",
        **{name: tensor_signature(x) for name, x in zip(mixer.arguments, tensors, strict=True)},
        "initial_state": "None" if initial is None else "given",
        "initial_state.requires_grad": options["initial_gradient"],
        "shard": shard.signature,
        "scale": options["scale"],
        "strategy": options["strategy"],
        "return_state": options["return_state"],
        "requires_grad": gradients,
    }
    agree(shard, signature, device=tensors[0].device)


class _Pair:
    """A mixer's two operators, registered when this is made."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        inputs = ", ".join(f"Tensor{'?' * (name in mixer.optional)} {name}" for name in mixer.arguments)
        gradients = ", ".join(f"Tensor d{name}" for name in mixer.arguments)
        name = f"longtrain::sequence_parallel_{mixer.name}"
        self.forward = torch.library.custom_op(
            name,
            self._forward,
            mutates_args=(),
            # gradients: backward will follow. state: no elements unless asked for.
            schema=f"({inputs}, Tensor? initial_state, *, {_OPTIONS}, bool gradients) "
            "-> (Tensor out, Tensor state, Tensor saved, Tensor carried)",
        )
        self.backward = torch.library.custom_op(
            f"{name}_backward",
            self._backward,
            mutates_args=(),
            # A gradient that is not needed has no elements.
            schema=f"(Tensor dout, Tensor? dstate, Tensor saved, Tensor carried, {inputs}, *, {_OPTIONS}, "
            f"bool initial, bool need_decay) -> ({gradients}, Tensor dinitial_state)",
        )
        self.forward.register_fake(self._forward_shapes)
        self.backward.register_fake(self._backward_shapes)
        self.forward.register_autograd(self._differentiate, setup_context=self._save)

    def _forward(self, *tensors: Any, gradients: bool, **options: Any) -> tuple[Tensor, ...]:
        *tokens, initial = tensors
        _check(tokens, options["shard"], options["strategy"])
        checks.never_positive("log_decay", tokens[-1])
        call = _call(self.mixer, tokens, initial=initial is not None, **options)
        _agree(self.mixer, tokens, initial, gradients, options)
        forward = ulysses.forward if call.strategy == "ulysses" else engine.scan_forward
        out, state, saved, carried = forward(tokens, initial, call)
        return out, carried.new_empty(0) if state is None else state, saved, carried

    def _forward_shapes(self, *tensors: Any, gradients: bool, **options: Any) -> tuple[Tensor, ...]:
        *tokens, initial = tensors
        q, v, sizes = tokens[0], tokens[2], self.mixer.sizes(tokens)
        if isinstance(options["shard"], int):
            _check(tokens, options["shard"], options["strategy"])
            call = _call(self.mixer, tokens, initial=initial is not None, **options)
            sizes_of = ulysses.carried_sizes if call.strategy == "ulysses" else engine.carried_sizes
            saved, carried = sizes_of(tokens, call)
        else:  # a compiler's symbol: any shard may come
            context = torch.library.get_ctx()
            saved, carried = context.new_dynamic_size(), context.new_dynamic_size()
        state = sizes.state if options["return_state"] else (0,)
        shapes = [(v.shape, q.dtype), (state, sizes.dtype), ((saved,), sizes.dtype), ((carried,), sizes.dtype)]
        return tuple(v.new_empty(shape, dtype=dtype) for shape, dtype in shapes)

    def _backward(
        self,
        dout: Tensor,
        dstate: Tensor | None,
        saved: Tensor,
        carried: Tensor,
        *tokens: Any,
        need_decay: bool,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        call = _call(self.mixer, tokens, **options)
        backward = ulysses.backward if call.strategy == "ulysses" else engine.scan_backward
        found, dinitial = backward(tokens, saved, carried, dout, dstate, call, need_decay=need_decay)
        if options["initial_gradient"] and dinitial is None:
            dinitial = carried.new_zeros(call.sizes.state)
        return tuple(carried.new_empty(0) if x is None else x for x in (*found, dinitial))

    def _backward_shapes(
        self,
        dout: Tensor,
        dstate: Tensor | None,
        saved: Tensor,
        carried: Tensor,
        *tokens: Any,
        need_decay: bool,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        given = (*tokens[:-1], tokens[-1] if need_decay else None)
        dinitial = carried.new_empty(self.mixer.sizes(tokens).state if options["initial_gradient"] else (0,))
        return (*(carried.new_empty(0) if x is None else x.new_empty(x.shape) for x in given), dinitial)

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        *tokens, initial = inputs
        _, _, saved, carried = output
        ctx.save_for_backward(*tokens, saved, carried)
        ctx.options = {name: value for name, value in keyword_only_inputs.items() if name in _NAMES}
        ctx.initial = initial is not None
        if not torch.compiler.is_compiling():  # a handle keeps no shard alive
            ctx.shard = shard_of(ctx.options["shard"])
        ctx.set_materialize_grads(False)

    def _differentiate(
        self, ctx: Any, dout: Tensor | None, dstate: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *tokens, saved, carried = ctx.saved_tensors
        if dout is None:  # this rank's loss uses the state alone; the others wait for its part all the same
            dout = torch.zeros_like(tokens[2], dtype=tokens[0].dtype)
        found = self.backward(
            dout,
            dstate if ctx.options["return_state"] else None,
            saved,
            carried,
            *tokens,
            **ctx.options,
            initial=ctx.initial,
            need_decay=tokens[-1] is not None and ctx.needs_input_grad[len(tokens) - 1],
        )
        return tuple(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=True))


PAIRS = {mixer.name: _Pair(mixer) for mixer in MIXERS}
