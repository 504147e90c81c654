"""Bytes that the fullest device holds, by term, at the fullest moment of a training step.

Terms and moments are the dry run's, which checks them. A step is fullest at one of these moments: a block's backward,
where most of what it computed again is alive (the last block's, when every layer's input is kept, or the first one's,
when every gradient is); the loss; the end of backward; the optimizer's step. Each is a sum over terms, and the plan is
that of the largest. With s bytes a number, T tokens of the rank, width D, SwiGLU's inner width F, H and G heads of K:

    working set of a block's backward, in its MLP:  T s (4 D + 6 F + 2 H K + 3 G K), and its weights' gradients
    working set that a block keeps (recompute none): T s (3 D + 3 F + 2 H K + 3 G K)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from longtrain.dry_run import TERMS
from longtrain.layers.pattern import Layer
from longtrain.planning.holding import holding
from longtrain.planning.policy import policies
from longtrain.planning.work import Shape

MARGIN = 0.03  # share of the peak that allocators waste; an assumption
CONTEXT = 1.0 * 2**30  # bytes that a driver and a library of messages hold on a card; an assumption

_LOSS_TILE = 8192  # tokens and vocabulary of a tile of logits, at most
_LABELS = 48  # bytes per token: tokens and labels, this micro-batch's and the next one's, and losses

_ENDS = 16  # bytes per token and other rank: which keys a query sees there, and which queries a key


@dataclass(frozen=True)
class Memory:
    """Bytes by term (`longtrain.dry_run.TERMS`) of a moment, and those on the host."""

    terms: dict[str, float]
    moment: str
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass
class _Moment:
    name: str
    terms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 0.0))

    def add(self, term: str, size: float) -> None:
        self.terms[term] += size


def memory(shape: Shape) -> Memory:
    """The fullest moment of a step."""
    fullest = max(_moments(shape), key=lambda moment: sum(moment.terms.values()))
    return Memory(fullest.terms, fullest.name, _activations_away(shape) + holding(shape).host)


def _moments(shape: Shape) -> Iterator[_Moment]:
    count = len(shape.layers)
    for index in range(count):
        # Between the last and the first every term grows or falls evenly, unless layers differ.
        if index in (0, count - 2, count - 1) or shape.layers[index].name != shape.layers[index - 1].name:
            yield _attention_backward(shape, index)
            if getattr(shape.recipe.memory, "tile", None) is None:  # a tile of an MLP holds next to nothing
                yield _mlp_backward(shape, index)
    yield _loss(shape)
    yield from _end_of_backward(shape)


def _start(shape: Shape, name: str, *, layers: int) -> _Moment:
    """What is held whatever runs, and of the first `layers` layers what backward has still to use."""
    moment = _Moment(name)
    holding(shape).resident(moment.add)
    tokens, size, width = shape.tokens, shape.size, shape.recipe.model.width
    for index, (layer, policy) in enumerate(zip(shape.layers[:layers], policies(shape)[:layers], strict=True)):
        input_away, results_away = _away(shape, policy)
        near = index >= layers - _near(shape)
        # What has come back from the host ahead of its use is a tensor like those that a layer works with.
        if not input_away or near:
            ahead = input_away and index < layers - 1
            moment.add("working set" if ahead else "layer inputs", tokens * size * width)
        if policy != "full" and (not results_away or near):
            moment.add("working set" if results_away else "kept attention", tokens * _results(shape, layer))
        if policy == "none":
            moment.add("working set", tokens * size * _kept(shape, layer))
            moment.add("kept attention", tokens * _held(shape, layer))
    moment.add("working set", tokens * _LABELS)
    moment.add("ring buffers", tokens * _ENDS * (shape.degrees[1] - 1))
    return moment


def _block_backward(shape: Shape, index: int, name: str) -> _Moment:
    count, layer, policy = len(shape.layers), shape.layers[index], policies(shape)[index]
    moment = _start(shape, f"{name} of layer {index + 1} of {count}, backward", layers=index + 1)
    holding(shape).block(index, moment.add)
    tokens = shape.tokens
    if policy != "none":
        moment.add("working set", tokens * shape.size * _kept(shape, layer))
    if policy == "full":
        moment.add("kept attention", tokens * _results(shape, layer))
    return moment


def _mlp_backward(shape: Shape, index: int) -> _Moment:
    """dy has come down through `down`: the gradient of gate and up is alive beside gate, up and their product."""
    moment, model = _block_backward(shape, index, "MLP"), shape.recipe.model
    moment.add("working set", shape.tokens * shape.size * (model.width + 3 * model.hidden))
    moment.add("working set", holding(shape).waiting(model.width * model.hidden))  # the gradient of `down`
    return moment


def _attention_backward(shape: Shape, index: int) -> _Moment:
    """The MLP is done, and its gradients wait to be summed; the mixer's own are made."""
    moment, model, layer = _block_backward(shape, index, "mixer"), shape.recipe.model, shape.layers[index]
    keys, values = _widths(layer)
    moment.add("working set", -shape.tokens * shape.size * (3 * model.hidden + model.width))
    moment.add("working set", holding(shape).waiting(3 * model.width * model.hidden + layer.place.width * values))
    moment.add("working set", shape.tokens * shape.size * values)  # dout
    moment.add("ring buffers", ring_bytes(shape, layer, keys=keys, values=values))
    return moment


