import os

import pytest
from data.stores import Bucket, web_server

from clip_jax.config.errors import UserError
from clip_jax.data.sources.tar_versions import UNKNOWN, current_versions


def test_local_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    os.utime(tmp_path / "a", ns=(7, 7))
    versions = current_versions([str(tmp_path / "a"), str(tmp_path / "b")], 3)
    assert versions == [(3, "mtime_ns:7"), None]


@pytest.mark.parametrize(("count", "requests"), [(3, {"info"}), (50, {"ls"})])
def test_many_objects_are_listed(count, requests):
    Bucket.empty()
    urls = [f"bucket://b/x/{number}" for number in range(count)]
    Bucket.objects |= {f"b/x/{number}": bytes(number) for number in range(count - 1)}
    versions = current_versions(urls, 0)
    assert [version and version.num_bytes for version in versions] == [*range(count - 1), None]
    assert {kind for kind, _ in Bucket.requests} == requests
    assert len(Bucket.requests) == (1 if requests == {"ls"} else count)


def test_a_folder_that_cannot_be_listed(caplog):
    Bucket.empty()
    Bucket.objects |= {f"b/x/{number}": bytes(number) for number in range(20)}
    Bucket.errors.append(PermissionError("no listing"))
    versions = current_versions([f"bucket://b/x/{number}" for number in range(20)], 0)
    assert [version.num_bytes for version in versions] == [*range(20)]
    assert caplog.text.count("cannot be listed (no listing)") == 1


def test_a_store_that_forbids():
    Bucket.empty()
    Bucket.down = PermissionError("forbidden")
    with pytest.raises(
        UserError, match="bucket://b/a cannot be read: PermissionError: forbidden; check"
    ):
        current_versions(["bucket://b/a"], 3)


def test_web_servers_are_asked_for_a_few():
    pytest.importorskip("aiohttp")
    with web_server({f"/{number}": b"x" for number in range(40)}) as root:
        urls = [f"{root}/{number}" for number in range(41)]
        versions = current_versions(urls, 0, at_most=5)
        assert [place for place, found in enumerate(versions) if found != UNKNOWN] == [
            *(0, 10, 20, 30, 40)
        ]
        assert versions[40] is None
        assert UNKNOWN not in current_versions(urls, 0)
