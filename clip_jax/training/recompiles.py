"""What JAX compiles while a run trains: for how long, and why again."""

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Spans of `jax.monitoring`: tracing, lowering, and compiling or reading the compilation cache.
_COMPILING = "/jax/core/compile/"
_BACKEND = _COMPILING + "backend_compile_duration"

_CALLS_TO_SETTLE = 2  # a first call, and one with the results of the first
_COMPILES_TO_SAY = 5  # of another function under one name: the first ones are for its shapes
_MOST_CAUSES = 5


class CompileWatch:
    """Compiles of the thread that made it, which trains. `watch_compiles` makes and ends it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._thread = threading.get_ident()
        # Spent so far on tracing, lowering and compiling; what happens within another counts once.
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # the last ones: disjoint, in order
        self._expected = self._calls = self._num_compiles = 0
        self._step = 0
        self._others: Counter[str] = Counter()

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Nothing that is compiled within is warned of."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    def watching(
        self, function: Callable[..., _Result], *names: str, first_step: int = 0
    ) -> Callable[..., _Result]:
        """`function`, the jitted step, called once for each step after `first_step`.

        names: of its arguments. From its third call on it says so where it is compiled again, and
        in what the arguments differ from those of the first.
        """
        signature: dict[str, str] = {}
        self._calls = 0

        @functools.wraps(function)
        def watched(*arguments: Any) -> _Result:
            nonlocal signature
            before, seconds = self._num_compiles, self.seconds
            with self.expected():
                result = function(*arguments)
            self._calls += 1
            self._step = first_step + self._calls
            if self._calls == 1:
                signature = _signature(names, arguments)
            elif self._calls > _CALLS_TO_SETTLE and self._num_compiles > before:
                self._say(
                    f"warning: the step was compiled again at step {self._step}, in "
                    f"{self.seconds - seconds:.1f} s: "
                    f"{_difference(signature, _signature(names, arguments))}"
                )
            return result

        return watched

    def on_span(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        """A listener of `jax.monitoring`. Spans come when they end: inner ones before outer."""
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        while self._spans and self._spans[-1][0] >= start_time:
            start, end = self._spans.pop()
            self.seconds -= end - start
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time
        if len(self._spans) > 10_000:  # more than any to come holds
            del self._spans[0]
        if event == _BACKEND:
            self._num_compiles += 1
            if not self._expected and self._calls > _CALLS_TO_SETTLE:
                self._note_other(str(kwargs.get("fun_name", "a function")), end_time - start_time)

    def _note_other(self, name: str, seconds: float) -> None:
        self._others[name] += 1
        if self._others[name] == _COMPILES_TO_SAY:
            self._say(
                f"warning: {name} was compiled {_COMPILES_TO_SAY} times in the loop, the last time "
                f"after step {self._step} in {seconds:.1f} s: a shape or a constant in it changes"
            )


@contextlib.contextmanager
def watch_compiles(say: Callable[[str], None] = logger.warning) -> Iterator[CompileWatch]:
    """Watches what this thread compiles. say: takes a line of text."""
    watch = CompileWatch(say)
    jax.monitoring.register_event_time_span_listener(watch.on_span)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_time_span_listener(watch.on_span)


def _signature(names: tuple[str, ...], arguments: tuple[Any, ...]) -> dict[str, str]:
    """What a jitted function is compiled for, by the path of each array. Donated ones have it."""
    tree = dict(zip(names, arguments, strict=True))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: Any) -> str:
    kind = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if not isinstance(leaf, jax.Array):
        return f"{kind} of {type(leaf).__name__}"
    weak = " (weak)" if leaf.aval.weak_type else ""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return f"{kind}{weak} on {sharding}"
    axes = ",".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
    return f"{kind}{weak} split {sharding.spec} over {axes}"


def _difference(first: dict[str, str], now: dict[str, str]) -> str:
    causes = [f"{name} is gone" for name in first.keys() - now.keys()]
    causes += [f"{name} {now[name]} is new" for name in now.keys() - first.keys()]
    causes += [
        f"{name} is {now[name]} and was {first[name]}"
        for name in first
        if name in now and now[name] != first[name]
    ]
    if not causes:
        return "its arguments are as they were: jax.config, or a context of it, is not"
    more = f"; {len(causes) - _MOST_CAUSES} more" if len(causes) > _MOST_CAUSES else ""
    return "; ".join(sorted(causes)[:_MOST_CAUSES]) + more
