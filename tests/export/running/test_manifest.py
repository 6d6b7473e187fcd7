"""A manifest names files inside its folder, and what is wrong with one is said in words."""

from slimvlm.export.running.manifest import check_files


def test_a_file_that_is_a_loop_of_links_is_missing(tmp_path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert check_files(tmp_path, {"loop": {"bytes": 1, "sha256": ""}}) == ["loop is missing"]
