"""What is special in recipes that translate, encode, refine or read: degradations, the pool, anomaly scores, pyramids,
captions; and what ``fastgan sample`` makes of a trained run."""

import dataclasses
import functools

import pytest
import torch

for needed in ("matplotlib", "rich", "safetensors", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)

from fastgan import recipes  # noqa: E402
from fastgan.recipes import bigan, cyclegan, lapgan, srgan, stackgan  # noqa: E402
from fastgan.training import captions, checkpoint, data, degradations, editing, sample  # noqa: E402
from fastgan.training.data import Part, Source  # noqa: E402
from fastgan.training.trainer import Trainer  # noqa: E402
from fastgan.training.translation import roughness  # noqa: E402


@functools.cache
def digits(size=8):
    return data.load("digits", size)


def colours(n=12, size=16, other=False):
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Source("colours", {"image": images} | ({"other": images.flip(0)} if other else {}))


def recipe(name, source, **changed):
    kind = recipes.get(name)
    return kind(kind.Options(**{"width": 8, **changed}), source)


# --- degradations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (5, 1, 13, 17), (1, 1, 8, 8), (0, 3, 16, 16)])
@pytest.mark.parametrize("name", ["inpaint", "denoise", "watermark", "edges", "scratch"])
def test_degradations_keep_shapes_and_leave_the_original(name, shape):
    images = torch.rand(shape) * 2 - 1
    before = images.clone()
    spoilt = getattr(degradations, name)(images)
    assert spoilt.shape == images.shape and spoilt.isfinite().all() and torch.equal(images, before)
    if len(images):
        assert (spoilt - images).flatten(1).abs().amax(1).min() > 0, "an image was left as it was"


def test_holes_are_squares_at_random_places():
    images = torch.ones(2000, 1, 32, 32)
    holes = degradations.inpaint(images) == 0
    assert (holes.flatten(1).sum(1) == 100).all()
    assert (holes.any(2).sum(2) == 10).all() and (holes.any(3).sum(2) == 10).all()
    assert (holes.float().mean(0) > 0).all(), "some pixels are never in a hole"
    inverted = degradations.scratch(images)
    assert ((inverted == -1).flatten(1).sum(1) == 64).all() and ((inverted == 1) | (inverted == -1)).all()


def test_noise_watermarks_and_edges():
    grey = torch.zeros(50, 1, 32, 32)
    assert abs(degradations.denoise(grey).std().item() - 0.4) < 0.01
    marked = degradations.watermark(grey)
    assert marked.unique().tolist() == pytest.approx([0, 0.6]) and 0.15 < (marked > 0).float().mean() < 0.35
    step = torch.full((1, 3, 8, 8), -1.0)
    step[..., 4:] = 1
    drawn = degradations.edges(step)
    assert (drawn[..., 3:5] == -1).all() and (drawn[..., :3] > 0.99).all() and (drawn[..., 5:] > 0.99).all()


# --- data that is held out -------------------------------------------------------------------------------------------


def test_a_part_is_rows_of_its_source():
    part = Part(digits(), [5, 3])
    assert len(part) == 2 and part.shape == digits().shape and part.classes == 10
    assert torch.equal(part[1]["image"], digits()[3]["image"])


@pytest.mark.parametrize("name", [name for name in recipes.names() if recipes.get(name).held_out])
def test_unseen_samples_are_not_trained_on(name):
    rows = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 3, 16, 16)
    made = recipe(name, Source("rows", {"image": rows, "label": torch.zeros(40).long()}, ("0",)))
    trained = {sample["image"].mean().item() for sample in (made.training_source[i] for i in range(len(made.training_source)))}
    unseen = set(made.unseen(1000)["image"].mean((1, 2, 3)).tolist())
    assert trained | unseen == set(map(float, range(40))) and not trained & unseen and len(made.unseen(2)["image"]) == 2
    drawn = made.unseen(100, random=True)["image"].mean((1, 2, 3))
    assert len(drawn) == 100 and set(drawn.tolist()) <= unseen


# --- pix2pix, srgan --------------------------------------------------------------------------------------------------


def test_pairs_are_the_sources_own():
    made = recipe("pix2pix", colours(other=True), task="pairs")
    batch = made.unseen(3)
    assert all(torch.equal(*pair) for pair in zip(made.pair(batch), (batch["image"], batch["other"]), strict=True))
    halves = data.Domains("two", colours(), Part(colours(), range(5)))
    with pytest.raises(ValueError, match="12 images in one half"):
        recipe("pix2pix", halves, task="pairs")
    with pytest.raises(ValueError, match='no "other"'):
        recipe("pix2pix", colours(), task="pairs").pair(colours()[0])
    with pytest.raises(ValueError, match="does not divide"):
        recipe("pix2pix", colours(size=9))


