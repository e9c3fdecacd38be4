"""Contests of what a run consists of: a training step, scoring, decoding a folder, sampling from priors."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from backbones import BACKBONES
from backbones.torchvision_repair import repair
from bench.core.device import resolve_device
from bench.data import Data, batch, decoding, eval_batches, from_uint8, load
from bench.metrics import full_precision, perceptual
from bench.priors.config import PriorConfig
from bench.priors.models import CAUSAL, Prior
from bench.priors.train import build
from bench.tokenizers.config import make_config
from bench.tokenizers.costs import flops, static_costs
from bench.tokenizers.evaluate import score
from bench.tokenizers.train import TokenizerLearner
from bench.training.loop import averaged, learning_rate

from .contest import Contest, Disagreement, Other, same
from .layers import optional

IMAGES = 128  # scored
FILES = 1000  # decoded
SQUARE = 1024  # side of the matrices whose product says what this machine can do


def steps(device: str) -> Iterator[Contest]:
    """A training step of the default preset against its bare passes, without batch, average and clipping, and against
    as many operations in products of large matrices."""
    images = load("photos", 64).train
    for name in BACKBONES:
        config = make_config(name, device=device).resolved()
        learner, bare = TokenizerLearner(config, images), TokenizerLearner(config, images)
        for one in (learner, bare):
            one.begin()
        average = averaged(learner.model, config.weight_ema)
        x = batch(images, config.seed, 0, config.batch_size, config.augment, config.device)

        def step(learner: TokenizerLearner = learner, average: torch.nn.Module = average) -> None:
            learner.step(1, learning_rate(learner.config, 1))
            average.update_parameters(learner.model)

        def passes(learner: TokenizerLearner = bare, x: Tensor = x) -> None:
            with learner.autocast:
                x_hat, quantized = learner.model(x)
            x_hat = x_hat.float()
            loss = (x_hat - x).square().mean() + quantized.loss
            if learner.lpips is not None:
                with learner.autocast:
                    loss = loss + learner.config.lpips_weight * learner.lpips(x_hat, x).mean()
            learner.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            learner.optimizer.step()

        others = {
            "its bare passes": Other(passes, "bound", 1.06),
            "its operations in a GEMM": _as_gemm(_operations(learner), config.precision, device),
        }
        yield Contest(name, step, others)


def _operations(learner: TokenizerLearner) -> float:
    """FLOPs of a training step: forward, and twice that backward; of LPIPS both forward passes and one backward to the
    image."""
    config, costs = learner.config, static_costs(learner.model)
    count = 3 * (costs["flops_encode"] + costs["flops_decode"])
    if learner.lpips is not None:
        x = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
        count += 3 * flops(_Trunk(perceptual(config.lpips_net, torch.device("cpu"))), x)
    return config.batch_size * count


class _Trunk(torch.nn.Module):
    def __init__(self, lpips: torch.nn.Module):
        super().__init__()
        self.lpips = lpips

    def forward(self, x: Tensor) -> Tensor:
        return self.lpips.features(x)[-1]


def _as_gemm(operations: float, precision: str, device: str) -> Other:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(SQUARE, SQUARE, device=device).to(dtype) for _ in range(2))
    return Other(lambda: a @ b, "bound", times=operations / (2 * SQUARE**3))


class _Slightly:
    """A codec that changes every image a little, at no cost."""

    def encode(self, x: Tensor) -> Tensor:
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.int64)[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        return (codes[:, None].expand(-1, 3, -1, -1) // 16 * 16 / 127.5 - 1).clamp(-1, 1)


def scoring(device: str) -> Iterator[Contest]:
    """All metrics of the test split's images against the reference packages, one after the other, and against nothing
    but the passes of the networks that both need."""
    images, codec = load("photos", 64).test[:IMAGES], _Slightly()
    pairs = []
    for x in eval_batches(images, 32):
        x = from_uint8(x.to(device))
        x_hat = codec.decode(codec.encode(x))
        pairs.append((x, from_uint8(((x_hat + 1) * 127.5).round().to(torch.uint8))))
    nets = {name: perceptual(name, torch.device(device)) for name in ("alex", "vgg")}

    @torch.inference_mode()
    def passes() -> None:
        with full_precision(torch.device(device)):
            for pair in pairs:
                for net in nets.values():
                    for x in pair:
                        net.features(x)

    others = {"its networks' passes": Other(passes, "bound", 1.15)}
    contest = Contest(f"{IMAGES} images", lambda: score(codec, 256, images, device), others)
    packages = [optional(name) for name in ("lpips", "torchmetrics.image")]
    if all(packages):
        theirs = _packages(pairs, device, *packages)
        others["lpips and torchmetrics"] = Other(theirs, "peer", 2)

        def agree() -> None:
            found, expected = score(codec, 256, images, device)[0], theirs()
            for name, value in expected.items():
                near = 1e-2 if name == "ssim" else 1e-3  # the package's has windows that reach over the border
                same(name, torch.tensor(found[name]), torch.tensor(value), near)

        contest = contest._replace(agree=agree)
    yield contest


def _packages(pairs: list[tuple[Tensor, Tensor]], device: str, lpips: object, image: object) -> Callable:
    """Each metric by its own package: LPIPS twice, PSNR, SSIM, and VGG16's features for the distance between sets."""
    nets = {}
    for name in ("alex", "vgg"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision dislikes how the package calls it
            net = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).to(device).eval()
        ours = perceptual(name, torch.device(device))
        net.net.load_state_dict(ours.trunk.state_dict())
        nets[name] = net

    @torch.inference_mode()
    def work() -> dict[str, float]:
        with full_precision(torch.device(device)):  # as ours
            return score_one_by_one()

    def score_one_by_one() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, net in nets.items():
            found[f"lpips_{name}"] = float(torch.cat([net(b, a).flatten() for a, b in pairs]).mean())
        for name, metric in {
            "psnr": image.PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)),
            "ssim": image.StructuralSimilarityIndexMeasure(data_range=1.0),
        }.items():
            metric.to(device)
            for a, b in pairs:
                metric.update((b + 1) / 2, (a + 1) / 2)
            found[name] = float(metric.compute())
        for side in (0, 1):  # the features of the Fréchet distance, which is between sets
            for pair in pairs:
                nets["vgg"].net(nets["vgg"].scaling_layer(pair[side]))
        return found

    return work


