import dataclasses
from pathlib import Path

import jax
import pytest
from flax import nnx

from clip_jax.config import PRESETS, preset
from clip_jax.models import CLIP
from clip_jax.models.summary import model_row, model_rows, model_table

# Parameters of the image tower with its projection, and of all, of the peers' own models, counted
# on torch's meta device. From open_clip 3.3.0 with timm 1.0.31:
PARAMETERS = {
    "RN50": (38_316_896, 102_007_137),
    "RN50-quickgelu": (38_316_896, 102_007_137),
    "RN101": (56_259_936, 119_688_033),
    "RN101-quickgelu": (56_259_936, 119_688_033),
    "RN50x4": (87_137_080, 178_300_601),
    "RN50x4-quickgelu": (87_137_080, 178_300_601),
    "RN50x16": (167_328_912, 290_979_217),
    "RN50x16-quickgelu": (167_328_912, 290_979_217),
    "RN50x64": (420_380_352, 623_258_305),
    "RN50x64-quickgelu": (420_380_352, 623_258_305),
    "ViT-S-32": (22_641_792, 63_085_825),
    "ViT-S-32-alt": (22_592_640, 43_224_449),
    "ViT-S-16": (21_813_504, 62_257_537),
    "ViT-S-16-alt": (21_764_352, 42_396_161),
    "ViT-M-32": (39_691_776, 103_119_873),
    "ViT-M-32-alt": (39_626_240, 80_070_273),
    "ViT-M-16": (38_587_392, 102_015_489),
    "ViT-M-16-alt": (38_534_144, 78_978_177),
    "ViT-B-32": (87_849_216, 151_277_313),
    "ViT-B-32-quickgelu": (87_849_216, 151_277_313),
    "ViT-B-32-256": (87_860_736, 151_288_833),
    "ViT-B-32-plus-256": (119_133_952, 210_297_473),
    "ViT-B-16": (86_192_640, 149_620_737),
    "ViT-B-16-quickgelu": (86_192_640, 149_620_737),
    "ViT-B-16-plus": (117_187_840, 208_351_361),
    "ViT-B-16-plus-240": (117_213_824, 208_377_345),
    "ViT-L-16": (304_089_088, 427_739_393),
    "ViT-L-16-320": (304_297_984, 427_948_289),
    "ViT-L-14": (303_966_208, 427_616_513),
    "ViT-L-14-quickgelu": (303_966_208, 427_616_513),
    "ViT-L-14-280": (304_113_664, 427_763_969),
    "ViT-L-14-336": (304_293_888, 427_944_193),
    "ViT-L-14-336-quickgelu": (304_293_888, 427_944_193),
    "ViT-H-16": (632_230_400, 986_263_041),
    "ViT-H-14": (632_076_800, 986_109_441),
    "ViT-H-14-quickgelu": (632_076_800, 986_109_441),
    "ViT-H-14-378-quickgelu": (632_682_240, 986_714_881),
    "ViT-g-14": (1_012_645_632, 1_366_678_273),
    "ViT-bigG-14": (1_844_907_264, 2_539_567_105),
    "ViT-bigG-14-quickgelu": (1_844_907_264, 2_539_567_105),
    "ViT-H-14-worldwide-quickgelu": (632_076_800, 1_858_783_745),
    "ViT-H-14-worldwide-378": (632_682_240, 1_859_389_185),
    "ViT-bigG-14-worldwide": (1_844_907_264, 3_630_409_985),
    "ViT-bigG-14-worldwide-378": (1_845_694_336, 3_631_197_057),
    "ViT-L-14-CLIPA": (303_964_160, 414_210_561),
    "ViT-L-14-CLIPA-336": (304_291_840, 414_538_241),
    "ViT-H-14-CLIPA": (632_074_240, 968_235_009),
    "ViT-H-14-CLIPA-336": (632_483_840, 968_644_609),
    "ViT-bigG-14-CLIPA": (1_844_903_936, 2_517_223_937),
    "ViT-bigG-14-CLIPA-336": (1_845_436_416, 2_517_756_417),
    "ViT-B-16-SigLIP": (92_884_224, 203_155_970),
    "ViT-B-16-SigLIP-256": (92_930_304, 203_202_050),
    "ViT-B-16-SigLIP-384": (93_176_064, 203_447_810),
    "ViT-B-16-SigLIP-512": (93_520_128, 203_791_874),
    "ViT-B-16-SigLIP-i18n-256": (92_930_304, 370_626_050),
    "ViT-L-16-SigLIP-256": (315_956_224, 652_150_786),
    "ViT-L-16-SigLIP-384": (316_283_904, 652_478_466),
    "ViT-SO400M-14-SigLIP": (427_680_704, 877_360_306),
    "ViT-SO400M-14-SigLIP-378": (428_225_600, 877_960_498),
    "ViT-SO400M-16-SigLIP-i18n-256": (427_888_064, 1_127_430_706),
    "ViT-B-32-SigLIP2-256": (94_552_320, 376_856_066),
    "ViT-B-16-SigLIP2": (92_884_224, 375_187_970),
    "ViT-B-16-SigLIP2-256": (92_930_304, 375_234_050),
    "ViT-B-16-SigLIP2-384": (93_176_064, 375_479_810),
    "ViT-B-16-SigLIP2-512": (93_520_128, 375_823_874),
    "ViT-L-16-SigLIP2-256": (315_956_224, 881_526_786),
    "ViT-L-16-SigLIP2-384": (316_283_904, 881_854_466),
    "ViT-L-16-SigLIP2-512": (316_742_656, 882_313_218),
    "ViT-SO400M-14-SigLIP2": (427_680_704, 1_135_463_602),
    "ViT-SO400M-14-SigLIP2-378": (428_225_600, 1_136_008_498),
    "ViT-SO400M-16-SigLIP2-256": (427_888_064, 1_135_670_962),
    "ViT-SO400M-16-SigLIP2-384": (428_256_704, 1_136_039_602),
    "ViT-SO400M-16-SigLIP2-512": (428_772_800, 1_136_555_698),
    "ViT-gopt-16-SigLIP2-256": (1_163_168_256, 1_871_393_906),
    "ViT-gopt-16-SigLIP2-384": (1_163_659_776, 1_871_885_426),
    # From transformers 5, with `Siglip2Model`:
    "ViT-B-16-SigLIP2-NaFlex": (92_930_304, 375_234_050),
    "ViT-SO400M-16-SigLIP2-NaFlex": (427_888_064, 1_135_670_962),
    # `ViTModel` and `BertModel` without poolers, with 16 positions, and a linear layer with a bias:
    "LiT-B-16-BERT-B": (85_798_656, 194_899_969),
    "LiT-L-16-BERT-L": (303_301_632, 637_935_617),
    # open_clip with `BertModel` of 77 positions as its text tower:
    "ViT-B-32-BERT": (87_849_216, 197_225_985),
    # The image tower of ViT-B-32; 49,408 embeddings of 512, a projection of 512 x 512, the scale.
    "ViT-B-32-CBOW": (87_849_216, 113_408_257),
}
# GFLOPs of an image and of a text: the profile that open_clip publishes (docs/model_profile.csv),
# 2 per multiply-add as here.
GFLOPS = {
    "ViT-S-32-alt": (2.29, 1.27),
    "ViT-B-32": (8.82, 5.96),
    "ViT-B-16": (35.13, 5.96),
    "ViT-B-16-plus-240": (54.76, 9.27),
    "ViT-L-14-336": (381.92, 13.3),
    "ViT-H-14": (334.59, 47.09),
    "ViT-g-14": (534.06, 47.09),
    "ViT-bigG-14": (967.5, 97.86),
    "ViT-L-14-CLIPA": (162.03, 5.47),
    "ViT-B-16-SigLIP-512": (216.24, 11.02),
    "ViT-L-16-SigLIP-384": (383.85, 39.06),
    "ViT-SO400M-14-SigLIP": (220.35, 13.19),
}
# Its ResNets count element-wise work too (norms, pools), and the attention pooling of all positions
# where one is needed.
RESNET_GFLOPS = {
    "RN50": (12.22, 5.96),
    "RN101": (19.54, 5.96),
    "RN50x4": (42.56, 9.27),
    "RN50x16": (149.39, 13.3),
    "RN50x64": (529.11, 23.55),
}


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in model_rows()}


