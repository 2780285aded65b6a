"""Which pairs of a tile are negatives and which are further positives."""

import jax.numpy as jnp
import numpy as np

from clip_jax.objectives.terms import Labels, Terms, part


def test_pairs_are_parted_by_id_padding_and_home():
    rows = Labels(jnp.array([1, 2, 3]), jnp.array([7, 8, 9]), jnp.array([True, True, False]))
    columns = Labels(jnp.array([1, 1, 4]), jnp.array([7, 8, 9]), jnp.array([True, True, True]))
    own = jnp.eye(3, dtype=bool)
    terms = Terms(kind="softmax", has_ids=True, further_positives=True)
    tile = part(terms, jnp.ones((3, 3)), None, rows, columns, ~own)
    # Row 0 shares its image with column 1; row 1's caption is column 1's own; row 2 is padding.
    negative = [[False, False, True], [True, False, True], [False, False, False]]
    further = [[False, True, False], [False, False, False], [False, False, False]]
    np.testing.assert_array_equal(tile.is_negative, negative)
    np.testing.assert_array_equal(tile.is_further, further)
    np.testing.assert_array_equal(np.isfinite(tile.negative), negative)
