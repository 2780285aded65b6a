"""Runs that are at fault, and what the doctor is to say of each."""

import dataclasses
from pathlib import Path
from typing import Any

from small import small_model

from clip_jax.checkpoint import Workdir
from clip_jax.config import (
    CheckpointConfig,
    EvalSetConfig,
    ExperimentConfig,
    PackingConfig,
    StartConfig,
    StreamConfig,
)
from clip_jax.planning.doctor_machine import Devices, Machine

REQUIREMENTS = ("jax>=0.10.2,!=0.11.1", "flax>=0.12.8,!=0.12.9", "onnx>=1.20; extra == 'onnx'")
VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


def machine(platform: str = "cpu", **changes: Any) -> Machine:
    sound = Machine(
        devices=lambda: Devices(platform=platform, device_kind=platform, count=8),
        requirements=REQUIREMENTS,
        versions=VERSIONS,
        memory_bytes=2**34,
    )
    return dataclasses.replace(sound, **changes)


def tiny_model(**text: Any) -> Any:
    model = small_model()
    text = {"vocab_size": 300, "eot_id": 2, "depth": 1} | text
    return dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, depth=1),
        text=dataclasses.replace(model.text, **text),
    )


def data(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def source(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    pairs = dataclasses.replace(config.data.sources["pairs"], **changes)
    return data(config, sources={"pairs": pairs})


def streams(config: ExperimentConfig, num_streams: int) -> ExperimentConfig:
    config = data(config, stream=StreamConfig(num_streams=num_streams, interleave=1, window=4))
    return source(config, access="stream")


def faults(config: ExperimentConfig, folder: Path) -> dict[str, tuple[str, dict[str, Any], str]]:
    """By name: the check that must find it, the case, and what is said, remedy included."""
    replace = dataclasses.replace
    tars = f"{folder}/{{0..3}}.tar"
    evaluation = config.evaluation
    return {
        "a tar of a brace list is missing": (
            "sources",
            {"config": source(config, path=f"{folder}/{{0..5}}.tar")},
            r"2 of 6 files .* do not exist, the first: .*4\.tar; check .* the brace range",
        ),
        "a caption key is not there": (
            "sources",
            {"config": source(config, caption_keys=("title",))},
            r"none of 64 samples can be used: .*title.*caption_keys",
        ),
        "images do not decode": (
            "sources",
            {"config": source(config, path=f"{folder}/broken.tar")},
            r"none of 20 samples can be used: .*cannot decode",
        ),
        "samples are bad and a run may not skip them": (
            "sources",
            {
                "config": data(
                    source(config, path=f"{tars},{folder}/broken.tar"), on_bad_sample="fail"
                )
            },
            r"of 64 samples are bad \(image \d+\).*mend them",
        ),
        "the bucket does not answer": (
            "sources",
            {"config": source(config, path="teststore://bucket/{0..3}.tar", access="stream")},
            r"cannot be read: .*check the path and the access",
        ),
        "fewer tars than streams": (
            "samples",
            {"config": streams(config, 8)},
            r"4 tars for 8 streams.*set data\.stream\.num_streams to 4",
        ),
        "streams do not divide over hosts": (
            "samples",
            {"config": streams(config, 4), "num_hosts": 3, "num_devices": 6},
            r"num_streams 4 is not divisible by 3 processes; nearest: 3 or 6",
        ),
        "fewer samples than a batch": (
            "samples",
            {"config": replace(config, global_batch_size=96)},
            r"80 samples .* are fewer than global_batch_size 96.*at most 80",
        ),
        "samples come twice": (
            "samples",
            {"config": data(config, repeat=False)},
            r"go through data source 'pairs' more than once.*data\.repeat=True",
        ),
        "streams do not measure rows": (
            "captions",
            {"config": data(streams(config, 4), packing=PackingConfig(group_size=4))},
            r"config\.data\.packing\.rows must be given where sources stream",
        ),
        "the tokenizer is larger than the table": (
            "tokenizer",
            {"config": replace(config, model=tiny_model(vocab_size=200))},
            r"has 269 tokens, but .* is 200: .*set vocab_size to 269",
        ),
        "another end of text": (
            "tokenizer",
            {"config": replace(config, model=tiny_model(eot_id=5))},
            r"end of text is token 2, but config\.model\.text\.eot_id is 5",
        ),
        "an evaluation set is not there": (
            "evaluation",
            {
                "config": replace(
                    config,
                    evaluation=replace(evaluation, sets={"gone": EvalSetConfig(path="gone.tar")}),
                )
            },
            r"'gone': 1 of 1 files .*gone\.tar; check the path",
        ),
        "the mesh needs more devices": (
            "mesh",
            {"config": replace(config, mesh=(-1, 16, 1))},
            r"needs a multiple of 16 devices, but there are 8",
        ),
        "the batch does not divide": (
            "mesh",
            {"config": config, "num_devices": 12},
            r"32 is not divisible by 12 data-parallel .*nearest: 24 or 36",
        ),
        "the tensor axis is wider than a host": (
            "mesh",
            {"config": replace(config, mesh=(-1, 1, 2)), "num_devices": 4, "num_hosts": 4},
            r"tensor axis 2 does not divide the 1 device of a host",
        ),
        "a broken pair of versions": (
            "versions",
            {"machine": machine(versions=VERSIONS | {"jax": "0.11.2", "flax": "0.12.9"})},
            r"jax 0\.11\.2 and flax 0\.12\.9 cannot be imported together; pip install",
        ),
        "a version that is too old": (
            "versions",
            {"machine": machine(versions=VERSIONS | {"flax": "0.12.1"})},
            r"flax 0\.12\.1 is not one of .*pip install 'flax",
        ),
        "no plugin for the GPUs": (
            "devices",
            {"machine": machine(num_gpus=8)},
            r"though 8 NVIDIA GPUs are here: .*pip install 'clip-jax-training\[cuda\]'",
        ),
        "a plugin of another version": (
            "devices",
            {"machine": machine(num_gpus=1, versions=VERSIONS | {"jax-cuda13-plugin": "0.9.1"})},
            r"jax-cuda13-plugin 0\.9\.1 is not of jaxlib 0\.10\.2.*'jax-cuda13-plugin==0\.10\.2'",
        ),
        "the TPU is hidden": (
            "devices",
            {"machine": machine(num_tpus=4, platforms="cpu")},
            r"though 4 TPUs are here: JAX_PLATFORMS=cpu hides them; unset it",
        ),
        "the host has too little memory": (
            "memory",
            {"machine": machine(memory_bytes=10**5)},
            r"where 100 kB are free; lower data\.prefetch_batches",
        ),
        "the state is larger than a device": (
            "state",
            {
                "config": replace(config, model=tiny_model(vocab_size=2**31)),
                "machine": machine("NVIDIA L4"),
            },
            r"which has 24 GB \(L4\); split it with a larger fsdp axis",
        ),
        "the disk is too small": (
            "room",
            {
                "config": replace(
                    config,
                    num_steps=10**9,
                    checkpoint=CheckpointConfig(every_steps=1, keep_every_steps=1),
                ),
                "workdir": Workdir(folder / "new"),
            },
            r"at most 1,000,000,000 checkpoints of .* are free; .*keep_every_steps",
        ),
        "the workdir is a file": (
            "workdir",
            {"workdir": Workdir(folder / "0.tar")},
            r"0\.tar is a file; name a folder",
        ),
        "the workdir is in a store without renames": (
            "workdir",
            {"workdir": Workdir("teststore://bucket/run")},
            r"checkpoints are written to local folders and to gs:// alone",
        ),
        "the run in the workdir is another one": (
            "workdir",
            {"config": replace(config, seed=1), "workdir": Workdir(folder / "run")},
            r"another config: seed 0 -> 1; use another --workdir",
        ),
        "the checkpoint is of another model": (
            "checkpoints",
            {
                "config": replace(config, model=replace(tiny_model(), embed_dim=8)),
                "workdir": Workdir(folder / "run"),
            },
            r"step 6 does not fit this config: params/\S+ has shape .*another --workdir",
        ),
        "start.model has no such step": (
            "start",
            {"config": replace(config, start=StartConfig(model=f"{folder}/run", step=4))},
            r"config\.start\.model .*no checkpoint of step 4 is there: \[3, 6\]",
        ),
        "start.image does not fit": (
            "start",
            {
                "config": replace(
                    config,
                    model=replace(
                        tiny_model(), image=replace(config.model.image, width=64, num_heads=2)
                    ),
                    start=StartConfig(image=f"{folder}/run"),
                )
            },
            r"config\.start\.image .* does not fit config\.model: image/",
        ),
        "start.branch has trained as long": (
            "start",
            {"config": replace(config, num_steps=6, start=StartConfig(branch=f"{folder}/run"))},
            r"is at step 6 already; config\.num_steps 6 must be more",
        ),
    }


WARNINGS = {
    "captions are longer than the context": (
        "captions",
        lambda config: dataclasses.replace(config, model=tiny_model(context_length=3)),
        r"100% of 64 captions are longer than context_length 3 .*context_length=\d",
    ),
    "a group has more rows than it takes": (
        "captions",
        lambda config: data(
            dataclasses.replace(config, model=tiny_model(context_length=32)),
            packing=PackingConfig(group_size=4, rows=4),
        ),
        r"rows 4 of a group of 4 captions, which take 1: the rest is padding; .*packing\.rows=1",
    ),
    "a group has fewer rows than it takes": (
        "captions",
        lambda config: data(config, packing=PackingConfig(group_size=4, rows=2)),
        r"rows 2 of a group of 4 captions, which take 4: captions are cut; .*packing\.rows=4",
    ),
    "bfloat16 on a CPU": (
        "precision",
        lambda config: dataclasses.replace(config, precision="bfloat16"),
        r"--config\.precision=float32",
    ),
    "some samples are bad": (
        "sources",
        lambda config: source(
            config,
            path=config.data.sources["pairs"].path
            + ","
            + config.data.sources["pairs"].path.replace("{0..3}", "broken"),
        ),
        r"of 64 samples are bad \(image \d+\): .*data check",
    ),
}