def test_every_preset_has_a_row(rows):
    assert list(rows) == list(PRESETS)
    # Sizes of our own, which no peer names.
    assert set(PRESETS) - set(PARAMETERS) == {"ViT-Ti-16", "ViT-B-8"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_peers_models(rows, name):
    row = rows[name]
    assert (row.image_parameters, row.num_parameters) == PARAMETERS[name]
    scale_and_bias = 1 if preset(name).logit_bias_init is None else 2
    assert row.image_parameters + row.text_parameters + scale_and_bias == row.num_parameters


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("ViT-Ti-16", {"num_registers": 4, "qk_norm": True, "activation": "swiglu"}, {}),
        ("ViT-Ti-16", {"position_embedding": "sincos2d", "layer_scale_init": 0.1}, {}),
        ("ViT-Ti-16", {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 4)}, {}),
        ("RN50", {"resnet_layers": (1, 2, 3, 1), "image_size": 256}, {"kind": "cbow"}),
        ("ViT-B-16-SigLIP2-NaFlex", {"depth": 2, "image_size": 64}, {"pooling": "attention"}),
    ],
)
def test_a_row_counts_the_parameters_of_the_whole_model(name, image, text):
    """What the row leaves out in tracing (patches, equal blocks) is put back."""
    model = preset(name)
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, **image),
        text=dataclasses.replace(model.text, vocab_size=2, depth=1, **text),
    )
    whole = jax.eval_shape(lambda key: CLIP(model, rngs=nnx.Rngs(key)), jax.random.key(0))
    leaves = jax.tree.leaves(nnx.state(whole, nnx.Param))
    assert model_row(model).num_parameters == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_are_the_published_ones(rows, name):
    row, (image, text) = rows[name], GFLOPS[name]
    assert row.image_flops / 1e9 == pytest.approx(image, rel=0.003)
    assert row.text_flops / 1e9 == pytest.approx(text, rel=0.003)


