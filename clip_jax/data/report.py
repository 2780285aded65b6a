"""What making a batch took and which samples could not be used: counted where batches are consumed.

A report travels beside its batch, out of whichever process made it. What was read ahead and never
consumed is not counted, so the counts of a run are the same for any number of workers.
"""

import collections
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from clip_jax.config.errors import UserError
from clip_jax.data.record import BAD_REASONS, BadReason, BadSampleError

logger = logging.getLogger(__name__)

STAGES = ("read", "decode", "tokenize", "batch")

MAX_REPLACEMENTS = 100  # in a row: where as many fail, the set is broken, not a sample

_FIRST_WARNINGS = 5
_MOST_KEPT = 10_000  # bad samples that nobody has drained: memory stays flat


class BadSample(NamedTuple):
    """A sample that was replaced by another."""

    position: int  # place in the order of the run
    source: str
    shard: str  # the file that holds it
    sample: str  # names it
    reason: BadReason
    message: str


@dataclass(slots=True)  # no NamedTuple: Grain would look for arrays in it
class BatchReport:
    """How one host's share of a batch was made. Seconds are wall time of the threads at it."""

    num_samples: int
    read: float = 0.0  # seconds
    decode: float = 0.0  # and augmentation
    tokenize: float = 0.0
    batch: float = 0.0  # the rest: order, choice of captions, putting together
    num_cut_captions: int = 0  # for want of room in a packed group
    bad_samples: list[BadSample] = field(default_factory=list)

    def add(self, other: "BatchReport") -> None:
        """Count the rest of the batch, which another thread made: the samples after these."""
        self.num_samples += other.num_samples
        for stage in STAGES:
            setattr(self, stage, getattr(self, stage) + getattr(other, stage))
        self.num_cut_captions += other.num_cut_captions
        self.bad_samples += other.bad_samples


class ReportTotals:
    """Sums of the reports of the batches that were consumed."""

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[str, BadSample]] = collections.deque(maxlen=_MOST_KEPT)
        self._num_bad = 0
        self._shards: set[tuple[str, str]] = set()
        self._start_lap()

    def add(self, report: BatchReport) -> None:
        """Count a batch. The first bad samples are logged, then ever fewer."""
        self._num_samples += report.num_samples
        self._num_cut += report.num_cut_captions
        for stage in STAGES:
            self._seconds[stage] += getattr(report, stage)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        for bad in report.bad_samples:
            self._bad[bad.reason] += 1
            self._shards.add((bad.source, bad.shard))
            self._kept.append((time, bad))
            self._warn(bad)

    def stats(self) -> dict[str, float]:
        """Figures of the lap since the last call, always the same ones.

        `data/STAGE_ms`: milliseconds of a thread per sample. `data/bad_samples`, of them
        `data/bad_REASON` for each reason; `data/bad_shards`, the files that have held any so far.
        `data/cut_captions`: of packed text. Counts are those of this process.
        """
        figures = {f"data/{stage}_ms": ms for stage, ms in self.milliseconds().items()}
        figures["data/bad_samples"] = float(self._bad.total())
        figures |= {f"data/bad_{reason}": float(self._bad[reason]) for reason in BAD_REASONS}
        figures["data/bad_shards"] = float(len(self._shards))
        figures["data/cut_captions"] = float(self._num_cut)
        self._start_lap()
        return figures

    def drain_bad_samples(self) -> list[dict[str, Any]]:
        """The bad samples since the last call, for JSON: `time` and the fields of `BadSample`.

        The last 10,000 of them: who wants all asks after each batch.
        """
        drained = [{"time": time, **bad._asdict()} for time, bad in self._kept]
        self._kept.clear()
        return drained

    def milliseconds(self) -> dict[str, float]:
        """Of each stage, per sample, in this lap; 0 where it saw no batch."""
        count = max(self._num_samples, 1)
        return {stage: 1000 * seconds / count for stage, seconds in self._seconds.items()}

    def _start_lap(self) -> None:
        self._num_samples = self._num_cut = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._bad: collections.Counter[BadReason] = collections.Counter()

    def _warn(self, bad: BadSample) -> None:
        self._num_bad += 1
        if self._num_bad <= _FIRST_WARNINGS:
            logger.warning(
                "bad sample replaced in '%s': %s: %s", bad.source, bad.sample, bad.message
            )
        elif self._num_bad % 1000 == 0 or self._num_bad in (10, 100):
            logger.warning(
                "%d bad samples replaced so far, the last in '%s': %s: %s",
                self._num_bad,
                bad.source,
                bad.sample,
                bad.message,
            )


def why_bad(error: Exception, otherwise: BadReason) -> BadReason:
    """The reason behind an error that a source or a decoder raised.

    otherwise: that of a ValueError which does not say.
    """
    if isinstance(error, BadSampleError):
        return error.reason
    return "read" if isinstance(error, OSError) else otherwise


class BadSamplesError(UserError):
    """Ends a run for its bad samples, and carries them to where they are written down."""

    def __init__(self, message: str, bad_samples: Sequence[BadSample]) -> None:
        super().__init__(message)
        self.bad_samples = list(bad_samples)

    def __reduce__(self) -> tuple[type["BadSamplesError"], tuple[str, list[BadSample]]]:
        return BadSamplesError, (str(self), self.bad_samples)


def bad_sample_error(bad: BadSample) -> BadSamplesError:
    """What a bad sample raises where `data.on_bad_sample` is 'fail'."""
    return BadSamplesError(
        f"bad sample in data source '{bad.source}': {bad.sample}: {bad.message}; mend it, or set "
        "data.on_bad_sample to 'skip'",
        [bad],
    )


def too_many_bad_error(bad: Sequence[BadSample]) -> BadSamplesError:
    """What so many bad samples of a source in a row raise."""
    reasons = collections.Counter(sample.reason for sample in bad)
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    return BadSamplesError(
        f"{len(bad)} samples in a row of data source '{bad[-1].source}' are bad ({counts}), the "
        f"last: {bad[-1].sample}: {bad[-1].message}; check the files and the access to them",
        bad,
    )
