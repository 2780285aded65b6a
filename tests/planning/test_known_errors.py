"""What a plan says of its own errors is what was measured."""

import json
from pathlib import Path

import pytest

from clip_jax.planning.known_errors import KNOWN_ERRORS, known_error

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_accuracy.json"


def test_known_errors_are_those_of_the_benchmark():
    results = json.loads(RESULTS.read_text())
    assert set(results) == set(KNOWN_ERRORS)
    for platform, measured in results.items():
        known, rows = KNOWN_ERRORS[platform], measured["rows"]
        assert known.num_steps == len(rows)
        for name in ("memory", "time"):
            worst = max(abs(row[f"{name}_error"]) for row in rows)
            assert getattr(known, name) == pytest.approx(worst, abs=0.005)


def test_a_platform_that_was_not_measured_says_so():
    assert "at most 4% off in memory and 16% in step time" in known_error("cpu")
    assert "is not known; --measured=WORKDIR" in known_error("tpu")
