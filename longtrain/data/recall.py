"""Tasks that measure what a model can look up in its own past: associative recall, a passkey, copying.

Every question is asked inside the sequence; labels stand only where an answer is due, so loss and accuracy are about
answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longtrain.data.generated import Draws, GeneratedSequences, answers_at_end
from longtrain.data.vocabulary import BOUNDARY, IGNORE, VOCABULARY, encode


class MqarSequences(GeneratedSequences):
    """Multi-query associative recall: key-value pairs, then every key once more, to be followed by its value.

    As in "Zoology: Measuring and Improving Recall in Efficient Language Models" (section 4 and appendix E): the first
    2 P tokens are P pairs, key then value, all different; the rest is blank but for the P keys, which stand at even
    distances 2 g from the pairs' end with the chance of g falling as g^-0.99, so most are asked for soon and some late.
    The label at such a key is its value; the value itself does not follow. Token 0 is blank, the first half of the
    vocabulary is keys and the second values.

    pairs: numbers of pairs, which take turns from sequence to sequence and are the `groups`.

    Raises:
        ValueError: ``"<option>: got ..., expected ..."``.
    """

    # The exponent of the published generator is a - 1 with a = 0.01.
    POWER = -0.99

    def __init__(self, length: int, *, pairs: Sequence[int], vocabulary: int, seed: int | None) -> None:
        if not pairs or min(pairs) < 1:
            raise ValueError(f"pairs: got {list(pairs)}, expected one or more numbers from 1")
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"pairs: got {list(pairs)}, expected each number once")
        most = max(pairs)
        if vocabulary < 2 * most + 2:
            raise ValueError(
                f"vocabulary: got {vocabulary}, {most} pairs need {2 * most + 2} or more: half is keys, half values"
            )
        if length < 4 * most:
            raise ValueError(f"length: got {length}, {most} pairs and their queries need {4 * most} tokens or more")
        super().__init__(length, seed=seed)
        self.groups = tuple(pairs)
        self.vocabulary = vocabulary
        self._weights = {count: _falling((length - 2 * count) // 2, self.POWER) for count in pairs}

    @property
    def name(self) -> str:
        """Task and options."""
        return f"mqar of {', '.join(map(str, self.groups))} pairs, vocabulary {self.vocabulary}"

    def draw(self, draws: Draws, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [T]."""
        count, half = self.groups[group], self.vocabulary // 2
        keys = 1 + draws.distinct(half - 1, count)
        values = half + draws.distinct(self.vocabulary - half, count)
        places = 2 * count + 2 * draws.distinct_weighted(self._weights[count], count)
        tokens = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        tokens[0 : 2 * count : 2] = keys
        tokens[1 : 2 * count : 2] = values
        tokens[places] = keys
        labels[places] = values
        return tokens, labels


def _falling(count: int, power: float) -> np.ndarray:
    """g^power for g = 1 ... count."""
    return np.arange(1, count + 1, dtype=np.float64) ** power


_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_SENTENCES = np.array([0, *(i + 2 for i in range(len(_FILLER)) if _FILLER[i] == ".")])  # where they start, and the end


class PasskeySequences(GeneratedSequences):
    """A passkey hidden in filler text and asked for at the end, in bytes: the vocabulary of all text here.

    The text of "Landmark Attention: Random-Access Infinite Context Length for Transformers" (section 4.2). Labels are
    the digits of the answer; each is given all digits before it.

    digits: length of the passkey. depth: share of the filler that stands before the passkey, up to the next start of a
    sentence: 0 the beginning of the text, 1 right before the question; None: drawn anew for every sequence.

    Raises:
        ValueError: ``"<option>: got ..., expected ..."``.
    """

    vocabulary = VOCABULARY

    def __init__(self, length: int, *, digits: int, depth: float | None, seed: int | None) -> None:
        if digits < 1:
            raise ValueError(f"digits: got {digits}, expected 1 or more")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth: got {depth}, expected a share from 0 to 1, or null for a random one")
        super().__init__(length, seed=seed)
        self.digits, self.depth = digits, depth
        # The boundary token before the text and the one label after the last token make up for one another.
        self._filler = length - sum(map(len, self._around("0" * digits)))
        if self._filler < 0:
            raise ValueError(
                f"length: got {length}, a passkey of {digits} digits and its question need {length - self._filler} "
                "tokens or more"
            )

    @property
    def name(self) -> str:
        """Task and options."""
        depth = "random depth" if self.depth is None else f"depth {self.depth:g}"
        return f"passkey of {self.digits} digits at {depth}"

    def draw(self, draws: Draws, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [T]."""
        digits = "".join(map(str, draws.below(10, self.digits)))
        depth = float(draws.uniform(1)[0]) if self.depth is None else self.depth
        hidden, question = self._around(digits)
        # The first sentence may be cut; all others are whole.
        repeats = -(-self._filler // len(_FILLER))
        cut = repeats * len(_FILLER) - self._filler
        filler = (_FILLER * repeats)[cut:]
        starts = (_SENTENCES[:-1] + len(_FILLER) * np.arange(repeats)[:, None]).ravel() - cut
        starts = np.array([0, *starts[starts > 0], self._filler])
        place = int(starts[np.searchsorted(starts, depth * self._filler)])
        text = filler[:place] + hidden + filler[place:] + question
        return answers_at_end(np.concatenate(([BOUNDARY], encode(text))), self.digits)

    @staticmethod
    def _around(digits: str) -> tuple[str, str]:
        """What hides the passkey, and the question with its answer."""
        hidden = f"The pass key is {digits}. Remember it. {digits} is the pass key. "
        return hidden, f"What is the pass key? The pass key is {digits}"


class CopySequences(GeneratedSequences):
    """Tokens to be said again in order after a delimiter.

    selective: they lie scattered among blanks, and the model has to pick them ("Mamba: Linear-Time Sequence Modeling
    with Selective State Spaces", section 3.1); otherwise they stand at the beginning, one after the other ("Repeat
    After Me: Transformers are Better than State Space Models at Copying", section 3). Labels are the copy's tokens;
    each is given all before it. Token 0 is blank, 1 the delimiter, and the others, drawn with repetition, are copied.

    items: tokens to copy.

    Raises:
        ValueError: ``"<option>: got ..., expected ..."``.
    """

    def __init__(self, length: int, *, items: int, selective: bool, vocabulary: int, seed: int | None) -> None:
        if items < 1:
            raise ValueError(f"items: got {items}, expected 1 or more")
        if vocabulary < 4:
            raise ValueError(f"vocabulary: got {vocabulary}, expected 4 or more: blank, delimiter, and some to copy")
        if length < 2 * items:
            raise ValueError(f"length: got {length}, {items} items and their copy need {2 * items} tokens or more")
        super().__init__(length, seed=seed)
        self.items, self.selective, self.vocabulary = items, selective, vocabulary

    @property
    def name(self) -> str:
        """Task and options."""
        return f"{'selective ' if self.selective else ''}copy of {self.items} items, vocabulary {self.vocabulary}"

    def draw(self, draws: Draws, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [T]."""
        items = 2 + draws.below(self.vocabulary - 2, self.items)
        room = self.length - self.items
        places = np.sort(draws.distinct(room, self.items)) if self.selective else np.arange(self.items)
        row = np.zeros(self.length + 1, dtype=np.int64)
        row[places] = items
        row[room] = 1
        row[room + 1 :] = items
        return answers_at_end(row, self.items)
