"""What a trial of either kind does around its training: hold the folder, record a failure, write the scores last."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.markup import escape

from bench.core.environment import environment
from bench.core.errors import Diverged
from bench.core.files import remove_parts, sha256_file
from bench.core.progress import say
from bench.core.runs import KEPT, Changed, Run, check_whole


@contextmanager
def begun(run: Run, about: dict[str, Any], resume: bool = True) -> Iterator[None]:
    """Holds the folder of ``run`` while it is trained and scored; ``about`` goes into its config.json, with the
    environment, and where it resumes in another one those before. Forgets an earlier failure, and records Diverged as
    failure.json. Raises Busy where another process has the folder, UserError where a file of it is damaged, and
    Changed where it would go on from a checkpoint on something else than it was ``trained_on`` before."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked():
        check_whole(run)
        remove_parts(run.folder)
        resumes = resume and all((run.folder / name).exists() for name in ("config.json", "checkpoint.pt"))
        if resumes and (before := run.trained_on()) not in (None, about.get("trained_on")):
            change = f"has changed since it was begun, from {before[:16]} to {about['trained_on'][:16]}"
            raise Changed(f"what {run.folder} is trained on {change}; put it back, or move that folder")
        run.seal("config.json", {**about, **_environments(run if resumes else None)})
        run.forgive()
        try:
            yield
        except Diverged as error:
            run.fail("diverged", str(error))
            raise


def _environments(resumed: Run | None) -> dict[str, Any]:
    """The present environment and, of a run that goes on, the ``earlier`` ones, oldest first; warns where numbers may
    have changed with the code."""
    now = environment()
    before = resumed.environments() if resumed else []
    if not before or before[-1] == now:
        return {"environment": now, **({"earlier": before[:-1]} if before[:-1] else {})}
    for name, words in (("commit", "another commit"), ("versions", "other versions"), ("python", "another Python")):
        old, new = before[-1].get(name), now[name]
        if old != new:
            changed = f"{old} before, {new} now" if name != "versions" else _changes(old, new)
            say(f"[yellow]{escape(resumed.folder.name)} goes on under {words}:[/] {escape(changed)}")
    return {"environment": now, "earlier": before}


def _changes(old: Any, new: dict[str, Any]) -> str:
    known = old if isinstance(old, dict) else {}
    return ", ".join(
        f"{name} {known.get(name)} before, {new[name]} now" for name in new if known.get(name) != new[name]
    )


def complete(run: Run, metrics: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Writes metrics.json, which makes ``run`` a finished one, and tidies it up; call it last."""
    files = {path.name: sha256_file(path) for pattern in KEPT for path in run.folder.glob(pattern)}
    run.seal("metrics.json", {"metrics": metrics, "protocol": protocol, "files": files})
    tidy(run)


def tidy(run: Run) -> None:
    """Drops the checkpoint of a finished ``run``, which has one where it was killed just before that."""
    with suppress(OSError):  # it has none, or can be read only
        (run.folder / "checkpoint.pt").unlink()
