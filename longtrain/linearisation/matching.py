"""The first stage: every new mixer learns what the old one makes of the same input, all layers at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longtrain.layers import Mixer
from longtrain.layers.pattern import LayersConfig
from longtrain.layers.recurrence import state_dtype
from longtrain.memory import MemoryConfig, run_block, store_for
from longtrain.model import Block, Decoder, ModelConfig
from longtrain.parallel import SequenceShard
from longtrain.trainer import Objective, Trainer


class MatchingBlock(Block):
    """A block that keeps, beside its mixer, a trained one that the mixer is to be like.

    Its `forward` is any block's. With `run`, what calls the mixer for its gradient, the block goes on with the trained
    mixer's output, and gives its own, and the mean over channels of the squared difference.
    """

    def __init__(self, config: ModelConfig, mixer: Mixer, teacher: Mixer, *, tile: int | None) -> None:
        super().__init__(config, mixer, tile=tile)
        self.teacher = teacher.requires_grad_(False)

    def forward(self, x: Tensor, shard: SequenceShard, *shared: Tensor, run: Callable[..., Any] | None = None) -> Any:
        """x ``[B, T_w, D]`` -> ``[B, T_w, D]``; with `run` this and the squared difference ``[B, T_w]``."""
        if run is None:
            return super().forward(x, shard, *shared)
        with torch.no_grad():
            normed = self.mixer_norm(x)
            wanted = self.teacher(normed, shard)
            after = self._with_mlp(x + wanted)
        found = run(self.mixer, normed, shard)
        wide = state_dtype(found.dtype)
        return after, (found.to(wide) - wanted.to(wide)).square().mean(-1)


class MatchingDecoder(Decoder):
    """A decoder some of whose blocks have a teacher beside their mixer.

    Teachers need no gradient: no optimizer moves them and no checkpoint holds them. With ``match`` the tokens pass
    through the trained model, without gradients, and each new mixer gets that model's normalised input to its layer:
    gradients reach the new mixers and nothing else, and no layer waits for another's.

    Args:
        config, layers, vocabulary, memory: as those of `Decoder`.
        teachers: by layer, the trained mixer.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayersConfig,
        *,
        vocabulary: int,
        memory: MemoryConfig,
        teachers: Mapping[int, Mixer],
    ) -> None:
        super().__init__(config, layers, vocabulary=vocabulary, memory=memory)
        for index, teacher in teachers.items():
            block = self.blocks[index]
            assert isinstance(block, Block)
            self.blocks[index] = MatchingBlock(config, block.mixer, teacher, tile=block.tile)

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(shard, device=device, dtype=dtype)
        for block in self.blocks:
            if isinstance(block, MatchingBlock):
                block.teacher.prepare(shard, device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        shard: SequenceShard,
        labels: Tensor | None = None,
        *,
        hits: bool = False,
        match: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As any decoder; with ``match`` each token's squared difference, a mean over channels and layers ``[B, T_w]``.

        A block's memory policy is then its mixer's.
        """
        if not match:
            return super().forward(tokens, shard, labels, hits=hits)
        with torch.no_grad():
            x = self.embedding(tokens)
        store, losses, shared = store_for(self.memory, x.device), [], ()
        for block, policy in zip(self.blocks, self.policies, strict=True):
            if isinstance(block, MatchingBlock):
                x, loss = block(x, shard, run=partial(run_block, policy=policy, store=store))
                losses.append(loss)
            else:
                with torch.no_grad():
                    found = block(x, shard, *shared)
                x, shared = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        return torch.stack(losses).mean(0)


MATCH = Objective(
    losses=lambda model, batch: model(batch.tokens, batch.shard, match=True), count=lambda batch: batch.shard.length
)
"""The mean squared error of the new mixers' outputs, over all tokens."""


def hand_over(before: Trainer, after: Trainer) -> None:
    """Give the weights, and the place in the data, of a trainer that ends to one that goes on; all ranks call it.

    The optimizer's state stays behind: it is about another objective.
    """
    before.close()
    old, new = before.tensors(), after.tensors()
    for name, tensor in new.items():
        if name.startswith("model."):
            _here(tensor).copy_(_here(old[name]))
    after.loaded(new)
    after.restore(before.numbers())


def matched(records: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """What a run's summary says of its first stage, from its metrics: nothing where there was none."""
    return {"match_steps": steps, "match_loss": records[steps - 1]["loss"]} if steps else {}


def _here(tensor: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
