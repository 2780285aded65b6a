"""Import, fine-tune, export and load, as a user types them (in one process, for its speed)."""

import dataclasses
import json

import numpy as np
import pytest
from data.tars import pairs, write_tar
from interop.small_weights import small_weights
from PIL import Image

import clip_jax
from clip_jax.cli import main
from clip_jax.config import UserError
from clip_jax.interop import huggingface
from clip_jax.interop.tensors import read_tensors

RECIPE = """
from clip_jax.config import *

def get_config():
    return to_config_dict(ExperimentConfig(
        name="small", num_steps=3, global_batch_size=16, precision="float32",
        data=DataConfig(sources={"pairs": SourceConfig(path="{tar}")}, cache_dir="{cache}"),
        schedule=ScheduleConfig(warmup_steps=1),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.5),
        evaluation=EvaluationConfig(
            sets={"pairs": EvalSetConfig(path="{tar}", zero_shot_ways=10)}, batch_size=16),
        logging=LoggingConfig(every_steps=1),
    ))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs and a recipe, a SigLIP of transformers in bits of float16, imported and fine-tuned."""
    folder = tmp_path_factory.mktemp("weights")
    tar = write_tar(folder / "pairs.tar", pairs(0, 40))
    recipe = RECIPE.replace("{tar}", str(tar)).replace("{cache}", str(folder / "cache"))
    (folder / "recipe.py").write_text(recipe)
    weights = small_weights("siglip")
    arrays = {
        path: array.astype(np.float16 if path.startswith("text/") else np.float32)
        for path, array in weights.arrays.items()
    }
    (folder / "theirs").mkdir()
    huggingface.write(dataclasses.replace(weights, arrays=arrays), folder / "theirs")
    theirs, imported = f"--from={folder}/theirs", f"--output={folder}/imported"
    assert main(["import", theirs, "--format=huggingface", imported]) == 0
    train = ["train", f"--config={folder}/recipe.py", f"--workdir={folder}/tuned"]
    assert main([*train, f"--config.start.model={folder}/imported"]) == 0
    return folder


def test_a_fine_tune_starts_from_the_checkpoint_with_its_tokenizer(folder):
    config = json.loads((folder / "tuned" / "config.json").read_text())
    assert config["loss"]["kind"] == "sigmoid"
    assert config["model"]["image"]["resize"] == "squash"
    tokenizers = [folder / run / "tokenizer.json" for run in ("imported", "tuned")]
    assert tokenizers[0].read_text() == tokenizers[1].read_text()
    start, _, _ = clip_jax.load(folder / "imported")
    tuned, _, _ = clip_jax.load(folder / "tuned")
    before, after = (model.text.token_embedding[...] for model in (start, tuned))
    # Three steps at a small rate: near the start, and not it.
    assert 0 < float(abs(after - before).max()) < 0.01


def test_an_import_is_scored_on_sets_of_the_command_line(folder, capsys):
    assert main(["eval", f"--workdir={folder}/imported"]) == 2
    assert "--config.evaluation.sets.mine.path=" in capsys.readouterr().err
    arguments = [
        f"--config.evaluation.sets.mine.path={folder}/pairs.tar",
        "--config.evaluation.batch_size=16",
        f"--config.data.cache_dir={folder}/cache",
    ]
    assert main(["eval", f"--workdir={folder}/imported", *arguments]) == 0
    assert "eval/mine/text_to_image_R@1" in capsys.readouterr().out


def test_the_untouched_import_exports_the_bytes_it_came_with(folder, capsys):
    arguments = [f"--workdir={folder}/imported", f"--output={folder}/again"]
    assert main(["export", "--format=huggingface", *arguments]) == 0
    assert "again: " in capsys.readouterr().out
    theirs, again = (read_tensors(folder / d / "model.safetensors") for d in ("theirs", "again"))
    assert theirs.keys() == again.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == again[name].dtype, name
        assert tensor.tobytes() == again[name].tobytes(), name
    assert {tensor.dtype.name for tensor in theirs.values()} == {"float16", "float32"}


def test_runs_and_their_checkpoints_export_with_and_without_the_average(folder):
    outputs = {}
    for name, source in (
        ("last", ["--workdir", f"{folder}/tuned"]),
        ("same", ["--checkpoint", f"{folder}/tuned/checkpoints/3"]),
        ("average", ["--workdir", f"{folder}/tuned", "--ema"]),
    ):
        output = folder / f"out-{name}"
        assert main(["export", *source, "--format=huggingface", f"--output={output}"]) == 0
        outputs[name] = read_tensors(output / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    assert np.array_equal(outputs["last"][name], outputs["same"][name])
    assert not np.array_equal(outputs["last"][name], outputs["average"][name])


def test_five_lines_to_an_embedding(folder):
    embeddings = []
    for where in ("theirs", "imported"):
        model, preprocess, tokenizer = clip_jax.load(folder / where)
        images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
        image = model.encode_image(preprocess(images))
        text = model.encode_text({"tokens": tokenizer(["a cat", "two dogs"])})
        assert (image @ text.T).shape == (2, 2)
        embeddings.append((image, text))
    for ours, theirs in zip(*embeddings, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--workdir={}/imported", "--format=huggingface", "--ema"], "moving average"),
        (["export", "--format=huggingface"], "one of --workdir and --checkpoint"),
        (["export", "--workdir={}/nothing", "--format=open_clip"], "is not the workdir"),
        (["import", "--from={}/nothing", "--format=open_clip"], "there is no"),
        (
            ["train", "--config={}/recipe.py", "--workdir={}/imported"],
            "holds imported weights; train them in",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    output = [] if arguments[0] == "train" else [f"--output={folder}/none"]
    assert main([*(a.replace("{}", str(folder)) for a in arguments), *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("clip-jax: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(folder.glob("*none*"))


def test_single_things_are_refused_by_name(folder):
    with pytest.raises(UserError, match="it has no steps"):
        clip_jax.load(folder / "theirs", step=3)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        clip_jax.load(folder / "tuned", step=7)
