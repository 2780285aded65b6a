import pytest
from data.stores import Bucket, web_server

from clip_jax.config.errors import UserError
from clip_jax.data.sources.tar_paths import expand_path, expand_tars


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "b-x.tar", "b-y.tar", "c-9.tar", "c-10.tar"]:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a-00.tar", ["a-00.tar"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-{02..01}.tar", ["a-02.tar", "a-01.tar"]),
        ("c-{9..10}.tar", ["c-9.tar", "c-10.tar"]),
        ("b-{y,x}.tar", ["b-y.tar", "b-x.tar"]),
        ("{a-{00,01},b-x}.tar", ["a-00.tar", "a-01.tar", "b-x.tar"]),
        ("{a-{00..01},c-{9,10}}.t{ar}", ["a-00.tar", "a-01.tar", "c-9.tar", "c-10.tar"]),
        ("b-*.tar, a-0[12].tar", ["b-x.tar", "b-y.tar", "a-01.tar", "a-02.tar"]),
        ("a-00.tar,a-00.tar", ["a-00.tar", "a-00.tar"]),
    ],
)
def test_expansion(folder, path, expected):
    assert expand_path(path) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a-{00..04}.tar", r"2 of 5 files .* the first: /.*/a-03.tar"),
        ("nothing-*.tar", "1 of 1 files"),
        (" , ", "empty"),
        ("pipe:cat a.tar", "commands are not run"),
        (".", r"^\. is a folder: name the files in it, as in '\./\*.tar'"),
        ("a-00.tar,sub/", r"^sub/ is a folder: name the files in it, as in 'sub/\*.tar'"),
    ],
)
def test_mistakes(folder, path, message):
    with pytest.raises(UserError, match=message) as caught:
        expand_path(path)
    assert "\n" not in str(caught.value)


def test_a_file_named_with_brackets(folder):
    (folder / "a[1].tar").touch()
    assert expand_path("a[1].tar") == ["a[1].tar"]


THIRTY_EIGHT = ["train/00038", "train/00039"]


@pytest.fixture
def bucket():
    Bucket.empty()
    names = [f"b/train/{number:05d}.tar" for number in range(40)] + ["b/val/[0].tar", "b/val/1.tar"]
    Bucket.objects |= dict.fromkeys(names, b"")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("bucket://b/train/{00002..00000}.tar", ["train/00002", "train/00001", "train/00000"]),
        ("bucket://b/{val/1,train/{00039,00001}}.tar", ["val/1", "train/00039", "train/00001"]),
        ("bucket://b/train/0003[89].tar,bucket://b/val/1.tar", [*THIRTY_EIGHT, "val/1"]),
        ("bucket://b/*/*1.tar", [*(f"train/000{tens}1" for tens in range(4)), "val/1"]),
    ],
)
def test_urls(bucket, path, expected):
    assert expand_path(path) == [f"bucket://b/{name}.tar" for name in expected]


def test_local_files_and_urls_in_one_path(bucket, folder):
    path = "a-00.tar,bucket://b/val/1.tar,b-*.tar"
    assert expand_path(path) == ["a-00.tar", "bucket://b/val/1.tar", "b-x.tar", "b-y.tar"]


def test_many_remote_files_cost_few_requests(bucket):
    assert len(expand_path("bucket://b/train/{00000..00039}.tar")) == 40
    looked_up = [path for _, path in Bucket.requests]
    assert len(looked_up) == 16
    assert {"b/train/00000.tar", "b/train/00039.tar"} <= set(looked_up)
    with pytest.raises(UserError, match=r"of 41 files .* do not exist, the first: .*/00040.tar"):
        expand_path("bucket://b/train/{00000..00040}.tar")


def test_known_files_may_be_gone(bucket, folder):
    names = "a-{00..03}.tar,bucket://b/train/{00039..00041}.tar"
    known = ["a-03.tar", "bucket://b/train/00041.tar"]
    with pytest.raises(UserError, match="00040"):
        expand_path(names, known.__contains__)
    known.append("bucket://b/train/00040.tar")
    assert len(expand_path(names, known.__contains__)) == 7


def test_a_store_that_does_not_answer(bucket, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    Bucket.down = ConnectionRefusedError("down")
    with pytest.raises(UserError, match=r"bucket://b/a.tar cannot be read: Connection.*: down"):
        expand_path("bucket://b/a.tar")
    with pytest.raises(UserError, match=r"bucket://b/\*.tar cannot be listed: Connection"):
        expand_path("bucket://b/*.tar")


def test_a_query_is_no_glob():
    pytest.importorskip("aiohttp")
    with web_server({"/a.tar?key=1": b"x"}) as root:
        assert expand_path(f"{root}/a.tar?key=1") == [f"{root}/a.tar?key=1"]
        with pytest.raises(UserError, match="1 of 1 files"):
            expand_path(f"{root}/a.tar")


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.jsonl", "a.parquet", "a.arrow"])
def test_files_that_are_no_tars(folder, name):
    (folder / name).touch()
    kind = "parquet" if name in ("a.parquet", "a.arrow") else "table"
    with pytest.raises(UserError, match=rf"{name} is no tar: .*kind='{kind}' .*--kind={kind}"):
        expand_tars(f"a-00.tar,{name}")
    assert expand_tars("a-00.tar") == ["a-00.tar"]


@pytest.mark.parametrize(
    ("status", "message"), [(503, "cannot be read: .*503"), (404, "not exist")]
)
def test_a_web_server_that_fails(monkeypatch, status, message):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with (
        web_server({"/a.tar": b"x"}, failures=[status] * 99) as root,
        pytest.raises(UserError, match=message),
    ):
        expand_path(f"{root}/a.tar")