def test_a_critic_that_knows_nothing_tells_no_image_from_a_result():
    made = recipe("pix2pix", colours())
    result = lambda given: made.translate(given)  # noqa: E731
    near = lambda image, given: -(image - result(given)).abs().mean((1, 2, 3), keepdim=True)  # noqa: E731
    for critic, share in ((near, 0), (lambda *images: -near(*images), 1), (lambda image, given: image[:, :1, :1, :1] * 0, 0)):
        made.critic = critic
        before = torch.get_rng_state()
        assert made.evaluate(70)["told_apart"] == share
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scale", [2, 4])
def test_super_resolution_of_any_size(scale):
    made = recipe("srgan", colours(), scale=scale, blocks=1)
    small, large = made.pair(made.unseen(2))
    assert large.shape[-1] == scale * small.shape[-1]
    images = torch.rand(2, 3, 5, 7)
    assert made.translate(images).shape == (2, 3, 5 * scale, 7 * scale)
    torch.testing.assert_close(srgan.bicubic(torch.ones(1, 3, 5, 7), scale), torch.ones(1, 3, 5 * scale, 7 * scale))


def test_srgan_content_in_features():
    trained = Trainer(recipes.get("srgan"), srgan.Options(width=8, content="features"), colours(), batch_size=4, steps=2)
    trained.step()
    assert trained.losses["content"] > 0


def test_roughness_is_lost_by_blur_and_counts_where_it_is_asked_for():
    image = torch.rand(4, 3, 16, 16)
    everywhere = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert roughness(blurred, everywhere) < 0.5 * roughness(image, everywhere)
    half = everywhere.clone()
    half[..., :8] = False
    image[..., 7:] = 0
    assert roughness(image, half) == 0 and roughness(image, everywhere) > 0
    line = torch.zeros(1, 1, 5, 5)
    line[0, 0, 2] = 1  # rows 1, 2, 3: second differences 1, -2, 1 down, 0 across
    torch.testing.assert_close(roughness(line, torch.ones(1, 1, 5, 5, dtype=torch.bool)), torch.tensor(4 / 3))


# --- cyclegan --------------------------------------------------------------------------------------------------------


def test_the_pool_keeps_some_and_gives_back_some():
    torch.manual_seed(0)
    pool = cyclegan.Pool(50, (1, 2, 2))
    numbered = torch.arange(1000.0).view(100, 10, 1, 1, 1).expand(-1, -1, 1, 2, 2)
    shown = torch.cat([pool(batch) for batch in numbered]).mean((1, 2, 3))
    own = torch.arange(1000.0)
    assert torch.equal(shown[:50], own[:50]), "not full yet: as they came"
    later = shown[50:] != own[50:]
    assert 0.4 < later.float().mean() < 0.6 and (shown <= own).all(), "half are exchanged for earlier ones"
    kept = pool.images.mean((1, 2, 3))
    assert len(kept.unique()) == 50 and len(set(kept.tolist()) & set(shown[50:][later].tolist())) == 0, "given back and kept"
    assert pool(numbered[0].clone()).shape == (10, 1, 2, 2) and cyclegan.Pool(0, (1, 2, 2))(numbered[0]).equal(numbered[0])


def test_the_pool_is_in_checkpoints():
    kind = recipes.get("cyclegan")
    trained = Trainer(kind, kind.Options(width=8, blocks=1, pool=5), colours(other=True), batch_size=4, steps=2)
    trained.step()
    packed = checkpoint.pack_modules(trained.raw)
    assert packed["pool.count"] == 4 and packed["pool.images"][:4].abs().sum() > 0 and packed["pool.images"][4].abs().sum() == 0


def test_two_domains_of_one_source():
    made = recipe("cyclegan", digits(16), domain="invert")
    image, other = made.domains(made.unseen(4))
    assert torch.equal(other, -image.roll(1, 0)) and torch.equal(made.stylise(image), -image)
    assert recipe("cyclegan", colours(other=True)).domains({"image": 1, "other": 2}) == (1, 2)


# --- bigan -----------------------------------------------------------------------------------------------------------


def test_auc():
    from sklearn.metrics import roc_auc_score

    high, low = torch.randn(30).round(decimals=1) + 0.5, torch.randn(40).round(decimals=1)
    labels = torch.cat([torch.ones(30), torch.zeros(40)])
    assert bigan.auc(high, low) == pytest.approx(roc_auc_score(labels, torch.cat([high, low])))


