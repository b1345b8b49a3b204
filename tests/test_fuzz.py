from __future__ import annotations

from pathlib import Path

from .fuzz import Fuzz


def test_damaged_files_meet_only_planned_errors(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path, seed=1)
    assert [wrong for number in range(150) if (wrong := fuzz.case(number))] == []
    assert fuzz.counts["taken"] > 10 and fuzz.counts["refused"] > 50
