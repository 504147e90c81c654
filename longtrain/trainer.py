"""The training loop: what one step is, and what a run remembers. It knows no mixer and no recipe.

One step takes ``sequences`` sequences. Each data rank takes its part of them in ``accumulation`` micro-batches; a
micro-batch is one or more sequences packed end to end, spread over the ranks of the sequence group by one
`SequenceShard`. The loss is the sum over all valid tokens of the step divided by their number, whoever holds them, so
it does not depend on how the step is cut.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longtrain.data import IGNORE, Sequences
from longtrain.engines import EngineFactory, FSDPEngine, Setup
from longtrain.measures import Measures
from longtrain.optimizer import OptimizerConfig, ScheduleConfig, learning_rate_factor
from longtrain.parallel import SequenceShard, sequence_ranks


@dataclass(frozen=True)
class TrainerConfig:
    """The loop's own settings."""

    steps: int = 1000
    sequences: int = 1
    accumulation: int = 1
    clip: float = 1.0
    precision: str = "float32"
    evaluate_every: int = 0
    evaluate_sequences: int = 8
    checkpoint_every: int = 0
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class MicroBatch:
    """One rank's tokens of one packed sequence."""

    tokens: Tensor  # [1, T_w] int64
    labels: Tensor  # [1, T_w] int64, IGNORE where there is nothing to predict
    shard: SequenceShard
    valid: int  # labels to predict in the whole sequence, not only here


@dataclass(frozen=True)
class Objective:
    """What a step makes smaller: the sum of what a model says of a rank's tokens, over a number of them all.

    losses: of the model and a micro-batch, any shape: this rank's part of the sum. count: of a micro-batch's whole
    sequence, the numbers that a mean is over.
    """

    losses: Callable[[nn.Module, MicroBatch], Tensor]
    count: Callable[[MicroBatch], int]


LANGUAGE_MODEL = Objective(
    losses=lambda model, batch: model(batch.tokens, batch.shard, batch.labels), count=lambda batch: batch.valid
)
"""The negative log-likelihood of each label."""


@dataclass(frozen=True)
class StepResult:
    """What one step reports."""

    step: int
    loss: float  # the objective, by default nats per valid token of the step
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # tokens of the step, over all ranks
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)  # what the model's modules say about it, by name


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and accuracy, overall, and by the token's position in its document or by the kind of sequence."""

    loss: float  # nats per labelled token
    accuracy: float  # share of the labelled tokens whose label was the likeliest
    accuracy_by_group: dict[int, float]  # for those of the data's groups that were seen
    positions: np.ndarray  # [n] lowest position of each bucket
    losses: np.ndarray  # [n] mean loss in the bucket, nan where it is empty
    counts: np.ndarray  # [n] tokens in the bucket

    def by_position(self) -> tuple[list[int], list[float], list[int]]:
        """Positions, losses and counts as plain numbers."""
        return self.positions.tolist(), self.losses.tolist(), self.counts.astype(int).tolist()


