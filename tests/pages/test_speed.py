"""What docs/speed.md says was measured: on which machine, when, and by which command that is still there.

Times belong to a machine: no rows of them are kept, and no test makes them again.
"""

import re

from page_numbers import ROOT, Page

PAGE = Page("speed.md")


def test_the_page_says_on_what_and_when_it_was_measured():
    PAGE.says("measured in November 2026 on one thread of two cores of an AMD EPYC")


def test_every_section_with_numbers_names_benchmarks_that_there_are():
    named = re.findall(r"`(?:python -m )?benchmarks\.(\w+)`", PAGE.raw)
    assert len({*named}) > 6
    assert [name for name in named if not (ROOT / "benchmarks" / f"{name}.py").is_file()] == []
    sections = re.split(r"^## ", PAGE.raw, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections if "benchmarks." not in section] == []


def test_every_line_of_the_table_belongs_to_a_benchmark():
    lines = re.findall(r"^\| (.*?) \|.*× \|$", PAGE.raw, flags=re.MULTILINE)
    begun = re.compile(r"the same|144 head pairs at length 256|classification into|probing while")
    assert len(lines) > 9
    assert [line for line in lines if "(`benchmarks." not in line and not begun.match(line)] == []
