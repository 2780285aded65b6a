import pytest
from small import small_config

from clip_jax.config import ConfigError, OptimizerConfig, StartConfig
from clip_jax.config.frozen import check_frozen, is_frozen

PATHS = ("image/stem/project/kernel", "image_projection/kernel", "text/token_embedding")


def config_of(*frozen, lock=()):
    return small_config(optimizer=OptimizerConfig(frozen=frozen), start=StartConfig(lock=lock))


def test_patterns_match_whole_paths_and_locks_whole_towers():
    frozen = config_of("image/.*", "text/token")
    assert [is_frozen(frozen, path) for path in PATHS] == [True, False, False]
    locked = config_of("image_projection/kernel", lock=("image",))
    assert [is_frozen(locked, path) for path in PATHS] == [True, True, False]
    assert not any(is_frozen(config_of(), path) for path in PATHS)
    check_frozen(frozen.__class__(), PATHS)
    check_frozen(locked, PATHS)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("image/.*", "text/token"), "frozen 'text/token' matches none of the 3 parameters; it"),
        ((".*",), "leave none of the 3 parameters to train"),
    ],
)
def test_a_pattern_that_means_nothing_or_all_is_an_error(patterns, message):
    with pytest.raises(ConfigError, match=message):
        check_frozen(config_of(*patterns), PATHS)
