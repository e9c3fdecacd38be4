"""The data dictionary: every column of the files of a report has a meaning, and metrics their unit and direction."""

from dataclasses import fields

import pandas as pd

from bench.analysis import data
from bench.analysis.data import described
from bench.analysis.frames import LABELS, METRICS, PRIOR, frame
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, fabricate_prior


def test_every_column_of_every_file_is_described_once(tmp_path):
    store = Store(tmp_path)
    run = fabricate(store, make_config("cnn", "smoke"))
    fabricate_prior(store, PriorConfig(tokenizer=run.folder.name, prior="rnn"), 5.0, 80.0)
    data.write_data(frame(store.runs()), frame(store.priors(), PRIOR), tmp_path)
    columns = pd.read_csv(tmp_path / data.COLUMNS, keep_default_na=False)
    files = (
        pd.read_csv(tmp_path / data.WIDE),
        pd.read_csv(tmp_path / data.PRIORS),
        pd.read_parquet(tmp_path / data.LONG),
    )
    assert {*columns.column} == {name for file in files for name in file}
    assert columns.column.is_unique
    assert (columns.meaning.str.len() > 0).all()
    assert {*columns.kind} == {"run", "setting", "metric", "reference", "protocol"}
    named = columns.set_index("column")
    assert (named.kind[[name for name in named.index if name in METRICS]] == "metric").all()


def test_columns_have_their_unit_and_direction():
    assert described("psnr")[1:] == ("metric", "PSNR dB", "dB", "higher")
    assert described("bits_per_image")[3:] == ("bits", "lower")
    assert described("images_per_second_decode")[3:] == ("images/s", "higher")
    assert described("train_seconds")[3:] == ("s", "lower")
    assert described("steps_to_loss")[3:] == ("steps", "")
    assert described("ssim").unit == ""
    assert described("psnr_kmeans")[1:] == ("reference", "PSNR dB of k-means on patches at the same bits", "dB", "")
    assert described("protocol_rounding").meaning == "how it was scored: rounding"
    assert {described(name).better for name in LABELS} == {"lower", "higher", ""}


def test_settings_mean_what_their_help_says():
    assert described("beta") == ("beta", "setting", "β, weight of the commitment loss", "", "")
    assert described("tokenizer_seed").meaning.startswith("of the tokenizer: weights, batches")
    for settings in (Config, PriorConfig):
        assert {*data.meanings(settings)} == {field.name for field in fields(settings)}
