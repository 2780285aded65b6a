import pytest

from clip_jax.config.errors import UserError
from clip_jax.data.sources.tar_paths import expand_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "b-x.tar", "b-y.tar", "c-9.tar", "c-10.tar"]:
        (tmp_path / name).touch()
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
        ("a-{00..04}.tar", r"2 of 5 tar files .* the first: /.*/a-03.tar"),
        ("nothing-*.tar", "1 of 1 tar files"),
        (" , ", "empty"),
        ("gs://bucket/a.tar", "only local files"),
        ("pipe:cat a.tar", "only local files"),
    ],
)
def test_mistakes(folder, path, message):
    with pytest.raises(UserError, match=message) as caught:
        expand_path(path)
    assert "\n" not in str(caught.value)


def test_a_file_named_with_brackets(folder):
    (folder / "a[1].tar").touch()
    assert expand_path("a[1].tar") == ["a[1].tar"]
