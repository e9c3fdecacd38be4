"""What wrong codes cost: a prior will make mistakes, and the decoder has to live with them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.core.errors import UserError
from bench.metrics import Metric, from_uint8, full_precision, perceptual, psnr

from .instrument import BATCH, Instrument, Reading, Subject, arrays, spread

IMAGES = 64
SHARES = (0.0, 0.01, 0.05, 0.1, 0.2)  # of the codes that are replaced
HEADLINE = 0.05
KINDS = {"random": "by any other", "near": "by the nearest other in use"}
SEED = 0
SHOWN, PICTURED = 10, (0.05, 0.2)  # images in the picture, and shares


def damaged(codes: Tensor, substitutes: Tensor, share: float) -> Tensor:
    """``codes`` (…) with each replaced by its substitute, of the same shape, with probability ``share``: always the
    same places, and those of a smaller share among those of a larger one. UserError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share:g} of the codes cannot be replaced; give one from 0 to 1")
    draw = torch.rand(codes.shape, generator=torch.Generator().manual_seed(SEED))
    return torch.where((draw < share).to(codes.device), substitutes, codes)


def random_others(codes: Tensor, codebook_size: int) -> Tensor:
    """For each of ``codes`` any other of the K, all equally likely; itself where there is no other."""
    generator = torch.Generator().manual_seed(SEED + 1)
    step = torch.randint(1, max(2, codebook_size), codes.shape, generator=generator)
    return (codes + step.to(codes.device)) % codebook_size


def nearest_others(codes: Tensor, subject: Subject) -> Tensor:
    """For each of ``codes`` the one among them whose vector is nearest to its own; itself where there is no other."""
    used, places = codes.unique(return_inverse=True)
    if len(used) == 1:
        return codes
    vectors = subject.lookup(used.view(-1, 1, 1)).flatten(1)
    near = torch.empty_like(used)
    for rows in torch.arange(len(used), device=used.device).split(1024):
        distances = torch.cdist(vectors[rows], vectors)
        distances[torch.arange(len(rows)), rows] = torch.inf
        near[rows] = distances.argmin(1)
    return used[near][places]


def measure(subject: Subject) -> Reading:
    """Means over IMAGES images of PSNR and LPIPS (alex) at each of SHARES, and what the HEADLINE costs in dB."""
    x = subject.few(IMAGES)
    codes = subject.encode(x)
    others = {"random": random_others(codes, subject.codebook_size), "near": nearest_others(codes, subject)}
    x_hat, pictured, metrics = subject.decode(codes), spread(len(x), SHOWN), {}
    pictures = [x[pictured], x_hat[pictured]]
    whole = _scores(x_hat, x)
    for kind, substitutes in others.items():
        for share in SHARES:
            x_hat = subject.decode(damaged(codes, substitutes, share)) if share else x_hat
            scores = _scores(x_hat, x) if share else whole
            metrics |= {f"{score}_{kind}_{100 * share:.0f}": value for score, value in scores.items()}
            pictures += [x_hat[pictured]] if share in PICTURED else []
        metrics[f"loss_{kind}"] = whole["psnr"] - metrics[f"psnr_{kind}_{100 * HEADLINE:.0f}"]
    return Reading(metrics, lambda path: draw(path, metrics, [arrays(part) for part in pictures]))


def _scores(x_hat: Tensor, x: Tensor) -> dict[str, float]:
    network = perceptual("alex", x.device)
    with torch.no_grad(), full_precision(x.device):
        pairs = zip(x_hat.split(BATCH), x.split(BATCH), strict=True)
        lpips = torch.cat([network(from_uint8(a), from_uint8(b)) for a, b in pairs])
    return {"psnr": psnr(x_hat, x).double().mean().item(), "lpips": lpips.double().mean().item()}


def draw(path: Path, metrics: dict[str, float], pictures: list[np.ndarray]) -> None:
    """Saves the curves over SHARES and below them ``pictures``, (n, H, W, 3) uint8 each: images, reconstructions, and
    the same at each of PICTURED for each kind."""
    from matplotlib.figure import Figure

    from bench.core import plots  # and seaborn: not before it is needed

    size = 12, 2.9 + 12 * len(pictures) / SHOWN
    figure = Figure(figsize=size, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.9, size[1] - 2.9])
    panels = above.subplots(1, 2)
    for axes, (score, label) in zip(panels, {"psnr": "PSNR, dB ↑", "lpips": "LPIPS (alex) ↓"}.items(), strict=True):
        for kind, words in KINDS.items():
            values = [metrics[f"{score}_{kind}_{100 * share:.0f}"] for share in SHARES]
            axes.plot([100 * share for share in SHARES], values, marker="o", label=f"replaced {words}")
        axes.set(xlabel="replaced codes, %", ylabel=label)
        axes.legend()
    loss = ", ".join(f"{metrics[f'loss_{kind}']:.2f} dB if {kind}" for kind in KINDS)
    panels[0].set_title(f"{HEADLINE:.0%} wrong codes cost {loss}", loc="left")
    words = [f"{share:.0%} {kind}" for kind in KINDS for share in PICTURED]
    sheet = plots.tile(pictures, scale=2)
    plots.show(below.subplots(), sheet, ["original", "reconstruction", *words], "")
    plots.save(figure, path)


ROBUSTNESS = Instrument(
    about="wrong codes, random or near ones, in place of some: what they cost",
    version=1,
    seconds=5,
    metrics={
        "loss_random": Metric("lost to 5 % random codes, dB", ".2f", "lower"),
        "loss_near": Metric("lost to 5 % near codes, dB", ".2f", "lower"),
        **{
            f"{score}_{kind}_{100 * share:.0f}": Metric(f"{label}, {share:.0%} {kind}", form, better)
            for score, label, form, better in (("psnr", "PSNR dB", ".2f", "higher"), ("lpips", "LPIPS", ".3f", "lower"))
            for kind in KINDS
            for share in SHARES
        },
    },
    shown=("loss_random", "loss_near"),
    measure=measure,
    fails=Subject.vectorless,
)