def decodings(device: str) -> Iterator[Contest]:
    """A folder of JPEGs decoded for the first time, and an epoch of it, against torchvision's folder and loader with as
    many workers as there are threads."""
    del device  # the CPU decodes
    repair()
    from torchvision import datasets, transforms

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        generator = np.random.default_rng(0)
        for i in range(FILES):
            small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            path = folder / "some" / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((160, 160), Image.Resampling.BICUBIC).save(path, quality=90)
        lanczos = transforms.InterpolationMode.LANCZOS
        prepare = transforms.Compose(
            [transforms.CenterCrop(160), transforms.Resize(64, lanczos), transforms.PILToTensor()]
        )
        theirs = datasets.ImageFolder(str(folder), prepare)
        workers = torch.get_num_threads()

        def read() -> np.ndarray:
            loader = DataLoader(theirs, batch_size=64, num_workers=workers)
            return np.concatenate([x.permute(0, 2, 3, 1).numpy() for x, _ in loader])

        def decode() -> Data:
            shutil.rmtree(folder.parent / "cache", ignore_errors=True)
            with _cache(folder.parent / "cache"):
                return load(f"folder:{folder}", 64)

        def agree() -> None:
            data = decode()
            found = np.concatenate([data.train, data.val, data.test]).reshape(FILES, -1)
            if sorted(map(bytes, found)) != sorted(map(bytes, read().reshape(FILES, -1))):
                raise Disagreement("the pixels differ")

        yield Contest(f"first time, {FILES} JPEGs", decode, {"torchvision": Other(read, "peer", 1.2)}, agree)

        data = decode()

        def epoch() -> None:
            for i in range(-(-FILES // 64)):
                batch(data.train, 0, i, 64, "none", "cpu")

        yield Contest("an epoch afterwards", epoch, {"torchvision": Other(read, "peer", 20)})


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """A cache of its own for decoded images."""
    folder.mkdir()
    with patch.object(decoding, "cache_dir", lambda: folder):
        yield


def samplings(device: str) -> Iterator[Contest]:
    """64 grids of 16×16 from each prior of a million parameters, step by step, against a pass over the whole grid for
    every position."""
    for name in CAUSAL:
        config = PriorConfig("none", name, device=resolve_device(device)).resolved()
        torch.manual_seed(0)
        prior: Prior = build(config, 512, (16, 16), 0).to(device).eval()
        for parameter in prior.parameters():  # what starts at zero would agree with anything
            torch.nn.init.normal_(parameter, std=0.05)

        def draw(prior: Prior = prior) -> Tensor:
            return prior.sample(64, torch.Generator(device).manual_seed(0))

        codes = draw()

        @torch.inference_mode()
        def whole(prior: Prior = prior, codes: Tensor = codes) -> None:
            prior.logits(codes)

        def agree(prior: Prior = prior, codes: Tensor = codes[:4]) -> None:
            flat = codes.flatten(1)
            with torch.no_grad(), full_precision(torch.device(device)):
                state, before = prior.start(None, len(codes)), None
                logits = prior.logits(codes).flatten(1, 2)
                for position in range(100):
                    step, state = prior.step(position, before, state)
                    same(f"logits at {position}", step, logits[:, position], 1e-3)
                    before = flat[:, position]

        passes = Other(whole, "peer", 8, times=codes[0].numel())
        yield Contest(f"{name}, 64 grids of 16×16", draw, {"whole passes": passes}, agree)
