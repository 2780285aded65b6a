import contextlib
import logging
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.states import abstract_on, is_step, state_on, values
from orbax.checkpoint import v1 as ocp
from small import mesh_of

from clip_jax.checkpoint import SKIP, CheckpointStore
from clip_jax.config import CheckpointConfig, UserError


def save_all(folder: Path, steps: tuple[int, ...], config: CheckpointConfig, **scores: float):
    """Saves states in the background, each scored after it was saved."""
    mesh = mesh_of(2, 2, 2)
    with contextlib.closing(CheckpointStore(folder, config)) as store:
        for step in steps:
            store.save(step, state_on(mesh, step), {"samples_seen": step})
            if f"at_{step}" in scores:
                store.note_score(step, scores[f"at_{step}"])
        store.wait()
        return store.steps()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    assert save_all(folder, (4, 8, 10), CheckpointConfig(keep_latest=3)) == [4, 8, 10]
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A folder of checkpoints to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def reader(saved):
    with contextlib.closing(CheckpointStore(saved)) as store:
        yield store


def test_old_checkpoints_go_and_the_kept_ones_stay(tmp_path):
    config = CheckpointConfig(keep_latest=2, keep_every_steps=4, keep_best=1)
    assert save_all(tmp_path, (2, 3, 4, 6, 8, 10), config, at_2=0.1, at_3=0.9) == [3, 4, 8, 10]


def test_a_step_that_is_saved_already_is_left_alone(copy):
    with contextlib.closing(CheckpointStore(copy)) as store:
        store.save(10, state_on(mesh_of(1), 0), {"samples_seen": -1})
        assert store.metadata() == {"samples_seen": 10}
        assert store.metadata(8) == {"samples_seen": 8}
        assert store.latest_step() == 10


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_restores_on_any_mesh(reader, mesh):
    abstract = abstract_on(mesh_of(*mesh))
    step, restored, metadata = reader.restore_latest(abstract)
    assert (step, metadata) == (10, {"samples_seen": 10})
    assert is_step(restored, 10)
    assert is_step(reader.restore(abstract, 4), 4)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_restored_arrays_can_be_donated(reader):
    restored = reader.restore(abstract_on(mesh_of(1, 8, 1)))
    kernel = restored.params["image"]["kernel"]
    jax.jit(lambda x: x + 1, donate_argnums=0)(kernel)
    assert kernel.is_deleted()


def test_restores_in_another_dtype(reader):
    abstract = abstract_on(mesh_of(1))
    scale = abstract.params["scale"].update(dtype=jnp.float32)
    abstract.params["scale"] = scale
    restored = reader.restore(abstract).params["scale"]
    assert restored.dtype == jnp.float32
    assert np.array_equal(restored, values(10).params["scale"].astype(np.float32))


def test_skipped_leaves_are_not_read(reader):
    abstract = abstract_on(mesh_of(1, 8, 1))
    skipped = jax.tree.map(lambda _: SKIP, abstract.opt_state)
    restored = reader.restore(abstract._replace(opt_state=skipped))
    assert np.array_equal(restored.params["image"]["kernel"], values(10).params["image"]["kernel"])
    assert all(leaf is SKIP for leaf in jax.tree.leaves(restored.opt_state))


def test_misfits_and_missing_steps_are_one_line(reader, tmp_path):
    abstract = abstract_on(mesh_of(1))
    other = abstract._replace(step=jax.ShapeDtypeStruct((3,), jnp.int32))
    with pytest.raises(UserError, match=r"restored: step has shape \(\), not \(3,\); .*step 8"):
        reader.restore(other)
    with pytest.raises(UserError, match=r"10 cannot be restored: step has shape"):
        reader.restore_latest(other)  # a config that does not fit is no damage
    assert reader.steps() == [4, 8, 10]
    for wanted, problem in (
        (abstract._replace(model_state={"mean": abstract.step}), "it has no model_state/mean"),
        (abstract._replace(opt_state=()), r"it has opt_state/\S+, which"),
    ):
        with pytest.raises(UserError, match=problem):
            reader.restore(wanted)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 .*there are \[4, 8, 10\]"):
        reader.restore(abstract, 3)
    with contextlib.closing(CheckpointStore(tmp_path)) as empty:
        for restore in (empty.restore, empty.restore_latest):
            with pytest.raises(UserError, match="no checkpoint in"):
                restore(abstract)


