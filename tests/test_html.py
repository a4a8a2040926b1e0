"""The pieces that pages are made of: what people wrote stays text."""

import base64

import pytest

from memcontrol.view.html import (
    make_data_uri,
    read_asset,
    render_code,
    render_definitions,
    render_document,
    render_list,
    render_paragraph,
    render_row,
    render_section,
    render_table,
)

EVIL, SAFE = "<b>&", "&lt;b&gt;&amp;"


@pytest.mark.parametrize(
    "render",
    [
        render_code,
        render_paragraph,
        render_section,
        lambda text: render_paragraph(f"`{text}`"),
        lambda text: render_table([text], []),
        lambda text: render_definitions({text: "a"}),
        lambda text: render_definitions({"a": text}),
        lambda text: render_list([text]),
        lambda text: render_document(text, "", ""),
    ],
)
def test_text_is_escaped(render):
    assert SAFE in render(EVIL) and EVIL not in render(EVIL)


def test_words_between_backticks_are_code():
    assert render_paragraph("run `a` and `b`", "note") == (
        "<p class=note>run <code>a</code> and <code>b</code></p>"
    )


def test_row_names_its_trial_and_keeps_all_but_its_first_cell_on_one_line():
    assert render_row(["<i>1</i>", "2"], 3, "pick") == (
        '<tr class="pick" data-trial="3"><td><i>1</i></td><td class=n>2</td></tr>'
    )
    assert "data-trial" not in render_row(["1"]) and 'data-trial="0"' in render_row(["1"], 0)


def test_definitions_leave_out_what_is_empty():
    assert render_definitions({"a": "", "b": "c"}) == "<dl><dt>b</dt><dd>c</dd></dl>"


def test_document_says_what_its_browser_may_load():
    policy = "default-src 'none'"
    assert policy in render_document("t", "", "", policy)
    assert "Content-Security-Policy" not in render_document("t", "", "")


def test_data_uri_holds_the_content():
    head, content = make_data_uri("image/png", b"\x00\xff").split(",")
    assert head == "data:image/png;base64" and base64.b64decode(content) == b"\x00\xff"


@pytest.mark.parametrize("name", ["report.css", "report.js"])
def test_style_and_script_lie_beside_the_module(name):
    assert read_asset(name).strip()
