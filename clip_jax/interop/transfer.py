"""Import and export: foreign files to the workdir of a run and back, through the parity gate."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.checkpoint import AnyPath, CheckpointStore, Workdir, unflatten, write_atomically
from clip_jax.config import (
    PRESETS,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    TokenizerConfig,
    UserError,
    from_config_dict,
    to_dict,
)
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.checks import checked
from clip_jax.interop.huggingface_files import read_json
from clip_jax.interop.verify import Format, Report, check_again, check_peer, described
from clip_jax.interop.weights import PARTS, Weights, flatten, is_statistic

LIBRARIES = {
    "open_clip": "open_clip",
    "huggingface": "transformers",
    "big_vision": "big_vision",
}
_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def import_weights(source: Path, format: str, output: Workdir, *, use_peer: bool = True) -> Report:
    """Makes the workdir of a run at step 0 out of foreign files.

    Such a workdir is what `config.start` names, what `weights_of_workdir` exports again with the
    bytes that it came with, and what evaluation reads. use_peer: run the peer library, where it is
    installed, on the source, and compare. Raises UserError, and leaves nothing behind, where the
    source is odd, computes something else here, or `output` holds files already.
    """
    module, source = format_module(format), Path(source).expanduser()
    if not source.exists():
        raise UserError(f"there is no {source}")
    if not isinstance(output.path, Path):
        raise UserError(f"{output.path} is in a bucket; import into a local folder and copy that")
    with staged(output.path) as folder:
        weights, notes = _in_float32(checked(module.read(source), str(source)))
        weights = dataclasses.replace(weights, model=_named(weights))
        _save(weights, Workdir(folder), output, format)
        checks = check_again(weights, weights_of_workdir(Workdir(folder)))
        differences: dict[str, float] = {}
        if use_peer and source.is_dir():
            lines, differences = check_peer(weights, source, module, library=LIBRARIES[format])
            checks += lines
        else:
            checks.append("self-check only: no other library ran the source")
    return Report(
        format=format,
        path=output.path,
        model=weights.model,
        parts=weights.parts,
        checks=(*notes, *checks),
        differences=differences,
    )


def export_weights(
    weights: Weights,
    format: str,
    output: Path,
    *,
    use_peer: bool = True,
    drop_framing: bool = False,
) -> Report:
    """Writes `weights` as the files of another library into the new or empty folder `output`.

    use_peer: run that library, where it is installed, on what was written, and compare. Raises
    UserError, and leaves nothing behind, where the format cannot say what the model is or the
    written files compute something else. drop_framing: export a run with `data.framing` 'object'
    all the same, though its images must then be cut out by the user.
    """
    module, output = format_module(format), Path(output).expanduser().absolute()
    framing = weights.extras.get("framing", "crop")
    if framing != "crop" and not drop_framing:
        raise UserError(
            f"{format} has no setting for data.framing {framing!r}, which trims images to their "
            "object: do that before its preprocessing, and export with drop_framing"
        )
    with staged(output) as folder:
        module.write(weights, folder)
        try:
            checks = check_again(weights, module.read(folder))
            differences: dict[str, float] = {}
            if use_peer:
                lines, differences = check_peer(weights, folder, module, library=LIBRARIES[format])
                checks += lines
            else:
                checks.append(f"self-check only: {LIBRARIES[format]} was not asked")
        except UserError as error:
            raise UserError(f"the export to {format} is refused: {error}") from None
    return Report(
        format=format,
        path=output,
        model=weights.model,
        parts=weights.parts,
        checks=tuple(checks),
        differences=differences,
    )


def weights_of_workdir(workdir: Workdir, step: int | None = None, *, ema: bool = False) -> Weights:
    """The model of a run at `step` (default: the latest).

    ema: the moving average of the weights. Raises UserError where there is no such checkpoint or no
    average in it.
    """
    workdir.load_config()  # names what is wrong with a folder that is no workdir
    if not workdir.checkpoints.is_dir():
        raise UserError(f"there is no checkpoint in {workdir.checkpoints}")
    return _weights_of(workdir.checkpoints, step, ema=ema)


def weights_of_checkpoint(directory: Path, *, ema: bool = False) -> Weights:
    """The model of one checkpoint, by its own folder: `WORKDIR/checkpoints/100`.

    The folder may have been moved away from its run, but not renamed. Raises UserError as
    `weights_of_workdir`.
    """
    directory = Path(directory).expanduser().absolute()
    if not directory.is_dir() or not directory.name.isdecimal():
        raise UserError(
            f"{directory} is not the folder of a checkpoint, which is named by its step"
        )
    return _weights_of(directory.parent, int(directory.name), ema=ema)


def detect_format(path: Path) -> str:
    """'workdir', 'checkpoint', 'open_clip', 'huggingface' or 'big_vision', by what lies there."""
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".npz":
            return "big_vision"
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            return "open_clip"
    elif path.is_dir():
        has_config = (path / "config.json").is_file()
        if any((path / name).is_file() for name in _OPEN_CLIP_WEIGHTS):
            return "open_clip"
        if has_config and {"model", "data"} <= read_json(path / "config.json").keys():
            return "workdir"
        if has_config:  # repositories that hold both have the weights of one or the other
            return "huggingface"
        if (path / "open_clip_config.json").is_file():
            return "open_clip"
        if path.name.isdecimal():
            return "checkpoint"
        if list(path.glob("*.npz")):
            return "big_vision"
    elif not path.exists():
        raise UserError(f"there is no {path}")
    raise UserError(
        f"cannot tell the format of {path}: no workdir, checkpoint, config.json, "
        "open_clip_config.json or .npz file"
    )


def format_module(format: str) -> Format:
    """The module that reads and writes a format. Raises UserError where there is none."""
    match format:
        case "huggingface":
            from clip_jax.interop import huggingface

            return huggingface
        case "open_clip":
            from clip_jax.interop import open_clip

            return open_clip
        case "big_vision":
            from clip_jax.interop import big_vision

            return big_vision
    raise UserError(f"unknown format {format!r}; known: {', '.join(LIBRARIES)}")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that takes its place when all went well, else is removed.

    Raises UserError where `output` holds files already, or is one.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; name another --output")
    made = [parent for parent in output.parents if not parent.exists()]
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, output)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        raise


# ---- Workdirs --------------------------------------------------------------------------------


def _save(weights: Weights, folder: Workdir, output: Workdir, format: str) -> None:
    """The workdir in `folder`, which is going to be `output`."""
    model, tokenizer = weights.model, weights.tokenizer
    data = DataConfig()
    if tokenizer is not None:
        write_atomically(folder.tokenizer, tokenizer.to_json())
        data = DataConfig(tokenizer=TokenizerConfig(kind="file", path=str(output.tokenizer)))
    loss = LossConfig(kind="softmax" if model.logit_bias_init is None else "sigmoid")
    config = dataclasses.replace(
        ExperimentConfig(), name=output.path.name, model=model, data=data, loss=loss
    )
    folder.save_config(config)
    arrays = {path: np.asarray(array, np.float32) for path, array in weights.arrays.items()}
    groups: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for path, array in arrays.items():
        groups[is_statistic(path)][path] = array
    state = {
        "step": np.zeros((), np.int32),
        "params": unflatten(groups[False]),
        "model_state": unflatten(groups[True]),
        "opt_state": (),
    }
    metadata = {
        "samples_seen": 0,
        "config": to_dict(config),
        "tokenizer": None if tokenizer is None else tokenizer.to_json(),
        "parts": list(weights.parts),
        "dtypes": {
            path: array.dtype.name
            for path, array in weights.arrays.items()
            if array.dtype != np.float32
        },
        "extras": weights.extras,
        "source": format,
    }
    with contextlib.closing(CheckpointStore(folder.checkpoints)) as store:
        store.save(0, state, metadata)
        store.wait()


def _weights_of(checkpoints: AnyPath, step: int | None, *, ema: bool) -> Weights:
    with contextlib.closing(CheckpointStore(checkpoints)) as store:
        metadata = store.metadata(step)
        groups = store.load(("params", "model_state"), step)
        if ema:
            groups["params"] = _average(store, step)
    config = from_config_dict(metadata["config"])
    arrays = flatten(groups["params"]) | flatten(groups["model_state"])
    for path, dtype in metadata.get("dtypes", {}).items():
        arrays[path] = arrays[path].astype(_DTYPES[dtype])  # the widening of the import undone
    extras = dict(metadata.get("extras") or {})
    if config.data.framing != "crop":
        extras["framing"] = config.data.framing
    tokenizer = metadata.get("tokenizer")
    return Weights(
        model=config.model,
        arrays=arrays,
        tokenizer=None if tokenizer is None else Tokenizer(tokenizer),
        parts=tuple(metadata.get("parts", PARTS)),
        extras=extras,
    )


def _average(store: CheckpointStore, step: int | None) -> Any:
    missing = (
        "the run keeps no moving average of its weights (config.optimizer.ema_decay is not set); "
        "leave --ema out"
    )
    try:
        average = store.load(("ema",), step)["ema"]
    except UserError as error:
        if "has no ema" in str(error):
            raise UserError(missing) from None
        raise
    if not average:
        raise UserError(missing)
    return average


def _in_float32(weights: Weights) -> tuple[Weights, list[str]]:
    """Without arrays of float64, which a checkpoint does not hold; and a line that says so."""
    doubles = [path for path, array in weights.arrays.items() if array.dtype == np.float64]
    if not doubles:
        return weights, []
    singles = {path: weights.arrays[path].astype(np.float32) for path in doubles}
    note = f"{len(doubles)} float64 arrays became float32"
    return dataclasses.replace(weights, arrays=weights.arrays | singles), [note]


def _named(weights: Weights) -> ModelConfig:
    """The model under the name of the preset that it equals, if any."""
    model = weights.model
    if model.name != ModelConfig.name or weights.parts != PARTS:
        return model
    settings = described(weights)
    for name, preset in PRESETS.items():
        if described(dataclasses.replace(weights, model=preset)) == settings:
            return dataclasses.replace(model, name=name)
    return model
