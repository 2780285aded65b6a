"""What `clip-jax plan` and `doctor` do: arguments in, one call out. Heavy imports are late."""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.config.errors import ConfigError, UserError

if TYPE_CHECKING:
    from clip_jax.config import ExperimentConfig
    from clip_jax.planning.calibration import Calibration
    from clip_jax.planning.doctor import Diagnosis
    from clip_jax.planning.topology import Topology


_MOST_DEVICES = 2**17  # of a run; the largest clusters have about as many


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0 where the recipe fits and nothing is an error, else 2; warnings count for nothing."""
    figures, page = _output("--json", arguments.json), _output("--html", arguments.html)
    if figures is not None and figures == page:
        raise UserError(f"--json and --html both name {page}; name two files")
    price, most = arguments.price_per_chip_hour, arguments.max_compiles
    if price is not None and not 0 < price < float("inf"):
        raise UserError(f"--price_per_chip_hour is more than 0, got {price:g}")
    if most is not None and most < 1:
        raise UserError(f"--max_compiles is 1 or more, got {most}")
    measured = arguments.measured
    if measured is not None:
        from clip_jax.checkpoint import Workdir

        if not Workdir(measured).exists():
            raise UserError(f"--measured {measured} is no workdir: it has no config.json")
    from clip_jax.planning.topology import open_topology, parse_topology, prepare

    wanted = parse_topology(arguments.topology)
    if arguments.calibrate and wanted.platform != "cpu":
        raise UserError(
            f"--calibrate measures the CPUs of this machine, for --topology=cpu:N; {wanted.name} "
            "is estimated by its data sheet, and --measured=WORKDIR tells how far that is off"
        )
    from clip_jax.config import check_devices
    from clip_jax.config.load import load_config

    config = load_config([f"--config={arguments.config}", *overrides])
    prepare(wanted)  # before anything asks JAX for devices
    from clip_jax.planning.sweep import parse_axes

    axes = () if arguments.sweep is None else parse_axes(arguments.sweep)
    topology = open_topology(arguments.topology)
    check_devices(config, topology.num_devices)
    from clip_jax.data.sources import cache_dir
    from clip_jax.planning.plan import Wishes, make_plan

    if measured is not None:
        from clip_jax.planning.measured_run import compare

        # Whether it can be, before minutes of compiling.
        compare(measured, config, topology, expected_seconds=1.0)
    wishes = Wishes(
        calibration=_calibration(arguments, config, topology),
        price_per_chip_hour=price,
        measured=measured,
        searches=not arguments.no_search,
        sweep=axes,
        max_compiles=most,
    )
    cache = cache_dir(config.data) / "plans"
    # What is kept whole is among the findings, once and not for each mesh that is tried.
    with _without_warnings("clip_jax.parallel.sharding"):
        made = make_plan(config, topology, wishes, cache=cache, progress=_say)
    from clip_jax.planning.page import write_plan_page
    from clip_jax.planning.report import text
    from clip_jax.planning.report_json import to_json

    print(text(made, width=shutil.get_terminal_size((100, 24)).columns), end="")
    problems = []
    if figures is not None:
        content = json.dumps(to_json(made), indent=2) + "\n"
        problems += _problem("--json", figures, lambda: figures.write_text(content))
    if page is not None:
        found = _problem("--html", page, lambda: write_plan_page(page, made))
        problems += found
        if not found:
            print(f"page: {page}")
    if problems:
        raise UserError("; ".join(problems))
    return made.exit_code


def _calibration(
    arguments: argparse.Namespace, config: "ExperimentConfig", topology: "Topology"
) -> "Calibration | None":
    from clip_jax.data.sources import cache_dir
    from clip_jax.planning.calibration import calibrate, load_calibration, save_calibration

    cache = cache_dir(config.data)
    if not arguments.calibrate:
        return load_calibration(topology, cache)
    _say(f"measuring this machine, for {topology.name}")
    calibration = calibrate(topology)
    _say(f"calibration: {save_calibration(calibration, cache)}")
    return calibration


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _say(line: str) -> None:
    """On the other stream, so that the report can be kept alone."""
    print(line, file=sys.stderr, flush=True)


def _output(flag: str, name: str | None) -> Path | None:
    """Raises UserError, before anything is computed, where a file of this name cannot be written.

    One that is there stays as it is.
    """
    if name is None:
        return None
    path = Path(name).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path} cannot be made: name a file in a folder that is there")
    if path.exists() and not path.is_file():
        return path  # a pipe: opened, it would wait for its reader
    if problems := _problem(flag, path, lambda: _probe(path)):
        raise UserError(problems[0])
    return path


def _probe(path: Path) -> None:
    """Opens a file for writing and changes nothing. Raises OSError where that cannot be done."""
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def _problem(flag: str, path: Path, write: Callable[[], object]) -> list[str]:
    """Why `path` cannot be written, in a line, if so: what else is to be written still is."""
    try:
        write()
    except OSError as error:
        return [f"{flag} {path} cannot be written: {error.strerror or error}"]
    return []


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0 where no check finds an error, else 2; warnings count for nothing."""
    hosts, devices = arguments.num_hosts, arguments.num_devices
    if hosts < 1 or (devices is not None and devices < 1):
        raise UserError("--num_hosts and --num_devices are 1 or more")
    if max(hosts, devices or 0) > _MOST_DEVICES:
        raise UserError(f"--num_hosts and --num_devices are at most {_MOST_DEVICES:,}")
    output = _output("--json", arguments.json)
    started = time.monotonic()
    from clip_jax.planning.doctor import DEVICE_SECONDS, SECONDS, diagnose, diagnose_machine
    from clip_jax.planning.doctor_case import Case, Finding
    from clip_jax.planning.doctor_machine import look

    machine = look(seconds=DEVICE_SECONDS)  # JAX begins to look for its devices meanwhile
    from clip_jax.config.load import load_config

    try:
        config = load_config([f"--config={arguments.config}", *overrides])
        import jax

        # Shapes alone are computed here; a device is for another process to ask.
        jax.config.update("jax_platforms", "cpu")
        from clip_jax.checkpoint import Workdir

        workdir = None if arguments.workdir is None else Workdir(arguments.workdir)
    except (ConfigError, ImportError) as error:
        diagnosis = diagnose_machine(machine)
        diagnosis.findings.insert(0, Finding("error", "config", str(error)))
    else:
        case = Case(
            config=config, machine=machine, workdir=workdir, num_devices=devices, num_hosts=hosts
        )
        spent = time.monotonic() - started
        diagnosis = diagnose(case, seconds=max(SECONDS - spent, SECONDS / 2))
        diagnosis.findings.insert(0, Finding("ok", "config", f"{config.name} is valid"))
    _show(diagnosis)
    code = 2 if diagnosis.count("error") else 0
    if output is not None:
        content = json.dumps(diagnosis.to_json(), indent=2) + "\n"
        for problem in _problem("--json", output, lambda: output.write_text(content)):
            _say(f"clip-jax: {problem}")
            code = 2
    if diagnosis.unfinished:
        # Pools of threads would be waited for, however long what they read does not answer.
        sys.stdout.flush()
        os._exit(code)
    return code


def _show(diagnosis: "Diagnosis") -> None:
    from clip_jax.planning.doctor_case import counted

    for level, check, text in diagnosis.findings:
        print(f"{level:8}{check:12} {text}")
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    numbers = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
    print(f"{numbers} in {counted(len(diagnosis.seconds), 'check')}")
