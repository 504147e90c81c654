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

from longtrain.dry_run import TERMS
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
    return Memory(fullest.terms, fullest.name, activations_away(shape) + holding(shape).host)


def _moments(shape: Shape) -> Iterator[_Moment]:
    count = len(shape.layers)
    for index in range(count):
        # Between the last and the first every term grows or falls evenly, unless layers differ. Where inputs are
        # offloaded that begins above the lowest layers, below which none are on the device.
        first, last = index <= _near(shape), index >= count - 2
        if first or last or shape.layers[index].name != shape.layers[index - 1].name:
            if policies(shape)[index] == "list":
                yield _tried_backward(shape, index)
                continue
            yield _attention_backward(shape, index)
            tiled = shape.recipe.memory.tile is not None
            yield _tile_backward(shape, index) if tiled else _mlp_backward(shape, index)
    yield from _loss(shape)
    yield from _end_of_backward(shape)


def _start(shape: Shape, name: str, *, layers: int) -> _Moment:
    """What is held whatever runs, and of the first `layers` layers what backward has still to use."""
    moment = _Moment(name)
    holding(shape).resident(moment.add)
    tokens, size, width = shape.tokens, shape.size, shape.recipe.model.width
    for index, (mixer, policy) in enumerate(zip(shape.mixers[:layers], policies(shape)[:layers], strict=True)):
        input_away, results_away = _away(shape, policy)
        near = index >= layers - _near(shape)
        # What has come back from the host ahead of its use is a tensor like those that a layer works with.
        if not input_away or near:
            ahead = input_away and index < layers - 1
            moment.add("working set" if ahead else "layer inputs", tokens * size * width)
        held, listed = (shape.blocks[index], True) if policy == "list" else (mixer, False)
        if not results_away or near:
            moment.add("working set" if results_away else "kept attention", tokens * held.remembered)
        if not (listed and results_away) or near:
            moment.add("working set", tokens * held.between)
        if policy == "none":
            moment.add("working set", tokens * _kept(shape))
    moment.add("working set", tokens * _LABELS)
    moment.add("ring buffers", tokens * _ENDS * (shape.degrees[1] - 1))
    return moment


def _block_backward(shape: Shape, index: int, name: str) -> _Moment:
    count, mixer, policy = len(shape.layers), shape.mixers[index], policies(shape)[index]
    moment = _start(shape, f"{name} of layer {index + 1} of {count}, backward", layers=index + 1)
    holding(shape).block(index, moment.add)
    tokens = shape.tokens
    if policy != "none":  # computed again
        moment.add("working set", tokens * (_kept(shape) + mixer.input + mixer.kept - mixer.between))
        moment.add("kept attention", tokens * (mixer.results - mixer.remembered))
    return moment


def _mlp_backward(shape: Shape, index: int) -> _Moment:
    """dy has come down through `down`: the gradient of gate and up is alive beside gate, up and their product."""
    moment, model = _block_backward(shape, index, "MLP"), shape.recipe.model
    moment.add("working set", shape.tokens * shape.size * (model.width + 3 * model.hidden))
    moment.add("working set", holding(shape).waiting(model.width * model.hidden))  # the gradient of `down`
    return moment


def _tile_backward(shape: Shape, index: int) -> _Moment:
    """Of the whole sequence there is x, dy and dx; of a tile all else; the weights' gradients run in float32."""
    moment, model = _block_backward(shape, index, "MLP tiles"), shape.recipe.model
    moment.add("working set", shape.tokens * shape.size * (model.width - 3 * model.hidden))
    tile = min(shape.recipe.memory.tile or 0, shape.tokens)
    moment.add("working set", tile * shape.size * (6 * model.hidden + 2 * model.width))
    moment.add("working set", 4.0 * 3 * model.width * model.hidden)
    return moment


def _attention_backward(shape: Shape, index: int) -> _Moment:
    """The MLP is done, and its gradients wait to be summed; the mixer's own are made."""
    moment, model, mixer = _block_backward(shape, index, "mixer"), shape.recipe.model, shape.mixers[index]
    moment.add("working set", -shape.tokens * shape.size * (3 * model.hidden + model.width))
    moment.add("working set", holding(shape).waiting(3 * model.width * model.hidden + shape.out_weights[index]))
    moment.add("working set", shape.tokens * (mixer.working - mixer.kept))
    moment.add("kept attention", shape.tokens * (mixer.kept_results - mixer.results))
    moment.add("ring buffers", shape.tokens * mixer.ring)
    moment.add("working set", holding(shape).hooked * shape.tokens * shape.size * model.width)
    return moment


def _tried_backward(shape: Shape, index: int) -> _Moment:
    """The fullest moment of a block of which a list of operators is kept, taken for that of its mixer."""
    name, model, block = f"layer {index + 1} of {len(shape.layers)}", shape.recipe.model, shape.blocks[index]
    moment = _start(shape, f"{name}, backward", layers=index + 1)
    holding(shape).block(index, moment.add)
    moment.add("working set", shape.tokens * (block.working - block.between))
    moment.add("kept attention", shape.tokens * (block.kept_results - block.remembered))
    moment.add("ring buffers", shape.tokens * block.ring)
    moment.add("working set", holding(shape).waiting(3 * model.width * model.hidden + shape.out_weights[index]))
    return moment


def _loss(shape: Shape) -> Iterator[_Moment]:
    model, tokens, vocabulary = shape.recipe.model, shape.tokens, shape.vocabulary
    rows, columns = min(tokens, _LOSS_TILE), min(vocabulary, _LOSS_TILE)
    tile = rows * columns * (4 if shape.size == 4 else 6)
    gradients = shape.size * model.width * (tokens + vocabulary)
    wide = 4 * model.width * min(tokens, vocabulary) if shape.size == 2 else 0
    loss = [*holding(shape).loss(), ("loss", tile + gradients + wide)]
    for name, terms in (("loss", loss), *holding(shape).after_loss()):
        moment = _start(shape, f"{name}, backward", layers=len(shape.layers))
        for term, size in terms:
            moment.add(term, size)
        moment.add("working set", 2 * tokens * shape.size * model.width)  # what left the blocks, and its norm
        yield moment


def _end_of_backward(shape: Shape) -> Iterator[_Moment]:
    for name, terms in holding(shape).end():
        moment = _start(shape, f"end of backward, gradients {name}", layers=0)
        for term, size in terms:
            moment.add(term, size)
        yield moment


def _away(shape: Shape, policy: str) -> tuple[bool, bool]:
    """Whether a layer's input, and the results that it keeps, lie on the host between forward and backward."""
    offload = shape.recipe.memory.offload if shape.devices.device.architecture is not None else "none"
    return offload != "none" and policy != "none", offload == "attention" and policy in ("attention", "list")


def _near(shape: Shape) -> int:
    """Layers whose tensors are on the device although they are offloaded: the one that runs, and those under way."""
    return shape.recipe.memory.offload_in_flight + 1


def activations_away(shape: Shape) -> float:
    """Bytes that layers have on the host when forward has ended."""
    each = shape.tokens * shape.size * shape.recipe.model.width
    total = 0.0
    for mixer, block, policy in zip(shape.mixers, shape.blocks, policies(shape), strict=True):
        inputs, results = _away(shape, policy)
        kept = block.remembered + block.between if policy == "list" else mixer.remembered
        total += each * inputs + shape.tokens * kept * results
    return total


def _kept(shape: Shape) -> float:
    """Bytes per token that a block keeps for its backward, beside its input and what its mixer keeps."""
    model = shape.recipe.model
    return shape.size * (2.0 * model.width + 3.0 * model.hidden)
