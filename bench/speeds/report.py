"""What was timed, kept as CSV, table and pictures."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.analysis.looks import plain_log
from bench.core.environment import environment
from bench.core.files import atomic_path

from .contest import met

PEERS = ("vector-quantize-pytorch", "transformers", "mamba-ssm")
# What a number is, by its kind.
WORDS = {"peer": "× as fast as", "bound": "× the time of", "beyond": "s beyond", "memory": "MiB beyond"}
SPEED_FILE, GROWTH_FILE = "speed.csv", "growth.csv"


def machine(device: str) -> dict[str, Any]:
    """What a time depends on besides the code: columns of every row."""
    about = environment()
    processor = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    versions = {**about["versions"], **{name: _version(name) for name in PEERS}}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    found = {"device": device, "processor": processor, "threads": about["threads"], "commit": about["commit"]}
    return {**found, "packages": packages}


def _processor() -> str:
    """Name of the CPU, and which of its units for matrix arithmetic torch has."""
    found = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    units = {"AVX-512 BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    there = [name for name, asked in units.items() if getattr(torch.cpu, asked, lambda: False)()]
    return " ".join([found.partition(":")[2].strip() or found, *(f"with {name}" for name in there)])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def line(row: dict[str, Any]) -> str:
    """A row of speeds in one line."""
    number = "unknown" if row["number"] is None else f"{row['number']:.2f}"
    goal = f" (goal {row['goal']:g}{', missed' if met(row) is False else ''})" if row["goal"] is not None else ""
    return f"{row['path']}, {row['case']}: {number} {WORDS[row['kind']]} {row['against']}{goal}"


def keep(file: Path, rows: list[dict[str, Any]], /, **place: str) -> None:
    """Writes ``rows`` into the CSV ``file``, in place of those there that have the values ``place`` of columns."""
    table = pd.DataFrame(rows)
    if file.is_file():
        before = pd.read_csv(file)
        old = (before[[*place]] == pd.Series(place)).all(axis=1)
        table = pd.concat([before[~old], table], ignore_index=True) if rows else before[~old]
    if table.empty:
        file.unlink(missing_ok=True)
        return
    with atomic_path(file) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def publish(folder: Path) -> None:
    """Writes tables.md, speed.png and growth.png from the CSV files in ``folder``, those that there are."""
    sections = []
    if (folder / SPEED_FILE).is_file():
        rows = pd.read_csv(folder / SPEED_FILE)
        sections += [_speeds(rows)]
        _picture_speeds(rows, folder / "speed.png")
    if (folder / GROWTH_FILE).is_file():
        rows = pd.read_csv(folder / GROWTH_FILE)
        sections += [_growths(rows)]
        _picture_growths(rows, folder / "growth.png")
    words = "# Speed\n\nMade by `python -m bench.speed`, which says how. Numbers are medians over rounds, in brackets "
    words += "what 5 and 95 % of the rounds stay below.\n\n"
    with atomic_path(folder / "tables.md") as temporary:
        temporary.write_text(words + "\n".join(sections))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _speeds(rows: pd.DataFrame) -> str:
    text = ["| path | case | against | | goal | ours | other |", "|---|---|---|---|---|---|---|"]
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        number = "–" if row["number"] is None else f"{row['number']:.2f}"
        spread = "" if row.get("low") is None else f" ({row['low']:.2f}–{row['high']:.2f})"
        goal = {True: "met", False: "**missed**", None: ""}[met(row)]
        least = "≥" if row["kind"] == "peer" else "≤"
        goal = f"{least} {row['goal']:g}, {goal}" if goal else "–"
        times = [_time(row.get(name)) for name in ("ours", "other")]
        against = f"{WORDS[row['kind']]} {row['against']}"
        text.append(f"| {row['path']} | {row['case']} | {against} | {number}{spread} | {goal} | {' | '.join(times)} |")
    return "\n".join([*_machines(rows), "", *text, ""])


def _growths(rows: pd.DataFrame) -> str:
    heads = ("work", "grows with", "times at these sizes", "exponent", "of the two largest", "expected")
    text = ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in rows.groupby("growth", sort=False):
        first = own.iloc[0]
        times = ", ".join(f"{size:,}: {_time(seconds)}" for size, seconds in zip(own["size"], own.seconds, strict=True))
        slopes = f"{first.exponent:.2f} | {first.exponent_at_end:.2f}"
        text.append(f"| {name} | {first.variable} | {times} | {slopes} | {first.expected} |")
    return "\n".join(["## Growth", "", *_machines(rows), *text, ""])


def _machines(rows: pd.DataFrame) -> list[str]:
    """One line for each machine, commit and list of packages that rows are from."""
    found, name = [], "path" if "path" in rows else "growth"
    by = ["processor", "threads", "commit", "packages"]
    for (processor, threads, commit, packages), own in rows.groupby(by, sort=False, dropna=False):
        where = f"{processor}, {threads} threads, commit {str(commit)[:10]}"
        found.append(f"{', '.join(own[name].unique())}: {where}; {packages}.  ")
    return found


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _picture_speeds(rows: pd.DataFrame, path: Path) -> None:
    """How far each ratio is from its goal, as bars: to the right of 1 it is met."""
    ratios = rows[rows.goal.notna() & rows.number.notna()]
    if ratios.empty:
        return
    share = np.where(ratios.kind == "peer", ratios.number / ratios.goal, ratios.goal / ratios.number.clip(lower=1e-3))
    labels = [f"{row.path} {row.case}, {WORDS[row.kind]} {row.against}" for row in ratios.itertuples()]
    figure = Figure(figsize=(9, 0.6 + 0.22 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    colours = [sns.color_palette()[2 if value >= 1 else 3] for value in share]
    axes.barh(range(len(share)), np.clip(share, 1e-2, 1e2) - 1, left=1, color=colours, height=0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="how far beyond its goal, as a ratio (right of 1: met)")
    plain_log(axes.xaxis)
    axes.margins(y=0.01)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    sns.despine(ax=axes, left=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _picture_growths(rows: pd.DataFrame, path: Path) -> None:
    """Seconds against size, one panel for each variable, both axes logarithmic."""
    variables = list(dict.fromkeys(rows.variable))
    figure = Figure(figsize=(3.4 * len(variables), 3.2), layout="constrained")
    for axes, variable in zip(np.atleast_1d(figure.subplots(1, len(variables))), variables, strict=True):
        for name, own in rows[rows.variable == variable].groupby("growth", sort=False):
            label = f"{name}: {own.exponent.iloc[0]:.2f}, {own.exponent_at_end.iloc[0]:.2f}"
            sns.lineplot(x=own["size"], y=1e3 * own.seconds, marker="o", ax=axes, label=label)
        axes.set(xscale="log", yscale="log", xlabel=variable, ylabel="ms")
        sizes = sorted(rows["size"][rows.variable == variable].unique())
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        plain_log(axes.yaxis)
        axes.legend(fontsize=7, title="exponent, and of the two largest", title_fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
