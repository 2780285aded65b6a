"""`clip-jax data ...` as a user meets it: exit codes, files and what is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data.tars import pairs, write_tar
from PIL import Image

from clip_jax.cli import main
from clip_jax.data.tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]

RECIPE = """
from clip_jax.config import *

def get_config():
    return to_config_dict(ExperimentConfig(
        name="small", num_steps=4, global_batch_size=16,
        model=ModelConfig(
            image=ImageTowerConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
            text=TextTowerConfig(
                vocab_size=300, eot_id=2, context_length=16, width=32, depth=1, num_heads=2),
            embed_dim=16),
        data=DataConfig(sources={"pairs": SourceConfig(path="TAR")}, cache_dir="CACHE",
            tokenizer=TokenizerConfig(kind="file", path="TOKENIZER")),
        schedule=ScheduleConfig(warmup_steps=1),
    ))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands_data")
    tar = write_tar(folder / "pairs.tar", pairs(0, 40))
    tokenizer = folder / "tokenizer.json"
    Tokenizer.train(["caption 1"], 300, lowercase=True).save(tokenizer)
    recipe = RECIPE.replace("TAR", str(tar)).replace("CACHE", str(folder / "cache"))
    (folder / "recipe.py").write_text(recipe.replace("TOKENIZER", str(tokenizer)))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs a command in a new folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_JAX_CACHE", str(folder / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_check_of_a_path(run, folder, tmp_path):
    flags = ("--tokenizer", folder / "tokenizer.json", "--context_length", 16, "--json", "c.json")
    code, printed, errors = run("check", folder / "pairs.tar", *flags, "--samples", 30)
    assert (code, errors) == (0, "")
    assert "in the source               40" in printed
    assert "usable                      30 (100.0%)" in printed
    assert "members of the first 80: png 40, txt 40" in printed
    assert f"page: {tmp_path / 'check.html'}" in printed
    assert (tmp_path / "check.html").read_text().startswith("<!doctype html>")
    [figures] = json.loads((tmp_path / "c.json").read_text())
    assert (figures["num_checked"], figures["context_length"]) == (30, 16)


def test_check_of_a_recipe(run, folder, tmp_path):
    code, printed, errors = run(
        "check", f"--config={folder / 'recipe.py'}", "--config.data.packing.group_size=8"
    )
    assert (code, errors) == (0, "")
    assert printed.startswith("pairs: 40 samples checked")
    assert "packed                      8 captions in " in printed
    assert "shorter side below 16       0 (0.0%)" in printed


def test_check_where_nothing_is_usable(run, folder, tmp_path):
    members = [(f"{n}.{e}", b"x") for n in range(3) for e in ("jpg", "txt")]
    tar = write_tar(tmp_path / "bad.tar", members)
    code, printed, _ = run("check", tar, "--tokenizer", folder / "tokenizer.json")
    assert code == 1
    assert "None of the 3 samples that were checked can be used." in printed
    assert printed.count("bad (image): ") == 3


