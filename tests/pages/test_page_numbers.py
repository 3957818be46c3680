"""A page's numbers are found, and a digit that is wrong on a page is noticed."""

import pytest
from page_numbers import NUMBER, Page, between, percent, power, short, with_interval

TEXT = """# A page of 3 sections

Trained as `--steps 1000` by [a command](other/7.md), in 2023:

    probe study --seeds 5

NoPE is **.134** [.107, .136] from T5, and 7 % of
4,096 tokens.

```python
x = 12
```

```{note}
In 87 of 100 cases; −.014 … 1e-7.
```
"""
NOT_MEASURED = {"names": ["3 sections"], "citation": ["2023"]}
SAYS = ("NoPE is .134 [.107, .136] from T5, and 7 % of 4,096 tokens", "In 87 of 100 cases; −.014 … 1e-7.")


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.md").write_text(TEXT, encoding="utf-8")
    return Page("page.md", tmp_path)


def test_every_number_is_made_again_or_said_to_be_none(page):
    page.says(*SAYS)
    assert page.rest(NOT_MEASURED) == []


def test_numbers_that_nobody_made_are_left_with_their_words(page):
    page.says(SAYS[1])
    left = page.rest(NOT_MEASURED)
    assert [each.split(">")[1].split("<")[0] for each in left] == [".134", ".107", ".136", "7 %", "4,096"]
    assert left[0].endswith("NoPE is >.134< [.107, .136] from T5, and 7 % of 4,096 ")


@pytest.mark.parametrize("wrong", ["NoPE is .135 [.107, .136]", "NoPE is .13", "107, .136", "−.014 … 1e-8"])
def test_a_digit_that_is_not_on_the_page_fails(page, wrong):
    with pytest.raises(AssertionError, match="does not say"):
        page.says(wrong)


def test_the_message_shows_what_the_page_has_instead(page):
    with pytest.raises(AssertionError, match=r"but has\n.*NoPE is \.134 \[\.107, \.136\]"):
        page.says("NoPE is .135 [.107, .136] from T5")


def test_a_snippet_of_two_places_wants_more_words(page):
    page.text += " Again 87 of 100."
    with pytest.raises(AssertionError, match="2 places"):
        page.says("87 of 100")


@pytest.mark.parametrize("part", ["4 sections", "A page"])
def test_what_is_allowed_has_to_be_there_and_to_hold_a_number(page, part):
    with pytest.raises(AssertionError, match="names"):
        page.rest({"names": [part]})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("from −1.2 to .74–.84, 10⁻⁵ or 3/4", ["−1.2", ".74", ".84", "10⁻⁵", "3", "4"]),
        ("T5, d_2 and W_1 but 2 % of 1,024×", ["2 %", "1,024"]),
        ("version 0.5.8, 5e-15, 2e−6, 12,345,678.", ["0.5.8", "5e-15", "2e−6", "12,345,678"]),
    ],
)
def test_what_counts_as_a_number(text, numbers):
    assert NUMBER.findall(text) == numbers


def test_numbers_are_written_as_the_pages_write_them():
    assert [short(x) for x in (0.134, -0.014, 1.049, -0.001, 0.0, -2.0)] == [
        ".13",
        "−.01",
        "1.05",
        ".00",
        ".00",
        "−2.00",
    ]
    assert short(0.2249999999999999) == ".23" and percent(0.375) == "38 %"  # a half is rounded up, as by hand
    assert short(0.1344, 3) == ".134" and short(11.38, 1) == "11.4"
    assert between(-0.02, 0.29) == "[−.02, .29]"
    assert with_interval({"value": 0.13, "low": -0.02, "high": 0.29}) == ".13 [−.02, .29]"
    assert percent(0.069) == "7 %" and power(5.2e-15) == "5e-15" and power(1.8e-7, 1) == "1.8e-7"
