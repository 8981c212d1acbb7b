"""What is printed of text that users wrote: nothing of it is markup, acts on a terminal or ends a run."""

import io
import os
import sys
import warnings
from dataclasses import replace

import pytest
from rich.table import Table

from rome_fast.cli.shared import progress
from rome_fast.evaluation import EditMetrics
from rome_fast.records import Record
from rome_fast.report import edit_table, metrics_table
from rome_fast.report.document import Bullets, Folded, Heading, Picture, Text, to_html, to_markdown
from rome_fast.report.document import Table as Cells
from rome_fast.report.figures import collapse_figure
from rome_fast.report.outcomes import verdict
from rome_fast.runs.terminal import patient_streams, say, show, tell, visible

NASTY = "[/INST] [bold]:smile: \x1b[31m\r\x00\x9b2J \u202e$x_{ | <script> \\"
SHOWN = r"[/INST] [bold]:smile: \x1b[31m\r\x00\x9b2J \u202e$x_{ | <script> \ ".rstrip()
RECORD = Record(
    prompt=f"{{}} {NASTY}",
    subject="Rome",
    target="Paris\n[/b]",
    method="c-rome",
    layer=1,
    loss=0.1,
    steps=3,
    drafted=0,
    converged=True,
    denominator=2.0,
    numerator_norm=1.0,
    update_norm=0.5,
    weight_norm=2.0,
    missed=0.0,
    needs_prefix=False,
    collapsed=False,
)
METRICS = EditMetrics(
    subject="Rome [/b]\x1b",
    target="Paris",
    probability=0.5,
    argmax=True,
    decoded="[/x]\u202e",
    decoded_right=False,
    answer="[/y]\x1b" + "a" * 60,
    answer_right=False,
    efficacy=None,
    paraphrase=None,
    neighborhood=None,
)


