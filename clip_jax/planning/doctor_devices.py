"""Checks of versions, devices and mesh: what must hold before clip_jax can even be imported."""

from collections.abc import Iterator

from clip_jax.config.errors import UserError
from clip_jax.planning.doctor_case import Case, Checks, Finding, counted, refusals
from clip_jax.planning.doctor_machine import NVIDIA_PLUGINS, TPU_PLUGIN, Machine

# `from flax import nnx` raises.
_BROKEN_PAIRS = (("0.11.1", "0.12.8"), ("0.11.2", "0.12.9"))  # jax, flax
_UNKNOWN = "not checked, as the devices are not known; mend that, or give --num_devices"


def machine_checks(machine: Machine, *, elsewhere: bool = False) -> Checks:
    """What can be checked without a config. elsewhere: the run will be on other machines."""
    return {
        "versions": lambda: check_versions(machine),
        "devices": lambda: check_devices_here(machine, elsewhere=elsewhere),
    }


def device_checks(case: Case) -> Checks:
    return {
        **machine_checks(case.machine, elsewhere=case.elsewhere),
        "precision": lambda: check_precision(case),
        "mesh": lambda: check_mesh(case),
    }


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Of the packages that clip_jax needs, as its own metadata say."""
    from packaging.requirements import Requirement

    versions, sound = machine.versions, True
    pair = (versions.get("jax", ""), versions.get("flax", ""))
    if pair in _BROKEN_PAIRS:
        sound = False
        text = f"jax {pair[0]} and flax {pair[1]} cannot be imported together"
        yield Finding("error", "versions", f"{text}; pip install -U jax flax")
    if not machine.requirements:
        sound = False
        text = "clip-jax-training is not installed, so versions are not compared; pip install -e ."
        yield Finding("warning", "versions", text)
    for line in machine.requirements:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = wanted.name.lower().replace("_", "-")
        found = versions.get(name)
        remedy = f"pip install '{wanted.name}{wanted.specifier}'"
        if found is None:
            sound = False
            yield Finding("error", "versions", f"{name} is not installed; {remedy}")
        elif pair not in _BROKEN_PAIRS and not wanted.specifier.contains(found, prereleases=True):
            sound = False
            text = f"{name} {found} is not one of {wanted.specifier}; {remedy}"
            yield Finding("error", "versions", text)
    if sound:
        named = ", ".join(f"{name} {versions.get(name, '?')}" for name in ("jax", "jaxlib", "flax"))
        yield Finding("ok", "versions", f"{named}; {len(machine.requirements)} requirements hold")


def check_devices_here(machine: Machine, *, elsewhere: bool) -> Iterator[Finding]:
    """Whether JAX computes on the accelerators that the machine has."""
    try:
        devices = machine.devices()
    except TimeoutError as error:
        text = f"{error}: on a slice of several hosts they wait for the others; give --num_devices"
        yield Finding("ok" if elsewhere else "warning", "devices", text)
        return
    except UserError as error:
        asked = f" (JAX_PLATFORMS={machine.platforms} asks for them)" if machine.platforms else ""
        yield Finding("warning" if elsewhere else "error", "devices", f"{error}{asked}")
        return
    here = f"{counted(devices.count, f'{devices.platform} device')} ({devices.device_kind})"
    if devices.platform == "cpu" and (machine.num_gpus or machine.num_tpus):
        there = (
            counted(machine.num_gpus, "NVIDIA GPU")
            if machine.num_gpus
            else counted(machine.num_tpus, "TPU")
        )
        text = f"JAX computes on the CPU though {there} are here: {_why_unused(machine)}"
        yield Finding("warning" if elsewhere else "error", "devices", text)
    else:
        yield Finding("ok", "devices", here)


def _why_unused(machine: Machine) -> str:
    if machine.platforms and not {"cuda", "gpu", "tpu"} & set(machine.platforms.split(",")):
        return f"JAX_PLATFORMS={machine.platforms} hides them; unset it"
    extra, names = ("cuda", NVIDIA_PLUGINS) if machine.num_gpus else ("tpu", (TPU_PLUGIN,))
    plugin = next((name for name in names if name in machine.versions), None)
    jaxlib = machine.versions.get("jaxlib", "")
    if plugin is None:
        return f"the plugin is missing; pip install 'clip-jax-training[{extra}]'"
    version = machine.versions[plugin]
    if extra == "cuda" and version.split(".post")[0] != jaxlib.split(".post")[0]:
        return (
            f"{plugin} {version} is not of jaxlib {jaxlib} and is passed over; pip install -U "
            f"'{plugin}=={jaxlib}'"
        )
    return (
        f'{plugin} {version} does not start; python -c "import jax; jax.devices()" says why '
        "(an old driver, most often)"
    )


def check_precision(case: Case) -> Iterator[Finding]:
    precision = case.config.precision
    try:
        on_cpu = not case.elsewhere and case.machine.devices().platform == "cpu"
    except (TimeoutError, UserError):
        yield Finding("warning", "precision", f"{precision}: {_UNKNOWN}")
        return
    if on_cpu and precision == "bfloat16":
        text = "bfloat16 is slower than float32 on most CPUs; --config.precision=float32"
        yield Finding("warning", "precision", text)
    else:
        yield Finding("ok", "precision", precision)


def check_mesh(case: Case) -> Iterator[Finding]:
    """Whether mesh, batches, heads and slices divide."""
    from clip_jax.config import check_devices

    config, hosts = case.config, case.num_hosts
    try:
        num_devices = case.count_devices()
    except (TimeoutError, UserError):
        yield Finding("warning", "mesh", f"{config.mesh}: {_UNKNOWN}")
        return
    if num_devices % hosts:
        text = (
            f"{num_devices} devices do not divide over {counted(hosts, 'host')}; mend --num_devices"
        )
        yield Finding("error", "mesh", text)
        return
    data, fsdp, tensor = check_devices(config, num_devices)
    of_host, sound = num_devices // hosts, True
    if of_host % tensor:
        sound = False
        text = (
            f"the tensor axis {tensor} does not divide the {counted(of_host, 'device')} of a host, "
            f"and must lie within one; choose a tensor size of config.mesh {config.mesh} that does"
        )
        yield Finding("error", "mesh", text)
    if config.num_slices is not None:
        from clip_jax.parallel.mesh import axes_across_slices

        slices = config.num_slices
        for refusal in refusals(
            "mesh", lambda: axes_across_slices(config, (data, fsdp, tensor), slices)
        ):
            sound = False
            yield refusal
    if sound:
        rows = config.global_batch_size // (data * fsdp * config.microbatches)
        text = f"{counted(num_devices, 'device')} as data {data} x fsdp {fsdp} x tensor {tensor}"
        yield Finding(
            "ok", "mesh", f"{text}; {counted(rows, 'sample')} of a device in a microbatch"
        )
