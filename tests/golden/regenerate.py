"""Writes the golden config of every recipe again: python tests/golden/regenerate.py

For a change of a default or a recipe that is meant. Read the diff before it is committed.
"""

import os
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, str(GOLDEN.parent))  # as pytest does
    from recipes import RECIPES, load_recipe, make_starts

    from clip_jax.config import to_json

    for path in GOLDEN.glob("*.json"):
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        make_starts(Path(folder))
        os.chdir(folder)
        for name in RECIPES:
            (GOLDEN / f"{name}.json").write_text(to_json(load_recipe(name)))
        os.chdir(GOLDEN)  # a folder that somebody is in cannot be removed everywhere
    print(f"{len(RECIPES)} configs in {GOLDEN}")


if __name__ == "__main__":
    main()
