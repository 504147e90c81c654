"""longtrain trains models on sequences longer than one device can hold.

Importing the package imports nothing heavy, not even torch: `longtrain --help` answers at once. What to import is in
`longtrain.kernels` (one device's arithmetic), `longtrain.parallel` (a sequence spread over a process group) and
`longtrain.layers` (the modules).
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("longtrain")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+not-installed"

__all__ = ["__version__"]
