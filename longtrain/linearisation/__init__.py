"""From a trained model of softmax layers to one of others: the recipe's `linearise` keys.

`config` has the keys and their checks, `source` says which weights of a trained run a model takes, and `matching` is
the first stage: each new mixer gets the trained model's input to its layer and learns the old mixer's output ("LoLCATs:
On Low-Rank Linearizing of Large Language Models", section 3.1; "Lizard", section 4.3). The second is any training.
"""

from longtrain.linearisation.config import LineariseConfig, check_linearise, optimizer_while_matching
from longtrain.linearisation.matching import MATCH, MatchingDecoder, hand_over, matched
from longtrain.linearisation.source import Source, check_source, differing, load_weights, teachers

__all__ = [
    "MATCH",
    "LineariseConfig",
    "MatchingDecoder",
    "Source",
    "check_linearise",
    "check_source",
    "differing",
    "hand_over",
    "load_weights",
    "matched",
    "optimizer_while_matching",
    "teachers",
]
