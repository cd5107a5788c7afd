"""Tables: aligned columns for a terminal, pipes for Markdown, nothing cut."""

from __future__ import annotations

from klora_compile.report.table import labelled, markdown_table, text_table


def test_columns_are_as_wide_as_their_cells() -> None:
    assert text_table([["a", "bcd", "e"], ["fgh", "i"]]) == "a    bcd  e\nfgh  i"


def test_numbers_stand_to_the_right_below_their_heads() -> None:
    rows = [["load", "21.9", "8.03"], ["remove", "131.8"]]
    assert text_table(rows, heads=("mode", "ms", "ratio"), numbers=True) == (
        "mode       ms  ratio\nload     21.9   8.03\nremove  131.8"
    )


def test_labels_share_a_column_and_no_line_ends_in_spaces() -> None:
    rows = [("rule", "klora"), ("", "near"), ("near ties", "")]
    assert labelled(rows) == "  rule       klora\n             near\n  near ties"
    assert labelled([]) == ""


def test_a_long_cell_is_not_cut() -> None:
    assert labelled([("a", "x" * 300)]).endswith("x" * 300)


def test_markdown_has_its_cells_as_they_are() -> None:
    assert markdown_table(["a", "b"], [["`1`", "2"]]) == "| a | b |\n| --- | --- |\n| `1` | 2 |"
    assert markdown_table(["a"], []) == "| a |\n| --- |"
