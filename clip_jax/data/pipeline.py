"""Host batches by Grain: read ahead by threads and worker processes, always in the same order."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import grain
import numpy as np

from clip_jax.config.errors import UserError, nearest_multiples
from clip_jax.config.schema import DataConfig, ImageTowerConfig
from clip_jax.data.host_batches import (
    Batch,
    EvaluationBatches,
    TextInputs,
    TrainingBatches,
    sample_order,
)
from clip_jax.data.order import Positions
from clip_jax.data.record import Source
from clip_jax.data.report import BadSamplesError, BatchReport, ReportTotals
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.transforms import Framing
from clip_jax.data.workers import SlowWait, WorkerEnvironment, prepare_worker, was_killed

_SLOW_WAIT_SECONDS = 30.0
_MAX_IN_THE_MAKING = 2  # batches: one's captions are tokenized while the next is decoded


class Batches(Protocol):
    """A sequence of batches and of how each was made; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Batch, BatchReport]: ...

    def describe(self, index: int) -> str:
        """What a batch consists of, for messages."""
        ...

    def close(self) -> None:
        """End the threads of this process that make batches. Calling it again is nothing."""
        ...


class BatchIterator(Iterator[Batch]):
    """Batches that are being made ahead of time. Close it to end the threads and workers.

    num_threads: in each process, to make a batch each, or have it made; 0: `next` does.
    ahead: batches that are made before they are asked for, in each process.
    slow_wait_seconds: after so long in `next` a warning says what it waits for.

    Usable in a `with` statement.
    """

    def __init__(
        self,
        batches: Batches,
        num_workers: int,
        num_threads: int,
        ahead: int,
        *,
        slow_wait_seconds: float = _SLOW_WAIT_SECONDS,
    ) -> None:
        # Each element is a whole batch, so the buffer counts batches; Grain's default is 500.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
        self._batches = batches
        self._num_workers = self._workers_to_hear_of = num_workers
        self._num_returned = 0
        self._totals = ReportTotals()
        self._slow_wait = SlowWait(slow_wait_seconds, self._describe_wait)
        self._environment: WorkerEnvironment | None = None
        if num_workers:
            workers = grain.MultiprocessingOptions(
                num_workers, per_worker_buffer_size=max(ahead, 1)
            )
            dataset = dataset.mp_prefetch(workers, worker_init_fn=prepare_worker)
            self._environment = WorkerEnvironment()
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        """Raises what the batches raise, and UserError where a worker process was killed."""
        try:
            with self._slow_wait:
                batch, report = next(self._iterator)
        except BadSamplesError as error:
            self._totals.add(BatchReport(0, bad_samples=error.bad_samples))
            raise
        except RuntimeError as error:
            if not was_killed(error):
                raise
            raise UserError(
                f"a worker process that makes batches was killed ({str(error).split('.')[0]}), "
                f"most likely for want of memory: give it more, or lower data.num_workers "
                f"({self._num_workers}) or data.prefetch_batches"
            ) from error
        self._num_returned += 1
        self._totals.add(report)
        if self._environment is not None:
            self._workers_to_hear_of -= 1  # each delivers one of the first batches
            if self._workers_to_hear_of == 0:
                self._forget_environment()
        return batch

    def stats(self) -> dict[str, float]:
        """Times and counts since the last call; see `ReportTotals.stats`."""
        return self._totals.stats()

    def drain_bad_samples(self) -> list[dict[str, Any]]:
        """The bad samples since the last call; see `ReportTotals.drain_bad_samples`."""
        return self._totals.drain_bad_samples()

    def close(self) -> None:
        """End the threads and workers. Calling it again is nothing."""
        self._slow_wait.close()
        self._iterator.close()
        self._batches.close()
        self._forget_environment()

    def _describe_wait(self) -> str:
        milliseconds = self._totals.milliseconds()
        times = ", ".join(f"{stage} {value:.2f}" for stage, value in milliseconds.items())
        processes = f" in {self._num_workers} worker processes" if self._num_workers else ""
        return (
            f"for a batch ({self._batches.describe(self._num_returned)}){processes}; before, in ms "
            f"per sample: {times}"
        )

    def _forget_environment(self) -> None:
        if self._environment is not None:
            self._environment.restore()
            self._environment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    config: DataConfig,
    sources: Mapping[str, Source],
    text: TextInputs,
    *,
    image: ImageTowerConfig,
    seed: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
    start_sample: int,
    num_samples: int | None = None,
) -> BatchIterator:
    """Return this host's endless training batches from a position on.

    text: makes arrays of captions, `PaddedText` or `PackedText`. num_samples: what the whole run
    consumes, from its beginning; with `config.repeat` False it may bring no sample twice.

    Yields {'image': uint8 [b, S, S, 3]} and the arrays of `text`, with b = global_batch_size /
    process_count and S the tower's image size; for NaFlex, instead of 'image', 'patches' uint8
    [b, N, D], 'patch_mask' bool [b, N] and 'spatial_shapes' int32 [b, 2], rows and columns. The
    hosts' batches one after another are the global batch. It depends on the seed, the sources,
    `config.skipped_ranges` and `start_sample` (samples consumed globally) alone, not on the number
    of workers, threads or hosts.

    Raises UserError if the batch does not divide over the hosts, the sources hold fewer samples
    than a batch, or samples would come twice; later, from `next`, for bad samples as
    `config.on_bad_sample` says and where a worker process is killed.
    """
    _check_divisible("global_batch_size", global_batch_size, process_count)
    total = sum(len(source) for name, source in sources.items() if config.sources[name].weight > 0)
    if total < global_batch_size:
        raise UserError(
            f"{total} samples in all data sources are fewer than global_batch_size "
            f"{global_batch_size}: a batch would hold a pair twice; at most {total}"
        )
    if num_samples is not None and not config.repeat:
        _check_once(config, sources, seed, num_samples)
    batches = TrainingBatches(
        config,
        sources,
        text,
        image=image,
        seed=seed,
        global_batch_size=global_batch_size,
        process_index=process_index,
        process_count=process_count,
        start_sample=start_sample,
    )
    num_threads = min(config.num_threads, _MAX_IN_THE_MAKING)
    return BatchIterator(batches, config.num_workers, num_threads, config.prefetch_batches)


