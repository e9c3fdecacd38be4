"""The bar: one line now and then, with the time that is left; on a terminal it is live."""

import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.core import progress
from bench.core.progress import Bar, SafeConsole, say


class Clock:
    """Stands in for the time module."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_elsewhere_than_on_a_terminal_a_line_every_ten_seconds(clock, capsys):
    """Two units a second, of 100: what is left after 20 of them takes 40 seconds."""
    with Bar("decoding", 100) as bar:
        for _ in range(50):
            clock.now += 0.5
            bar.advance(figures="loss 0.1")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "decoding  20/100  ETA 40 s  loss 0.1",
        "decoding  40/100  ETA 30 s  loss 0.1",
    ]
    assert bar.done == 50


def test_what_was_done_before_does_not_count_as_speed(clock, capsys):
    """From 60 to 80 in ten seconds: the last 20 take ten more."""
    with Bar("run", 100, start=60) as bar:
        clock.now += 10
        bar.advance(20)
    assert capsys.readouterr().err == "run  80/100  ETA 10 s\n"


def test_nothing_is_said_of_quick_work(clock, capsys):
    with Bar("run", 5) as bar:
        for _ in range(5):
            clock.now += 1.9
            bar.advance()
    assert capsys.readouterr().err == ""


def test_a_standstill_has_no_eta(clock, capsys):
    with Bar("run", 5, seconds=1.0) as bar:
        clock.now += 2
        bar.advance(0)
    assert capsys.readouterr().err == "run  0/5  ETA unknown\n"


def test_who_knows_better_how_much_is_left_is_believed(clock, capsys, monkeypatch):
    left = [None, 90.0]
    with Bar("run", 5, seconds=1.0, eta=lambda: left.pop(0)) as bar:
        for _ in range(2):
            clock.now += 2
            bar.advance()
    assert capsys.readouterr().err.splitlines() == ["run  1/5  ETA unknown", "run  2/5  ETA 90 s"]
    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    monkeypatch.setattr(progress, "console", console)
    with Bar("run", 10, eta=lambda: 70.0) as bar:
        bar.advance()
        bar.live.refresh()
    assert "ETA 70 s" in Text.from_ansi(console.file.getvalue()).plain


def test_on_a_terminal_the_bar_is_live(monkeypatch):
    """It starts where the work does and keeps its figures until there are others."""
    monkeypatch.setattr(progress, "console", Console(force_terminal=True, file=io.StringIO(), width=120))
    with Bar("run", 10, start=3) as bar:
        (task,) = bar.live.tasks
        assert (task.description, task.completed, task.total) == ("run", 3, 10)
        bar.advance(2, "loss 0.1")
        assert (task.completed, task.fields["figures"]) == (5, "loss 0.1")
        bar.advance()
        assert (task.completed, task.fields["figures"]) == (6, "loss 0.1")
        assert bar.live.live.is_started
    assert not bar.live.live.is_started


def test_what_happens_is_said_in_one_line_on_the_error_stream(capsys):
    """However long; standard output is for what was asked for."""
    say("word " * 100 + "[bold]end[/]")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "word " * 100 + "end\n"
    say("runs/:x:")
    assert capsys.readouterr().err == "runs/:x:\n"  # a name, and no picture
    progress.stdout.print("table")
    assert capsys.readouterr() == ("table\n", "")


def test_a_live_bar_tells_all_on_the_error_stream_and_vanishes(monkeypatch):
    """Label, count, figures and what is left of the time; nothing of it stays in the way of what is said next."""
    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    monkeypatch.setattr(progress, "console", console)
    with Bar("run", 10) as bar:
        bar.advance(4, "loss 0.1")
        bar.live.refresh()
        shown = Text.from_ansi(console.file.getvalue()).plain
        assert bar.live.live.transient
    for words in ("run", "4/10", "ETA", "loss 0.1", "0:00:00"):
        assert words in shown
    assert bar.live.console is console


@pytest.mark.parametrize("terminal", [True, False])
def test_what_fails_under_a_bar_is_not_hidden(monkeypatch, terminal):
    """And the terminal is given back."""
    monkeypatch.setattr(progress, "console", Console(force_terminal=terminal, file=io.StringIO(), width=120))
    with pytest.raises(ZeroDivisionError), Bar("run", 10) as bar:
        1 / 0  # noqa: B018
    assert bar.live is None or not bar.live.live.is_started


def test_numbers_and_words_keep_the_colour_of_their_line():
    """In tables, too: colour is for what is marked."""
    for console in (progress.console, progress.stdout):
        assert console.render_str("step 12 of True 'x' /a/b").spans == []


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown_cannot_steer_the_terminal(terminal):
    """Names and reasons come from files that anybody may have written; tables, markup and lines keep their own."""
    out = io.StringIO()
    shown = SafeConsole(file=out, force_terminal=terminal, highlight=False, width=60)
    hostile = "a\x1b]0;title\x07b\x9b2J\u202ec"
    table = Table(hostile)
    table.add_row(Text(hostile))
    shown.print(table)
    shown.print(f"[bold]{hostile}[/]\nnext", soft_wrap=True)
    shown.print(hostile, markup=False)
    text = out.getvalue()
    for mark in ("\x1b]", "\x07", "\x9b", "\u202e"):
        assert mark not in text
    assert "a\ufffd]0;title" in text
    assert "\nnext\n" in text
    assert ("\x1b[1m" in text) == terminal


def test_a_plain_line_of_a_bar_cannot_either(capsys):
    with Bar("x\x1b[2J", 2, seconds=0.0) as bar:
        bar.advance(1, "y\x07")
    assert capsys.readouterr().err.startswith("x\ufffd[2J  1/2  ETA ")
