"""What the benchmarks' measuring processes share.

worker      a worker process: joins its group, takes commands from a pipe and answers them
comparing   how far results are from others
measuring   seconds of a run, and the bytes that a rank holds at its peak
"""
