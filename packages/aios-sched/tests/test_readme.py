from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_snippet_prints_what_the_readme_says(capsys):
    exec(SNIPPETS[0], {})
    [expected] = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_second_snippet_answers(capsys):
    exec(SNIPPETS[1], {})
    assert "Paris" in capsys.readouterr().out
