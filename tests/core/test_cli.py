"""The manners of commands: which mistakes are told in one sentence, and in which words."""

import errno

import pytest

from bench.core.cli import fail, guarded
from bench.core.errors import UserError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_place_that_takes_no_more_is_a_mistake_that_users_can_mend(capsys, number):
    """A full disk, a full quota, no permission, a disk for reading only; with the file, where the system names it."""
    for file, named in (("x.pt", "x.pt"), (None, "results")):

        def write(file=file) -> int:
            raise OSError(number, "no way", *([file] if file else []))

        assert guarded(write) == 2
        said = capsys.readouterr()
        assert said.err == f"error: no way while writing {named}; free or choose another --results\n"
        assert said.out == ""


def test_brackets_of_a_message_are_shown_as_they_are(capsys):
    """And are not taken for markup, which would hide the value that is wrong."""

    def work() -> int:
        raise UserError("unknown data '[bold]x[/]'; choose photos")

    assert guarded(work) == fail("unknown data '[bold]x[/]'; choose photos") == 2
    assert capsys.readouterr().err == 2 * "error: unknown data '[bold]x[/]'; choose photos\n"
