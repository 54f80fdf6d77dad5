"""Where written files go, and what is said where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from openhelix.runtime.core.paths import CacheFolderError, cache_folder, make_in_cache


def test_a_folder_of_the_cache_is_made_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENHELIX_CACHE", str(tmp_path / "here"))
    folder = cache_folder() / "a" / "b"
    assert make_in_cache(folder) == make_in_cache(folder) == tmp_path / "here" / "a" / "b"
    assert folder.is_dir()


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("/proc/nope", str(tmp_path / "file")):
        monkeypatch.setenv("OPENHELIX_CACHE", place)
        with pytest.raises(
            CacheFolderError, match=rf"^OPENHELIX_CACHE: cannot write to {place}: .+$"
        ):
            make_in_cache(cache_folder() / "playtable")
