"""What tests of commands share."""

TINY = [
    "--preset",
    "smoke",
    "--width",
    "16",
    "--depth",
    "1",
    "--codebook-size",
    "16",
    "--steps",
    "3",
    "--device",
    "cpu",
]  # a run of a moment