class Trainer:
    """Trains a model on packed sequences over a (data, sequence) mesh.

    Args:
        model: maps ``(tokens, shard, labels)`` to the loss of each token, ``[1, T_w]``.
        blocks: the parts of the model whose weights are gathered one at a time; empty: all at once.
        prepare: does the host's work for a new shard ahead of the step that uses it, beside the step before.
        data: training sequences; `position` counts how many have been used.
        mesh: over all ranks, as `longtrain.parallel.build_mesh` makes it.
        layout: how each sequence is spread over the sequence group.
        values: where the model is on the meta device, its weights' and buffers' values; see `longtrain.engines.Setup`.
        engine: makes what shards the weights and takes the steps; `longtrain.engines` has them.
        objective: what the steps make smaller.
        first: steps that others have taken before: the schedule runs from there to ``config.steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        data: Sequences,
        mesh: DeviceMesh,
        layout: str,
        blocks: Iterator[nn.Module] | tuple[nn.Module, ...] = (),
        prepare: Callable[[SequenceShard], None] = lambda shard: None,
        values: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
        engine: EngineFactory = FSDPEngine,
        objective: Objective = LANGUAGE_MODEL,
        first: int = 0,
    ) -> None:
        self._prepare, self._objective, self._first = prepare, objective, first
        self.config, self.schedule, self.peak_rate = config, schedule, optimizer.learning_rate
        self.data, self.layout = data, layout
        self.device = torch.device(mesh.device_type)
        self.data_group, self.data_rank = mesh.get_group("data"), mesh.get_local_rank("data")
        self.sequence_ranks = sequence_ranks(mesh)
        self.data_degree = mesh["data"].size()
        # Before they are sharded.
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._measures = Measures(model.modules())
        self.engine = engine(
            Setup(
                model=model,
                blocks=tuple(blocks),
                mesh=mesh,
                precision=config.precision,
                optimizer=optimizer,
                clip=config.clip,
                accumulation=config.accumulation,
                values=values,
            )
        )
        self.model = self.engine.model
        self.step = 0
        self.position = 0  # sequences of `data` used so far
        # The next step's tokens and shards are made while this one runs.
        self._loader: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def train_step(self) -> StepResult:
        """One optimizer step over the next ``sequences`` sequences."""
        start = time.perf_counter()
        factor = learning_rate_factor(self.schedule, self.step + 1 - self._first, self.config.steps - self._first)
        loss, norm, means = self.take_step(self._micro_batches(), factor)
        self.step += 1
        self.position += self.config.sequences
        return StepResult(
            step=self.step,
            loss=float(loss),
            gradient_norm=float(norm),
            learning_rate=self.peak_rate * factor,
            tokens=self.config.sequences * self.data.length,
            seconds=time.perf_counter() - start,
            measures={name: float(mean) for name, mean in zip(self._measures.names, means, strict=True)},
        )

    def take_step(
        self, micro_batches: list[MicroBatch], rate_factor: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Forward, backward and optimizer step on given micro-batches; the device's part of `train_step`.

        Nothing in it waits for a number. Returns the step's loss, float64, the norm of its gradients, and the means of
        what the model's modules measure.
        """
        valid = self._sum_over_data_ranks(sum(map(self._objective.count, micro_batches))).clamp_(min=1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            self.engine.begin(last=number == len(micro_batches))
            loss = self._objective.losses(self.model, batch).sum()
            self._measures.take()
            self.engine.backward(loss, valid)
            total += loss.detach()
        norm = self.engine.step(rate_factor)
        if not self._measures.names:
            dist.all_reduce(total)
            return total / valid, norm, ()
        sums = torch.cat((total[None], self._measures.sums(self.device).flatten()))
        dist.all_reduce(sums)
        sum_, weight = sums[1:].unflatten(0, (-1, 2)).unbind(1)
        return sums[0] / valid, norm, (sum_ / weight).unbind()

    @torch.no_grad()
    def evaluate(self, data: Sequences, sequences: int) -> Evaluation:
        """Loss and accuracy on the first ``sequences`` sequences of ``data`` (all of them where there are fewer)."""
        edges = position_buckets(data.length)
        lower = torch.from_numpy(edges).to(self.device)
        # By position: losses and labels. By group: hits and labels.
        by_position = torch.zeros(2, len(edges), dtype=torch.float64, device=self.device)
        by_group = torch.zeros(2, max(len(data.groups), 1), dtype=torch.float64, device=self.device)
        count = min(sequences, len(data))
        each = min(self._sequences_at_once, -(-count // self.data_degree))
        for first in range(0, count, self.data_degree * each):
            mine = range(first + self.data_rank * each, min(first + (self.data_rank + 1) * each, count))
            # Ranks without a sequence of their own repeat one, uncounted: every rank must join the weights' gathering.
            batch = self.micro_batch(data, list(mine) or [first])
            losses, hits = self.model(batch.tokens, batch.shard, batch.labels, hits=True)
            if not mine:
                continue
            labelled = (batch.labels[0] != IGNORE).double()
            bucket = torch.bucketize(batch.shard.document_positions_on(self.device), lower, right=True) - 1
            by_position[0].index_add_(0, bucket, losses[0].double())
            by_position[1].index_add_(0, bucket, labelled)
            groups = torch.tensor([data.group(index) for index in mine], device=self.device)
            group = groups[batch.shard.positions.to(self.device) // data.length]
            by_group[0].index_add_(0, group, hits[0].double())
            by_group[1].index_add_(0, group, labelled)
        dist.all_reduce(by_position)
        dist.all_reduce(by_group)
        return _evaluation(edges, by_position.cpu().numpy(), by_group.cpu().numpy(), data.groups)

    def micro_batch(self, data: Sequences, indices: list[int]) -> MicroBatch:
        """This rank's part of some sequences packed end to end. Labels are made before sharding: they cannot shift."""
        packed = [data.sequence(index) for index in indices]
        tokens = torch.from_numpy(np.concatenate([sequence.tokens for sequence in packed]))[None]
        labels = torch.from_numpy(np.concatenate([sequence.labels for sequence in packed]))[None]
        starts = [sequence.cu_seqlens[:-1] + n * data.length for n, sequence in enumerate(packed)]
        cu_seqlens = np.concatenate([*starts, [tokens.shape[1]]])
        shard = SequenceShard(
            length=tokens.shape[1],
            group=self.sequence_ranks,
            layout=self.layout,
            cu_seqlens=torch.from_numpy(cu_seqlens),
        )
        self._prepare(shard)
        return MicroBatch(
            tokens=shard.split(tokens, dim=1).to(self.device),
            labels=shard.split(labels, dim=1).to(self.device),
            shard=shard,
            valid=int((labels != IGNORE).sum()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name: weights and optimizer state."""
        return self.engine.tensors()

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Take over what a checkpoint wrote into the tensors that `tensors` gave."""
        self.engine.loaded(tensors)

    def numbers(self) -> dict[str, int]:
        """Everything else that a checkpoint holds. Data and schedule are pure functions of these."""
        return {"step": self.step, "position": self.position}

    def restore(self, numbers: dict[str, int]) -> None:
        self.step, self.position = numbers["step"], numbers["position"]

    def _micro_batches(self) -> list[MicroBatch]:
        """This step's micro-batches; those of the next one are started."""
        position, batches = self._next or (-1, None)
        if batches is None or position != self.position:  # the first step, or a checkpoint was restored
            batches = self._load(self.position)
        current = batches.result()
        following = self.position + self.config.sequences
        last = self.step + 1 >= self.config.steps
        self._next = None if last else (following, self._load(following))
        return current

    def close(self) -> None:
        """End the thread that makes batches; the trainer takes no step afterwards."""
        if self._loader is not None:
            self._loader.shutdown(wait=True, cancel_futures=True)
        self._next = None

    def _load(self, position: int) -> "Future[list[MicroBatch]]":
        indices = self._step_indices(position)
        if self._loader is None:
            self._loader = ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix="longtrain-data",
                initializer=_use,
                initargs=(_device_index(self.device),),
            )
        return self._loader.submit(lambda: [self.micro_batch(self.data, some) for some in indices])

    @property
    def _sequences_at_once(self) -> int:
        """Sequences of one micro-batch."""
        return self.config.sequences // (self.data_degree * self.config.accumulation)

    def _step_indices(self, position: int) -> list[list[int]]:
        """The sequences of each of this rank's micro-batches; the step as a whole is the same for any cut."""
        each = self._sequences_at_once
        first = position + self.data_rank * each * self.config.accumulation
        return [list(range(first + n * each, first + (n + 1) * each)) for n in range(self.config.accumulation)]

    def _sum_over_data_ranks(self, count: int) -> Tensor:
        """The sum of each data rank's count, float64, on the device: the host need not wait for it."""
        total = torch.tensor(count, dtype=torch.float64, device=self.device)
        if self.data_degree > 1:
            dist.all_reduce(total, group=self.data_group)
        return total


def _evaluation(
    edges: np.ndarray, by_position: np.ndarray, by_group: np.ndarray, groups: tuple[int, ...]
) -> Evaluation:
    """Means from sums: by_position [2, n] of losses and labels, by_group [2, m] of hits and labels."""
    losses, counts = by_position
    hits, asked = by_group
    labels = max(counts.sum(), 1)
    with np.errstate(invalid="ignore"):
        return Evaluation(
            loss=float(losses.sum() / labels),
            accuracy=float(hits.sum() / labels),
            accuracy_by_group={
                name: float(hit / all_) for name, hit, all_ in zip(groups, hits, asked, strict=False) if all_
            },
            positions=edges,
            losses=losses / counts,
            counts=counts,
        )


def _device_index(device: torch.device) -> int | None:
    """Which accelerator this process uses; None on a CPU."""
    return None if device.type == "cpu" else torch.accelerator.current_device_index()


def _use(index: int | None) -> None:
    """Let this thread use an accelerator: a new thread starts with the first one."""
    if index is not None:
        torch.accelerator.set_device_index(index)


def position_buckets(length: int) -> np.ndarray:
    """Lowest positions of half-octave buckets over 0 ... length - 1, int64: 0, 1, 2, 3, 4, 6, 8, 11, 16 ..."""
    powers = np.arange(0, 2 * math.log2(max(length, 2)) + 1)
    edges = np.unique(np.concatenate([[0], np.round(2 ** (powers / 2))]).astype(np.int64))
    return edges[edges < max(length, 1)]
