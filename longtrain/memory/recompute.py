"""Running a block so that backward computes it again, all but what its policy keeps.

torch's checkpoint runs the block again in backward when its first saved tensor is asked for. Around the first run
stands a mode that records the results of the kept operators, around the second one that gives them back, in the order
of their calls, instead of calling these operators again. The modes stand below autograd: in the second run each kept
operator gets its place in the graph as usual, and its backward finds its inputs computed again and its results kept.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from longtrain.memory.offload import Away, Store
from longtrain.memory.operators import LAST, Operator, Results
from longtrain.memory.policies import Policy

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def run_block(
    block: Callable[..., Result], x: Tensor, *rest: Any, policy: Policy, tiled: bool = False, store: Store | None = None
) -> Result:
    """``block(x, *rest)``, of which backward keeps what the policy says; the same gradients, bit for bit.

    rest: tensors that depend on weights are arguments like x, so that they are kept as it is. tiled: whether the last
    step of the block is a tiled MLP (see `LAST`). store: where what is kept lies until backward; None: where it is.
    """
    if not policy.recompute or not torch.is_grad_enabled():
        return block(x, *rest)
    kept = (*policy.kept, LAST) if tiled else policy.kept
    away = store if store is not None and store.kept else None
    contexts: dict[str, Any] = {"context_fn": lambda: _record_and_replay(kept, away, policy.seen)} if kept else {}
    with nullcontext() if store is None else store.next_layer():
        # Inside, torch's checkpoint saves its tensor arguments first and then has hooks of its own for the block.
        result = checkpoint(block, x, *rest, use_reentrant=False, **contexts)
    if isinstance(
        result, tuple
    ):  # the next block keeps these: copies, for a part of a larger tensor would hold all of it
        result = tuple(z.contiguous() for z in result)
    return cast(Result, result)


def _record_and_replay(kept: Sequence[Operator], store: Store | None, seen: set[str]) -> "tuple[_Record, _Replay]":
    operators = {operator.overload: operator for operator in kept}
    results: dict[OpOverload, deque[Results]] = defaultdict(deque)
    return _Record(operators, results, store, seen=seen), _Replay(operators, results, store)


class _Recorded(TorchDispatchMode):
    """What both modes know: the kept operators, and their results in the order of the calls."""

    def __init__(
        self,
        operators: dict[OpOverload, Operator],
        results: dict[OpOverload, "deque[Results]"],
        store: Store | None,
    ) -> None:
        super().__init__()
        self._operators, self._results, self._store = operators, results, store


class _Record(_Recorded):
    def __init__(self, *args: Any, seen: set[str]) -> None:
        super().__init__(*args)
        self._seen = seen
        # By storage: where what shares it is kept, a queue and a place in it.
        self._shared: dict[int, list[tuple[deque[Results], int]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._shared and func._schema.is_mutable:
            self._spare(_written(func, args, kwargs))
        results = func(*args, **kwargs)
        if (operator := self._operators.get(func)) is not None:
            # Aliases: autograd makes the graph's nodes owners of the results themselves.
            put = Tensor.detach if self._store is None else self._store.put
            self._seen.add(operator.name)
            queue, kept = self._results[func], operator.keep(results)
            for x in tree_leaves(kept):
                if isinstance(x, Tensor):
                    self._shared[x.untyped_storage()._cdata].append((queue, len(queue)))
            queue.append(tree_map_only(Tensor, put, kept))
        return results

    def _spare(self, written: Iterator[Tensor]) -> None:
        """Before the block writes to what is kept: copies of it, for the second run wants it as it was."""
        for x in written:
            for queue, place in self._shared.pop(x.untyped_storage()._cdata, ()):
                if self._store is None:
                    queue[place] = tree_map_only(Tensor, Tensor.clone, queue[place])
                else:
                    self._store.settle()


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(given) if isinstance(x, Tensor))


class _Replay(_Recorded):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = self._operators.get(func)
        if operator is None:
            return func(*args, **(kwargs or {}))
        if not self._results[func]:
            raise RuntimeError(
                f"{func} was called more often in recompute than in forward, or backward ran twice: what recompute "
                "keeps is given back once"
            )
        kept = self._results[func].popleft()
        if self._store is not None:
            kept = tree_map_only(Away, self._store.take, kept)
        return operator.give(kept, args, kwargs or {})
