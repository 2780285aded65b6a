"""Files of named tensors: safetensors, torch's `.pt`, NumPy's `.npz`; never by unpickling code."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from clip_jax.config import UserError
from clip_jax.interop.table import NdArray

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_tensors(path: Path) -> dict[str, NdArray]:
    """All tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or `.npz` file, by name.

    Raises UserError, which names the file, where it is missing, cut short or of another kind, and
    for torch files where torch is not installed.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise UserError(f"{path} is not a file of tensors: .safetensors, .pt, .pth, .bin or .npz")


def write_safetensors(path: Path, tensors: Mapping[str, NdArray]) -> None:
    """Writes a `.safetensors` file as torch libraries expect it, names in order."""
    content = {name: np.asarray(tensor, order="C") for name, tensor in sorted(tensors.items())}
    safetensors.numpy.save_file(content, path, {"format": "pt"})


def _read_safetensors(path: Path) -> dict[str, NdArray]:
    # safe_open in NumPy's framework knows no bfloat16, so the bytes are cut here.
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            if "BF16" not in dtypes.values():
                return {name: file.get_tensor(name) for name in names}
        parts = dict(safetensors.deserialize(path.read_bytes()))
        return {
            name: np.frombuffer(part["data"], _DTYPES[part["dtype"]]).reshape(part["shape"])
            for name, part in parts.items()
        }
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} holds tensors of the unknown type {error}") from None


def _read_torch(path: Path) -> dict[str, NdArray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} takes torch: pip install 'clip-jax-training[verify]', or convert it "
            "to .safetensors"
        ) from None
    try:
        # weights_only: the pickle may name tensors and containers, no code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises half a dozen types on bad files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise UserError(f"{path} cannot be read as torch weights: {reason}") from None
    # Training checkpoints keep the weights in a group beside optimizer and epoch.
    for group in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(group), dict):
            content = content[group]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no tensors by name")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} holds {name!r}, which is not a tensor")
        name = name.removeprefix("module.")  # of torch's DistributedDataParallel
        if tensor.dtype == torch.bfloat16:
            tensors[name] = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            tensors[name] = tensor.numpy()
    return tensors


def _read_npz(path: Path) -> dict[str, NdArray]:
    try:
        # Opened here, for NumPy leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "cut short"
        raise UserError(f"{path} is damaged or no .npz file: {reason}") from None
    # NumPy saves bfloat16 as raw pairs of bytes.
    return {
        name: tensor.view(ml_dtypes.bfloat16) if tensor.dtype == np.dtype("V2") else tensor
        for name, tensor in tensors.items()
    }
