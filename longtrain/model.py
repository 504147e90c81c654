"""A Llama-shaped decoder whose blocks name their token mixer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longtrain.kernels import linear_cross_entropy, tiled_mlp
from longtrain.layers import LayerPlace, Mixer, SwiGLU
from longtrain.layers.mixers.base import Shared, SharingMixer
from longtrain.layers.norm import RMSNorm
from longtrain.layers.pattern import LayersConfig, hands_on, layer_names, named_layers
from longtrain.memory import MemoryConfig, check_seen, layer_policies, run_block, store_for
from longtrain.parallel import SequenceShard

KEEP_EVERYTHING = MemoryConfig()


@dataclass(frozen=True)
class ModelConfig:
    """Size and shape of the decoder, apart from its mixers."""

    width: int = 512
    depth: int = 8
    mlp_width: int | None = None
    tie_embedding: bool = True
    norm_eps: float = 1e-6
    vocabulary: int | None = None
    meta_tokens: int = 0

    @property
    def hidden(self) -> int:
        # 8/3 keeps the three matrices of SwiGLU as large as the two of a plain 4 x MLP.
        return -(-self.width * 8 // 3 // 32) * 32 if self.mlp_width is None else self.mlp_width


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, the latter by tiles of `tile` tokens where that is given.

    hands_on: whether the next block takes what this one's mixer hands on (see `SharingMixer`).
    """

    def __init__(self, config: ModelConfig, mixer: Mixer, *, tile: int | None = None, hands_on: bool = False) -> None:
        super().__init__()
        self.tile, self.eps, self.hands_on = tile, config.norm_eps, hands_on
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, shard: SequenceShard, *shared: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x ``[B, T_w, D]``, after meta tokens where there are any -> alike; with ``hands_on`` a tuple: it, and these.

        shared: what the block before handed on.
        """
        if not isinstance(self.mixer, SharingMixer):
            return self._with_mlp(x + self.mixer(self.mixer_norm(x), shard))
        y, shared = self.mixer.mix_shared(self.mixer_norm(x), shard, shared)
        x = self._with_mlp(x + y)
        return (x, *shared) if self.hands_on else x

    def prefill(
        self, x: Tensor, shard: SequenceShard, state: Any = None, shared: Shared = ()
    ) -> tuple[Tensor, Any, Shared]:
        """As ``forward`` on one document on one device, from its mixer's state on; see ``Mixer.prefill``."""
        if not isinstance(self.mixer, SharingMixer):
            y, state = self.mixer.prefill(self.mixer_norm(x), shard, state)
            return self._with_mlp(x + y), state, ()
        y, state, shared = self.mixer.prefill_shared(self.mixer_norm(x), shard, state, shared)
        return self._with_mlp(x + y), state, shared if self.hands_on else ()

    def step(self, x: Tensor, state: Any, shared: Shared = ()) -> tuple[Tensor, Any, Shared]:
        """The next token, x ``[B, D]``; see ``Mixer.step``."""
        if not isinstance(self.mixer, SharingMixer):
            y, state = self.mixer.step(self.mixer_norm(x), state)
            return self._with_mlp(x + y), state, ()
        y, state, shared = self.mixer.step_shared(self.mixer_norm(x), state, shared)
        return self._with_mlp(x + y), state, shared if self.hands_on else ()

    def _with_mlp(self, x: Tensor) -> Tensor:
        if self.tile is None:
            return x + self.mlp(self.mlp_norm(x))
        # One operator whose inputs are the weights: they get one gradient each, whatever the number of tiles.
        weights = (self.mlp_norm.weight, self.mlp.gate_up.weight, self.mlp.down.weight)
        norm, gate_up, down = (weight.to(x.dtype) for weight in weights)
        return tiled_mlp(x, norm, gate_up, down, tile=self.tile, eps=self.eps)


