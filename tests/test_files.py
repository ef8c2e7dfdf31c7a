import numpy as np
import pytest

from models.files import atomic_folder, remove_leftovers, reserve, write_array, write_text
from tests.limits import no_file_beyond


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    """In containers the next process has the same number."""
    target = tmp_path / "folder"
    context = atomic_folder(target)
    killed = context.__enter__()  # and never left
    with atomic_folder(target) as folder:
        (folder / "file").write_text("whole")
    assert (target / "file").read_text() == "whole"
    assert killed.is_dir()
    write_text(tmp_path / ".mine.tmp", "not ours")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".mine.tmp", target]


def test_a_file_that_has_no_room_is_named_and_the_older_one_stays(tmp_path):
    path = tmp_path / "file"
    write_text(path, "older")
    with no_file_beyond(100), pytest.raises(OSError, match=f"File too large: '{path}'"):
        write_text(path, "x" * 101)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_whose_files_have_no_room_is_named_and_not_there(tmp_path):
    target = tmp_path / "folder"

    def fill():
        with atomic_folder(target) as folder:
            (folder / "one").write_text("x" * 100)
            (folder / "two").write_text("x" * 101)

    with no_file_beyond(100), pytest.raises(OSError, match=f"File too large: '{target}'"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_reason_without_a_number_is_told_with_the_name(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(OSError, match=f"^{target}: 1024 requested and 0 written$"), atomic_folder(target):
        raise OSError("1024 requested and 0 written")


def test_an_unfinished_folder_is_called_by_its_later_name(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(FileNotFoundError, match=f"'{target}'"), atomic_folder(target) as folder:
        (folder / "missing").read_text()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match=f"'{file / 'folder'}'"), atomic_folder(file / "folder"):
        pass


def test_errors_of_its_own_pass_through_an_unfinished_folder(tmp_path):
    with pytest.raises(ValueError, match=r"^not a number$"), atomic_folder(tmp_path / "folder"):
        raise ValueError("not a number")
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"'{missing}'"), atomic_folder(tmp_path / "folder"):
        missing.read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.uint16).reshape(1, 2, 3), np.arange(6.0).reshape(2, 3).T, np.empty((0, 4, 8), np.int8)],
    ids=["three dimensions", "transposed", "empty"],
)
def test_an_array_is_read_by_numpy(tmp_path, array):
    path = tmp_path / "array.npy"
    write_array(path, array)
    again = np.load(path)
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_an_array_without_room_for_its_last_byte_is_an_error(tmp_path, n):
    path = tmp_path / "array.npy"
    write_array(path, np.arange(n))
    size = path.stat().st_size
    with no_file_beyond(size - 1), pytest.raises(OSError, match="File too large"):
        write_array(path, np.arange(n))


def test_a_reserved_file_has_its_room(tmp_path):
    path = tmp_path / "file"
    reserve(path, 1_000_000)
    assert path.stat().st_size == 1_000_000
    assert path.stat().st_blocks * 512 >= 1_000_000
    with no_file_beyond(1_000_000), pytest.raises(OSError, match="File too large"):
        reserve(path, 1_000_001)
