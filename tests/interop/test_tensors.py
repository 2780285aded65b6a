"""Files of tensors: what damaged and odd ones say, and that nothing in them is run."""

import pickle

import ml_dtypes
import numpy as np
import pytest

from clip_jax.config import UserError
from clip_jax.interop.tensors import read_tensors, write_safetensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(2.5, np.float16),
    "c.d": np.array([1.5, -2], ml_dtypes.bfloat16),
    "e": np.arange(3),
}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("names", [list(TENSORS), ["a", "b", "e"]])
def test_safetensors_here_and_back(tmp_path, names):
    """With and without bfloat16, which NumPy's safetensors does not read."""
    file, tensors = tmp_path / "model.safetensors", {name: TENSORS[name] for name in names}
    write_safetensors(file, tensors)
    equal(read_tensors(file), tensors)


def test_transposed_tensors_are_written_in_order(tmp_path):
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"a": TENSORS["b"].T})
    np.testing.assert_array_equal(read_tensors(file)["a"], TENSORS["b"].T)


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    found = load_file(tmp_path / "model.safetensors")
    assert found["c.d"].dtype == torch.bfloat16
    assert found["c.d"].tolist() == [1.5, -2]
    assert found["b"].tolist() == TENSORS["b"].tolist()
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_npz(tmp_path):
    np.savez(tmp_path / "model.npz", **TENSORS)
    equal(read_tensors(tmp_path / "model.npz"), TENSORS)


@pytest.mark.parametrize("group", [None, "state_dict", "model"])
def test_torch_files(tmp_path, group):
    torch = pytest.importorskip("torch")
    content = {
        f"module.{name}": torch.tensor(tensor.astype(np.float32)).to(
            getattr(torch, tensor.dtype.name)
        )
        for name, tensor in TENSORS.items()
    }
    content = content if group is None else {group: content, "epoch": 3}
    torch.save(content, tmp_path / "model.pt")
    equal(read_tensors(tmp_path / "model.pt"), TENSORS)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("trap", "w"))


def test_code_in_torch_files_is_not_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "model.pt")
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    for name in ("model.pt", "model.bin"):
        with pytest.raises(UserError, match="cannot be read as torch weights"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "trap").exists()
    pickle.loads((tmp_path / "model.bin").read_bytes())["a"].close()
    assert (tmp_path / "trap").exists()  # the trap works


def test_code_in_npz_files_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "model.npz", a=np.array([Trap()], dtype=object))
    with pytest.raises(UserError, match="damaged or no"):
        read_tensors(tmp_path / "model.npz")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize("kept", [0, 5, 100, -20])
def test_files_cut_short_are_one_line(tmp_path, suffix, kept):
    file = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.zeros(100)}, file)
    elif suffix == ".npz":
        np.savez(file, **TENSORS)
    else:
        write_safetensors(file, TENSORS)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=str(file)) as error:
        read_tensors(file)
    assert "\n" not in str(error.value)


def test_odd_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_tensors(tmp_path / "model.safetensors")
    (tmp_path / "model.txt").touch()
    with pytest.raises(UserError, match=r"not a file of tensors: \.safetensors"):
        read_tensors(tmp_path / "model.txt")
    torch = pytest.importorskip("torch")
    for content, message in (
        ({"a": 3}, "holds 'a', which is not a tensor"),
        ({}, "holds no tensors"),
        ([torch.zeros(1)], "holds no tensors"),
    ):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / "model.pt")
