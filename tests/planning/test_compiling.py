"""Steps compiled for simulated devices: whether they are the run's, what they hold, the cache."""

import dataclasses
import logging

import jax
import pytest
from small import small_config, small_model

from clip_jax.config import (
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PackingConfig,
    SourceConfig,
    StartConfig,
    UserError,
)
from clip_jax.planning.assumed import assume
from clip_jax.planning.compiler_errors import DoesNotFit, one_line, sizes_too_large
from clip_jax.planning.compiling import compile_step
from clip_jax.planning.topology import open_topology

FILES = "*.gz.b64"


def config_of(**changes):
    """Pictures of 32x32 at 16 patches: activations are most of the memory. Little text."""
    model = small_model()
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, image_size=32, depth=4),
        text=dataclasses.replace(model.text, kind="cbow", pooling="mean"),
    )
    return small_config(
        **{
            "model": model,
            "global_batch_size": 64,
            "evaluation": EvaluationConfig(batch_size=64),
            "data": DataConfig(packing=PackingConfig(group_size=0)),
        }
        | changes
    )


@pytest.fixture(scope="module")
def topology():
    return open_topology("cpu:2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def steps(topology, cache):
    """One by each way of recomputing."""
    ways = {
        "none": config_of(optimizer=OptimizerConfig(ema_decay=0.99)),
        "full": config_of(remat="full"),
        "microbatches": config_of(microbatches=4, mesh=(1, 2, 1)),
    }
    return {name: compile_step(way, topology, cache=cache) for name, way in ways.items()}


def test_a_step_is_described_as_it_is(steps):
    step = steps["none"]
    assert (step.topology, step.platform, step.num_devices) == ("cpu:2", "cpu", 2)
    assert step.mesh == {"data": 2, "fsdp": 1, "tensor": 1}
    assert (step.dtype, step.attention, step.remat) == ("float32", "xla", "none")
    assert not step.cached
    assert step.compile_seconds > 0
    # The analytic count is of three forward passes: the loss comes on top of it, and the gradient
    # of pixels, which nobody needs, is not computed.
    analytic = step.least_flops * 64
    assert step.num_devices * step.program.flops == pytest.approx(analytic, rel=0.06)
    assert steps["full"].program.flops > 1.2 * step.program.flops


def test_state_and_batch_take_what_their_shards_do(steps):
    """Of the program's own arguments, against the shapes of the state."""
    for name, step in steps.items():
        held = dict.fromkeys(("params", "opt_state", "batch", "rest"), 0)
        for array in step.arrays:
            group = array.path.split("/")[0]
            held[group if group in held else "rest"] += array.device_bytes
        memory = step.memory
        assert memory.parameters == held["params"] > 0, name
        assert memory.optimizer == held["opt_state"] > 0, name
        assert memory.batch == held["batch"] > 0, name
        assert memory.model_state == held["rest"] > 0, name
    ema, plain = steps["none"].memory, steps["full"].memory
    assert ema.model_state == plain.model_state + plain.parameters
    split = next(
        a for a in steps["microbatches"].arrays if a.path.endswith("image/blocks/mlp/up/kernel")
    )
    assert split.spec == "(None, 'fsdp', None)"
    assert split.num_bytes == 2 * split.device_bytes


def test_parts_are_the_whole(steps):
    for name, step in steps.items():
        parts = dataclasses.asdict(step.memory)
        total, scores = parts.pop("total"), parts.pop("attention_scores")
        assert sum(parts.values()) == total, name
        assert scores == 0, name
        assert min(parts.values()) >= 0, name


def test_recomputing_keeps_less(steps):
    """All layers' hidden values; the inputs of layers and one layer; a quarter of the batch."""
    kept = {name: step.memory.activations for name, step in steps.items()}
    hidden = 4 * 32 * 17 * 128 * 3  # float32, rows of a device, tokens, MLP width, whole layers
    assert kept["none"] > 2 * hidden  # before and behind the activation function
    assert kept["full"] < 0.6 * kept["none"]
    assert kept["microbatches"] < 0.4 * kept["none"]
    for name, step in steps.items():
        assert step.memory.activations > 0.3 * (
            step.memory.activations + step.memory.temporaries
        ), name


def test_a_step_is_compiled_once(steps, topology, cache, monkeypatch):
    """What does not change the program is not part of its name."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", _refuse)
    again = config_of(
        optimizer=OptimizerConfig(ema_decay=0.99),
        name="another",
        num_steps=99,
        seed=7,
        start=StartConfig(model="runs/not/there"),
        data=DataConfig(
            sources={"more": SourceConfig(path="more.tar")}, packing=PackingConfig(group_size=0)
        ),
        logging=LoggingConfig(every_steps=3),
    )
    step = compile_step(again, topology, cache=cache)
    assert step.cached
    assert step.config.name == "another"
    assert step.memory == steps["none"].memory
    assert step.compile_seconds == steps["none"].compile_seconds
    assert step.program.flops == steps["none"].program.flops
    # And what does change it is.
    for change in (
        {"logging": LoggingConfig(layer_norms=True)},
        {"start": StartConfig(lock=("text",))},
    ):
        with pytest.raises(AssertionError, match="compiled"):
            compile_step(dataclasses.replace(again, **change), topology, cache=cache)


def test_a_damaged_entry_is_compiled_anew(steps, topology, cache, tmp_path, caplog):
    config = config_of(optimizer=OptimizerConfig(ema_decay=0.99))
    for entry in cache.glob(FILES):
        text = entry.read_text()
        (tmp_path / entry.name).write_text(text[: len(text) // 2])
    with caplog.at_level(logging.WARNING):
        step = compile_step(config, topology, cache=tmp_path)
    assert not step.cached
    assert step.memory == steps["none"].memory
    assert "is damaged and compiled anew" in caplog.text
    assert compile_step(config, topology, cache=tmp_path).cached


def test_what_does_not_fit_is_told_with_both_numbers(steps, topology, cache):
    config = config_of(optimizer=OptimizerConfig(ema_decay=0.99))
    needed = steps["none"].memory.total
    small = dataclasses.replace(topology, memory_bytes=needed - 1)
    with pytest.raises(DoesNotFit, match=r"the step needs .* GB of a device's memory") as error:
        compile_step(config, small, cache=cache)
    assert (error.value.needed_bytes, error.value.has_bytes) == (needed, needed - 1)
    compile_step(config, small, cache=cache, must_fit=False)
    compile_step(config, dataclasses.replace(topology, memory_bytes=needed), cache=cache)


def _refuse(*_, **__):
    raise AssertionError("compiled")


def test_a_mesh_that_does_not_go_with_the_devices_is_refused(topology):
    with pytest.raises(UserError, match=r"config.mesh \(3, 1, 1\) needs 3 devices"):
        compile_step(config_of(mesh=(3, 1, 1)), topology, cache=None)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (571.88G) exceeds available HBM (15.75G).",
            (571.88 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 2.20T of 850.5M hbm. Exceeded hbm capacity by 6.47G.\n\nTotal ...",
            (2.2 * 2**40, 850.5 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32M of 16M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_how_much_is_too_much(message, sizes):
    found = sizes_too_large(message)
    assert found == (None if sizes is None else tuple(map(int, sizes)))


def test_the_message_of_a_compiler_is_one_line():
    message = "INTERNAL: no such thing\n  in this place.\n\nE1101 stack trace\n@ 0x7f"
    assert one_line(RuntimeError(message)) == "INTERNAL: no such thing in this place"


def test_what_a_run_would_measure_is_assumed_and_said():
    text = dataclasses.replace(small_model().text, context_length=77)
    model = dataclasses.replace(small_model(), text=text)
    config = small_config(model=model, global_batch_size=1024, num_epochs=2.0)
    config = dataclasses.replace(config, data=DataConfig(packing=PackingConfig()))
    found, stated = assume(config, 8)
    assert found.data.packing == PackingConfig(group_size=64, rows=20)
    assert "64 share 20 rows of 77" in stated[0]
    assert "--config.epoch_samples=N" in stated[1]
    assert assume(found, 8)[0] == found


@pytest.mark.parametrize(
    ("group_size", "context_length", "chosen"),
    [
        (None, 8, PackingConfig(group_size=0)),  # rows of half a caption save nothing
        (0, 77, PackingConfig(group_size=0)),
        (16, 77, PackingConfig(group_size=16, rows=7)),
        (16, 8, PackingConfig(group_size=16, rows=16)),  # asked for: at most a row each
    ],
)
def test_groups_as_a_run_would_choose_them(group_size, context_length, chosen):
    text = dataclasses.replace(small_model().text, context_length=context_length)
    model = dataclasses.replace(small_model(), text=text)
    config = small_config(model=model, global_batch_size=1024)
    config = dataclasses.replace(
        config, data=DataConfig(packing=PackingConfig(group_size=group_size))
    )
    found, stated = assume(config, 8)
    assert found.data.packing == chosen
    # None is longer than a row.
    assert all(f"captions of {min(16, context_length)} tokens" in line for line in stated)
    assert bool(stated) == (group_size != 0)
