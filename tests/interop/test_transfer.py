"""Foreign files to a workdir and back, and what is left behind where that fails."""

import contextlib
import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from interop.hf_models import clip_config, random_model, transformers
from interop.small_weights import CAPTIONS, small_weights
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore, Workdir, unflatten
from clip_jax.config import ExperimentConfig, UserError, preset, to_dict
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop import huggingface, transfer
from clip_jax.interop.tensors import read_tensors, write_safetensors
from clip_jax.interop.weights import model_shapes
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small CLIPModel as files of transformers, with tokenizer, some of it in float16."""
    weights = small_weights("clip")
    arrays = {
        path: array.astype(np.float16 if path.startswith("text/") else array.dtype)
        for path, array in weights.arrays.items()
    }
    folder = tmp_path_factory.mktemp("huggingface")
    huggingface.write(dataclasses.replace(weights, arrays=arrays), folder)
    return folder


@pytest.fixture(scope="module")
def workdir(directory, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "imported")
    transfer.import_weights(directory, "huggingface", workdir, use_peer=False)
    return workdir


@pytest.mark.parametrize("kind", ["clip", "siglip", "naflex", "bert"])
def test_exports_pass_the_gate(kind, tmp_path):
    """Here the preprocessing and the tokenizer of transformers run too."""
    report = transfer.export_weights(small_weights(kind), "huggingface", tmp_path / "out")
    assert report.differences.keys() == {"image", "text"}
    assert 0 < max(report.differences.values()) <= 1e-5
    assert "transformers: 5 text embeddings" in str(report)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.model_max_length == 24
    sees_mask = "attention_mask" in processor.tokenizer.model_input_names
    assert sees_mask == (kind in ("clip", "bert"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_of_transformers_itself(tmp_path):
    """Files as transformers saves them, with its own CLIP tokenizer and processor."""
    config = clip_config(
        (32, 1, 2), (32, 1, 2), patch_size=16, image_size=32, projection_dim=16, vocab_size=49408
    )
    model = json.loads(Tokenizer.clip().to_json())["model"]
    tokenizer = transformers.CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=77
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = transformers.CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
    )
    random_model(config).save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    report = transfer.import_weights(tmp_path / "theirs", "huggingface", Workdir(tmp_path / "run"))
    assert report.differences.keys() == {"image", "text"}


@pytest.mark.parametrize("kind", ["vit", "clip vision", "siglip vision", "bert", "bert, no pooler"])
def test_single_towers_are_compared_too(kind, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64}
    if kind.startswith("bert"):
        tokenizer = Tokenizer.train(CAPTIONS, 300, lowercase=True, kind="wordpiece")
        config = transformers.BertConfig(**sizes, vocab_size=320, max_position_embeddings=24)
        tokenizer.save(tmp_path / "tokenizer.json")
        names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
        names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    else:
        name = {"vit": "ViT", "clip vision": "CLIPVision", "siglip vision": "SiglipVision"}[kind]
        config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=16)
        processor = {"do_resize": True, "size": {"height": 32, "width": 32}}
        processor["image_processor_type"] = "ViTImageProcessor"
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = random_model(config)
    if kind == "bert, no pooler":
        model.pooler = None
    model.save_pretrained(tmp_path)
    report = transfer.import_weights(tmp_path, "huggingface", Workdir(tmp_path / "run"))
    part = "text" if kind.startswith("bert") else "image"
    assert report.parts == (part,)
    assert 0 < report.differences[part] <= 1e-5
    weights = transfer.weights_of_workdir(Workdir(tmp_path / "run"))
    assert weights.parts == (part,)
    assert weights.arrays.keys() == model_shapes(weights.model, (part,)).keys()
    with pytest.raises(UserError, match=r"single towers are not exported"):
        transfer.export_weights(weights, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_import_is_a_run_at_step_0(workdir):
    config = workdir.load_config()
    assert config.model.text.eot_id == 2
    assert config.data.tokenizer.path == str(workdir.tokenizer)
    assert Tokenizer.load(workdir.tokenizer)(["a cat"], 24).shape == (1, 24)
    task = ContrastiveTask(config, mesh_of())
    abstract = abstract_state(task, make_optimizer(config), mesh_of())
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        assert store.steps() == [0]
        loaded = store.load(("step", "params"))
        metadata = store.metadata()
    assert loaded["step"] == 0
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded["params"])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract.params)
    assert metadata["samples_seen"] == 0
    assert metadata["source"] == "huggingface"
    assert metadata["dtypes"]["text/token_embedding"] == "float16"
    assert "image/position_embedding" not in metadata["dtypes"]


def test_a_round_trip_returns_the_same_bytes(directory, workdir, tmp_path):
    by_step = transfer.weights_of_checkpoint(workdir.checkpoints / "0")
    for number, weights in enumerate((transfer.weights_of_workdir(workdir), by_step)):
        out = tmp_path / str(number)
        transfer.export_weights(weights, "huggingface", out, use_peer=False)
        before, after = (read_tensors(path / "model.safetensors") for path in (directory, out))
        assert {name: tensor.tobytes() for name, tensor in before.items()} == {
            name: tensor.tobytes() for name, tensor in after.items()
        }
        assert (out / "config.json").read_text() == (directory / "config.json").read_text()


def test_a_checkpoint_may_leave_its_run(workdir, tmp_path):
    (workdir.checkpoints / "0").rename(tmp_path / "0")
    try:
        weights = transfer.weights_of_checkpoint(tmp_path / "0")
    finally:
        (tmp_path / "0").rename(workdir.checkpoints / "0")
    assert weights.arrays.keys() == model_shapes(weights.model).keys()
    assert weights.tokenizer is not None


@pytest.fixture(scope="module")
def run_with_average(tmp_path_factory):
    """As training saves: an average beside the parameters, batches of a few steps."""
    weights = small_weights("clip")
    workdir = Workdir(tmp_path_factory.mktemp("average"))
    config = dataclasses.replace(ExperimentConfig(), model=weights.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, framing="object"))
    workdir.save_config(config)
    arrays = weights.arrays
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        for step in (3, 6):
            shifted = {path: np.asarray(array + np.float32(step)) for path, array in arrays.items()}
            state = {
                "step": np.asarray(step, np.int32),
                "params": unflatten(shifted),
                "model_state": {},
                "opt_state": (),
                "ema": unflatten(arrays),
            }
            metadata = {"config": to_dict(config), "samples_seen": 1}
            store.save(step, state, metadata | {"tokenizer": weights.tokenizer.to_json()})
    return workdir


def test_steps_and_averages(run_with_average, workdir):
    name, read = "text/token_embedding", transfer.weights_of_workdir
    saved = small_weights("clip").arrays[name]
    for found, added in (
        (read(run_with_average, 3), 3),
        (read(run_with_average), 6),
        (read(run_with_average, ema=True), 0),
        (transfer.weights_of_checkpoint(run_with_average.checkpoints / "3"), 3),
    ):
        np.testing.assert_array_equal(found.arrays[name], saved + np.float32(added))
    with pytest.raises(UserError, match=r"no moving average .*leave --ema out"):
        read(workdir, ema=True)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        read(run_with_average, 4)


def test_objects_are_framed_by_nobody_else(run_with_average, tmp_path):
    weights = transfer.weights_of_workdir(run_with_average)
    with pytest.raises(UserError, match=r"no setting for data.framing 'object'"):
        transfer.export_weights(weights, "huggingface", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    transfer.export_weights(
        weights, "huggingface", tmp_path / "out", use_peer=False, drop_framing=True
    )


def damaged(directory, folder, how):
    """A copy of `directory` with one fault."""
    folder.mkdir()
    for file in directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "NaN":
        tensors["text_model.final_layer_norm.weight"][3] = np.nan
    elif how == "infinite bfloat16":
        name = "text_projection.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        tensors[name][0, 0] = np.inf
    elif how == "integers":
        tensors["logit_scale"] = np.int8(3)
    elif how == "missing":
        del tensors["visual_projection.weight"]
    if how != "cut short":
        write_safetensors(file, tensors)
    config = json.loads((folder / "config.json").read_text())
    if how == "activation":
        config["vision_config"]["hidden_act"] = "mish"
    elif how == "small table":
        rows = tensors["text_model.embeddings.token_embedding.weight"][:250]
        write_safetensors(file, tensors | {"text_model.embeddings.token_embedding.weight": rows})
        config["text_config"]["vocab_size"] = 250
    elif how == "end of text":
        config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "model.safetensors is damaged"),
        ("NaN", "'text_model.final_layer_norm.weight' has values that are not finite"),
        ("infinite bfloat16", "'text_projection.weight' has values that are not finite"),
        ("integers", "'logit_scale' is of type int8"),
        ("missing", "lack 'visual_projection.weight'"),
        ("activation", "unknown activation hidden_act 'mish'"),
        ("small table", r"the tokenizer has \d+ tokens, but the embedding table only 250 rows"),
        ("end of text", "eos_token_id is 7, but the tokenizer ends a text with token 2"),
    ],
)
def test_odd_sources_leave_nothing_behind(directory, tmp_path, how, message):
    source = damaged(directory, tmp_path / "source", how)
    output = Workdir(tmp_path / "new" / "run")
    with pytest.raises(UserError, match=message) as error:
        transfer.import_weights(source, "huggingface", output)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_gate_refuses_leaves_nothing_behind(tmp_path):
    weights = small_weights("clip")
    image = dataclasses.replace(weights.model.image, pooling="mean")
    odd = dataclasses.replace(weights, model=dataclasses.replace(weights.model, image=image))
    with pytest.raises(UserError, match=r"cannot express model.image.pooling='mean'"):
        transfer.export_weights(odd, "huggingface", tmp_path / "out")
    naflex = small_weights("naflex")
    other = dataclasses.replace(naflex, tokenizer=weights.tokenizer)
    with pytest.raises(UserError, match="every Siglip2Model with Gemma's tokenizer"):
        transfer.export_weights(other, "huggingface", tmp_path / "out")
    arrays = weights.arrays | {"log_logit_scale": np.float32(np.nan)[None][0]}
    nan = dataclasses.replace(weights, arrays=arrays)
    with pytest.raises(UserError, match=r"export to huggingface is refused: .*'logit_scale' .*NaN"):
        transfer.export_weights(nan, "huggingface", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_full_folders_stay_as_they_are(directory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        transfer.export_weights(small_weights("clip"), "huggingface", tmp_path / "out")
    with pytest.raises(UserError, match="not an empty folder"):
        transfer.import_weights(directory, "huggingface", Workdir(tmp_path / "out"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    transfer.export_weights(
        small_weights("clip"), "huggingface", tmp_path / "empty", use_peer=False
    )
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_formats_by_content(directory, workdir, tmp_path):
    assert transfer.detect_format(directory) == "huggingface"
    assert transfer.detect_format(workdir.path) == "workdir"
    assert transfer.detect_format(workdir.checkpoints / "0") == "checkpoint"
    for name, format in (
        ("open_clip_model.safetensors", "open_clip"),
        ("weights.pt", "open_clip"),
        ("vit.npz", "big_vision"),
    ):
        (tmp_path / name).touch()
        assert transfer.detect_format(tmp_path / name) == format
    assert transfer.detect_format(tmp_path) == "open_clip"
    with pytest.raises(UserError, match="there is no"):
        transfer.detect_format(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot tell the format"):
        transfer.detect_format(tmp_path / "empty")
    with pytest.raises(UserError, match="unknown format 'onnx'; known: open_clip, huggingface"):
        transfer.format_module("onnx")


def test_odd_checkpoints_are_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        transfer.weights_of_workdir(Workdir(tmp_path))
    with pytest.raises(UserError, match="not the folder of a checkpoint"):
        transfer.weights_of_checkpoint(workdir.path)
    (tmp_path / "5").mkdir()
    with pytest.raises(UserError, match=r"checkpoint .*5 cannot be read"):
        transfer.weights_of_checkpoint(tmp_path / "5")


def test_models_get_the_name_of_their_preset():
    model = dataclasses.replace(preset("ViT-B-32"), name="custom", logit_scale_max=50.0)
    weights = dataclasses.replace(small_weights("clip"), model=model)
    assert transfer._named(weights).name == "ViT-B-32"
    assert transfer._named(small_weights("clip")).name == "custom"
