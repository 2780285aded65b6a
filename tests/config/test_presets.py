import pytest

from clip_jax.config import PRESETS, ConfigError, preset

# Parameters as open_clip counts them (its model profile table), in millions.
OPEN_CLIP_MILLIONS = {
    "ViT-S-32": 63.09,
    "ViT-S-16": 62.26,
    "ViT-B-32": 151.28,
    "ViT-B-16": 149.62,
    "ViT-L-14": 427.62,
    "ViT-L-14-336": 427.94,
}


@pytest.mark.parametrize("name", OPEN_CLIP_MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    import jax
    from flax import nnx

    from clip_jax.models import CLIP

    abstract = jax.eval_shape(lambda k: CLIP(preset(name), rngs=nnx.Rngs(k)), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract)))
    assert abs(count / 1e6 - OPEN_CLIP_MILLIONS[name]) < 0.01


def test_names_are_keys():
    assert all(name == model.name for name, model in PRESETS.items())
    assert preset("ViT-B-32-quickgelu").text.activation == "quick_gelu"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean ViT-B-32"):
        preset("vit-b-32")
