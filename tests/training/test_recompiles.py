import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of

from clip_jax.parallel import batch_sharding, replicated
from clip_jax.training.recompiles import CompileWatch, watch_compiles


def step_function():
    """A step that donates its state, as the real one; a new one compiles anew."""

    def train_step(state, batch):
        w = state["w"] + batch["image"].sum()
        return {"w": w, "step": state["step"] + 1}, {"loss": w.sum()}

    return jax.jit(train_step, donate_argnums=0)


def state():
    return {"w": jnp.zeros((4, 4)), "step": jnp.int32(0)}


def batch(rows=8, dtype=np.float32):
    return {"image": jnp.asarray(np.ones((rows, 2), dtype))}


@pytest.fixture
def said():
    return []


@pytest.fixture
def compiles(said):
    with watch_compiles(said.append) as watch:
        yield watch


def run(step, batches):
    current = state()
    for one in batches:
        current, _ = step(current, one)


def test_the_same_arguments_compile_once_and_say_nothing(compiles, said):
    step = compiles.watching(step_function(), "state", "batch")
    run(step, [batch()])
    seconds = compiles.seconds
    assert seconds > 0
    run(step, [batch()] * 4)
    assert not said


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda: batch(rows=16), r"batch/image is float32\[16,2\] .* was float32\[8,2\]"),
        (lambda: batch(dtype=np.int32), r"batch/image is int32\[8,2\] .* was float32\[8,2\]"),
        (lambda: batch() | {"weight": jnp.ones(8)}, r"batch/weight float32\[8\] .* is new"),
    ],
    ids=["shape", "dtype", "new"],
)
def test_a_recompile_after_the_second_step_names_the_cause(compiles, said, change, cause):
    step = compiles.watching(step_function(), "state", "batch", first_step=100)
    run(step, [batch(), batch(), batch(), change(), change()])
    assert len(said) == 1
    assert "compiled again at step 104" in said[0]
    assert re.search(cause, said[0])
    assert "state/" not in said[0]


def test_a_sharding_that_differs_is_named(compiles, said):
    mesh = mesh_of(data=2)
    step = compiles.watching(jax.jit(lambda batch: batch["image"] * 2), "batch")
    rows, whole = batch_sharding(mesh), replicated(mesh)
    for sharding in (rows, rows, rows, whole):
        step(jax.device_put(batch(), sharding))
    assert len(said) == 1
    assert f"batch/image is float32[8,2] split {whole.spec} over data=2" in said[0]
    assert f"was float32[8,2] split {rows.spec} over data=2" in said[0]


def test_the_second_call_may_compile(compiles, said):
    step = compiles.watching(step_function(), "state", "batch")
    run(step, [batch(), batch(rows=16), batch(rows=16)])
    assert not said


def test_a_cause_outside_of_the_arguments(compiles, said):
    step = compiles.watching(step_function(), "state", "batch")
    run(step, [batch()] * 3)
    with jax.default_matmul_precision("highest"):
        run(step, [batch()])
    assert len(said) == 1
    assert "its arguments are as they were" in said[0]


def test_what_is_expected_is_not_warned_of(compiles, said):
    step = compiles.watching(step_function(), "state", "batch")
    run(step, [batch()] * 3)
    before = compiles.seconds
    for rows in range(1, 5):
        with compiles.expected():
            jax.jit(lambda x: x * 3)(jnp.ones(rows))
    assert not said
    assert compiles.seconds > before


def test_another_function_that_compiles_again_and_again_is_said_once(compiles, said):
    step = compiles.watching(step_function(), "state", "batch")
    run(step, [batch()] * 3)

    def helper(x):
        return x * 3 - 1

    inputs = [jax.device_put(np.ones(rows, np.float32)) for rows in range(1, 7)]
    for one in inputs:
        jax.jit(helper)(one)
    assert len(said) == 1
    assert "helper" in said[0]
    assert "5 times" in said[0]


def test_nested_spans_count_once_and_other_threads_not_at_all():
    watch = CompileWatch(print)
    event = "/jax/core/compile/jaxpr_trace_duration"
    watch.on_span(event, 11.0, 12.0)
    watch.on_span(event, 12.5, 13.0)
    watch.on_span(event, 10.0, 14.0)  # holds both
    watch.on_span(event, 20.0, 21.0)
    watch.on_span("/jax/checkpoint/write", 21.0, 30.0)
    assert watch.seconds == 5.0
    thread = threading.Thread(target=watch.on_span, args=(event, 30.0, 40.0))
    thread.start()
    thread.join()
    assert watch.seconds == 5.0
    for second in range(100, 12_000):
        watch.on_span(event, second, second + 0.5)
    assert watch.seconds == pytest.approx(5.0 + 5950.0)


def test_nothing_is_heard_after_the_end(said):
    with watch_compiles(said.append) as watch:
        pass
    jax.jit(lambda x: x - 7)(jnp.ones(3))
    assert watch.seconds == 0
