"""Tile sizes: bounded memory, little work done twice, lanes filled where rows allow it."""

import pytest

from clip_jax.objectives.tiles import choose_tile_size


@pytest.mark.parametrize("num_rows", [1, 5, 40, 1000, 2048, 4096, 5000, 8191, 65_536, 1_000_000])
@pytest.mark.parametrize("embed_dim", [16, 512, 1024])
def test_a_tile_is_small_and_wastes_little(num_rows, embed_dim):
    size = choose_tile_size(num_rows, embed_dim)
    num_tiles = -(-num_rows // size)
    assert size <= num_rows
    assert size**2 <= max(num_rows * embed_dim / 2, 512**2) * 1.05  # rounded up to 8 rows
    assert size <= 4096
    assert (num_tiles * size) ** 2 <= 1.05 * num_rows**2


def test_sides_that_divide_and_fill_lanes_come_first():
    assert choose_tile_size(4096, 512) == 1024
    assert choose_tile_size(1 << 20, 512) == 4096
    assert choose_tile_size(300, 512) == 300
