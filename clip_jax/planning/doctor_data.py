"""Checks of what a run reads: sources, amounts, tokenizer, captions, evaluation sets."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_jax.checkpoint import Workdir
from clip_jax.config import EvalSetConfig, SourceConfig, UserError
from clip_jax.data.check import check_source
from clip_jax.data.check_result import SourceCheck
from clip_jax.data.check_schema import describe_schema
from clip_jax.data.configured_text import configured_tokenizer, packing_rows
from clip_jax.data.packing import choose_rows
from clip_jax.data.pipeline import training_batches
from clip_jax.data.sources import cache_dir
from clip_jax.data.stream_batches import local_streams
from clip_jax.data.streams import StreamedSource, check_tars
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.planning.doctor_case import Case, Checks, Finding, counted, is_writable, refusals
from clip_jax.planning.doctor_samples import Counted, Sampled, sample_source
from clip_jax.training.measured import count_epochs
from clip_jax.training.vocabulary import kept_tokenizer

_NUM_SAMPLES = 64  # of a source, fewer where there are many sources: half a second each
_MOST_SAMPLES, _LEAST_SAMPLES = 256, 8  # of all sources; of each
_NUM_THREADS = 2
_CUT = 0.01  # share of captions above which it is worth a line, as for `clip-jax data check`
_ROOMY = 1.25  # rows given by rows needed, likewise
_SEE = "`clip-jax data check` lists them"


def data_checks(case: Case) -> Checks:
    checks = DataChecks(case)
    return {
        "cache": checks.cache,
        "tokenizer": checks.tokenizer,
        "sources": checks.sources,
        "samples": checks.samples,
        "captions": checks.captions,
        "evaluation": checks.evaluation,
    }


class DataChecks:
    """They build on each other: what an earlier one could not open, a later one leaves out."""

    def __init__(self, case: Case) -> None:
        self._case, self._config = case, case.config
        self._cache = cache_dir(case.config.data)
        self._tokenizer: Tokenizer | None = None
        self._sampled: dict[str, Sampled] = {}
        self._checked: dict[str, SourceCheck] = {}

    def cache(self) -> Iterator[Finding]:
        if is_writable(self._cache):
            yield Finding("ok", "cache", f"{self._cache} can be written")
        else:
            text = f"{self._cache} cannot be written: indexes are kept there"
            yield Finding("error", "cache", f"{text}; set --config.data.cache_dir=FOLDER")

    def tokenizer(self) -> Iterator[Finding]:
        """The one that `prepare_tokenizer` would take, and whether the text tower fits it."""
        config, text = self._config, self._config.model.text
        folders = [self._case.workdir, config.start.branch and Workdir(config.start.branch)]
        kept = next((f.tokenizer for f in folders if f and _has_tokenizer(f)), None)
        if kept is not None:
            self._tokenizer = kept_tokenizer(kept)
        elif config.data.tokenizer.kind != "bpe" or config.data.streams:
            self._tokenizer = configured_tokenizer(config, {})
        else:
            said = f"{text.vocab_size:,} tokens are trained on the captions when the run starts"
            yield Finding("ok", "tokenizer", said)
            return
        check_fit(self._tokenizer, text)
        said = f"{self._tokenizer.vocab_size:,} tokens in a table of {text.vocab_size:,}"
        yield Finding(
            "ok", "tokenizer", f"{said}, end of text {text.eot_id}, padding {text.pad_id}"
        )

    def sources(self) -> Iterator[Finding]:
        """A few samples of each, read and decoded."""
        sources = self._config.data.sources
        fails = self._config.data.on_bad_sample == "fail"
        for name, source in sources.items():
            try:
                sampled, checked = self._look_into(name, source, len(sources))
            except UserError as error:
                yield Finding("error", "sources", f"'{name}': {error}")
                continue
            self._sampled[name], self._checked[name] = sampled, checked
            yield _judged("sources", source, sampled, checked, fails=fails)

    def samples(self) -> Iterator[Finding]:
        """Whether there are enough for the batch, the streams, the hosts and the length."""
        sources, streams = self._config.data.sources, self._config.data.streams
        found = list(self._count_hosts() if streams else [])
        if unread := [name for name in sources if name not in self._sampled]:
            text = f"not counted: data source '{unread[0]}' cannot be opened; mend that first"
            yield from (*found, Finding("warning", "samples", text))
            return
        total = sum(sampled.total for sampled in self._sampled.values())
        exact = all(sampled.exact for sampled in self._sampled.values())
        found += self._count_tars() if streams else []
        amounts = self._too_few(total) if streams else self._count_random()
        for finding in amounts:
            if not exact:  # a few files of many, which may be unlike the others
                text = f"{finding.text}; the samples are estimated from a few files"
                finding = Finding("warning", finding.check, text)
            found.append(finding)
        yield from found
        if not found:
            config = count_epochs(self._config, self._counted())
            seen = config.num_steps * config.global_batch_size
            about = "" if exact else "about "
            text = f"{about}{total:,} samples; the run sees {seen:,}, {seen / max(1, total):.3g} "
            yield Finding("ok", "samples", f"{text}times as many, in batches of {self._batch:,}")

    def captions(self) -> Iterator[Finding]:
        """Their lengths against the context length, and against the rows of packed groups."""
        length, packing = self._config.model.text.context_length, self._config.data.packing
        filled = {name: check for name, check in self._checked.items() if len(check.tokens)}
        if not filled:
            text = "not measured: no caption could be read; mend the sources first"
            yield Finding("warning", "captions", text)
            return
        whose = "" if self._tokenizer is not None else " (by CLIP's tokenizer, as the run's is new)"
        sound = True
        for name, check in filled.items():
            if check.share_cut > _CUT:
                sound = False
                wanted = int(check.tokens.percentile(99))
                text = (
                    f"data source '{name}': {check.share_cut:.0%} of {len(check.tokens)} captions "
                    f"are longer than context_length {length} and are cut{whose}; 99% fit with "
                    f"--config.model.text.context_length={wanted}"
                )
                yield Finding("warning", "captions", text)
        lengths = np.array(
            list(itertools.chain.from_iterable(check.tokens for check in filled.values())), np.int32
        )
        packed = ""
        if packing.group_size:
            if self._config.data.streams and self._tokenizer is not None:  # rows must be given
                rows = functools.partial(packing_rows, self._config, {}, self._tokenizer)
                for refusal in refusals("captions", rows):
                    sound = False
                    yield refusal
            needed = choose_rows(lengths, packing.group_size, length)
            given = packing.rows
            packed = f"; {packing.group_size} captions take {needed} rows"
            if given is not None and not needed <= given <= max(needed + 1, _ROOMY * needed):
                sound = False
                harm = "captions are cut" if given < needed else "the rest is padding"
                text = f"rows {given} of a group of {packing.group_size} captions, which take"
                remedy = f"{harm}{whose}; --config.data.packing.rows={needed}, or None to measure"
                yield Finding("warning", "captions", f"{text} {needed}: {remedy}")
        if sound:
            mean, most = lengths.mean(), lengths.max()
            text = f"{mean:.1f} tokens each, at most {most}, of {length}{packed}{whose}"
            yield Finding("ok", "captions", text)

    def evaluation(self) -> Iterator[Finding]:
        """The sets; a bad sample in one ends the evaluation."""
        sets = self._config.evaluation.sets
        if not sets:
            yield Finding("ok", "evaluation", "no sets")
        for name, eval_set in sets.items():
            try:
                sampled, checked = self._look_into(name, eval_set, len(sets))
            except UserError as error:
                yield Finding("error", "evaluation", f"'{name}': {error}")
                continue
            yield _judged("evaluation", eval_set, sampled, checked, fails=True)

    # ---- Helpers ---------------------------------------------------------------------------------

    @property
    def _batch(self) -> int:
        return self._config.global_batch_size

    def _look_into(
        self, name: str, source: SourceConfig | EvalSetConfig, count: int
    ) -> tuple[Sampled, SourceCheck]:
        """count: sources that are looked into, among which the time is divided."""
        sampled = sample_source(source, self._config.data, self._cache)
        checked = check_source(
            name,
            sampled.source,
            self._tokenizer or Tokenizer.clip(),
            context_length=self._config.model.text.context_length,
            image_size=self._config.model.image.image_size,
            num_samples=min(_NUM_SAMPLES, max(_LEAST_SAMPLES, _MOST_SAMPLES // count)),
            num_threads=_NUM_THREADS,
        )
        return sampled, checked

    def _counted(self) -> dict[str, Any]:
        if self._config.data.streams:
            return {}
        return {name: Counted(self._sampled[name].total) for name in self._config.data.sources}

    def _count_random(self) -> Iterator[Finding]:
        """What a run that reads at random refuses, by the function that makes its batches."""

        def start() -> None:
            config = count_epochs(self._config, self._counted())
            data = dataclasses.replace(config.data, num_workers=0)
            training_batches(
                data,
                self._counted(),
                _no_text,
                image=config.model.image,
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                process_index=0,
                process_count=self._case.num_hosts,
                start_sample=0,
                num_samples=config.num_steps * config.global_batch_size,
            ).close()

        yield from refusals("samples", start)

    def _count_hosts(self) -> Iterator[Finding]:
        streams, hosts = self._config.data.stream.num_streams, self._case.num_hosts
        yield from refusals("samples", lambda: local_streams(streams, 0, hosts))
        yield from refusals("samples", lambda: count_epochs(self._config, {}))

    def _count_tars(self) -> Iterator[Finding]:
        data = self._config.data
        streams = data.stream.num_streams
        for name in data.sources:
            tars = self._sampled[name].files
            source = StreamedSource(name=name, tars=tars)
            yield from refusals("samples", functools.partial(check_tars, source, data.stream))
            if len(tars) > streams and len(tars) % streams and len(tars) < 10 * streams:
                text = f"data source '{name}' has {len(tars)} tars for {streams} streams: those of"
                text += " the smaller ones come round more often; a num_streams that divides them"
                yield Finding("warning", "samples", f"{text} is better")

    def _too_few(self, total: int) -> Iterator[Finding]:
        if total < self._batch:
            text = f"{total} samples are fewer than global_batch_size {self._batch}"
            yield Finding("error", "samples", f"{text}; lower it or add tars")


def _has_tokenizer(folder: Workdir) -> bool:
    """A folder that does not answer is told by the check of the workdir or the start."""
    try:
        return folder.tokenizer.exists()
    except UserError:
        return False


def _no_text(captions: Sequence[str]) -> dict[str, NDArray[Any]]:
    raise AssertionError(f"no batch is made, and yet {len(captions)} captions came")


def _judged(
    check: str,
    config: SourceConfig | EvalSetConfig,
    sampled: Sampled,
    found: SourceCheck,
    *,
    fails: bool,
) -> Finding:
    """fails: whether a bad sample ends the run."""
    about = "" if sampled.exact else "about "
    files = f" in {counted(len(sampled.files), 'file')}" if sampled.files else ""
    of = f"{about}{found.num_samples if sampled.exact else sampled.total:,}{files}"
    bad = found.num_bad.total()
    first = f": {found.bad_samples[0].name}: {found.bad_samples[0].message}" if bad else ""
    if not found.num_usable:
        holds = f" ({'; '.join(describe_schema(config.kind, sampled.source))})" if bad else ""
        what = f"'{found.name}': none of {found.num_checked} samples can be used{first}{holds}"
        remedy = "name what holds captions and images with caption_keys and image_key, or mend it"
        return Finding("error", check, f"{what}; {remedy}")
    if bad:
        reasons = ", ".join(f"{reason} {count}" for reason, count in found.num_bad.items())
        what = f"'{found.name}': {bad} of {found.num_checked} samples are bad ({reasons}){first}"
        remedy = _SEE if not fails else f"{_SEE}; mend them, for a run ends at the first"
        return Finding("error" if fails else "warning", check, f"{what}; {remedy}")
    if found.damaged:
        what = f"'{found.name}': {len(found.damaged)} files are damaged: {found.damaged[0]}"
        return Finding("warning", check, f"{what}; copy them anew")
    read = f"{found.num_checked} read and decoded of {of}"
    return Finding("ok", check, f"'{found.name}': {read}")
