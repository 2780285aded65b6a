"""The small run that faults.py disturbs, as a child process."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_STEPS = 300
# Fields of metrics.jsonl that say when or how fast, not what was computed.
_TIMED = ("data/", "data_wait", "time/", "memory/")
_TIMES = {
    *("steps_per_second", "samples_per_second", "samples_per_second_per_chip", "train_seconds"),
    *("goodput", "productive_seconds", "mfu", "mfu_measured", "unix_time", "restarts"),
    "compile_seconds",
}
_RECIPE = """
from clip_jax.config import *

def get_config():
    return to_config_dict(ExperimentConfig(
        name="faults", num_steps={num_steps}, global_batch_size=64, precision="float32",
        model=ModelConfig(
            image=ImageTowerConfig(image_size=32, patch_size=8, width=64, depth=2, num_heads=2),
            text=TextTowerConfig(
                vocab_size=300, eot_id=2, context_length=8, width=64, depth=2, num_heads=2),
            embed_dim=32),
        data=DataConfig(sources={{"pairs": SourceConfig(path={tar!r})}}, cache_dir={cache!r},
            tokenizer=TokenizerConfig(kind="bpe")),
        optimizer=OptimizerConfig(ema_decay=0.99),
        schedule=ScheduleConfig(warmup_steps=20),
        evaluation=EvaluationConfig(
            sets={{"pairs": EvalSetConfig(path={tar!r}, zero_shot_ways=10)}},
            batch_size=64, every_steps=100, report=False),
        checkpoint=CheckpointConfig(every_steps=10, keep_latest=3),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    ))
"""


def recipe(folder: Path, num_steps: int = NUM_STEPS) -> Path:
    """A recipe on a tar of 512 noise pictures with captions."""
    tar, rng = folder / "pairs.tar", np.random.default_rng(0)
    with tarfile.open(tar, "w") as file:
        for number in range(512):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(stream, "PNG")
            members = {"png": stream.getvalue(), "txt": f"picture {number}".encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    path = folder / "recipe.py"
    text = _RECIPE.format(num_steps=num_steps, tar=str(tar), cache=str(folder / "cache"))
    path.write_text(text)
    return path


class Child:
    """`clip-jax train` in a process of its own, on simulated devices."""

    def __init__(
        self,
        config: Path,
        workdir: Path,
        *arguments: str,
        devices: int = 8,
        prefix: tuple[str, ...] = (),
    ) -> None:
        """prefix: a command that runs the rest of the line, as in a mount namespace of its own."""
        self.workdir = workdir
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self._first_step = steps_of(workdir)
        main = "import sys; from clip_jax.cli import main; sys.exit(main())"
        command = [*prefix, sys.executable, "-c", main, "train", f"--config={config}"]
        self._process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        )

    def trains(self) -> bool:
        """Waits for a step after the one it began with; False where the child ended before."""
        return self._until(lambda: steps_of(self.workdir) != self._first_step)

    def saves(self) -> bool:
        """Waits for a checkpoint that is not complete yet; False where the child ended before."""
        folder = self.workdir / "checkpoints"
        return self._until(lambda: any(not p.name.isdigit() for p in folder.glob("*")))

    def _until(self, happens: Callable[[], bool]) -> bool:
        while not happens():
            if self.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float = 600) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired, after it has ended the child."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def said(self) -> str:
        """What it printed so far."""
        self._output.seek(0)
        return self._output.read()


def steps_of(workdir: Path) -> int:
    """The last step in the metrics of a run; 0 where there is none."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue  # being written
    return 0


def facts(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl less what a clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in _TIMES and not k.startswith(_TIMED)}
        for line in lines
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
