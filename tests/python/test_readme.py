"""The programs of README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT, python

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_program_of_the_readme_runs(block: int, tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    assert "fence 1\n" in python(BLOCKS[block], cwd=tmp_path)
