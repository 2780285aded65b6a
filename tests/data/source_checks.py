"""What every source of records must do, whatever it reads."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from clip_jax.data.record import Source


def check_source(source: Source, expected: list[tuple[bytes, tuple[str, ...]]]) -> None:
    """Length, records, captions, unique keys, bounds, pickling to little, threads."""
    assert len(source) == len(expected)
    keys = set()
    for index, (image, captions) in enumerate(expected):
        record = source[index]
        assert (record.image, record.captions) == (image, captions)
        assert source.captions(index) == captions
        keys.add((source.shard(index), record.key))
        assert source.locate(index).startswith(source.shard(index))
    assert len(keys) == len(expected)
    for index in (-1, len(expected)):
        with pytest.raises(IndexError, match=f"{index} of {len(expected)}"):
            source[index]
    data = pickle.dumps(source)
    assert len(data) < 4000
    copy = pickle.loads(data)
    order = [(7 * step) % len(expected) for step in range(40)]
    with ThreadPoolExecutor(8) as pool:  # of a copy that has nothing open yet
        records = list(pool.map(copy.__getitem__, order))
    assert [(record.image, record.captions) for record in records] == [expected[i] for i in order]


def imported_by(source: Source, *modules: str) -> list[str]:
    """Which of some modules a fresh process imports to read a pickled source."""
    code = (
        "import pickle, sys; source = pickle.loads(sys.stdin.buffer.read()); source[0];"
        f"print(*[name for name in {modules} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(source),
        capture_output=True,
        check=True,
        env=os.environ,
    )
    return result.stdout.decode().split()
