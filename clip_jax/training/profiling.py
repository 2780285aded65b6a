"""A trace of a few training steps, for XProf, TensorBoard or Perfetto."""

import re
from collections.abc import Callable
from typing import Any

from clip_jax.checkpoint import UploadedFolder, Workdir
from clip_jax.config import ConfigError, ExperimentConfig

# jax is imported late, as `parse_profile_steps` serves the command line.


def parse_profile_steps(text: str) -> tuple[int, int]:
    """'10:15' as (10, 15): the first and the last step of a trace. Raises ConfigError."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"--profile_steps={text} is not FIRST:LAST, two steps from 1 on, as in 10:15"
        )
    return int(match[1]), int(match[2])


class Profiler:
    """Traces the steps of `config.logging.profile_steps` in the first process, if there are any.

    The trace lies in WORKDIR/profile. Steps before the one that a run resumes at are left out, and
    it says so. Python's own calls are not traced: that would slow the threads that make batches,
    and with them the very steps. Close it: a run that ends within the steps has a trace of part.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: Workdir,
        *,
        first_step: int = 0,
        say: Callable[[str], None],
    ) -> None:
        """first_step: the step the run starts from. say: takes a line of text."""
        import jax

        self._target, self._say = workdir.path / "profile", say
        self._upload_seconds = config.logging.upload_seconds
        self._first, self._last = config.logging.profile_steps or (0, 0)
        self._running: UploadedFolder | None = None  # where JAX writes the trace that it takes
        self._annotation: Any = None
        self._step = 0  # the last one in the trace
        if self._last and (first_step >= self._first or self._first > config.num_steps):
            self._say_what_is_left(first_step, config.num_steps)
        if jax.process_index() != 0:
            self._last = 0
        self._first = max(self._first, first_step + 1)

    def before(self, step: int) -> None:
        """Call it before step `step` is sent to the devices."""
        if not self._first <= step <= self._last:
            return
        import jax

        if self._running is None:
            self._running = UploadedFolder(self._target, self._upload_seconds)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._running.path, profiler_options=options)
        self._step = step
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, result: Any) -> None:
        """Call it after step `step` was sent. After the last one it waits for `result`, arrays."""
        if self._running is None:
            return
        import jax

        self._end_annotation()
        if step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def close(self) -> None:
        """Ends a trace that is being taken."""
        if self._running is not None:
            self._end_annotation()
            self._stop()

    def _end_annotation(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _stop(self) -> None:
        import jax

        assert self._running is not None
        folder, self._running, self._last = self._running, None, 0
        jax.profiler.stop_trace()
        folder.close()
        self._say(
            f"trace of steps {self._first} to {self._step} in {self._target}; look at it with "
            f"xprof --logdir={self._target}, TensorBoard's profile plugin, or its .trace.json.gz "
            "at ui.perfetto.dev"
        )

    def _say_what_is_left(self, first_step: int, num_steps: int) -> None:
        steps = f"config.logging.profile_steps {self._first}:{self._last}"
        if self._first > num_steps:
            self._say(f"no trace: {steps} is after the last step, {num_steps}")
        elif self._last <= first_step:
            self._say(f"no trace: {steps} lies before step {first_step}, where the run resumes")
        else:
            self._say(f"{steps}: the trace begins at step {first_step + 1}, where the run resumes")
