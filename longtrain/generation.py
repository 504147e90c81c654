"""`longtrain generate`: text from a run's newest checkpoint, on one process."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain import checkpoint
from longtrain.config import read_run
from longtrain.data import BOUNDARY, VOCABULARY, decode, encode, vocabulary_of
from longtrain.errors import UsageError, report_failure
from longtrain.model import Decoder
from longtrain.parallel import SequenceShard

PIECE = 8192
"""Tokens of a prompt that are read at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a prompt and what the model continues it with; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="longtrain generate", description="Text from a run's newest checkpoint.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.tokens < 1:
            raise UsageError(f"--tokens: got {arguments.tokens}, expected 1 or more")
        if arguments.temperature != 0 and not 1e-3 <= arguments.temperature <= 1e3:
            raise UsageError(f"--temperature: got {arguments.temperature}, expected 0, or from 0.001 to 1000")
        if not 0 <= arguments.seed < 2**63:
            raise UsageError(f"--seed: got {arguments.seed}, expected a whole number from 0 to 2^63 - 1")
        model, length = load_model(arguments.run)
        sys.stdout.write(arguments.prompt)
        tokens = generate(
            model,
            np.concatenate([[BOUNDARY], encode(arguments.prompt)]),
            tokens=arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            context=length,
        )
        # Decoded as one text at the end: a character may take several tokens.
        print(decode(np.array(list(tokens), dtype=np.int64)))
    except Exception as error:
        return report_failure(error, environment=os.environ)
    return 0


def load_model(run_dir: Path) -> tuple[Decoder, int]:
    """The model of a run's newest checkpoint, whole and in evaluation mode, and the length it was trained on."""
    recipe = read_run(run_dir)
    if vocabulary_of(recipe.data) != VOCABULARY:
        raise UsageError(
            f"run: {run_dir} was trained on data={recipe.data.source}, which is no text; evaluate it instead"
        )
    folder = checkpoint.latest(run_dir)
    if folder is None:
        raise UsageError(f"run: {run_dir} has no checkpoint yet")
    model = Decoder(recipe.model, recipe.layers, vocabulary=recipe.model.vocabulary or VOCABULARY)
    weights = checkpoint.read_tensors(folder, prefix="model.")
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if recipe.model.tie_embedding:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval(), recipe.data.length


class Reader:
    """What a model expects after a text that grows.

    A model whose mixers keep states reads each token once: the work and, where no state grows (recurrent mixers and
    windows), the memory per token are the same at any position, and the text may be of any length. With softmax layers
    that see all of the text the work grows with it, up to `context` tokens, the length that the model was trained on;
    past that it sees the last `context` tokens only, as if the text began there: a window that moves with every token,
    so each token is then as much work as reading all of them. So it is from the start with a mixer that keeps no state.
    """

    def __init__(self, model: Decoder, *, context: int) -> None:
        self.model = model
        self.context = context
        self.kind = model.state_kind
        self.states: list[Any] | None = None
        self.text = torch.empty(0, dtype=torch.int64)  # the last `context` tokens, unless states stand for them

    def read(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64 ``[n]`` with n >= 1; the logits of the one after them, ``[vocabulary]`` float32."""
        if self.kind == "constant":
            return self._go_on(tokens)
        length = len(self.text) + len(tokens)
        self.text = torch.cat((self.text, tokens))[-self.context :]
        if self.kind == "growing" and length <= self.context:
            return self._go_on(tokens)
        self.states = None
        shard = SequenceShard(length=len(self.text))
        return self.model(self.text[None], shard)[0, -1].float()

    def _go_on(self, tokens: Tensor) -> Tensor:
        if self.states is not None and len(tokens) == 1:
            logits, self.states = self.model.step(tokens, self.states)
            return logits[0].float()
        logits = torch.empty(0)
        # In pieces, so that a long prompt needs no more memory than a short one.
        for piece in tokens.split(PIECE):
            logits, self.states = self.model.prefill(piece[None], self.states)
        return logits[0].float()


@torch.no_grad()
def generate(
    model: Decoder, prompt: np.ndarray, *, tokens: int, temperature: float, seed: int, context: int
) -> Iterator[int]:
    """Yield new tokens until the document ends or ``tokens`` are made.

    Args:
        prompt: int64 ``[n]``, n >= 1.
        temperature: divides the logits; 0 takes the likeliest token.
        context: at most so many of the last tokens are seen by softmax layers without a window; see `Reader`.
    """
    generator = torch.Generator().manual_seed(seed)
    reader = Reader(model, context=context)
    unread = torch.as_tensor(prompt, dtype=torch.int64)
    for _ in range(tokens):
        logits = reader.read(unread)[:VOCABULARY]  # rows beyond stand for no token
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == BOUNDARY:
            return
        yield token
        unread = torch.tensor([token])


if __name__ == "__main__":
    sys.exit(main())
