"""The URL of a study's database: where it comes from, and how it is printed."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy

from bench.core.errors import UserError

# What of a URL's query may be printed: a mistyped password has any other name.
PLAIN = ("user", "host", "port", "dbname", "sslmode", "connect_timeout", "application_name", "timeout")
EXAMPLES = "sqlite:///studies.db or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
IN_MEMORY = re.compile(r"sqlite(\+\w+)?:(//)?/?(:memory:|file:.*memory.*)?(\?.*)?$")


def storage_url(given: str | None, results: Path) -> str:
    """``given``, or else ``default_url``. Raises UserError for a database that ends with its process."""
    url = given or default_url(results)
    if IN_MEMORY.match(url):
        raise UserError(f"the database {url} is kept nowhere; name a file, such as sqlite:///studies.db, or a server")
    return url


def default_url(results: Path) -> str:
    """$VQBENCH_STORAGE, or else the SQLite database below ``results``."""
    file = sqlalchemy.URL.create("sqlite", database=str(results / "studies" / "optuna.db"))
    return os.environ.get("VQBENCH_STORAGE") or file.render_as_string()  # in which a ? or % of the path is escaped


def check_place(url: str) -> None:
    """Raises UserError where something else than a file is in the place of the SQLite database at ``url``, or where
    that cannot be made."""
    parsed = _parsed(url)
    if parsed is None or not parsed.drivername.startswith("sqlite") or not parsed.database:
        return
    place, fix = parsed.database, "or name another database with --storage"
    for file in (place, *(place + part for part in ("-journal", "-wal", "-shm"))):  # SQLite waits for a pipe
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{file} is not a file, so no part of a database; move it away, {fix}")
    folder = os.path.dirname(os.path.realpath(place))  # a link leads to where it is made
    if not os.path.isdir(folder):
        raise UserError(f"the database {place} cannot be made, as there is no folder {folder}; make that, {fix}")


def hide_misplaced(words: Sequence[str]) -> list[str]:
    """``words`` of a command line, the passwords masked in URLs that no --storage takes: what is wrong is shown."""
    return [
        word if "://" not in word or before == "--storage" or word.startswith("--storage=") else _masked(word)
        for before, word in itertools.pairwise(["", *words])
    ]


def _masked(word: str) -> str:
    flag, _, url = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{flag}={without_password(url)}" if flag else without_password(url)


def _parsed(url: str) -> sqlalchemy.URL | None:
    try:
        return sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return None


def without_password(url: str) -> str:
    """``url`` as it may be printed: passwords masked, also those of its query. One that cannot be read is not shown."""
    parsed = _parsed(url)
    if parsed is None:
        return "the storage URL, which cannot be read"
    local = parsed.drivername.startswith("sqlite")
    if not local and "@" in f"{parsed.username}{parsed.host}{parsed.database}":  # then it may be that of a password
        return f"a {parsed.drivername} URL with an @ too many (write %40 in a password)"
    secret = {name: "***" for name in parsed.query if name not in PLAIN}
    if not secret and parsed.password is None:
        return url
    return parsed.update_query_dict(secret).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")
