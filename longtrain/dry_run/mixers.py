"""What single mixers or blocks hold: forward and backward of each alone, at two lengths, on a pretended device.

    python -m longtrain.dry_run.mixers '{"world": 2, "architecture": "sm_90", "dtype": "bfloat16", "layout": "zigzag",
        "mixers": [{"name": "gla", "options": {}, "place": {...}, "before": null, "block": null}]}'

prints the `MixerHeld` of each as a line of JSON: of the mixer alone, or of its block under a policy, which is given as
``{"hidden": 384, "tile": null, "recompute": ["attention", "aten::mm"]}``.

What does not grow with the tokens is left out: a planner that knows
the length, or looks for the longest one, needs what each token takes.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
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


def held(asked: Mapping[str, Any]) -> list[MixerHeld]:
    """Of each mixer that is asked for, in order; once per process."""
    world, architecture = asked["world"], asked["architecture"]
    device = join(world=world, rank=0, architecture=architecture)
    mesh = build_mesh(device.type, data=1, sequence=world)
    dtype, found = getattr(torch, asked["dtype"]), []
    lengths = _CPU_TOKENS if architecture is None else _DEVICE_TOKENS
    for each in asked["mixers"]:
        passes = []
        for tokens in lengths:
            with watched(device) as (tracker, program):
                with program.preparing():
                    group = sequence_ranks(mesh)
                    shard = SequenceShard(length=tokens * world, group=group, layout=asked["layout"])
                passes.append(_passes(each, shard, tracker, device=device, dtype=dtype))
        few, many = passes
        each_token = {name: max(0.0, (many[name] - few[name]) / (lengths[1] - lengths[0])) for name in few}
        found.append(MixerHeld(**each_token))
    dist.destroy_process_group()
    return found


def _passes(
    asked: Mapping[str, Any], shard: SequenceShard, tracker: Tracker, *, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """A forward and a backward pass: bytes by the names of `MixerHeld`."""
    place = LayerPlace(**asked["place"])
    mixer = _made(asked["name"], asked["options"], place, tracker, device=device, dtype=dtype)
    mixer.prepare(shard, device=device, dtype=dtype)
    tokens = place.meta + len(shard.positions)
    leaf = torch.empty(1, tokens, place.width, device=device, dtype=dtype).requires_grad_()
    x = leaf * 1
    shared: Shared = ()
    if asked["before"] is not None:
        name, options = asked["before"]
        before = _made(name, options, place, tracker, device=device, dtype=dtype)
        assert isinstance(before, SharingMixer)
        with torch.no_grad():
            shared = before.mix_shared(x, shard, ())[1]
        shared = tuple(z.requires_grad_() for z in shared)
    tracker.mark(x, Term.INPUTS)
    remembered = 0.0
    if asked["block"] is not None:
        module = _block(asked["block"], mixer, place.width, tracker, device=device, dtype=dtype)
        policy = layer_policies(asked["block"]["recompute"], [mixer.name])[0]
        y = run_block(module, x, shard, *shared, policy=policy, tiled=module.tile is not None)
        assert isinstance(y, Tensor)
    else:
        module = mixer
        remembered = _remembered(mixer, leaf, shard, shared, tracker)
        y = mixer.mix_shared(x, shard, shared)[0] if isinstance(mixer, SharingMixer) else mixer(x, shard)
    del x  # if the mixer has no need of it, nobody has
    if module is not mixer:
        y = y * 1  # its backward makes a dy that nobody holds but autograd, which frees it as in a training
    dy = torch.empty_like(y)
    tracker.mark((leaf, shared, y, dy), Term.WEIGHTS)
    forward = tracker.held()
    tracker.restart()
    inputs: list[Tensor] = [leaf, *shared, *module.parameters()]
    gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    del gradients
    backward = tracker.peak()
    return {
        "results": forward[Term.ATTENTION.value],
        "remembered": remembered,
        "kept": forward[Term.WORKING.value],
        "input": forward[Term.INPUTS.value],
        "working": backward[Term.WORKING.value],
        "ring": backward[Term.RING.value],
        "kept_results": backward[Term.ATTENTION.value],
    }


def _remembered(mixer: Mixer, x: Tensor, shard: SequenceShard, shared: Shared, tracker: Tracker) -> float:
    """Bytes of results over ranks that the policy `attention` keeps."""

    def mix(x: Tensor, shard: SequenceShard, *shared: Tensor) -> Tensor:
        return mixer.mix_shared(x, shard, shared)[0] if isinstance(mixer, SharingMixer) else mixer(x, shard)

    y = run_block(mix, x * 1, shard, *shared, policy=layer_policies("attention", [mixer.name])[0])
    tracker.mark((shared, y), Term.WEIGHTS)
    return tracker.held()[Term.ATTENTION.value]


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
    asked: Mapping[str, Any], mixer: Mixer, width: int, tracker: Tracker, *, device: torch.device, dtype: torch.dtype
) -> Block:
    """The block around a mixer."""
    config = ModelConfig(width=width, mlp_width=asked["hidden"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            block = Block(config, mixer, tile=asked["tile"])
    finally:
        torch.set_default_dtype(before)
    tracker.mark(list(block.parameters()), Term.WEIGHTS)
    return block


def main(words: list[str]) -> int:
    """Print what is asked for in the only word; 0, or 2 for what the user can mend, or 1."""
    try:
        print(json.dumps([dataclasses.asdict(each) for each in held(json.loads(words[0]))]))
    except Exception as error:
        return report_failure(error, environment=os.environ)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
