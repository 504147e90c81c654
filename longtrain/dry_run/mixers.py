"""What single mixers or blocks hold: forward and backward of each alone, at two lengths, on a pretended device.

    python -m longtrain.dry_run.mixers '{"world": 2, "architecture": "sm_90", "dtype": "bfloat16", "layout": "zigzag",
        "mixers": [{"name": "gla", "options": {}, "place": {...}, "before": null, "hands_on": false,
                    "recompute": "full", "block": null}]}'

prints for each mixer what it holds at two numbers of tokens, as a line of JSON: of the mixer alone, or of its block,
given as ``{"hidden": 384, "tile": null}``. `before` is the mixer whose keys and values this one takes, with whether
they are held for this one only: ``{"name": "hymba", "options": {}, "held": false}``. From two lengths a planner works
out all others: most tensors grow with the tokens, some do not.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.dry_run import MixerHeld
from longtrain.dry_run.step import join, watched
from longtrain.dry_run.tracker import Term, Tracker
from longtrain.errors import leave, report_failure
from longtrain.layers.mixers import MIXERS, LayerPlace, Mixer
from longtrain.layers.mixers.base import Shared, SharingMixer
from longtrain.memory import layer_policies, run_block
from longtrain.model import Block, ModelConfig
from longtrain.parallel import SequenceShard, build_mesh, sequence_ranks

# Tokens of a rank, whole numbers of every tile: on CPUs tiles are small.
_CPU_TOKENS, _DEVICE_TOKENS = (2048, 4096), (2**17, 2**18)


def held(asked: Mapping[str, Any]) -> list[list[tuple[int, MixerHeld]]]:
    """Of each mixer that is asked for, in order, the tokens of a rank and bytes of a pass with so many, few and many.

    Once per process.
    """
    world, architecture = asked["world"], asked["architecture"]
    device = join(world=world, rank=0, architecture=architecture)
    mesh = build_mesh(device.type, data=1, sequence=world)
    dtype, found = getattr(torch, asked["dtype"]), []
    for each in asked["mixers"]:
        passes = []
        for tokens in _CPU_TOKENS if architecture is None else _DEVICE_TOKENS:
            with watched(device) as (tracker, program):
                with program.preparing():
                    group = sequence_ranks(mesh)
                    shard = SequenceShard(length=tokens * world, group=group, layout=asked["layout"])
                held = _passes(each, shard, tracker, device=device, dtype=dtype)
            passes.append((tokens + LayerPlace(**each["place"]).meta, held))
        found.append(passes)
    dist.destroy_process_group()
    return found


def _passes(
    asked: Mapping[str, Any], shard: SequenceShard, tracker: Tracker, *, device: torch.device, dtype: torch.dtype
) -> MixerHeld:
    """A forward and a backward pass."""
    place = LayerPlace(**asked["place"])
    mixer = _made(asked["name"], asked["options"], place, tracker, device=device, dtype=dtype)
    mixer.prepare(shard, device=device, dtype=dtype)
    tokens = place.meta + len(shard.positions)
    leaf = torch.empty(1, tokens, place.width, device=device, dtype=dtype).requires_grad_()
    shared: Shared = ()
    if (giver := asked["before"]) is not None:
        before = _made(giver["name"], giver["options"], place, tracker, device=device, dtype=dtype)
        assert isinstance(before, SharingMixer)
        with torch.no_grad():
            shared = before.mix_shared(leaf, shard, ())[1]
        shared = tuple(z.contiguous().requires_grad_() for z in shared)
    module: Mixer | Block = mixer
    if asked["block"] is not None:
        module = _block(
            asked["block"], mixer, place.width, tracker, device=device, dtype=dtype, hands_on=asked["hands_on"]
        )
    tracker.mark(leaf, Term.WEIGHTS)
    policy = layer_policies(asked["recompute"], [mixer.name])[0]
    started: dict[str, int] = {}
    run = _watched(module, tracker, started, hands_on=asked["hands_on"])
    y, *handed = run_block(
        run, leaf, shard, *shared, policy=policy, tiled=isinstance(module, Block) and module.tile is not None
    )
    if policy.recompute:
        tracker.mark(handed, Term.WEIGHTS)  # the next layer's
    if giver is not None:
        tracker.mark(shared, Term.WORKING if giver["held"] else Term.WEIGHTS)
    # Their backward makes gradients that nobody holds but autograd, which frees them as in a training.
    handed = [z * 1 for z in handed]
    given = [torch.empty_like(z) for z in (y, *handed)]
    tracker.mark((y, handed, given), Term.WEIGHTS)
    for weight in module.parameters():  # planners know them
        weight.register_hook(lambda gradient: tracker.mark(gradient, Term.GRADIENTS))
    forward = tracker.held()
    inputs: list[Tensor] = [leaf, *shared, *module.parameters()]
    gradients = torch.autograd.grad([y, *handed], inputs, given, allow_unused=True)
    del gradients
    backward = tracker.peak()
    return MixerHeld(
        remembered=forward[Term.ATTENTION.value],
        between=forward[Term.WORKING.value] + forward[Term.INPUTS.value],
        results=started[Term.ATTENTION.value],
        kept=started[Term.WORKING.value],
        input=started[Term.INPUTS.value],
        working=backward[Term.WORKING.value],
        ring=backward[Term.RING.value],
        kept_results=backward[Term.ATTENTION.value],
    )


def _watched(
    module: Mixer | Block, tracker: Tracker, started: dict[str, int], *, hands_on: bool
) -> Callable[..., tuple[Tensor, ...]]:
    """The mixer or block, so that what is held when its backward starts comes to `started`, and the peak from then on.

    The last product keeps a number, so that what is computed again is there when it has run backward.
    """

    def run(x: Tensor, shard: SequenceShard, *shared: Tensor) -> tuple[Tensor, ...]:
        x = x * 1  # if the module has no need of it, nobody has
        tracker.mark(x, Term.INPUTS)
        if isinstance(module, SharingMixer):
            y, handed = module.mix_shared(x, shard, shared)
        else:
            made = module(x, shard, *shared)
            y, *handed = (made,) if isinstance(made, Tensor) else made

        def starts(dy: Tensor) -> None:
            if isinstance(module, Mixer):
                tracker.mark(dy, Term.WEIGHTS)
            started.update(tracker.held())
            tracker.restart()

        y.register_hook(starts)
        return y * y.new_ones(()), *(handed if hands_on else ())

    return run


def _made(
    name: str,
    options: Mapping[str, Any],
    place: LayerPlace,
    tracker: Tracker,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Mixer:
    """A mixer whose weights are in the dtype that is computed with, as engines gather them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            mixer = MIXERS[name](MIXERS[name].Config(**options), place)
    finally:
        torch.set_default_dtype(before)
    tracker.mark(list(mixer.parameters()), Term.WEIGHTS)
    return mixer


def _block(
    asked: Mapping[str, Any],
    mixer: Mixer,
    width: int,
    tracker: Tracker,
    *,
    device: torch.device,
    dtype: torch.dtype,
    hands_on: bool,
) -> Block:
    """The block around a mixer."""
    config = ModelConfig(width=width, mlp_width=asked["hidden"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            block = Block(config, mixer, tile=asked["tile"], hands_on=hands_on)
    finally:
        torch.set_default_dtype(before)
    tracker.mark(list(block.parameters()), Term.WEIGHTS)
    return block


def main(words: list[str]) -> int:
    """Print what is asked for in the only word; 0, or 2 for what the user can mend, or 1."""
    try:
        found = held(json.loads(words[0]))
        print(json.dumps([[(tokens, dataclasses.asdict(each)) for tokens, each in passes] for passes in found]))
    except Exception as error:
        return report_failure(error, environment=os.environ)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
