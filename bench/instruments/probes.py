"""What codes tell about what an image shows, where that is known."""

import warnings

import numpy as np
import torch
from torch import Tensor

from bench.metrics import Metric

from .instrument import Instrument, Reading, Subject, pixels, spread

TRAIN, SCORED = 2048, 1024  # images, at most, that probes are fitted to and scored on
NEIGHBOURS = 10
ITERATIONS = 200  # of the logistic regression


def histograms(train: Tensor, scored: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of the share that each code has in an image, of two sets of codes (N, h, w): (N, C) and (M, C) over
    the C codes that occur in ``train``. Their Euclidean distance is the Hellinger distance of the histograms."""
    used = train.unique()
    table = []
    for codes in (train.flatten(1), scored.flatten(1)):
        places = torch.searchsorted(used, codes).clamp(max=len(used) - 1)
        known = (used[places] == codes).double()
        counts = torch.zeros(len(codes), len(used), dtype=torch.float64, device=codes.device)
        table.append((counts.scatter_add_(1, places, known) / codes.shape[1]).sqrt().cpu().numpy())
    return table[0], table[1]


def pooled(subject: Subject, codes: Tensor) -> np.ndarray:
    """Mean over the grid of the vectors of codes (N, h, w): (N, d)."""
    return torch.cat([subject.lookup(part).mean((2, 3)) for part in codes.split(256)]).double().cpu().numpy()


def accuracies(train: np.ndarray, labels: np.ndarray, scored: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share in [0, 1] of ``scored`` (M, F) that is classified right: ``linear``, by a logistic regression, and ``knn``,
    by the NEIGHBOURS nearest. Fitted to ``train`` (N, F), centred and of unit scale as a whole, and its ``labels``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    mean, scale = train.mean(0), max(float(train.std()), 1e-12)
    train, scored = (train - mean) / scale, (scored - mean) / scale
    if len(np.unique(labels)) < 2:  # nothing to tell apart
        return dict.fromkeys(("linear", "knn"), float((truth == labels[0]).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many iterations are what is compared
        linear = LogisticRegression(max_iter=ITERATIONS).fit(train, labels)
    knn = KNeighborsClassifier(min(NEIGHBOURS, len(train)), algorithm="brute").fit(train, labels)
    return {"linear": float(linear.score(scored, truth)), "knn": float(knn.score(scored, truth))}


def information(codes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of tokens' codes (N,) and the labels (N,) of their images: ``purity``, the share of tokens whose label is the
    most frequent one of their code, and ``code_label_bits``, Σ p(k, c) log2 p(k, c) / p(k) p(c), their mutual
    information, at most the entropy of the labels. Both as counted: few tokens per code make them larger."""
    _, code = np.unique(codes, return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    classes = label.max() + 1
    joint, counts = np.unique(code * classes + label, return_counts=True)
    most = np.zeros(code.max() + 1, dtype=np.int64)
    np.maximum.at(most, joint // classes, counts)
    of_code, of_label = np.bincount(code)[joint // classes], np.bincount(label)[joint % classes]
    bits = (counts * np.log2(counts * len(codes) / (of_code * of_label.astype(np.float64)))).sum() / len(codes)
    return {"purity": float(most.sum() / len(codes)), "code_label_bits": float(max(bits, 0.0))}


def measure(subject: Subject) -> Reading:
    """Accuracies of both probes on histograms of codes and on mean code vectors, the share of the most frequent label
    in the training images, and ``information``."""
    known = []
    for images, labels, count in zip((subject.train, subject.images), subject.labels, (TRAIN, SCORED), strict=True):
        rows = spread(len(images), count)
        known.append((subject.encode(pixels(images[rows])), labels[rows]))
    (codes, labels), (scored, truth) = known
    metrics = {}
    features = {"codes": histograms(codes, scored), "vectors": [pooled(subject, part) for part in (codes, scored)]}
    for name, (fitted_to, scored_on) in features.items():
        for probe, accuracy in accuracies(fitted_to, labels, scored_on, truth).items():
            metrics[f"probe_{probe}_{name}"] = accuracy
    metrics["probe_chance"] = float((truth == np.bincount(labels).argmax()).mean())
    tokens = scored.flatten(1).cpu().numpy()
    return Reading(metrics | information(tokens.ravel(), truth.repeat(tokens.shape[1])))


PROBES = Instrument(
    about=(
        "what codes tell of labels: accuracy of a linear and a nearest-neighbour probe, by chance that of always "
        "naming the most frequent label of the training images; purity, mutual information"
    ),
    version=1,
    seconds=8,
    metrics={
        "probe_linear_codes": Metric("linear probe of code histograms", ".3f", "higher"),
        "probe_linear_vectors": Metric("linear probe of mean vectors", ".3f", "higher"),
        "probe_knn_codes": Metric("k-NN probe of code histograms", ".3f", "higher"),
        "probe_knn_vectors": Metric("k-NN probe of mean vectors", ".3f", "higher"),
        "probe_chance": Metric("probes by chance", ".3f", ""),
        "purity": Metric("purity of codes", ".3f", "higher"),
        "code_label_bits": Metric("bits of the label in a code", ".2f", "higher"),
    },
    shown=(
        "probe_linear_codes",
        "probe_linear_vectors",
        "probe_knn_codes",
        "probe_chance",
        "purity",
        "code_label_bits",
    ),
    measure=measure,
    fails=Subject.vectorless,
    labelled=True,
)