def test_no_jax_is_imported(folder, tmp_path):
    commands = [
        ["data", "check", str(folder / "pairs.tar")],
        ["data", "index", str(folder / "pairs.tar")],
        ["data", "show", f"--config={folder / 'recipe.py'}", "--count=4"],
    ]
    code = (
        "import sys; from clip_jax.cli import main\n"
        f"for command in {commands}:\n"
        "    assert main(command) == 0, command\n"
        "    assert not {'jax', 'grain'} & set(sys.modules), command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"CLIP_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_index(run, folder, tmp_path):
    tars = [write_tar(tmp_path / f"a-{n}.tar", pairs(10 * n, 10)) for n in range(3)]
    flags = ("--cache_dir", tmp_path / "cache")
    code, printed, _ = run("index", tars[0], *flags)
    assert code == 0
    assert printed.startswith("1 tars, 10 samples; 1 tars scanned in ")
    assert "samples/s" in printed
    code, printed, _ = run("index", tmp_path / "a-*.tar", *flags, "--beside")
    assert code == 0
    assert printed.startswith("3 tars, 30 samples; 2 tars scanned in ")
    assert printed.strip().endswith("1 had an index")
    assert len(list(tmp_path.glob("a-?.tar.index.npy"))) == 3
    tars[1].write_bytes(tars[1].read_bytes()[:6000])
    code, printed, _ = run("index", tmp_path / "a-*.tar", *flags)
    assert code == 1
    assert f"damaged: {tars[1]}: the file ends inside a member" in printed


def test_bench(run, folder):
    config = f"--config={folder / 'recipe.py'}"
    code, printed, errors = run("bench", config, "--seconds=0.2", "--batches=4", "--target=1000")
    assert (code, errors) == (0, "")
    assert [line.split()[0] for line in printed.splitlines()[2:7]] == [
        *("read", "decode", "tokenize", "batch", "all")
    ]
    assert "(64 samples in batches of 16)" in printed
    assert "1,000 samples/s take " in printed


def test_show(run, folder, tmp_path):
    config = f"--config={folder / 'recipe.py'}"
    code, printed, _ = run("show", config, "--count=5", "--start_sample=3", "--config.seed=2")
    assert code == 0
    assert printed == f"small: samples 3 to 7: {tmp_path / 'show.png'}\n"
    sheet = np.asarray(Image.open(tmp_path / "show.png"))
    run("show", config, "--count=5", "--start_sample=3", "--config.seed=2", "--output=again.png")
    assert (np.asarray(Image.open(tmp_path / "again.png")) == sheet).all()
    run("show", config, "--count=5", "--start_sample=3", "--config.seed=1", "--output=other.png")
    assert (np.asarray(Image.open(tmp_path / "other.png")) != sheet).any()
    code, _, _ = run("show", config, "--count=2", "--output=show.html")
    assert code == 0
    assert (tmp_path / "show.html").read_text().count("data:image/png") == 2


def test_show_with_the_tokenizer_of_a_workdir(run, folder, tmp_path, capsys):
    """Not with the one of the config, which may have changed or gone since."""
    main(["config", f"--config={folder / 'recipe.py'}"])
    config = tmp_path / "config.json"
    resolved = capsys.readouterr().out
    config.write_text(resolved.replace(str(folder / "tokenizer.json"), "gone.json"))
    code, _, errors = run("show", f"--config={config}", "--count=2")
    assert code == 2
    assert "gone.json" in errors
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    code, _, _ = run("show", f"--config={config}", "--count=2")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "takes one of SOURCE, a path, and --config=RECIPE"),
        (["check", "x.tar", "--config=r.py"], "takes one of SOURCE"),
        (["check", "x.tar", "--config.seed=1"], "--config.seed=1 goes with --config=RECIPE"),
        (["check", "none.tar"], "none.tar; check the path"),
        (["check", "x.tar", "--output=none/x.html"], "there is no folder"),
        (["check", "x.tar", "--samples=-1"], "--samples is 0 or more"),
        (["check", "."], ". is a folder: --kind=folder for images in it, or './*.tar' for tars"),
        (["check", "x.tar", "--context_length=2"], "--context_length is 3 or more"),
        (["check", "x.tar", "--templates", "a {}", "b"], "prompts that contain {}"),
        (["check", "x.tar", "--sampels=1"], "see clip-jax data check -h"),
        (["index", "none.tar"], "none.tar; check the path"),
        (["index", "x.tar", "--retries=-1"], "--retries must be 0 or more"),
        (["bench", "--config=RECIPE", "--seconds=0"], "are more than 0"),
        (["bench", "--config=RECIPE", "--config.sed=0"], "did you mean config.seed?"),
        (["show", "--config=RECIPE", "--count=0"], "--count is 1 to 1024, got 0"),
        (["show", "--config=RECIPE", "--start_sample=-1"], "--start_sample is 0 or more"),
        (["show", "--config=RECIPE", "--output=x.gif"], "x.gif is neither .png nor .html"),
        (["show", "--config=RECIPE", "--output=."], "is a folder; name a file"),
        (["show", "--config=RECIPE", "--config.model.text.vocab_size=20"], "vocab_size is 20"),
    ],
)
def test_mistakes_are_one_line(run, folder, arguments, message):
    recipe = str(folder / "recipe.py")
    code, printed, errors = run(*(argument.replace("RECIPE", recipe) for argument in arguments))
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.startswith("clip-jax: ")
    assert errors.count("\n") == 1


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in ("check", "index", "bench", "show"))
