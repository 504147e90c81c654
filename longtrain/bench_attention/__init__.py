"""The measured side of `longtrain bench attention`: programs that `longtrain.launch.benchmark_attention` starts.

__main__   one worker process: takes commands from a pipe, answers them
cases      a case's shapes, inputs and the truth they are compared with
sides      what is timed: longtrain's attention, one process's SDPA, the public ring-attention-pytorch
memory     bytes that one rank's attention call holds at its peak
virtual    the critical path of W ranks, played in turn by one process
"""
