"""Files and folders are written whole, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl_gmt.files import whole


def entries(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    others = {".a.txt.part": "precious", "a.txt.part": "precious"}
    for name, text in {**others, "a.txt": "old"}.items():
        (tmp_path / name).write_text(text)
    with whole(tmp_path / "a.txt") as part:
        part.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert entries(tmp_path) == {**others, "a.txt": "new"}


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("old")
    for text in ("new", "newer"):
        with whole(tmp_path / "old") as part:
            part.mkdir()
            (part / "b").write_text(text)
        assert entries(tmp_path) == {"old/b": text}


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_fails_leaves_everything_as_it_was(is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    file = path / "b" if is_folder else path
    file.parent.mkdir(exist_ok=True)
    file.write_text("old")
    before = entries(tmp_path)

    def write_half() -> None:
        with whole(path) as part:
            file_in_part = part / "b" if is_folder else part
            file_in_part.parent.mkdir(exist_ok=True)
            file_in_part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    with whole(path):
        pass
    assert entries(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no"), whole(tmp_path / "no" / "a"):
        raise AssertionError