def test_groups_load_on_the_host_whatever_the_model(reader):
    groups = reader.load(("step", "params", "model_state"), 8)
    assert set(groups) == {"step", "params", "model_state"}
    assert groups["model_state"] == {}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(groups))
    assert jax.tree.all(jax.tree.map(np.array_equal, groups["params"], values(8).params))
    assert groups["step"] == 8
    with pytest.raises(UserError, match=r"checkpoint .*8 has no queue"):
        reader.load(("queue",), 8)


def test_arrays_of_the_host_are_saved_and_restored_without_others(tmp_path):
    abstract = abstract_on(mesh_of(1, 8, 1))
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save(0, values(5)._asdict() | {"opt_state": ()}, {"samples_seen": 0})
        skipped = jax.tree.map(lambda _: SKIP, abstract.opt_state)
        restored = store.restore(abstract._replace(opt_state=skipped), 0)
        assert int(restored.step) == 5
        assert restored.opt_state is skipped
        assert store.verify(0) == []
        with pytest.raises(UserError, match="it has no opt_state/"):
            store.restore(abstract, 0)


def test_orbax_alone_reads_a_checkpoint(saved):
    abstract = abstract_on(mesh_of(8))
    assert is_step(ocp.load(saved / "10", abstract), 10)


def test_saving_does_not_see_later_steps(tmp_path):
    """The arrays are donated to the next step while they are being written."""
    state = state_on(mesh_of(2, 2, 2), 1)
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with contextlib.closing(CheckpointStore(tmp_path, CheckpointConfig())) as store:
        store.save(1, state, {})
        state = jax.block_until_ready(next_step(state))
        store.wait()
        assert store.verify(1) == []
        assert is_step(store.restore(abstract_on(mesh_of(1))), 1)


# ---- Damage --------------------------------------------------------------------------------------


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def lose(file: Path, rng: random.Random) -> None:
    file.unlink()


def check_damage(folder: Path, hurt, name: str, rng: random.Random, caplog) -> None:
    """Harm to one file of step 10 is found, named, and step 8 used in its place."""
    aside = folder / "10.damaged"
    shutil.copytree(folder / "10", folder / "good")
    with contextlib.closing(CheckpointStore(folder, CheckpointConfig())) as store:
        hurt(folder / "10" / name, rng)
        assert store.verify(10), f"verify does not see {hurt.__name__} of {name}"
        caplog.clear()
        step, state, metadata = store.restore_latest(abstract_on(mesh_of(1)))
        assert step == 8, f"restored in spite of {hurt.__name__} of {name}"
        assert is_step(state, 8)
        assert metadata == {"samples_seen": 8}
        (warning,) = [record.getMessage() for record in caplog.records]
        assert "10 is damaged: " in warning
        assert "step 8 is used" in warning
        assert "\n" not in warning
        assert aside.exists()
        assert store.steps() == [4, 8]
    shutil.rmtree(aside)
    (folder / "good").rename(folder / "10")


def files_of(folder: Path) -> list[str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path.relative_to(folder)) for path in files]


@pytest.mark.parametrize("hurt", [flip, cut, lose])
def test_harm_to_any_file_is_found(copy, hurt, caplog):
    names = files_of(copy / "10")
    assert len(names) >= 9
    for name in names:
        if hurt is lose or (copy / "10" / name).stat().st_size:  # orbax.checkpoint is empty
            check_damage(copy, hurt, name, random.Random(name), caplog)


@pytest.mark.slow
def test_any_flipped_bit_is_found(copy, caplog):
    for seed in range(20):
        for name in files_of(copy / "10"):
            if (copy / "10" / name).stat().st_size:
                check_damage(copy, flip, name, random.Random(seed), caplog)


