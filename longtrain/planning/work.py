"""What a step computes and sends: FLOPs with causality and documents counted exactly, bytes over each kind of link."""

from functools import cached_property

from longtrain.dry_run import MixerHeld
from longtrain.layers.pattern import Layer
from longtrain.parallel.attention.cost import Estimate, Hardware
from longtrain.planning.mixing import blocks, mixing
from longtrain.planning.sizes import Sizes

LATENCY = 2e-5  # seconds that a message takes to start between devices; 3e-4 through gloo


class Shape(Sizes):
    """A recipe on so many devices, with all that a step computes, holds and sends, worked out when it is asked for."""

    # ---- weights ----------------------------------------------------------------------------------------------------

    @cached_property
    def block_weights(self) -> list[int]:
        """Of each block: mixer, SwiGLU and the two norms."""
        model = self.recipe.model
        rest = 3 * model.width * model.hidden + 2 * model.width
        return [layer.mixer.count_parameters(layer.options, layer.place) + rest for layer in self.layers]

    @property
    def outer_weights(self) -> int:
        """Embedding, head, meta tokens and the last norm."""
        model = self.recipe.model
        matrices = 1 if model.tie_embedding else 2
        return (self.vocabulary * matrices + model.meta_tokens + 1) * model.width

    @property
    def weights(self) -> int:
        return sum(self.block_weights) + self.outer_weights

    @cached_property
    def out_weights(self) -> list[int]:
        """Of each layer's projection to the residual stream."""
        return [layer.mixer.count_out(layer.options, layer.place) for layer in self.layers]

    # ---- memory -----------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> list[MixerHeld]:
        """What each layer's block holds for each token where its policy is a list of operators; 0 of all others."""
        return blocks(self)

    @cached_property
    def mixers(self) -> list[MixerHeld]:
        """What each layer's mixer holds for each token."""
        return mixing(self)

    # ---- FLOPs, of forward, for one token on average -----------------------------------------------------------------

    @cached_property
    def mixing(self) -> list[float]:
        """Of each layer, where tokens meet."""
        return [layer.mixer.mixing_flops(layer.options, layer.place, self.cu_seqlens) for layer in self.layers]

    @cached_property
    def projections(self) -> list[float]:
        """Of each layer, where a weight meets every token."""
        mlp = 6.0 * self.recipe.model.width * self.recipe.model.hidden
        alike = [layer.mixer.flops_per_token(layer.options, layer.place, self.cu_seqlens) for layer in self.layers]
        return [flops - mixing + mlp for flops, mixing in zip(alike, self.mixing, strict=True)]

    @property
    def head(self) -> float:
        return 2.0 * self.recipe.model.width * self.vocabulary

    @property
    def step_tokens(self) -> int:
        """Of a step, over all devices."""
        return self.recipe.trainer.sequences * self.recipe.data.length

    @property
    def model_flops(self) -> float:
        """Of a step over all devices, three times forward: what is computed again does not count."""
        return 3.0 * self.step_tokens * (sum(self.mixing) + sum(self.projections) + self.head)

    # ---- messages ---------------------------------------------------------------------------------------------------

    @cached_property
    def hardware(self) -> Hardware:
        device, cpu = self.devices.device, self.devices.device.architecture is None
        peak = device.bfloat16 if self.size == 2 else device.float32
        one_row = self.recipe.parallel.rows == 1
        # Over several nodes a ring of one row waits for its slowest link.
        inner = device.outer if one_row and self.degrees[1] > device.node else device.inner
        return Hardware(peak * device.attention, inner, device.outer, 3e-4 if cpu else LATENCY)

    def attention(self, layer: Layer) -> Estimate | None:
        """What attention of a layer costs on the slowest rank, forward and backward; None for other mixers."""
        if layer.mixer.name not in ("softmax", "sliding_window"):
            return None
        return self.estimates(layer, self.shard, self.hardware)[0]
