"""The code on the page docs/growth.md, run as a doctest."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "growth.md"


def test_the_examples_of_the_page_run():
    # A closing fence would count as expected output of the example above it.
    text = PAGE.read_text(encoding="utf-8").replace("```python\n", "").replace("```\n", "\n")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    results = doctest.DocTestRunner(optionflags=flags).run(test)
    assert results.failed == 0 and results.attempted > 15
