"""What to do after a report: only what can be done and what it is about."""

from bench.analysis.frames import PRIOR, frame
from bench.analysis.onward import commands
from bench.analysis.report import contents, select
from bench.core.store import Store
from bench.tokenizers.config import make_config
from tests.analysis.test_advice import settle
from tests.fabricate import fabricate, sweep


def told(store: Store, study: dict | None = None) -> list[str]:
    """What follows a report on all runs of ``store``."""
    selection = select([], store.root)
    table = frame(selection.runs)
    return commands(contents(selection, table, frame([], PRIOR)).blocks, table, study)


def test_the_best_is_held_against_the_best_of_another_backbone_at_equal_settings(tmp_path):
    """Two values of beta of cnn are first; the second backbone is compared where beta is that of the first row."""
    store = Store(tmp_path)
    best, *_, rival, other = (
        fabricate(store, make_config(name, "smoke", beta=beta), quality)
        for name, beta, quality in (("cnn", 0.5, 0.05), ("cnn", 1.0, 0.04), ("vit", 0.5, 0.01), ("vit", 1.0, 0.02))
    )
    (line,) = (line for line in told(store) if line.startswith("Compare the best two: "))
    assert line.split()[-2:] == [str(best.folder), str(rival.folder)]
    for run in (rival, other):
        (run.folder / "metrics.json").unlink()
    (line,) = (line for line in told(store) if line.startswith("Compare the best two: "))
    assert line.split()[-2] == str(best.folder)


def test_images_are_generated_from_what_is_better_than_kmeans(tmp_path):
    for name, known, offered in (("a", 30.0, False), ("b", 10.0, True)):
        store = Store(tmp_path / name)
        run = fabricate(store, make_config("cnn", "smoke"), psnr_kmeans=known)
        (run.folder / "tokenizer.safetensors").touch()
        assert any(line.startswith("Generate images: ") for line in told(store)) is offered


def test_what_is_missing_has_the_command_that_adds_it(tmp_path):
    """Longer where curves fall, so many seeds as a verdict takes; with them nothing."""
    store = Store(tmp_path)
    sweep(store, {"cnn": 0.0, "vit": 0.03}, betas=(0.25,), seeds=(0, 4))
    study = {"study": "beta", "kind": "ablation", "runs": dict.fromkeys(run.folder.name for run in store.runs())}
    same = "python -m studies.beta with the flags that these runs were started with"
    assert told(store, study)[0] == f"Add what is missing: {same}, and --steps 300 --seeds 0 4 5"
    settle(store)
    assert told(store, study)[0] == f"Add what is missing: {same}, and --seeds 0 4 5"
    assert told(store)[0].startswith("Add what is missing: python -m bench.run with ")
    assert not any(line.startswith("Add") for line in told(store, {**study, "kind": "search"}))
    assert told(store, {**study, "runs": {**study["runs"], "cnn-ema-0": {}}})[0] == f"Finish what was planned: {same}"
    sweep(store, {"cnn": 0.0, "vit": 0.03}, betas=(0.25,), seeds=(0, 4, 5))
    settle(store)
    assert [line.partition(":")[0] for line in told(store, study)] == ["Compare the best two"]