def evaluation_batches(
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    image: ImageTowerConfig,
    context_length: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
    framing: Framing = "crop",
) -> BatchIterator:
    """Return this host's batches over a source, in order, once.

    Yields {'image': uint8 [b, S, S, 3] (for NaFlex its three arrays, as in training), 'tokens':
    int32 [b, context_length] (with a tokenizer; first captions), 'mask': bool [b], 'index': int32
    [b], the row in the source} with b = batch_size / process_count. All hosts yield the same number
    of batches; rows past the end have mask False and index -1. `framing` is that of the training,
    `DataConfig.framing`.

    Raises UserError if the batch does not divide over the hosts; from `next`, for a bad sample.
    """
    _check_divisible("evaluation.batch_size", batch_size, process_count)
    batches = EvaluationBatches(
        source,
        tokenizer,
        image=image,
        framing=framing,
        context_length=context_length,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
    )
    num_threads = min(num_threads, _MAX_IN_THE_MAKING)
    return BatchIterator(batches, num_workers=0, num_threads=num_threads, ahead=2)


def sample_keys(
    config: DataConfig, sources: Mapping[str, Source], *, seed: int, positions: Sequence[int]
) -> list[str]:
    """Name the samples that a run consumes as its n-th ones, `SOURCE/KEY` each; decodes none.

    positions: n of each, counted from 0. Bad samples are named too, not what replaces them.
    """
    counts = np.asarray(positions, np.int64)
    passed_over = Positions(config.skipped_ranges)
    places = sample_order(config, sources, seed).places(passed_over(counts))
    return [f"{place.source}/{sources[place.source][place.row].key}" for place in places]


def _check_once(
    config: DataConfig, sources: Mapping[str, Source], seed: int, num_samples: int
) -> None:
    """Raises UserError if a run would go through a source more than once."""
    order, positions = sample_order(config, sources, seed), Positions(config.skipped_ranges)
    end = int(positions(np.array([num_samples - 1]))[0]) + 1
    first_repeat = order.first_repeat()
    if end <= first_repeat:
        return
    taken = order.drawn_before(end)
    name = max(taken, key=lambda name: taken[name] / len(sources[name]))
    raise UserError(
        f"{num_samples} samples go through data source '{name}' more than once ({taken[name]} of "
        f"its {len(sources[name])}) and data.repeat is False; at most num_samples_seen="
        f"{positions.consumed_before(first_repeat)}, or lower its weight, or set data.repeat=True"
    )


def _check_divisible(name: str, batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        raise UserError(
            f"{name} {batch_size} is not divisible by {process_count} processes; "
            f"nearest: {nearest_multiples(batch_size, process_count)}"
        )
