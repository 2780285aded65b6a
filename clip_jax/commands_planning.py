"""What `clip-jax doctor` does: arguments in, one call out. Heavy imports are late."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.config.errors import ConfigError, UserError

if TYPE_CHECKING:
    from clip_jax.planning.doctor import Diagnosis


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0 where no check finds an error, else 2; warnings count for nothing."""
    hosts, devices = arguments.num_hosts, arguments.num_devices
    if hosts < 1 or (devices is not None and devices < 1):
        raise UserError("--num_hosts and --num_devices are 1 or more")
    output = None if arguments.json is None else Path(arguments.json).expanduser().absolute()
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--json {output} cannot be made: name a file in a folder that is there")
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
    if output is not None:
        output.write_text(json.dumps(diagnosis.to_json(), indent=2) + "\n")
    code = 2 if diagnosis.count("error") else 0
    if diagnosis.unfinished:
        # Pools of threads would be waited for, however long what they read does not answer.
        sys.stdout.flush()
        os._exit(code)
    return code


def _show(diagnosis: "Diagnosis") -> None:
    for level, check, text in diagnosis.findings:
        print(f"{level:8}{check:12} {text}")
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    print(f"{errors} errors, {warnings} warnings in {len(diagnosis.seconds)} checks")
