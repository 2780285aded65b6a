"""What an estimate takes for granted, in lines for its reader."""

from clip_jax.planning.calibration import Calibration
from clip_jax.planning.estimate_speeds import (
    EXPECTED,
    GUESSED_RANGE,
    HOST_BANDWIDTH,
    PEAK,
    SLOW,
    SOURCES,
)
from clip_jax.planning.known_errors import known_error


def assumptions(
    platform: str, calibration: Calibration | None, *, sends: bool, fused: bool, to_host: bool
) -> tuple[str, ...]:
    """A line each.

    sends: the program has collectives between chips. fused: the run's attention is cuDNN's.
    to_host: activations lie on the host.
    """
    lines = ["each instruction takes the longer of its products and its memory traffic"]
    if platform == "cpu":
        lines += [
            "simulated devices share the cores and the memory of this machine",
            f"measured on this machine: {calibration.describe()}"
            if calibration is not None
            else "not calibrated: 40 GFLOP/s a core and 10 GB/s are guesses, a factor of "
            f"{GUESSED_RANGE:g} either way; --calibrate measures this machine",
        ]
        if calibration is not None:
            lines.append(known_error(platform))
        return tuple(lines)
    if calibration is not None:
        lines.append(f"expected: as measured on one device: {calibration.describe()}")
    lines += [
        SOURCES[platform],
        "at best everything runs at the data sheet's figures and at once: products, memory, "
        "links; expected, what is asynchronous hides behind the work between its start and "
        "its end; at worst nothing hides",
    ]
    if sends:
        lines.append(
            "collectives along a dim of a TPU's torus use both of its links where it is a "
            "ring, else one"
            if platform == "tpu"
            else "collectives in a node use all NVLinks of a GPU; between nodes each GPU has "
            "its own adapter"
        )
    if fused:
        lines.append(
            "compiled with XLA's attention: arrays of scores and copies of q, k and v are left "
            "out of memory and traffic, as cuDNN makes none; its backward pass computes the "
            "scores once more, which is in the FLOPs; kernels are not autotuned"
        )
    if to_host:
        rates = (PEAK.host, EXPECTED[platform].host, SLOW[platform].host)
        best, expected, worst = (HOST_BANDWIDTH / 1e9 * share for share in rates)
        lines.append(
            f"activations that lie on the host go there and back at {best:g} GB/s a chip at "
            f"best, {expected:g} expected, {worst:g} at worst, as chips of a host share its "
            "links; others compute meanwhile"
        )
    lines += ["input, checkpoints and evaluation are left out", known_error(platform)]
    return tuple(lines)
