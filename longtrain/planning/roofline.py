"""How long a step takes where its parts run at the share of the device's peak that devices.yaml gives them.

Arithmetic, memory traffic, copies to and from the host and messages of weights overlap; messages of attention that its
own arithmetic cannot hide, and the optimizer, come on top. An estimate: no part of it was fitted to a measured run.
"""

from dataclasses import dataclass

from longtrain.planning.holding import holding
from longtrain.planning.policy import kept_mixers, recomputed
from longtrain.planning.terms import activations_away
from longtrain.planning.work import Shape

# Bytes moved through a device's memory for each token and number of a layer's width, forward and backward: inputs and
# results of norms, residuals, projections and activations, each read and written once. A round figure.
_TRAFFIC = 60.0


@dataclass(frozen=True)
class Times:
    """Seconds of a step, and the bytes that one device sends or receives over its links in it."""

    products: float  # matrix products of weights, forward, backward and computed again
    mixing: float  # attention and scans
    memory: float  # traffic of the device's memory, weights and optimizer included
    weights: float  # messages of weights and gradients
    exposed: float  # messages of tokens that arithmetic does not hide
    host: float  # copies to and from host memory, of which those of either way take longer
    optimizer: float
    inner_bytes: float
    outer_bytes: float

    @property
    def step(self) -> float:
        beside = max(self.products + self.mixing, self.memory, self.weights, self.host)
        return beside + self.exposed + self.optimizer

    @property
    def limit(self) -> str:
        """What a step's time goes to, mostly."""
        parts = {
            "matrix products": self.products,
            "attention and scans": self.mixing,
            "memory traffic": self.memory if self.memory > self.products + self.mixing else 0.0,
            "messages of weights": self.weights if self.weights > self.products + self.mixing else 0.0,
            "copies to and from the host": self.host if self.host > self.products + self.mixing else 0.0,
            "messages of tokens": self.exposed,
            "optimizer": self.optimizer,
        }
        return max(parts, key=lambda name: parts[name])


def times(shape: Shape) -> Times:
    """The times of a step."""
    recipe, device, world = shape.recipe, shape.devices.device, shape.devices.count
    peak = device.bfloat16 if shape.size == 2 else device.float32
    again, kept = recomputed(shape), kept_mixers(shape)
    own_tokens = shape.step_tokens / world
    products = own_tokens * sum((3.0 + a) * x for a, x in zip(again, shape.projections, strict=True))
    products += own_tokens * 4.0 * shape.head  # the loss computes its logits twice
    micro = recipe.trainer.accumulation
    mixing = exposed = token_bytes = 0.0
    for layer, flops, a, keep in zip(shape.layers, shape.mixing, again, kept, strict=True):
        repeated = 0.0 if keep else a
        cost = shape.attention(layer)
        if cost is None:
            mixing += own_tokens * (3.5 + repeated) * flops / (peak * device.attention)
            continue
        # Backward is 2.5 times forward, in the cost model too.
        mixing += micro * (cost.seconds - cost.exposed) * (1 + repeated / 3.5)
        exposed += micro * cost.exposed * (1 + repeated / 3.5)
        token_bytes += micro * cost.sent * (1 + repeated / 3.5)
    gathers = 1 + (1 if recipe.memory.shard_blocks else 0)  # in forward, and again in backward
    share = (world - 1) / world
    weight_bytes = share * shape.weights * (gathers * shape.size + 4) * micro
    across = 0.0 if shape.devices.nodes == 1 else weight_bytes / device.node
    outer_tokens = token_bytes if shape.degrees[1] > device.node else 0.0
    memory = own_tokens * len(shape.layers) * recipe.model.width * _TRAFFIC * shape.size / 2
    memory += micro * gathers * shape.weights * shape.size
    moved = shape.weights / world * 28  # weight, gradient, two states: read, three written
    held = holding(shape)
    optimizer = moved / (device.bandwidth if held.here else device.host_bandwidth / min(device.node, world))
    # Layers' tensors go out in forward and come back in backward, weights or gradients either way.
    away = micro * (activations_away(shape) + shape.weights / world * held.copied)
    return Times(
        products=products / (peak * device.share),
        mixing=mixing,
        memory=memory / device.bandwidth,
        weights=max(weight_bytes / device.inner, across / device.outer),
        exposed=exposed,
        host=away / device.host,
        optimizer=optimizer,
        inner_bytes=weight_bytes + token_bytes - outer_tokens,
        outer_bytes=across + outer_tokens,
    )