@pytest.mark.parametrize("name", RESNET_GFLOPS)
def test_flops_of_resnets_are_a_little_less_than_the_published_ones(rows, name):
    row, (image, text) = rows[name], RESNET_GFLOPS[name]
    assert 0.94 * image < row.image_flops / 1e9 < 0.99 * image
    assert row.text_flops / 1e9 == pytest.approx(text, rel=0.003)


def test_rows_are_found_by_name_and_by_family():
    assert {row.name for row in model_rows("naflex")} == {
        "ViT-B-16-SigLIP2-NaFlex",
        "ViT-SO400M-16-SigLIP2-NaFlex",
    }
    found = {row.name for row in model_rows("openai")}
    assert found == {
        *(f"{name}-quickgelu" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")),
        *(f"ViT-{name}-quickgelu" for name in ("B-32", "B-16", "L-14", "L-14-336")),
    }
    assert model_rows("no such model") == []


def test_the_table_is_aligned(rows):
    table = model_table([rows["ViT-B-32-quickgelu"], rows["ViT-bigG-14-worldwide-378"]])
    header, units, short, long = table.splitlines()
    assert table.endswith("\n")
    assert header.split()[:4] == ["model", "params", "image", "text"]
    assert units.split()[:2] == ["total", "M"]
    assert short.split()[:9] == (
        ["ViT-B-32-quickgelu", "151.28", "87.85", "63.43", "8.82", "5.96", "512", "224", "77"]
    )
    assert short.index("151.28") + len("151.28") == long.index("3631.20") + len("3631.20")
    assert header.index("fits") == short.index("OpenAI ViT-B/32") == long.index("MetaCLIP 2")
    assert model_table([rows["ViT-B-8"]]).splitlines()[2].split()[-1] == "-"


def test_the_table_of_the_docs_is_this_one(rows):
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert model_table(rows.values()) in page.read_text(), "paste what `clip-jax models` prints"
