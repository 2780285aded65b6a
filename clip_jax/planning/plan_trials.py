"""Settings of one config, compiled one by one; what cannot fit by what is known is left out."""

import collections
from collections.abc import Callable

from clip_jax.config import ExperimentConfig, UserError
from clip_jax.planning.compiler_errors import DoesNotFit
from clip_jax.planning.compiling import CompiledStep
from clip_jax.planning.plan_setting import Attempt, Known, Setting, StateBytes, least_bytes

Compile = Callable[[ExperimentConfig], CompiledStep]

# Bounds on memory are of arrays; the order in which a compiler lays them out moves them by a few
# percent. Only what is further beyond is left out.
_MARGIN = 1.05


class Trials:
    """Compiles settings and remembers what they need.

    memory_bytes: of a device; None: no limit. state_bytes: by the mesh. limit: of compilations,
    beside that of the recipe as it is. progress: told what is compiled, which may take minutes.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        memory_bytes: int | None,
        compile: Compile,
        state_bytes: Callable[[tuple[int, int, int]], StateBytes],
        limit: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config, self._memory_bytes, self._compile = config, memory_bytes, compile
        self._state_bytes, self._progress = state_bytes, progress
        self._known: list[Known] = []
        self.limit, self.num_compiled = limit, 0

    def with_limit(self, limit: int) -> "Trials":
        """Others that start from what these know."""
        trials = Trials(
            self._config,
            memory_bytes=self._memory_bytes,
            compile=self._compile,
            state_bytes=self._state_bytes,
            limit=limit,
            progress=self._progress,
        )
        trials._known = list(self._known)
        return trials

    def attempt(self, setting: Setting) -> Attempt:
        """What becomes of a setting; without a compilation where it cannot fit, or at the limit."""
        state = self._state_bytes(setting.mesh)
        least = least_bytes(setting, state, self._known)
        if self._memory_bytes is not None and least > self._memory_bytes * _MARGIN:
            reason = "needs at least this by what others needed"
            return Attempt(setting=setting, verdict="ruled out", needed_bytes=least, reason=reason)
        if self.num_compiled >= self.limit:
            reason = f"after {self.limit} compilations"
            return Attempt(setting=setting, verdict="not tried", needed_bytes=None, reason=reason)
        self.num_compiled += 1
        self._progress(f"compiling {self.num_compiled}, at most {self.limit}: {setting}")
        return self.compile(setting)

    def compile(self, setting: Setting) -> Attempt:
        """A setting compiled, whatever is known; it does not count against the limit."""
        try:
            step = self._compile(setting.apply(self._config))
        except DoesNotFit as error:
            self._remember(setting, error.needed_bytes)
            return Attempt(
                setting=setting,
                verdict="too large",
                needed_bytes=error.needed_bytes,
                reason=str(error),
            )
        except UserError as error:
            return Attempt(setting=setting, verdict="failed", needed_bytes=None, reason=str(error))
        except Exception as error:  # noqa: BLE001 - the others go on, whatever becomes of one
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return Attempt(setting=setting, verdict="failed", needed_bytes=None, reason=text)
        needed = step.memory.total
        self._remember(setting, needed)
        fits = self._memory_bytes is None or needed <= self._memory_bytes
        return Attempt(
            setting=setting,
            verdict="fits" if fits else "too large",
            needed_bytes=needed,
            step=step,
        )

    def _remember(self, setting: Setting, needed_bytes: int) -> None:
        self._known.append(Known(setting, self._state_bytes(setting.mesh), needed_bytes))


def counted(attempts: list[Attempt]) -> str:
    """`3 too large, 40 ruled out`."""
    counts = collections.Counter(attempt.verdict for attempt in attempts)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