class Decoder(nn.Module):
    """Embedding, blocks, norm, output head. Each rank runs it on its own tokens of the shard.

    Args:
        config: width, depth and so on; meta_tokens stand in front of every document, and no loss asks for them.
        layers: the mixers' pattern and options.
        vocabulary: number of token ids.
        memory: what is kept for backward of each block, and its tiles of tokens; the gradients are those without.
    """

    def __init__(
        self, config: ModelConfig, layers: LayersConfig, *, vocabulary: int, memory: MemoryConfig = KEEP_EVERYTHING
    ) -> None:
        super().__init__()
        self.memory = memory
        self.policies = layer_policies(memory.recompute, layer_names(layers, config.depth))
        self._unseen = any(policy.named for policy in self.policies)  # whether the first forward pass has still to tell
        made: dict[str, Any] = dict(self.parts(config, layers, vocabulary=vocabulary, memory=memory))
        self.embedding: nn.Embedding = made["embedding"]
        # Learned tokens in front of every document, "meta tokens" ("Hymba", section 2.3): a text of their own, whose
        # hidden states depend on weights only. Each rank carries its copy of them through all layers.
        meta = torch.empty(config.meta_tokens, config.width) if config.meta_tokens else None
        self.meta_embedding = None if meta is None else nn.Parameter(meta)
        self.blocks = nn.ModuleList(made[f"blocks.{index}"] for index in range(config.depth))
        self.norm: RMSNorm = made["norm"]
        self.head: nn.Linear = made["head"]
        for _, parameter, std in draws(self, config):
            nn.init.normal_(parameter, std=std) if std else nn.init.zeros_(parameter)
        if config.tie_embedding:
            self.head.weight = self.embedding.weight

    @staticmethod
    def parts(
        config: ModelConfig, layers: LayersConfig, *, vocabulary: int, memory: MemoryConfig
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules that a decoder is made of, by name, each made when it is asked for."""
        yield "embedding", nn.Embedding(vocabulary, config.width)
        planned = named_layers(layers, width=config.width, depth=config.depth, meta=config.meta_tokens)
        for index, (layer, hands) in enumerate(zip(planned, hands_on(planned), strict=True)):
            mixer = layer.mixer(layer.options, layer.place)
            yield f"blocks.{index}", Block(config, mixer, tile=memory.tile, hands_on=hands)
            del mixer  # not beside the next one
        yield "norm", RMSNorm(config.width, eps=config.norm_eps)
        yield "head", nn.Linear(config.width, vocabulary, bias=False)

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        """Do the host's work for a batch on `shard` ahead, in a data loader say; it will run on `device` in `dtype`."""
        for block in self.blocks:
            cast(Block, block).mixer.prepare(shard, device=device, dtype=dtype)

    def forward(
        self, tokens: Tensor, shard: SequenceShard, labels: Tensor | None = None, *, hits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss of each token.

        Args:
            tokens: ``[B, T_w]`` int64, this rank's tokens.
            shard: says which tokens of which documents these are.
            labels: ``[B, T_w]`` int64, -100 where there is nothing to predict.
            hits: say too whether each label was the likeliest token.

        Returns:
            Without labels the logits ``[B, T_w, vocabulary]``; with them the negative log-likelihood of each label in
            nats, ``[B, T_w]`` float32 (float64 for a float64 model), 0 where the label is -100. With ``hits`` a pair:
            these losses, and bool ``[B, T_w]``, true where the label has the largest logit (the first of equal ones).
        """
        x = self._after_meta(self.embedding(tokens))
        store, shared, tiled = store_for(self.memory, x.device), (), self.memory.tile is not None
        for block, policy in zip(self.blocks, self.policies, strict=True):
            found = run_block(block, x, shard, *shared, policy=policy, tiled=tiled, store=store)
            x, shared = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        if self._unseen and torch.is_grad_enabled():
            check_seen(self.policies)
            self._unseen = False
        x = self.norm(x if self.meta_embedding is None else x[:, len(self.meta_embedding) :])
        if labels is None:
            return self.head(x)
        if torch.is_autocast_enabled(x.device.type):  # as the head itself would do it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = self.head.weight.to(x.dtype)
        # A copy: fully_shard hooks the backward of what a model returns, and hooks on views can get lost.
        losses = linear_cross_entropy(x, weight, labels, reduction="none").clone()
        return (losses, _hits(x.detach(), weight.detach(), labels)) if hits else losses

    def _after_meta(self, x: Tensor) -> Tensor:
        """``[B, T_w, D]`` with the meta tokens before it."""
        if self.meta_embedding is None:
            return x
        return torch.cat((self.meta_embedding.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        """Whether the model can go on from a state, and whether that grows with the text: its mixers' worst."""
        kinds = {cast(Block, block).mixer.state_kind for block in self.blocks}
        return "none" if "none" in kinds else "growing" if "growing" in kinds else "constant"

    def prefill(self, tokens: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Read a text, or a further piece of it, on one device.

        tokens ``[B, T]`` int64, T >= 1 -> logits of the token after the last, ``[B, vocabulary]``, and each block's
        state. states: those after the piece before (they may be written to); None at the text's beginning.
        """
        shard, shared, after = SequenceShard(length=tokens.shape[1]), (), []
        x = self.embedding(tokens) if states else self._after_meta(self.embedding(tokens))
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state, shared = cast(Block, block).prefill(x, shard, state, shared)
            after.append(state)
        return self.head(self.norm(x[:, -1])), after

    def step(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """Read one more token: ``[B]`` int64 -> the next one's logits ``[B, vocabulary]``, and each block's state."""
        x, shared, after = self.embedding(tokens), (), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state, shared = cast(Block, block).step(x, state, shared)
            after.append(state)
        return self.head(self.norm(x)), after


def draws(model: Decoder, config: ModelConfig) -> Iterator[tuple[str, Tensor, float]]:
    """The weights that begin normal, in the order in which they are drawn, with their standard deviations; 0: zeros.

    What adds to the residual stream is smaller, so that depth does not raise its variance.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("mixer.out", "mlp.down")):
                std /= (2 * config.depth) ** 0.5
            yield f"{name}.weight", module.weight, std
    # The first guess is an even one. Tied, large embeddings would make each token predict itself.
    yield "head.weight", model.head.weight, 0.0
    std = 0.02 if config.tie_embedding else 1.0
    yield "embedding.weight", model.embedding.weight, std
    if model.meta_embedding is not None:
        yield "meta_embedding", model.meta_embedding, std


_LOGITS_AT_ONCE = 2**26


def _hits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Where the label has the largest logit, bool ``[B, T_w]``, from few tokens' logits at a time.

    x ``[B, T_w, D]``, weight ``[vocabulary, D]``.
    """
    flat = x.flatten(0, 1)
    tokens = max(1, _LOGITS_AT_ONCE // weight.shape[0])
    found = [(part @ weight.t()).argmax(-1) for part in flat.split(tokens)]
    return torch.cat(found).view_as(labels) == labels


def count_parameters(model: nn.Module) -> int:
    """Number of different weights (a tied embedding counts once)."""
    return sum(parameter.numel() for parameter in model.parameters())


__all__ = ["Block", "Decoder", "LayerPlace", "ModelConfig", "count_parameters"]
