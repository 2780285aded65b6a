"""`clip-jax doctor`: its flags; `commands_planning.py` has what it does."""

from typing import Any

from clip_jax import commands_planning as commands


def add_planning_commands(subparsers: Any) -> None:
    """Add `doctor` to the subparsers of `clip-jax`."""
    text = "Check in seconds what can be checked of a run without training."
    doctor = subparsers.add_parser("doctor", help=text, description=text, allow_abbrev=False)
    doctor.set_defaults(run=commands.doctor, takes_config=True)
    doctor.epilog = "Any field of the recipe, joined with '=': --config.mesh='(-1, 8, 1)'"
    doctor.add_argument(
        "--config", required=True, help="recipe with get_config(), or the config.json of a workdir"
    )
    doctor.add_argument("--workdir", help="folder or bucket that the run is to be in")
    doctor.add_argument(
        "--num_devices", type=int, help="of the whole run, on other machines (default: those here)"
    )
    doctor.add_argument("--num_hosts", type=int, default=1, help="that the devices are on")
    doctor.add_argument("--json", metavar="FILE", help="write the findings there too")
