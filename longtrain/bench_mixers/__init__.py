"""The measured side of `longtrain bench mixers`: programs that `longtrain.launch.benchmark_mixers` starts.

__main__    one worker process: takes commands from a pipe, answers them
cases       a case's shapes and inputs
operators   the operators over ranks, beside causal softmax attention
layers      the mixers of `longtrain.layers`, found by themselves
sides       one forward and one backward pass on a rank's tokens, and the truth it is compared with
"""
