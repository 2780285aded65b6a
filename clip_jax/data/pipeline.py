"""Host batches by Grain: read ahead by threads and worker processes, always in the same order."""

from collections.abc import Iterator, Mapping, Sequence

import grain

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, ImageTowerConfig
from clip_jax.data.host_batches import (
    Batch,
    EvaluationBatches,
    Source,
    TrainingBatches,
    sample_order,
)
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.transforms import Framing
from clip_jax.data.workers import WorkerEnvironment

_MAX_TOKENIZER_SAMPLES = 200_000  # of a source: the merges of a BPE have long settled by then


class BatchIterator(Iterator[Batch]):
    """Batches that are being made ahead of time. Close it to end the threads and workers.

    Usable in a `with` statement.
    """

    def __init__(
        self,
        batches: TrainingBatches | EvaluationBatches,
        num_workers: int,
        num_threads: int,
        ahead: int,
    ) -> None:
        # Each element is a whole batch, so `ahead` counts batches; Grain's default is 500.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
        self._environment: WorkerEnvironment | None = None
        self._workers_to_hear_of = num_workers
        if num_workers:
            workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=ahead)
            dataset = dataset.mp_prefetch(workers)
            self._environment = WorkerEnvironment()
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        if self._environment is not None:
            self._workers_to_hear_of -= 1  # each delivers one of the first batches
            if self._workers_to_hear_of == 0:
                self._forget_environment()
        return batch

    def close(self) -> None:
        """End the threads and workers. Calling it again is nothing."""
        self._iterator.close()
        self._forget_environment()

    def _forget_environment(self) -> None:
        if self._environment is not None:
            self._environment.restore()
            self._environment = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    config: DataConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    image: ImageTowerConfig,
    context_length: int,
    seed: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
    start_sample: int,
) -> BatchIterator:
    """Return this host's endless training batches from a position on.

    Yields {'image': uint8 [b, S, S, 3], 'tokens': int32 [b, context_length]} with b =
    global_batch_size / process_count and S the tower's image size; for NaFlex, instead of 'image',
    'patches' uint8 [b, N, D], 'patch_mask' bool [b, N] and 'spatial_shapes' int32 [b, 2], rows and
    columns. The hosts' batches one after another are the global batch. It depends on the seed, the
    sources and `start_sample` (samples consumed globally) alone, not on the number of workers,
    threads or hosts.

    Raises UserError if the batch does not divide over the hosts or the sources hold fewer samples
    than a batch; later, from `next`, for bad samples as `config.on_bad_sample` says.
    """
    _check_divisible("global_batch_size", global_batch_size, process_count)
    total = sum(len(source) for name, source in sources.items() if config.sources[name].weight > 0)
    if total < global_batch_size:
        raise UserError(
            f"{total} samples in all data sources are fewer than global_batch_size "
            f"{global_batch_size}: a batch would hold a pair twice; at most {total}"
        )
    batches = TrainingBatches(
        config,
        sources,
        tokenizer,
        image=image,
        context_length=context_length,
        seed=seed,
        global_batch_size=global_batch_size,
        process_index=process_index,
        process_count=process_count,
        start_sample=start_sample,
    )
    return BatchIterator(batches, config.num_workers, config.num_threads, config.prefetch_batches)


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
    )
    return BatchIterator(batches, num_workers=0, num_threads=num_threads, ahead=2)


def captions(source: Source) -> list[str]:
    """The first caption of every sample, in order. Raises UserError for a bad sample."""
    return [_record_captions(source, row)[0] for row in range(len(source))]


def training_captions(sources: Mapping[str, Source]) -> Iterator[str]:
    """What a tokenizer is trained on: captions of up to 200,000 samples of each source.

    Evenly spread over the source, in the order of the sources' names. Bad samples are passed over:
    the pipeline reports them.
    """
    for name in sorted(sources):
        stride = -(-len(sources[name]) // _MAX_TOKENIZER_SAMPLES)
        for row in range(0, len(sources[name]), stride):
            try:
                yield from sources[name][row].captions
            except (ValueError, OSError):
                continue


def sample_keys(
    config: DataConfig, sources: Mapping[str, Source], *, seed: int, positions: Sequence[int]
) -> list[str]:
    """Name the samples at some positions of a run, `SOURCE/KEY` each, without decoding any."""
    places = sample_order(config, sources, seed).places(positions)
    return [f"{place.source}/{sources[place.source][place.row].key}" for place in places]


def _record_captions(source: Source, row: int) -> tuple[str, ...]:
    try:
        return source[row].captions
    except (ValueError, OSError) as error:
        raise UserError(f"bad sample: {source.locate(row)}: {error}; mend it") from None


def _check_divisible(name: str, batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        below = batch_size // process_count * process_count
        raise UserError(
            f"{name} {batch_size} is not divisible by {process_count} processes; "
            f"nearest: {below or process_count} or {below + process_count}"
        )
