"""`clip-jax plan` and `clip-jax doctor`: their flags; `commands_planning.py` has what they do."""

from typing import Any

from clip_jax import commands_planning as commands

_CONFIG_HELP = "recipe with get_config(), or the config.json of a workdir"


def add_planning_commands(subparsers: Any) -> None:
    """Add `plan` and `doctor` to the subparsers of `clip-jax`."""
    _add_plan(subparsers)
    _add_doctor(subparsers)


def _add_plan(subparsers: Any) -> None:
    text = (
        "Compile a run's step for hardware that need not be there: does it fit, how long does it "
        "take, what does it cost."
    )
    plan = subparsers.add_parser("plan", help=text, description=text, allow_abbrev=False)
    plan.set_defaults(run=commands.plan, takes_config=True)
    plan.epilog = "Any field of the recipe, joined with '=': --config.mesh='(-1, 8, 1)'"
    plan.add_argument("--config", required=True, help=_CONFIG_HELP)
    plan.add_argument(
        "--topology",
        required=True,
        help="v5e:4x4, v4:2x2x2, v5p, v6e, 7x; h100x8, a100x8, h200x8, b200x8; cpu:8; *2 after it "
        "for two slices or nodes",
    )
    plan.add_argument("--json", metavar="FILE", help="write all figures there")
    plan.add_argument("--html", metavar="FILE", help="write a page with all of it there")
    plan.add_argument(
        "--sweep", metavar="AXES", help="try a grid as well: of mesh,microbatches,remat or some"
    )
    plan.add_argument(
        "--no_search", action="store_true", help="do not look for what fits if the recipe does not"
    )
    plan.add_argument(
        "--max_compiles",
        type=int,
        help="of the search and of the sweep (default: 12 and 48)",
    )
    plan.add_argument(
        "--price_per_chip_hour", type=float, help="in any currency: tells the cost as well"
    )
    plan.add_argument(
        "--measured",
        "--workdir",
        metavar="WORKDIR",
        help="a run of this config on this hardware (also gs://), to compare the estimate with",
    )
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure this machine, for cpu:N alone; kept for later",
    )


def _add_doctor(subparsers: Any) -> None:
    text = "Check in seconds what can be checked of a run without training."
    doctor = subparsers.add_parser("doctor", help=text, description=text, allow_abbrev=False)
    doctor.set_defaults(run=commands.doctor, takes_config=True)
    doctor.epilog = "Any field of the recipe, joined with '=': --config.mesh='(-1, 8, 1)'"
    doctor.add_argument("--config", required=True, help=_CONFIG_HELP)
    doctor.add_argument("--workdir", help="folder or bucket that the run is to be in")
    doctor.add_argument(
        "--num_devices", type=int, help="of the whole run, on other machines (default: those here)"
    )
    doctor.add_argument("--num_hosts", type=int, default=1, help="that the devices are on")
    doctor.add_argument("--json", metavar="FILE", help="write the findings there too")
