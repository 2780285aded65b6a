import dataclasses

import pytest
from small import small_config

from clip_jax.checkpoint import Workdir
from clip_jax.config import CheckpointConfig, LoggingConfig, UserError
from clip_jax.training.resume import check_workdir


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    workdir = Workdir(tmp_path / "run")
    assert check_workdir(workdir, small_config(), allow_config_change=False) == {}
    workdir.save_config(small_config())
    return workdir


def test_the_same_config_has_no_changes(workdir):
    assert check_workdir(workdir, small_config(), allow_config_change=False) == {}


def test_what_does_not_change_the_result_may_change(workdir):
    other = dataclasses.replace(
        small_config(),
        mesh=(2, 1, 1),
        microbatches=2,
        remat="full",
        data=dataclasses.replace(small_config().data, num_workers=3, prefetch_batches=9),
        logging=LoggingConfig(every_steps=99),
        checkpoint=CheckpointConfig(every_steps=99),
    )
    changes = check_workdir(workdir, other, allow_config_change=False)
    assert changes == {
        "mesh": ((-1, 1, 1), (2, 1, 1)),
        "microbatches": (1, 2),
        "remat": ("none", "full"),
        "data.num_workers": (0, 3),
        "data.prefetch_batches": (2, 9),
        "logging.every_steps": (10, 99),
        "checkpoint.every_steps": (1000, 99),
    }


def test_what_does_is_listed_and_refused_unless_asked_for(workdir):
    data = small_config().data
    pairs = dataclasses.replace(data.sources["pairs"], path="other.tar")
    other = dataclasses.replace(
        small_config(), seed=4, data=dataclasses.replace(data, sources={"pairs": pairs})
    )
    with pytest.raises(UserError) as caught:
        check_workdir(workdir, other, allow_config_change=False)
    assert "data.sources.pairs.path 'pairs.tar' -> 'other.tar', seed 0 -> 4" in str(caught.value)
    assert len(check_workdir(workdir, other, allow_config_change=True)) == 2


def test_checkpoints_without_a_config_are_not_overwritten(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.checkpoints.mkdir()
    check_workdir(workdir, small_config(), allow_config_change=False)  # empty: an early end
    (workdir.checkpoints / "10").mkdir()
    with pytest.raises(UserError, match="checkpoints but no config"):
        check_workdir(workdir, small_config(), allow_config_change=False)


def test_a_run_keeps_its_tokenizer_whatever_is_allowed(workdir):
    data = small_config().data
    tokenizer = dataclasses.replace(data.tokenizer, lowercase=False)
    other = dataclasses.replace(small_config(), data=dataclasses.replace(data, tokenizer=tokenizer))
    with pytest.raises(UserError, match=r"keeps its tokenizer .*data\.tokenizer\.lowercase"):
        check_workdir(workdir, other, allow_config_change=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_workdir(Workdir(tmp_path / "file"), small_config(), allow_config_change=False)
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        check_workdir(Workdir(tmp_path / "file" / "x"), small_config(), allow_config_change=False)
