"""Metrics of reconstructions and of codes: pure functions, and accumulators that take an evaluation set in batches.

To add one: write an ``Evaluator`` with an entry of its METRICS, beside the function that computes it, and add it to
``EVALUATORS``; or add an entry to one that is there.

Images are NCHW with 3 channels: uint8 in [0, 255] wherever a score is taken, since a picture that is stored and shown
has been clamped and rounded, or float in [-1, 1] inside networks. ``to_uint8`` and ``from_uint8`` are the only bridge.

========================  ==========================================================================================
lpips_alex, lpips_vgg     Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
fid                       Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6; Inception alone
fd_dinov2                 the same distance on DINOv2's features (1024-d): Stein et al. 2023, "Exposing flaws of ..."
fid_vgg16, kid_vgg16      the same distance, and Bińkowski et al. 2018's, on mean-pooled VGG16 relu5_3 features (512-d)
psnr, ssim                decibels; Wang et al. 2004, "Image Quality Assessment: From Error Visibility to ...", eq. 13
grid_energy, grid_edges   how far a grid of patches shows in what was reconstructed wrongly; 0 dB is not at all
gfid …, gfd …, gkid …     the same between generated and real images
precision, recall         Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric", eq. 2; k = 3, on VGG16
sharpness                 how steep the reconstructions are beside the originals; 1 is as steep, less is blurred
perplexity, usage         exp(entropy) and support of the codes over the whole evaluation set
bits_per_image            log2 K per code; of a latent without codes, and of files, the mean that was measured
========================  ==========================================================================================
"""

from backbones.plugins import plugged
from bench.data import from_uint8

from . import weights
from .artefacts import Artefacts, ArtefactScores
from .codes import CodeHistogram, CodeScores
from .distances import FrechetStatistics, kernel_distance
from .images import PixelScores, full_precision, psnr, ssim, to_uint8
from .lpips import MINIMUM_SIZE, LPIPSScores, Perceptual, perceptual
from .registry import Batch, Codec, Evaluator, Metric, Setup
from .sets import EXTRACTORS, PRECISION_NEIGHBOURS, DinoV2Scores, ImageSet, InceptionScores, digests

# Every score of reconstructions, in the order of tables. Each network runs in one of them.
EVALUATORS: tuple[type[Evaluator], ...] = (
    *(InceptionScores, LPIPSScores, DinoV2Scores),
    *(PixelScores, ArtefactScores, CodeScores),
    *plugged("metrics", {}).values(),
)
