"""A quantizer."""

from bench.quantizers.learned import EMAQuantizer


class SlowEMA(EMAQuantizer):
    """codes follow a moving average, as those of ema do"""
