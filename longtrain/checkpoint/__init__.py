"""Checkpoints: sharded safetensors files and one JSON manifest; written all or not at all, readable at any world size.

    run_dir/checkpoints/step-00000100/
        manifest.json                what there is: shapes, pieces, checksums, and the caller's numbers
        rank-00000.safetensors       rank 0's pieces
        rank-00001.safetensors       ...

A tensor is a `DTensor` sharded on its first dimension over one mesh dimension (FSDP2; uneven and empty shards too) and
replicated over the others, or it is replicated altogether: then one rank writes it. Nothing is pickled into a file: a
stranger's checkpoint can hold wrong numbers but cannot run code.

All ranks call `save` and `load` together. What fails on one of them raises on every one: nobody is left waiting.
"""

from longtrain.checkpoint.folders import latest, prune, step_folder
from longtrain.checkpoint.reading import load, read_numbers, read_tensors
from longtrain.checkpoint.writing import save

__all__ = ["latest", "load", "prune", "read_numbers", "read_tensors", "save", "step_folder"]
