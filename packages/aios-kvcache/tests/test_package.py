"""What the package promises as a whole: a lazy table of contents, no torch where none is needed, a README that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import aios_kvcache

README = Path(__file__).parents[1] / "README.md"


def test_everything_in_the_table_of_contents_can_be_had():
    assert sorted(aios_kvcache.__all__) == dir(aios_kvcache)
    for name in aios_kvcache.__all__:
        assert getattr(aios_kvcache, name).__name__ == name
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = aios_kvcache.Nonsense


def test_bookkeeping_and_sizing_leave_torch_out():
    code = (
        "import sys; from aios_kvcache import BlockManager, plan_pool, available_memory, PoolTooSmallError;"
        "import aios_kvcache.layout; BlockManager(num_blocks=4).open('a', [1]); available_memory();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_readmes_snippet_runs_and_prints_what_it_says(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(snippets) == 1
    exec(compile(snippets[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)  # (.*)", snippets[0])
    assert printed == promised
