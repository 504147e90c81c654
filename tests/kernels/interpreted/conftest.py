"""Tests of the Triton kernels in Triton's interpreter, on the CPU.

Triton reads TRITON_INTERPRET when it is imported, and then interprets every kernel of the process. So these files are
not collected with the others: `tests/kernels/test_interpreted.py` runs each of them in a process of its own. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

from longtrain.kernels import launching

if not launching.interpreted():
    collect_ignore_glob = ["test_*.py"]
