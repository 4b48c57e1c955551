"""Changed files are noticed: once, when they are whole, however they were changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config import BackendConfig, Config, ServerConfig
from proxy.config_secrets import files_of
from proxy.config_watch import Stamp, Watch, stamp_of

A, B = Path("a"), Path("b")


class Disk:
    """Files as numbers: what a stamp is made of does not matter here."""

    def __init__(self) -> None:
        self.files: dict[Path, int] = {A: 1}

    def stamp(self, file: Path) -> Stamp:
        return (self.files[file], 0, 0) if file in self.files else None


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def watch(disk: Disk) -> Watch:
    return Watch([A, B], disk.stamp)


def test_what_stays_the_same_is_never_read_again(watch: Watch) -> None:
    assert [watch.look() for _ in range(3)] == [False, False, False]


def test_a_change_is_told_once_and_only_when_the_file_is_still(watch: Watch, disk: Disk) -> None:
    looks = []
    for content in (2, 3, 4, 4, 4, 4):
        disk.files[A] = content
        looks.append(watch.look())
    assert looks == [False, False, False, True, False, False]


def test_a_file_that_goes_and_one_that_comes_are_changes(watch: Watch, disk: Disk) -> None:
    disk.files[B] = 1
    assert [watch.look(), watch.look(), watch.look()] == [False, True, False]
    del disk.files[A]
    assert [watch.look(), watch.look(), watch.look()] == [False, True, False]


def test_a_change_that_is_taken_back_in_time_is_none(watch: Watch, disk: Disk) -> None:
    disk.files[A] = 2
    assert not watch.look()
    disk.files[A] = 1
    assert [watch.look(), watch.look()] == [False, False]


def test_what_a_signal_had_read_is_not_read_again(watch: Watch, disk: Disk) -> None:
    disk.files[A] = 2
    watch.look()
    watch.read()
    assert [watch.look(), watch.look()] == [False, False]


def test_a_change_while_the_files_are_read_is_told_although_they_are_followed_anew(watch: Watch, disk: Disk) -> None:
    watch.read()
    disk.files[A] = 2
    watch.follow([A])
    assert [watch.look(), watch.look()] == [False, True]


def test_files_that_are_no_longer_named_are_no_longer_looked_at(watch: Watch, disk: Disk) -> None:
    watch.follow([B])
    disk.files[A] = 2
    assert [watch.look(), watch.look()] == [False, False]


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "by rename"])
def test_a_real_file_shows_every_change(tmp_path: Path, replace: bool) -> None:
    file, other = tmp_path / "x.toml", tmp_path / "y.toml"
    file.write_text("one")
    before = stamp_of(file)
    if replace:
        other.write_text("two")
        other.rename(file)
    else:
        file.write_text("three")
    assert stamp_of(file) not in (before, None)
    file.unlink()
    assert stamp_of(file) is None


def test_the_files_of_secrets_are_those_that_are_read(tmp_path: Path) -> None:
    config = Config(
        server=ServerConfig(api_keys=("file:keys.txt", "env:NAME"), admin_keys=("file:/etc/admin",)),
        backends=(
            BackendConfig(name="r", kind="openai", base_url="https://h/v1", api_key="file:key"),
            BackendConfig(name="s", kind="openai", base_url="https://h/v1"),
        ),
    )
    assert files_of(config, tmp_path) == [tmp_path / "keys.txt", Path("/etc/admin"), tmp_path / "key"]
