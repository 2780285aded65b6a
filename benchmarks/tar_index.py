"""The index of webdataset tars: size, opening, memory, and the rates of scans and reads.

    python benchmarks/tar_index.py

The index of a million samples is written by the real writer from one scan: its hundred tars are
links to one tar of 10,000 samples. What a worker does is measured in a fresh process: unpickle the
source, read at random. Rates are samples per second of CPU time, the best of --repeats, the
contestants in turn: a JPEG-sized member of 2 KB, a json and a txt each.
"""

import argparse
import importlib.metadata
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from environment import environment

from clip_jax.data.sources.files import local_info
from clip_jax.data.sources.tar_index_files import index_file, of_scan, save
from clip_jax.data.sources.tar_scan import scan
from clip_jax.data.sources.webdataset import WebdatasetSource

RESULTS = Path(__file__).parent / "results" / "tar_index.json"
TAR_SAMPLES = 10_000
IMAGE_BYTES = 2_000

# What a worker process does, told in JSON. argv: the file of the pickled source.
WORKER = """
import json, pickle, random, resource, sys, time
import clip_jax.data.sources.webdataset
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
with open(sys.argv[1], "rb") as file:
    data = file.read()
result = {"pickle_bytes": len(data)}
before, start = resident(), time.perf_counter()
source = pickle.loads(data)
source.shard(0)
result["open_ms"] = (time.perf_counter() - start) * 1e3
rng = random.Random(0)
for count in (1_000, 100_000):
    for _ in range(count):
        source[rng.randrange(len(source))]
    result[f"added_mb_after_{count}_reads"] = (resident() - before) / 1e6
print(json.dumps(result))
"""


def write_tar(path: Path) -> None:
    rng = random.Random(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(TAR_SAMPLES):
            caption = f"a photo of number {number}"
            fields = {"caption": caption, "url": f"https://example.org/{number}.jpg", "width": 640}
            for extension, data in (
                ("jpg", rng.randbytes(IMAGE_BYTES)),
                ("json", json.dumps(fields).encode()),
                ("txt", caption.encode()),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def million(folder: Path, tar: Path, num_tars: int) -> dict[str, Any]:
    """Index `num_tars` links to the tar, open that, and have a worker read it."""
    found = scan(str(tar))
    index_dir = folder / "million"
    for number in range(num_tars):
        link = folder / f"{number:05d}.tar"
        link.symlink_to(tar)
        save(index_file(str(link), index_dir), of_scan(found, local_info(str(link))))
    path = str(folder / f"{{00000..{num_tars - 1:05d}}}.tar")
    seconds = []
    for _ in range(2):  # the first joins the tars' rows
        start = time.perf_counter()
        source = WebdatasetSource(path, index_dir)
        seconds.append(time.perf_counter() - start)
    pickled = folder / "source.pickle"
    pickled.write_bytes(pickle.dumps(source))
    command = [sys.executable, "-c", WORKER, str(pickled)]
    workers = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    rows_file = max(index_dir.glob("rows-*.npy"), key=lambda file: file.stat().st_size)
    return {
        "samples": len(source),
        "tars": num_tars,
        "bytes_per_sample": round(rows_file.stat().st_size / len(source), 2),
        "join_ms": round(seconds[0] * 1e3, 1),
        "start_ms": round(seconds[1] * 1e3, 1),
        "worker": {name: round(min(worker[name] for worker in workers), 2) for name in workers[0]},
    }


def rates(folder: Path, tar: Path, repeats: int) -> dict[str, float]:
    """Samples per second of CPU time of scanning and of reading in random order or in sequence."""
    import webdataset

    source = WebdatasetSource(str(tar), folder / "one")
    order = random.Random(0).sample(range(TAR_SAMPLES), TAR_SAMPLES)
    archive = tarfile.open(tar)  # noqa: SIM115 - for the whole run
    by_name = {info.name: info for info in archive}

    def ours_scan() -> None:
        assert len(scan(str(tar)).rows) == TAR_SAMPLES

    def tarfile_scan() -> None:
        with tarfile.open(tar) as opened:
            assert len(opened.getmembers()) == 3 * TAR_SAMPLES

    def ours_random() -> None:
        for index in order:
            assert len(source[index].image) == IMAGE_BYTES

    def tarfile_random() -> None:
        for index in order:
            for extension in ("jpg", "txt"):
                member = archive.extractfile(by_name[f"{index:09d}.{extension}"])
                assert member is not None
                member.read()

    def webdataset_sequence() -> None:
        peer = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
        assert sum(len(sample["jpg"]) == IMAGE_BYTES for sample in peer) == TAR_SAMPLES

    contestants: dict[str, Callable[[], None]] = {
        "scan: ours": ours_scan,
        "scan: tarfile": tarfile_scan,
        "read at random: ours": ours_random,
        "read at random: tarfile with an index of its own": tarfile_random,
        "read in sequence: webdataset": webdataset_sequence,
    }
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            best[name] = max(best[name], TAR_SAMPLES / (time.process_time() - start))
    archive.close()
    return {name: round(rate) for name, rate in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tars", type=int, default=100)
    arguments = parser.parse_args()
    machine = environment()
    machine["webdataset"] = importlib.metadata.version("webdataset")
    print(json.dumps(machine, indent=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tar = folder / "ten-thousand.tar"
        write_tar(tar)
        results = {
            "environment": machine,
            "index": million(folder, tar, arguments.tars),
            "samples_per_second": rates(folder, tar, arguments.repeats),
        }
    print(json.dumps({name: results[name] for name in ("index", "samples_per_second")}, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
