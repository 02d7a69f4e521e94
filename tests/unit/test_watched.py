"""Whether a configuration file has changed since it was read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from router.watched import WatchedFile


def looks(file: WatchedFile, count: int = 3) -> list[bool]:
    return [file.changed() for _ in range(count)]


def reread(file: WatchedFile) -> None:
    file.reading()
    assert looks(file) == [False, False, False]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("workers = 1\n")
    return path


def test_a_file_that_stays_is_not_told_of(path: Path) -> None:
    assert looks(WatchedFile(str(path))) == [False, False, False]


def test_a_change_is_told_of_once_it_has_stood_still_and_until_it_is_read(path: Path) -> None:
    file = WatchedFile(str(path))
    for text in ("workers = 2\n", "workers = 22\n"):
        path.write_text(text)
        assert not file.changed(), "somebody may still be writing"
    assert looks(file) == [True, True, True]
    reread(file)


def test_a_file_that_is_replaced_taken_away_and_put_back_is_told_of_each_time(path: Path) -> None:
    file = WatchedFile(str(path))
    other = path.with_name("other")
    other.write_text("workers = 3\n")
    os.replace(other, path)
    assert looks(file) == [False, True, True]
    reread(file)
    path.unlink()
    assert looks(file) == [False, True, True]
    reread(file)
    path.write_text("workers = 1\n")
    assert looks(file) == [False, True, True]
    reread(file)


def test_a_mounted_config_map_is_followed_through_its_links(tmp_path: Path) -> None:
    """Kubernetes: `config.toml` → `..data/config.toml`, `..data` → a folder of that version, and swaps the latter."""
    for version, workers in (("..1", 1), ("..2", 2)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.toml").write_text(f"workers = {workers}\n")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "config.toml").symlink_to("..data/config.toml")
    file = WatchedFile(str(tmp_path / "config.toml"))
    assert looks(file) == [False, False, False]
    (tmp_path / "..data_tmp").symlink_to("..2")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
    assert looks(file) == [False, True, True]
    reread(file)


def test_a_file_that_is_not_there_yet_is_told_of_when_it_comes(tmp_path: Path) -> None:
    file = WatchedFile(str(tmp_path / "none"))
    assert looks(file) == [False, False, False]
    (tmp_path / "none").write_text("")
    assert looks(file) == [False, True, True]
