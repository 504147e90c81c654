"""Layers of models on sequences that are spread over ranks: every mixer maps ``(x, shard)`` to y."""

from longtrain.layers.attention import SequenceParallelAttention
from longtrain.layers.mixers import MIXERS, LayerPlace, Mixer, RecurrentMixer
from longtrain.layers.mlp import SwiGLU
from longtrain.layers.rotary import rotate

__all__ = ["MIXERS", "LayerPlace", "Mixer", "RecurrentMixer", "SequenceParallelAttention", "SwiGLU", "rotate"]