def _loss(shape: Shape) -> _Moment:
    moment, model = _start(shape, "loss, backward", layers=len(shape.layers)), shape.recipe.model
    tokens, vocabulary = shape.tokens, shape.vocabulary
    moment.add("working set", 2 * tokens * shape.size * model.width)  # what left the blocks, and its norm
    rows, columns = min(tokens, _LOSS_TILE), min(vocabulary, _LOSS_TILE)
    moment.add("loss", rows * columns * (4 if shape.size == 4 else 6))
    moment.add("loss", shape.size * model.width * (tokens + vocabulary))  # the two gradients
    if shape.size == 2:
        moment.add("loss", 4 * model.width * min(tokens, vocabulary))
    return moment


def _end_of_backward(shape: Shape) -> Iterator[_Moment]:
    for name, terms in holding(shape).end():
        moment = _start(shape, f"end of backward, gradients {name}", layers=0)
        for term, size in terms:
            moment.add(term, size)
        yield moment


def _away(shape: Shape, policy: str) -> tuple[bool, bool]:
    """Whether a layer's input, and the results that it keeps, lie on the host between forward and backward."""
    offload = shape.recipe.memory.offload if shape.devices.device.architecture is not None else "none"
    return offload != "none" and policy != "none", offload == "attention" and policy == "attention"


def _near(shape: Shape) -> int:
    """Layers whose tensors are on the device although they are offloaded: the one that runs, and those under way."""
    return shape.recipe.memory.offload_in_flight + 1


def _activations_away(shape: Shape) -> float:
    """Bytes on the host when forward has ended."""
    each = shape.tokens * shape.size * shape.recipe.model.width
    total = 0.0
    for layer, policy in zip(shape.layers, policies(shape), strict=True):
        inputs, results = _away(shape, policy)
        total += each * inputs + shape.tokens * _results(shape, layer) * results
    return total


def _widths(layer: Layer) -> tuple[int, int]:
    """Numbers per token of queries, and of the mixer's results: H K and H V."""
    options, width = layer.options, layer.place.width
    heads = getattr(options, "heads", 1)
    if layer.mixer.name in ("softmax", "sliding_window"):
        keys = heads * options.key_width(width)
        return keys, keys
    head_width = getattr(options, "head_width", None) or width // heads
    return heads * head_width, heads * (getattr(options, "value_width", None) or head_width)


def _results(shape: Shape, layer: Layer) -> float:
    """Bytes per token of what a mixer's operator returns: out and, of attention, lse."""
    _, values = _widths(layer)
    attends = layer.mixer.name in ("softmax", "sliding_window")
    return shape.size * values + (4 * layer.options.heads if attends else 0)


def _held(shape: Shape, layer: Layer) -> float:
    """Bytes per token of keys and values that a ring held last, kept so that backward need not fetch them again."""
    if shape.degrees[1] == 1 or layer.mixer.name not in ("softmax", "sliding_window"):
        return 0.0
    return 2.0 * shape.size * layer.options.groups * layer.options.key_width(layer.place.width)


def _kept(shape: Shape, layer: Layer) -> float:
    """Numbers per token that a block keeps for its backward, beside its input and its mixer's results."""
    model = shape.recipe.model
    return 3 * model.width + 3 * model.hidden + mixer_kept(layer)


def mixer_kept(layer: Layer) -> float:
    """Numbers per token that a mixer keeps: its projections, and what is made of them before the operator.

    Exact for softmax. Other mixers are taken to keep every projection's output twice, in and out of its activation.
    """
    options: Any = layer.options
    if layer.mixer.name in ("softmax", "sliding_window"):
        width = options.key_width(layer.place.width)
        return width * (2 * options.heads + 3 * options.groups)
    matrices = [p for name, p in layer.mixer._on_meta(options, layer.place).named_parameters() if p.ndim == 2]
    return 2.0 * sum(p.shape[0] for p in matrices[:-1])


def ring_bytes(shape: Shape, layer: Layer, *, keys: int, values: int) -> float:
    """What the operator over ranks holds inside its backward: float32 running gradients, and what travels."""
    tokens = shape.tokens
    if layer.mixer.name not in ("softmax", "sliding_window"):
        return 4.0 * tokens * (2 * keys + values) / 2
    options = layer.options
    at_once = min(options.heads_at_once or options.groups, options.groups)
    share = at_once / options.groups
    keys, values, grouped = keys * share, values * share, at_once * options.key_width(layer.place.width)
    own = 4.0 * (2 * values + keys + 2 * grouped)  # out, dout, dq; dk, dv
    narrow = 0 if shape.size == 4 else shape.size
    results = narrow * (keys + 2 * grouped)
    kernels = narrow * (values + grouped) + 8.0 * options.heads * share  # dout and v for them, delta and exponents
    if shape.degrees[1] > 1:  # two blocks of keys and values, and their gradients: made, sent and received
        kernels += 2.0 * grouped * (2 * shape.size + 12)
    if share == 1:
        return tokens * (own + max(results, kernels))
    # Copies of the group's keys and values; the results of all groups, whole from the start.
    return tokens * (own + kernels + narrow * 2 * grouped + (shape.size * (keys + 2 * grouped)) / share)
