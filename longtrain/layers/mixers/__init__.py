"""Token mixers, one file each, found by name: a new file in this folder needs no other change."""

import importlib
import inspect
import pkgutil
from types import MappingProxyType

from longtrain.layers.mixers.base import LayerPlace, Mixer, RecurrentMixer


def _discover() -> MappingProxyType[str, type[Mixer]]:
    found: dict[str, type[Mixer]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Mixer) and not inspect.isabstract(value):
                if found.setdefault(value.name, value) is not value:
                    raise ValueError(f"two mixers are named {value.name!r}: {found[value.name]} and {value}")
    return MappingProxyType(dict(sorted(found.items())))


MIXERS = _discover()

__all__ = ["MIXERS", "LayerPlace", "Mixer", "RecurrentMixer"]
