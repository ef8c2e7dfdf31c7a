from models.files import atomic_folder, remove_leftovers, write_text


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
