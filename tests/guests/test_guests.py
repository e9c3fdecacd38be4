"""Guests are scored as runs of ours are: what they compute is what their own library does, and what is broken, or not
what it says, is refused before anything is built of it."""

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.analysis import frames, rankings
from bench.analysis.report import Selection, contents
from bench.core.errors import UserError
from bench.core.runs import Run
from bench.core.store import Store, find_tokenizer
from bench.data import Data
from bench.guests import Guest, GuestConfig, Place, invited, pairs, score_guest, trial
from bench.guests.guest import Adapted
from bench.instruments import INSTRUMENTS, Subject
from bench.metrics import from_uint8
from bench.tokenizers.codecs import FormatCodec
from bench.tokenizers.evaluate import score
from bench.tokenizers.trial import run_trial
from bench.training.trial import complete
from tests.fabricate import fabricate

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, **LEVELS}
CONVS = {"embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
MODELS = {
    "diffusers:vq": lambda: diffusers.VQModel(**SMALL, num_vq_embeddings=16, vq_embed_dim=4),
    "diffusers:spatial": lambda: diffusers.VQModel(
        **{**SMALL, "block_out_channels": (32, 32)}, num_vq_embeddings=16, norm_type="spatial"
    ),
    "diffusers:kl": lambda: diffusers.AutoencoderKL(**SMALL),
    "transformers:janus": lambda: transformers.JanusVQVAE(
        transformers.JanusVQVAEConfig(**CONVS, num_embeddings=16, latent_channels=32, num_patches=8)
    ),
    "transformers:emu3": lambda: transformers.Emu3VQVAE(
        transformers.Emu3VQVAEConfig(
            **CONVS, codebook_size=16, latent_channels=4, attn_resolutions=[], hidden_size=32, num_attention_heads=1
        )
    ),
}
OWN = {  # what the library's own code makes of images
    "diffusers:vq": lambda model, x: model(x).sample,
    "diffusers:spatial": lambda model, x: model(x).sample,
    "diffusers:kl": lambda model, x: model(x).sample,
    "transformers:janus": lambda model, x: model(x).decoded_pixel_values,
    "transformers:emu3": lambda model, x: model.decode(
        torch.stack(model.encode(x, image_sizes=torch.tensor([x.shape[2:]] * len(x))).image_tokens)
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name → its folder, saved by its library with random weights, and the model."""
    root, found = tmp_path_factory.mktemp("guests"), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        folder = root / name.partition(":")[2]
        model.save_pretrained(folder)
        found[name] = folder, model
    return found


def guest_of(name, folder, results="results"):
    return invited(f"{name.partition(':')[0]}:{folder}", Place(results, "cpu"))


def pictures(count, size=32, seed=0):
    """Smooth colours, (count, size, size, 3) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture
def data():
    return Data("photos", pictures(6), pictures(4, seed=1), pictures(5, seed=2), "f" * 64, "photos: 6 / 4 / 5", ())


@pytest.fixture
def alone(monkeypatch):
    """Without references, which take a second each."""
    monkeypatch.setattr(trial, "format_references", lambda *given: {})
    monkeypatch.setattr(trial, "kmeans_reference", lambda *given: {})


class Grey:
    """Brightness of cells of 8×8 pixels in 16 steps, for images in [0, 1]."""

    codebook_size, value_range, version = 16, (0.0, 1.0), 1

    def encode(self, x):
        assert 0 <= x.min() <= x.max() <= 1
        return (torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8)[:, 0] * 16).long().clamp(0, 15)

    def decode(self, codes):
        shown = (codes[:, None].float() + 0.5) / 16
        return shown.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


class Film(torch.nn.Module):
    """A tokenizer without codes that has a convolution over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv3d(3, 3, 1)

    def encode(self, x):
        return self.layer(x[:, :, None])[:, :, 0]

    def decode(self, codes):
        return codes


def grey(**changes):
    return Guest(
        **{"name": "grey", "codec": Adapted(Grey(), low=0, high=1), "codebook_size": 16, "digest": "d"}
        | {"device": "cpu"}
        | changes
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_checkpoint_reconstructs_as_its_own_library_does(saved, name):
    folder, model = saved[name]
    guest, x = guest_of(name, folder), torch.rand(2, 3, 16, 16) * 2 - 1
    codes = guest.codec.encode(x)
    torch.testing.assert_close(guest.codec.decode(codes), OWN[name](model, x).clamp(-1, 1), atol=1e-5, rtol=0)
    if guest.codebook_size is None:
        assert codes.is_floating_point()
    else:
        assert guest.codebook_size == 16
        assert codes.dtype == torch.int64
        assert codes.shape == (2, 8, 8)
        assert guest.lookup(codes).shape[:1] + guest.lookup(codes).shape[2:] == codes.shape


@torch.no_grad()
def test_a_tokenizer_of_one_grid_takes_others(saved):
    """Janus' own decode refuses them, and there is no reason in its layers."""
    guest = guest_of("transformers:janus", saved["transformers:janus"][0])
    assert guest.codec.decode(guest.codec.encode(torch.zeros(1, 3, 24, 24))).shape == (1, 3, 24, 24)


@torch.no_grad()
def test_a_whole_multimodal_model_has_its_tokenizer_below_a_prefix(saved, tmp_path):
    folder, _ = saved["transformers:janus"]
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus", "vq_config": settings}))
    tensors = {f"model.vqmodel.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "model.language_model.x": torch.zeros(3)}, tmp_path / "model.safetensors")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(
        guest_of("transformers:x", tmp_path).codec.decode(guest_of("transformers:x", folder).codec.encode(x)),
        guest_of("transformers:x", folder).codec.decode(guest_of("transformers:x", folder).codec.encode(x)),
    )


def _settings(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _weights(change):
    def changed(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def _pickled(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def _cut(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


HOSTILE = {
    "pickled": (_pickled, "no weights in safetensors but diffusion_pytorch_model.bin, which may run anything"),
    "cut": (_cut, "does not hold weights"),
    "no settings": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "unknown class": (_settings(_class_name="UNet2DModel"), "is of the class 'UNet2DModel', and VQModel"),
    "other K": (_settings(num_vq_embeddings=17), r"quantize.embedding.weight is \(16, 4\) .* and \(17, 4\)"),
    "huge K": (_settings(num_vq_embeddings=10**12), "num_vq_embeddings 1000000000000"),
    "many layers": (_settings(layers_per_block=10**6), "layers_per_block 1000000"),
    "many levels": (_settings(block_out_channels=[8] * 100), "block_out_channels 100 values"),
    "other type": (_settings(block_out_channels="x"), "describes no VQModel"),
    "missing tensor": (_weights(lambda t: t.pop("quant_conv.bias")), "quant_conv.bias is missing"),
    "extra tensor": (_weights(lambda t: t.update(more=torch.zeros(1))), r"more is \(1,\) in its weights and unknown"),
    "NaN": (_weights(lambda t: t["quant_conv.bias"].fill_(math.nan)), "quant_conv.bias .* not finite"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_or_hostile_checkpoint_is_one_sentence(saved, tmp_path, kind):
    change, sentence = HOSTILE[kind]
    folder = tmp_path / "vq"
    shutil.copytree(saved["diffusers:vq"][0], folder)
    change(folder)
    with pytest.raises(UserError, match=sentence) as error:
        guest_of("diffusers:vq", folder)
    assert "\n" not in str(error.value)


def test_the_decoder_that_is_missing_from_a_library_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon_vqgan"}')
    with pytest.raises(UserError, match="has no decoder"):
        guest_of("transformers:x", tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vq", "no tokenizer to score"),
        ("diffusers:", "no tokenizer to score"),
        ("diffusers:/nowhere", "there is no folder /nowhere"),
        ("codec:webp", "write codec:webp@2304"),
        ("codec:png@100", "write codec:webp@2304"),
        ("codec:webp@-1", "write codec:webp@2304"),
        ("codec:webp@nan", "write codec:webp@2304"),
        ("python:json", "write python:package.module:function"),
        ("python:no_such_module:f", "cannot be imported"),
        ("python:json:f", "has no function f"),
        ("python:json:JSONEncoder", "gives no decode|gives has no decode"),
        ("run:nobody", "unknown run 'nobody'"),
    ],
)
def test_what_is_no_guest_is_told(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        invited(name, Place(tmp_path, "cpu"))


def test_an_object_of_anybodys_is_taken_in_its_own_range():
    guest = invited("python:tests.guests.test_guests:Grey", Place("results", "cpu"))
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    codes = guest.codec.encode(x)
    assert codes.unique().tolist() == [8]
    assert guest.codec.decode(codes).unique().item() == pytest.approx(1 / 16)  # 8.5 / 16 in [0, 1]
    assert guest.codebook_size == 16


def test_a_module_of_any_rank_is_taken():
    """Films have kernels of five dimensions."""
    guest = invited("python:tests.guests.test_guests:Film", Place("results", "cpu"))
    assert guest.latent(8).shape == (1, 3, 8, 8)
    assert guest.digest == invited("python:tests.guests.test_guests:Film", Place("results", "cpu")).digest


def test_images_are_resized_there_and_back():
    seen = []

    class Same:
        def encode(self, x):
            seen.append(x.shape)
            return x

        def decode(self, codes):
            return codes

        def encode_with_bits(self, x):
            return self.encode(x), torch.full((len(x),), 7.0)

    adapted, x = Adapted(Same(), 16, 32), from_uint8(torch.from_numpy(pictures(2, 16)).permute(0, 3, 1, 2))
    codes, bits = adapted.encode_with_bits(x)
    assert seen == [(2, 3, 32, 32)]
    assert bits.tolist() == [7, 7]
    torch.testing.assert_close(adapted.decode(codes), x, atol=0.05, rtol=0)
    assert not hasattr(Adapted(Grey()), "encode_with_bits")


def test_what_gives_no_images_or_codes_back_is_told():
    class Odd(Grey):
        def __init__(self, codes=None, images=None):
            self.codes, self.images = codes, images

        def encode(self, x):
            return torch.zeros(1, 4, 4).long() if self.codes is None else self.codes

        def decode(self, codes):
            return torch.zeros(1, 3, 32, 32) if self.images is None else self.images

    for codec, sentence in (
        (Odd(images=torch.zeros(1, 3, 16, 16)), r"makes images of shape \(1, 3, 16, 16\)"),
        (Odd(images=[1]), "gives a list from decode"),
        (Odd(codes=torch.zeros(1, 4, 4)), "encodes to torch.float32"),
        (Odd(codes=torch.zeros(1, 16).long()), "codes are whole numbers"),
    ):
        with pytest.raises(UserError, match=sentence):
            grey(codec=codec).latent(32)
    with pytest.raises(UserError, match=r"cannot take images of 4×4 .*--resize-to"):
        grey().latent(4)


def test_a_guest_is_scored_once_and_known_by_what_it_depends_on(data, tmp_path, alone, monkeypatch):
    store = Store(tmp_path)
    run = score_guest(grey(), data, store)
    assert run.finished
    assert run.elsewhere
    metrics, _ = score(grey().codec, 16, data.test)
    assert {name: run.metrics()[name] for name in metrics} == metrics
    assert run.metrics()["bits_per_image"] == 16 * 4
    assert (run.folder / "reconstructions.png").is_file()
    others = [
        score_guest(grey(digest="e"), data, store),
        score_guest(grey(), data, store, split="val"),
        score_guest(grey().resized(16, 32), data, store),
    ]
    assert len({run.folder, *(other.folder for other in others)}) == 4
    assert others[1].protocol()["scored_on"] == "val"
    assert others[2].protocol()["resizer"] == "bicubic and antialiased, to 16×16 for the tokenizer and back"
    assert run.protocol()["resizer"].startswith("none")
    monkeypatch.setattr(trial, "score", lambda *given: 1 / 0)
    assert score_guest(grey(), data, store).folder == run.folder
    with pytest.raises(UserError, match="other images"):
        score_guest(grey(), replace(data, fingerprint="g" * 64), store)
    with pytest.raises(UserError, match="trained elsewhere"):
        find_tokenizer(str(run.folder), tmp_path)


def test_codes_beyond_the_codebook_are_told(data, tmp_path, alone):
    with pytest.raises(UserError, match=r"grey: codes must be integers in \[0, 2\); its codebook_size is 2"):
        score_guest(grey(codebook_size=2), data, Store(tmp_path))
    (run,) = Store(tmp_path).runs()
    assert run.status == "refused"


def test_references_are_those_of_its_rate(data, tmp_path, monkeypatch):
    """As of a run with the same grid, K and images."""
    seen = {}
    monkeypatch.setattr(trial, "kmeans_reference", lambda config, data, fid: seen.update(k=config) or {"psnr": 1.0})
    monkeypatch.setattr(trial, "format_references", lambda config, data, bits, fid: seen.update(b=bits) or {})
    run = score_guest(grey(), data, Store(tmp_path), train_images=3)
    assert (seen["k"].grid_size, seen["k"].codebook_size, seen["b"]) == (4, 16, 64)
    assert run.metrics()["psnr_kmeans"] == 1
    assert run.config()["train_images"] == 3


def test_costs_are_counted_where_sides_are_known(saved, data, tmp_path, alone):
    folder, model = saved["diffusers:vq"]
    run = score_guest(guest_of("diffusers:vq", folder), data, Store(tmp_path))
    count = sum(value.numel() for value in model.parameters()) - model.quantize.embedding.weight.numel()
    assert run.metrics()["params"] == count
    assert run.metrics()["flops_encode"] > 0
    assert run.metrics()["images_per_second_decode"] > 0


@pytest.mark.slow
def test_a_run_of_ours_scores_as_it_did(tiny, data, tmp_path, alone, monkeypatch):
    """To the last digit; it is not scored twice on the same images."""
    monkeypatch.setattr("bench.tokenizers.trial.load", lambda name, size: data)
    monkeypatch.setattr("bench.tokenizers.trial.format_references", lambda *given: {})
    run = run_trial(replace(tiny, data="photos"), tmp_path)
    guest = invited(f"run:{run.folder.name}", Place(tmp_path, "cpu"))
    assert score_guest(guest, data, Store(tmp_path)).folder == run.folder
    again = score_guest(replace(guest, folder=None), data, Store(tmp_path))
    clocked = {name for name in again.metrics() if "second" in name}
    assert again.folder != run.folder
    assert len(again.metrics()) > 20
    assert {name: value for name, value in again.metrics().items() if name not in clocked} == {
        name: run.metrics()[name] for name in again.metrics() if name not in clocked
    }


# --- folders of pairs ------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Originals, and what JPEG made of them, as PNG."""
    images = pictures(5, seed=2)
    codec = FormatCodec("jpeg", 4000)
    x = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))
    shown = ((codec.encode(x) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for place, arrays in (("a", images), ("b", shown)):
        (tmp_path / place).mkdir()
        for number, pixels in enumerate(arrays):
            Image.fromarray(pixels).save(tmp_path / place / f"{number}.png")
    return tmp_path / "a", tmp_path / "b", codec


def test_pairs_score_as_what_made_them(folders, tmp_path, alone):
    originals, reconstructions, codec = folders
    data, guest = pairs(originals, reconstructions, 4000.0, "cpu")
    run = score_guest(guest, data, Store(tmp_path / "results"))
    metrics, _ = score(codec, None, data.test)
    for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg", "fid_vgg16"):
        assert run.metrics()[name] == metrics[name]
    assert run.metrics()["bits_per_image"] == 4000
    shown = run.arrays("samples.npz")
    assert len(shown["x"]) == 5
    np.testing.assert_array_equal(shown["x_hat"][3], np.asarray(Image.open(reconstructions / "3.png")))
    originals_in_parts = torch.zeros(2, 3, 32, 32), torch.zeros(3, 3, 32, 32)
    parts = torch.cat([guest.codec.encode(part) for part in originals_in_parts])
    torch.testing.assert_close(parts, from_uint8(torch.from_numpy(guest.made).permute(0, 3, 1, 2)))
    _, unrated = pairs(originals, reconstructions, None, "cpu")
    assert score_guest(unrated, data, Store(tmp_path / "results")).config()["quantizer"] == "none"


def test_pairs_that_are_none_are_refused(folders):
    originals, reconstructions, _ = folders

    def refused(sentence):
        with pytest.raises(UserError, match=sentence):
            pairs(originals, reconstructions, None, "cpu")

    Image.open(reconstructions / "0.png").save(reconstructions / "0.bmp")
    refused("have one name")
    (reconstructions / "0.bmp").unlink()
    Image.open(reconstructions / "0.png").save(reconstructions / "9.png")
    refused(r"9 is in .*b and not in .*a \(5 originals, 6 reconstructions\)")
    (reconstructions / "9.png").unlink()
    Image.new("RGB", (32, 16)).save(reconstructions / "4.png")
    refused(r"4.png is of 32×16 pixels")
    (reconstructions / "4.png").write_bytes(b"x")
    refused(r"4.png cannot be read")
    for number in range(5):
        Image.new("RGB", (16, 16)).save(reconstructions / f"{number}.png")
    refused("32×32 and 16×16 pixels")


# --- in reports ------------------------------------------------------------------------------------------------------


def beside(run, store, **changes):
    """A guest that was scored as ``run`` was, and better."""
    config = run.config()
    known = {name: config[name] for name in ("data", "image_size", "split", "codebook_size", "grid_size", "device")}
    own = GuestConfig(**{**known, "backbone": "python:x:y", "digest": "d", "split": "test", **changes})
    made = store.run(own)
    made.folder.mkdir(parents=True)
    made.seal("config.json", {"config": asdict(own), "environment": run.environment()})
    shutil.copy(run.folder / "per_image.npz", made.folder)
    metrics = {name: run.metrics()[name] for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg")}
    bits = {"bits_per_image": run.metrics()["bits_per_image"]} if own.quantizer == "own" else {}
    complete(made, {**metrics, **bits}, run.protocol())
    return made


@pytest.fixture
def reported(tiny, tmp_path):
    """The frame of two backbones, three seeds each, a guest with codes and one without, and its report."""
    store = Store(tmp_path)
    for seed in range(3):
        for quality, name in enumerate(("cnn", "vit")):
            fabricate(store, replace(tiny, backbone=name, seed=seed), quality / 10, seed / 1000)
    best = fabricate(Store(tmp_path / "elsewhere"), tiny, 0.5)
    beside(best, store)
    beside(best, store, backbone="python:x:z", quantizer="none", codebook_size=0, grid_size=0)
    table, damaged = frames.read(store.runs())
    assert damaged == []
    none = frames.read([], frames.PRIOR)[0]
    return table, contents(Selection("all", store.runs(), tmp_path), table, none)


def test_a_guest_is_ranked_at_equal_bits_and_marked(reported):
    table, report = reported
    (block,) = report.blocks
    names = [row[0].text for row in block.ranking.rows]
    assert sorted(names) == ["cnn", "python:x:y ‡", "vit"]
    assert any(note.startswith("‡ trained elsewhere") for note in block.ranking.notes)
    assert any(cell.text == "python:x:z, no codes" for row in block.ranking.references for cell in row)
    assert frames.elsewhere(table).sum() == 2
    assert set(frames.ours(table).backbone) == {"cnn", "vit"}


def test_a_guest_recommends_no_backbone_and_hides_no_setting(reported):
    _, report = reported
    (block,) = report.blocks
    assert block.advice.line.startswith("Take vit: better than cnn")
    assert block.equal["steps"] == "12"
    assert not any("python" in sentence for sentence in block.headline)
    assert any("python" in sentence for sentence in block.others)
    assert not any("python" in note for note in block.ranking.notes if note.startswith("Not equal"))
    assert "16 codes" in block.title or "codes, K = 16" in block.title


def test_a_report_of_guests_alone_says_so(tiny, tmp_path):
    store = Store(tmp_path / "own")
    guest = beside(fabricate(store, tiny), Store(tmp_path))
    table = frames.frame([guest])
    report = contents(Selection("all", [guest], tmp_path), table, frames.read([], frames.PRIOR)[0])
    assert report.blocks[0].advice.line == "No recommendation: all of these were trained elsewhere."
    assert rankings.trained_on(table) == ""


def test_image_formats_meet_no_grid(tiny, tmp_path):
    """A rate alone names no grid in a title."""
    store = Store(tmp_path / "own")
    guest = beside(fabricate(store, tiny), Store(tmp_path), codebook_size=0, grid_size=0)
    table = frames.frame([guest])
    report = contents(Selection("all", [guest], tmp_path), table, frames.read([], frames.PRIOR)[0])
    assert report.blocks[0].title.endswith("64 bits per image")


@pytest.mark.parametrize("name", ["robustness", "probes"])
def test_instruments_that_need_vectors_say_so(name):
    images = pictures(2)
    labels = np.zeros(2, dtype=np.int64)
    subject = Subject(grey().codec, None, 16, images, images, (labels, labels), lambda size: images)
    assert "vectors of its codes are not known" in INSTRUMENTS[name].unfit(subject)
    assert not INSTRUMENTS["atlas"].unfit(subject)


def test_a_strangers_guest_is_damaged_where_it_is_none(tiny, tmp_path):
    store = Store(tmp_path)
    guest = beside(fabricate(store, tiny), store)
    stored = guest.config()
    for field, value in (("codebook_size", -1), ("image_size", "x"), ("backbone", 3)):
        guest.seal("config.json", {"config": {**stored, field: value}, "environment": {}})
        table, damaged = frames.read([Run(guest.folder)])
        assert len(table) == 0, field
        assert field in damaged[0]
