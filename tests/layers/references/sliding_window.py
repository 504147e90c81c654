"""Softmax attention within a window: the same loop."""

from tests.layers.references.softmax import reference

__all__ = ["CASES", "reference"]

CASES = [{"heads": 4, "window": 7}, {"heads": 2, "kv_heads": 1, "sinks": True, "window": 0}]
