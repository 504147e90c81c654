"""Starting runs: on this machine, and the entry points of benchmarks."""