def test_a_flip_in_an_array_is_found_by_the_array_s_checksum(tmp_path, monkeypatch):
    """In large files, which have no checksum of their own."""
    monkeypatch.setattr("clip_jax.checkpoint.record._LARGE_BYTES", 0)
    save_all(tmp_path, (7,), CheckpointConfig())
    kernel = values(7).params["image"]["kernel"][1, 32:, :8]  # of one device
    (file,) = [
        f
        for f in (tmp_path / "7" / "state").rglob("*")
        if f.is_file() and kernel[3].tobytes() in f.read_bytes()
    ]
    data = bytearray(file.read_bytes())
    data[data.index(kernel[3].tobytes()) + 2] ^= 16
    file.write_bytes(data)
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        (problem,) = store.verify(7)
        name = file.relative_to(tmp_path / "7")
        assert problem == f"array params/image/kernel [0:3] has changed, in {name}"
        abstract = abstract_on(mesh_of(1, 2, 1))
        with pytest.raises(UserError, match=r"is whole: 7: array params/image/kernel"):
            store.restore_latest(abstract)
        with pytest.raises(UserError, match=r"7 cannot be restored: array params/image/kernel"):
            store.restore(abstract)
        with pytest.raises(UserError, match=r"7 cannot be read: array params/image/kernel"):
            store.load(("params",))
        assert store.steps() == [7]  # nothing is moved aside where nothing else is left
        assert store.load(("opt_state",))["opt_state"]["0"]["count"] == 7


def test_no_flip_in_the_data_is_ever_restored(copy, monkeypatch):
    """Wherever it is: in an array, in the index of the arrays, or in what nobody reads."""
    monkeypatch.setattr("clip_jax.checkpoint.store.file_problems", lambda *_: [])
    rng, abstract, found = random.Random(0), abstract_on(mesh_of(1)), 0
    data = [copy / "10" / name for name in files_of(copy / "10" / "state") if "/d/" in name]
    data = [
        copy / "10" / "state" / name for name in files_of(copy / "10" / "state") if "d/" in name
    ]
    with contextlib.closing(CheckpointStore(copy)) as store:
        for _ in range(25):
            file = rng.choice(data)
            before = file.read_bytes()
            flip(file, rng)
            try:
                assert is_step(store.restore(abstract, 10), 10)
            except UserError:
                found += 1
            file.write_bytes(before)
    assert found > 12


def test_checks_can_be_left_out(tmp_path):
    save_all(tmp_path, (7,), CheckpointConfig())
    (tmp_path / "7" / "commit_success.txt").write_text("nothing that is read")
    with contextlib.closing(CheckpointStore(tmp_path, CheckpointConfig(verify=False))) as store:
        assert store.restore_latest(abstract_on(mesh_of(1)))[0] == 7
    with (
        contextlib.closing(CheckpointStore(tmp_path, CheckpointConfig())) as store,
        pytest.raises(UserError, match=r"whole: 7: commit_success.txt has \d+ bytes"),
    ):
        store.restore_latest(abstract_on(mesh_of(1)))


def test_after_a_fallback_the_step_is_saved_again_and_whole_ones_stay(copy, caplog):
    caplog.set_level(logging.WARNING)
    (copy / "10" / "_CHECKPOINT_METADATA").unlink()
    with contextlib.closing(CheckpointStore(copy, CheckpointConfig(keep_latest=2))) as store:
        assert store.restore_latest(abstract_on(mesh_of(1)))[0] == 8
        store.save(10, state_on(mesh_of(1), 10), {"samples_seen": 10})
        store.wait()
        assert store.steps() == [8, 10]
        assert store.verify(10) == []
        assert (copy / "10.damaged").exists()
        assert len(caplog.records) == 1


def test_opening_to_save_removes_what_a_killed_process_left(copy):
    leftovers = ["12.saving", "12.saving.orbax-checkpoint-tmp", "4.deleting"]
    for name in leftovers:
        (copy / name / "state").mkdir(parents=True)
    (copy / "2.damaged").mkdir()
    CheckpointStore(copy).close()  # a reader beside the run that saves
    assert all((copy / name).exists() for name in leftovers)
    CheckpointStore(copy, CheckpointConfig()).close()
    assert sorted(path.name for path in copy.iterdir()) == ["10", "2.damaged", "4", "8"]
