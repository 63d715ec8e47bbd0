"""Files: whole or not there at all, readable by others, and never a pickle."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from paretoprune.files import atomic_path, read_json, read_npz, write_csv, write_json, write_npz


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        raise error


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(path, RuntimeError("half way"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_where_there_was_no_file_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "new.json", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".csv"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "c.json", {"x": 1})
    assert read_json(tmp_path / "a" / "b" / "c.json") == {"x": 1}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    write_json(tmp_path / "a.json", {})
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode
    assert umask(mask) == mask


def test_json_keeps_the_order_of_keys_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "z": 1,\n  "a": [\n    1.5,\n    null\n  ]\n}\n'


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": np.zeros(3)})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected a JSON object, found list; delete the file and run again"):
        read_json(tmp_path / "a.json")


def test_a_table_without_rows_still_has_its_header(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [], ("id", "density"))
    assert (tmp_path / "a.csv").read_text().splitlines() == ["id,density"]


def test_columns_of_a_table_stand_in_the_order_asked_for(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"density": 0.1, "id": 0}, {"id": 1, "density": 1 / 3}], ("id", "density"))
    assert (tmp_path / "a.csv").read_text().splitlines() == ["id,density", "0,0.1", "1,0.3333333333333333"]


def test_a_row_with_an_unknown_key_is_refused_and_the_old_table_stays(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"id": 0}], ("id",))
    with pytest.raises(ValueError, match="sparsity"):
        write_csv(tmp_path / "a.csv", [{"id": 1}, {"id": 2, "sparsity": 0.5}], ("id",))
    assert (tmp_path / "a.csv").read_text().splitlines() == ["id", "0"]
    assert len(list(tmp_path.iterdir())) == 1


def test_arrays_read_back_as_they_were_and_nothing_else(tmp_path: Path) -> None:
    arrays = {"words": np.array([[2**64 - 1]], dtype=np.uint64), "n": np.array(70), "names": np.array(["a", "bc"])}
    write_npz(tmp_path / "a.npz", arrays)
    read = read_npz(tmp_path / "a.npz")
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_object_arrays_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    with pytest.raises(TypeError, match="array 'names' has dtype object, which only pickle can store"):
        write_npz(tmp_path / "a.npz", {"x": np.arange(4), "names": np.array(["a", None])})
    assert read_npz(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_files_with_pickles_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(tmp_path / "a.npz")


def test_permissions_follow_the_umask_whoever_writes_the_file(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0o022)
    with atomic_path(tmp_path / "a.bin") as temporary:
        other = tmp_path / "other"
        other.touch(mode=0o600)
        other.replace(temporary)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o644