def printed(encoding, action):
    """What an action prints on a standard output of an encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with patient_streams():
            action()
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_what_would_steer_a_terminal_is_spelled_out():
    assert visible(NASTY) == SHOWN
    assert (
        visible("a\tb\nc – Straße 東京 👩\u200d🚀 نمی\u200cخواهم") == "a\tb\nc – Straße 東京 👩\u200d🚀 نمی\u200cخواهم"
    )
    assert visible("\ud800 \x7f \u2067 \x07") == r"\ud800 \x7f \u2067 \x07"
    assert visible("→ é", "latin-1") == "\\u2192 é"
    assert visible("→ é", "ascii") == visible("→ é", "no such encoding") == r"\u2192 \xe9"


def test_a_table_shows_text_as_it_is():
    text = printed("utf-8", lambda: show(edit_table([RECORD])))
    assert not set(text) & {"\x1b", "\u202e", "\r", "\x00"}
    # A cell that is wrapped.
    cell = "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert "".join(SHOWN.split()) in "".join(cell.split())
    assert r"Paris\n[/b]" in cell
    assert r"Rome [/b]\x1b → Paris" in printed("utf-8", lambda: show(metrics_table([METRICS])))
    shown = printed("utf-8", lambda: show(metrics_table([replace(METRICS, answer_right=True)])))
    assert not set(shown) & {"\x1b", "\u202e"}
    cell = "".join(line.split("│")[5].strip() for line in shown.splitlines() if "│" in line)
    assert cell == r"'[/y]\x1b" + "a" * 34 + "…' ✓"
    # Those of other rooms, whoever makes them.
    table = Table("[/column]", title="[/title]\x1b", caption="[/caption]")
    table.add_row("[/cell]\x9b")
    shown = printed("utf-8", lambda: show(table))
    assert all(part in shown for part in ("[/column]", r"[/title]\x1b", "[/caption]", r"[/cell]\x9b"))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_an_encoding_does_not_have_is_spelled_out(encoding):
    def action():
        show(edit_table([replace(RECORD, prompt="{} → 東")]))
        say("東 → done")
        print("東 → by print")

    text = printed(encoding, action)
    assert r"Rome \u2192 \u6771" in text
    assert r"\u6771 \u2192 done" in text
    assert r"\u6771 \u2192 by print" in text
    # Columns stay in line, as what is spelled out has its width.
    widths = {len(line) for line in text.splitlines() if line.startswith(("|", "+"))}
    assert len(widths) == 1


def test_a_reader_that_has_gone_ends_nothing(monkeypatch):
    """`| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    # Closing it would raise if anything were left to write.
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with patient_streams() as unprinted:
            for _ in range(3):
                say("a line")
                show(edit_table([RECORD]))
            assert unprinted() is None


def test_a_full_disk_is_told_and_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with patient_streams() as unprinted:
            print("a line")
            assert unprinted() == "No space left on device"
            say("another one")


def test_closed_and_absent_streams_end_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    with patient_streams() as unprinted:
        say("a line")
        tell("another one")
        assert "closed" in unprinted()
    assert sys.stdout is closed
    assert sys.stderr is None


def test_a_warning_is_one_line_and_raises_nothing(capsys, monkeypatch):
    with patient_streams(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(NASTY, UserWarning, stacklevel=1)
    with open("/dev/full", "w") as stream, monkeypatch.context() as patch, patient_streams():
        patch.setattr(sys, "stderr", stream)
        with patient_streams(), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("lost", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == f"warning: {SHOWN}\n"


@pytest.mark.parametrize("terminal", [False, True], ids=["in a log", "on a terminal"])
def test_a_warning_above_a_bar_shows_text_as_it_is(terminal, capsys, monkeypatch):
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", "200")
    with patient_streams(), progress("[/stage]", "[/unit]") as (advance, reading):
        advance(1, 2)
        reading(10, 5.0)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(NASTY, UserWarning, stacklevel=1)
    text = capsys.readouterr().err
    assert f"warning: {SHOWN}" in text
    assert "[/stage]" in text
    assert "[/unit]" in text


def test_documents_and_figures_take_any_text(tmp_path):
    blocks = [
        Heading(NASTY),
        Text(NASTY),
        Bullets([NASTY]),
        Cells([NASTY, "n"], [[NASTY, "1"]]),
        Folded(NASTY, Cells([NASTY, "n"], [[NASTY, "1"]])),
        Picture("a.png", b"", NASTY),
    ]
    html, markdown = to_html(NASTY, blocks), to_markdown(NASTY, blocks)
    for text in (html, markdown):
        assert not set(text) & {"\x1b", "\x00", "\u202e", "\x9b", "\r"}
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 12
    assert "<script" not in markdown.replace(r"\<", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.replace(r"\|", "").count("|") for line in rows] == [3, 3, 3]
    assert r"\$x\_{" in markdown
    measured = replace(RECORD, prompt="{} costs $x_{ and \\$ or $5", perplexity_after=3.0, probability_after=0.5)
    collapse_figure([measured], 2.0, "conditions $y_{", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"applied": False, "left_out": "did not converge", "converged": False}, "left out: did not converge"),
        ({"applied": False, "left_out": "would collapse", "collapsed": True}, "left out: would collapse"),
        ({"applied": False, "left_out": "loss not finite", "collapsed": True}, "left out: loss not finite"),
        ({"collapsed": True}, "collapse predicted"),
        ({"collapsed": True, "perplexity_after": 900.0}, "model collapsed"),
        ({}, "applied"),
        ({"missed": 0.4}, "applied, met in part (40% off)"),
        ({"argmax_after": True, "missed": 0.06}, "edited, met in part (6% off)"),
        ({"argmax_after": True, "missed": 0.04}, "edited"),
        ({"argmax_after": False, "argmax_after_prefixed": 0.5}, "edited, answers behind a prefix"),
        ({"argmax_after": True, "argmax_after_prefixed": 0.4}, "edited, but not behind a prefix"),
        ({"argmax_after": False, "argmax_after_prefixed": 0.4, "missed": 1.2}, "fact lost, met in part (120% off)"),
    ],
)
def test_a_verdict_says_what_became_of_an_edit(changes, words):
    assert verdict(replace(RECORD, **changes)) == words


def test_a_weight_of_zeros_has_no_ratio():
    assert "–" in printed("utf-8", lambda: show(edit_table([replace(RECORD, weight_norm=0.0)])))
