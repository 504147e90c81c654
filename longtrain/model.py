"""A Llama-shaped decoder whose blocks name their token mixer."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longtrain.layers import LayerPlace, Mixer, SwiGLU
from longtrain.layers.pattern import LayersConfig, plan_layers
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class ModelConfig:
    """Size and shape of the decoder, apart from its mixers."""

    width: int = 512
    depth: int = 8
    mlp_width: int | None = None
    tie_embedding: bool = True
    norm_eps: float = 1e-6

    @property
    def hidden(self) -> int:
        # 8/3 keeps the three matrices of SwiGLU as large as the two of a plain 4 x MLP.
        return -(-self.width * 8 // 3 // 32) * 32 if self.mlp_width is None else self.mlp_width


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), shard)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm, output head. Each rank runs it on its own tokens of the shard.

    Args:
        config: width, depth and so on.
        layers: the mixers' pattern and options.
        vocabulary: number of token ids.
        recompute: ``"none"`` keeps every activation for backward, ``"full"`` keeps only each block's input and runs the
            block again ("Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(self, config: ModelConfig, layers: LayersConfig, *, vocabulary: int, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(
            Block(config, mixer(options, place))
            for mixer, options, place in plan_layers(layers, width=config.width, depth=config.depth)
        )
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self._initialise(config)
        if config.tie_embedding:
            self.head.weight = self.embedding.weight

    def _initialise(self, config: ModelConfig) -> None:
        """Normal weights; what adds to the residual stream is smaller, so that depth does not raise its variance."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("mixer.out", "mlp.down")):
                    std /= (2 * config.depth) ** 0.5
                nn.init.normal_(module.weight, std=std)
        # The first guess is an even one. Tied, large embeddings would make each token predict itself.
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.embedding.weight, std=0.02 if config.tie_embedding else 1.0)

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
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, shard, use_reentrant=False)
            else:
                x = block(x, shard)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        # A copy: fully_shard hooks the backward of what a model returns, and hooks on views can get lost.
        losses = losses.view_as(labels).clone()
        return (losses, logits.argmax(-1) == labels) if hits else losses


def count_parameters(model: nn.Module) -> int:
    """Number of different weights (a tied embedding counts once)."""
    return sum(parameter.numel() for parameter in model.parameters())


__all__ = ["Block", "Decoder", "LayerPlace", "ModelConfig", "count_parameters"]