def test_a_class_that_is_left_out():
    made = recipe("bigan", digits(), left_out="3")
    labels = {int(made.training_source[i]["label"]) for i in range(len(made.training_source))}
    assert labels == set(range(10)) - {3}
    images, is_anomaly = made.anomalies(200)
    assert len(images) == 200 and 5 < is_anomaly.sum() < 60
    assert made.anomaly_score(images[:7]).shape == (7,)
    with pytest.raises(ValueError, match="no such class"):
        recipe("bigan", digits(), left_out="ten")


def test_anomaly_scores_are_errors_of_reconstruction():
    """An autoencoder that knows one image: anything else has a higher score."""
    made = recipe("bigan", digits())
    known = digits().tensors["image"][:1]
    made.networks["generator"] = lambda z: known.expand(len(z), -1, -1, -1)
    scores = made.anomaly_score(torch.cat([known, -known, digits().tensors["image"][1:2]]))
    assert scores[0] < 1e-6 and (scores[1:] > 0.1).all()


# --- lapgan ----------------------------------------------------------------------------------------------------------


def test_a_pyramid_adds_up():
    made = recipe("lapgan", digits(16), base=4)
    assert made.sides == [4, 8, 16] and made.averaged == ("generator4", "generator8", "generator16")
    batch = made.unseen(3)
    detail, (coarse,) = made.level(16, batch)
    torch.testing.assert_close(coarse + detail, batch["image"])
    image, args = made.level(4, batch)
    torch.testing.assert_close(image, torch.nn.functional.avg_pool2d(batch["image"], 4))
    assert not args and [images.shape[-1] for images in made.grow(2)] == [4, 8, 16]
    torch.testing.assert_close(lapgan.finer(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="base=6"):
        recipe("lapgan", digits(16), base=6)


# --- captions and stackgan -------------------------------------------------------------------------------------------


def test_captions():
    words = captions.Captions(tuple("0123456789"))
    assert words.tokens("three").tolist() == [0, 6] and words.tokens("a small Seven").tolist() == [1, 10]
    assert words.tokens("the large zero").tolist() == [2, 3]
    pairs = words.of(torch.tensor([3, 7]), torch.tensor([0, 1]))
    assert [words.text(pair) for pair in pairs] == ["three", "small seven"]
    for text in ("", "small", "eleven", "a tiny seven", "seven small"):
        with pytest.raises(ValueError, match="expected"):
            words.tokens(text)
    letters = captions.Captions(("A", "a", "b"))
    assert letters.tokens("a").tolist() == [0, 4] and letters.tokens("a small A").tolist() == [1, 3]
    assert captions.Captions(("red car", "tree")).tokens("a large red car").tolist() == [2, 3]


def test_small_ones_are_shrunk():
    image = digits(16).tensors["image"][:8]
    both = captions.shrunk(image, torch.arange(8) % 2 == 1)
    assert torch.equal(both[::2], image[::2])
    ratio = stackgan.spread(both[1::2]) / stackgan.spread(image[1::2])
    assert ((ratio > 0.5) & (ratio < 0.7)).all() and (both[1::2, :, 0] == -1).all()


def test_critics_of_stackgan_are_shown_wrong_texts(monkeypatch):
    made = recipe("stackgan", digits(16), wrong_text=0.5)
    seen = {}
    monkeypatch.setattr(made, "critic_step", lambda critic, real, fake, loss, **args: seen.update(real=real, fake=fake, **args))
    real, fake, tokens = torch.arange(8.0), -1 - torch.arange(8.0), torch.stack([torch.zeros(8), 3 + torch.arange(8)], 1).long()
    made.judge(None, real, fake, tokens)
    assert seen["fake"].tolist() == [-1, -2, -3, -4, 4, 5, 6, 7] and seen["real_args"][0] is tokens
    (other,) = seen["fake_args"]
    assert torch.equal(other[:4], tokens[:4]) and (other[4:] != tokens[4:]).any(1).all()


# --- latents ---------------------------------------------------------------------------------------------------------


def test_moved_latents_arrive():
    torch.manual_seed(0)
    z, direction = torch.randn(6, 5), torch.randn(5)
    target = torch.linspace(-2, 2, 6)
    moved = editing.move(lambda z: z @ direction, z, target)
    torch.testing.assert_close(moved @ direction, target, atol=1e-4, rtol=0)
    across = (moved - z) - ((moved - z) @ direction / direction.square().sum())[:, None] * direction
    assert across.abs().max() < 1e-4, "moved further than it had to"
    curved = editing.move(lambda z: (z @ direction).tanh(), z / 10, target / 4)
    torch.testing.assert_close((curved @ direction).tanh(), target / 4, atol=1e-4, rtol=0)


def test_arcs_end_where_they_should_and_keep_their_length():
    a, b = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    b = b / b.norm(dim=1, keepdim=True) * a.norm(dim=1, keepdim=True)
    for share, want in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(editing.arc(a, b, torch.tensor(share)), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(editing.arc(a, b, torch.tensor(0.3)).norm(dim=1), a.norm(dim=1))
    torch.testing.assert_close(editing.arc(a, 2 * a, torch.tensor(0.5)), 1.5 * a)


def test_attributes_of_a_stroke():
    upright, leaning = torch.full((2, 1, 1, 9, 9), -1.0)
    upright[..., 4] = 1
    leaning[..., range(9), range(8, -1, -1)] = 1  # to the right going up
    assert editing.slant(upright).abs() < 1e-4 and editing.slant(leaning) > 0.9
    assert editing.width(leaning) > editing.width(upright) and editing.height(upright) > 0.3
    assert editing.brightness(torch.ones(2, 3, 4, 4)).tolist() == [1, 1]


# --- fastgan sample --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of runs by recipe, trained for a step."""

    @functools.cache
    def made(name, spec, size, **changed):
        out, kind = tmp_path_factory.mktemp(name), recipes.get(name)
        known = {field.name for field in dataclasses.fields(kind.Options)}
        chosen = kind.Options(**{k: v for k, v in {"width": 8, "z_dim": 8, **changed}.items() if k in known})
        trained = Trainer(kind, chosen, data.load(spec, size), batch_size=4, steps=1, out=out)
        trained.step()
        trained.save()
        config = {"recipe": name, "data": spec, "size": size, "options": dataclasses.asdict(chosen)}
        checkpoint.write_json(out / "config.json", config)
        return out

    return made


def drawn(folder, *arguments):
    import numpy

    out = folder / "x.npz"
    assert sample.main([str(folder), "--out", str(out), *arguments]) == 0
    return torch.tensor(numpy.load(out)["samples"])


def test_a_line_of_text(folder, capsys):
    run = folder("cgan", "glyphs", 8)
    line = drawn(run, "--text", "HELLO you", "-n", "3")
    assert line.shape == (9, 3, 1, 8, 8) and (line[5] == -1).all()
    assert torch.equal(line[2], line[3]) and not torch.equal(line[1], line[2])
    assert sample.main([str(run), "--text", "no ;"]) == 2 and "';'" in capsys.readouterr().err
    assert sample.main([str(run), "--text", "HELLO"]) == 0 and (run / "samples.png").stat().st_size > 100


def test_edits_and_interpolations(folder, capsys):
    run = folder("cgan", "digits", 8)
    relabelled = drawn(run, "--edit", "label=7", "-n", "10")
    assert relabelled.shape == (10, 2, 1, 8, 8)
    assert torch.equal(relabelled[7, 0], relabelled[7, 1]) and not torch.equal(relabelled[3, 0], relabelled[3, 1])
    brighter = drawn(run, "--edit", "brightness=1", "-n", "5").mean((2, 3, 4))
    assert (brighter.diff(dim=1) > 0).all()
    between = drawn(run, "--interpolate", "-n", "4")
    assert between.shape == (8, 4, 1, 8, 8) and (between.diff(dim=0).abs().amax((2, 3, 4)) > 0).all()
    for wrong in ("label=x", "colour=1", "slant=much", "slant"):
        assert sample.main([str(run), "--edit", wrong]) == 2
        assert "expected" in capsys.readouterr().err


def test_pictures_to_translate_and_texts_to_draw(folder, capsys):
    run = folder("srgan", "digits", 16, blocks=1)
    assert drawn(run, "--input", "digits", "-n", "3", "--size", "8").shape == (3, 2, 1, 16, 16)
    assert sample.main([str(run), "--input", "photos", "--size", "32"]) == 2 and "channels" in capsys.readouterr().err
    for option in (("--text", "A"), ("--interpolate",), ("--edit", "slant=1")):
        assert sample.main([str(run), *option]) == 2 and capsys.readouterr().err
    captioned = folder("stackgan", "digits", 16)
    assert drawn(captioned, "--text", "a small seven", "-n", "5").shape == (5, 1, 16, 16)
    assert sample.main([str(captioned), "--text", "a small horse"]) == 2 and "horse" in capsys.readouterr().err
    assert sample.main([str(captioned), "--input", "digits"]) == 2
