"""Files that are whole or absent, and where what is kept between runs lies."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.atomic import check_folder, write_atomic, write_or_refuse


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    target = tmp_path / "out" / "file.json"
    write_or_refuse(target, "ü")
    assert target.read_bytes() == "ü".encode()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, b"new")
    assert list(target.parent.iterdir()) == [target] and target.read_text() == "ü"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    target = tmp_path / "file"
    texts = [letter * 200_000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: write_atomic(target, text), texts * 5))
    assert target.read_text() in texts
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*/file/x: File exists"):
        write_or_refuse(tmp_path / "file" / "x", "text")


def test_a_folder_is_made_and_tried_before_the_work(tmp_path):
    check_folder(tmp_path / "a" / "b", "x")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*/file/x: .*; choose another"):
        check_folder(tmp_path / "file" / "x", "choose another")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("IGRPO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "igrpo-nemo"
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
