"""``python -m benchmarks.trainers --repos FOLDER``: public GAN trainers, as they are and after ``fastgan.accelerate``.

FOLDER holds clones of the repositories named in ``TRAINERS`` (``--list`` prints the commands); none of their code is part of
this project. Each trainer runs in a process of its own on small real data: scikit-learn's digits and tables. Measured are

* lockstep: the plain trainer's state is copied to the accelerated one before every step; differences of losses and gradients,
* drift: how far free-running parameters are apart in the end, beside plain against plain with parameters moved by one rounding,
* time of a critic's and a generator's update, interleaved, and the peak of memory.
"""

import argparse
import ast
import copy
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch.nn import functional as F

import fastgan
from fastgan import measure


def definitions(path: Path, names: set[str], given: dict) -> types.SimpleNamespace:
    """Some classes and functions of a script that can't be imported as a whole."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = dict(given)
    exec(compile(tree, str(path), "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def digits(size: int, channels: int) -> torch.Tensor:
    """(1797, channels, size, size) in [-1, 1]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
    return F.interpolate(images, size=size, mode="bilinear").expand(-1, channels, -1, -1).contiguous()


class Trainer:
    """One repository's networks and updates.

    ``__init__(folder)`` makes ``generator``, ``critic`` and ``data`` (N, ...); ``critic_loss(generator, critic, real)`` and
    ``generator_loss(generator, critic, real)`` call the repository's own functions.
    """

    repository: str
    batch: int
    latent: int
    learning_rate, betas = 2e-4, (0.5, 0.9)

    def noise(self, real):
        return torch.randn(len(real), self.latent)


class WganGP(Trainer):
    """gan_mnist.py: a DCGAN-like critic, WGAN-GP by calc_gradient_penalty."""

    repository, batch, latent = "caogang/wgan-gp", 50, 128

    def __init__(self, folder):
        text = (folder / "gan_mnist.py").read_text()
        self.script = {"torch": torch, "nn": torch.nn, "autograd": torch.autograd, "use_cuda": False, "BATCH_SIZE": self.batch}
        self.script |= {"DIM": 64, "OUTPUT_DIM": 784, "LAMBDA": 10}
        for first, last in (("class Generator", "def generate_image"), ("def calc_gradient_penalty", "# ====")):
            exec(text[text.index(first) : text.index(last, text.index(first))], self.script)  # the rest is Python 2
        self.generator, self.critic = self.script["Generator"](), self.script["Discriminator"]()
        self.data = digits(28, 1).flatten(1) / 2 + 0.5

    def critic_loss(self, generator, critic, real):
        with torch.no_grad():
            fake = generator(self.noise(real))
        penalty = self.script["calc_gradient_penalty"](critic, real, fake)
        return critic(fake).mean() - critic(real).mean() + penalty

    def generator_loss(self, generator, critic, real):
        return -critic(generator(self.noise(real))).mean()


class Sngan(Trainer):
    """sngan_32: residual networks, spectral norm in the critic, hinge loss."""

    repository, batch, latent = "kwotsin/mimicry", 16, 128

    def __init__(self, folder):
        package = types.ModuleType("torch_mimicry")
        package.__path__ = [str(folder / "torch_mimicry")]  # without its __init__, which imports data sets and metrics
        sys.modules["torch_mimicry"] = package
        for name in ("training", "utils"):  # loggers and checkpoints
            sys.modules[f"torch_mimicry.{name}"] = types.ModuleType(name)
            sys.modules[f"torch_mimicry.{name}"].metric_log = sys.modules[f"torch_mimicry.{name}"].common = None
        networks = importlib.import_module("torch_mimicry.nets.sngan.sngan_32")
        self.generator, self.critic = networks.SNGANGenerator32(ngf=64), networks.SNGANDiscriminator32(ndf=64)
        self.data = digits(32, 3)

    def critic_loss(self, generator, critic, real):
        real_scores = critic(real)
        fake = generator(self.noise(real)).detach()
        return critic.compute_gan_loss(output_real=real_scores, output_fake=critic(fake))

    def generator_loss(self, generator, critic, real):
        return generator.compute_gan_loss(output=critic(generator(self.noise(real))))


class BigGAN(Trainer):
    """BigGAN.py: class-conditional residual networks, their own spectral norm in every layer of both, hinge loss."""

    repository, batch, latent, betas = "ajbrock/BigGAN-PyTorch", 16, 64, (0.0, 0.999)

    def __init__(self, folder):
        sys.path.insert(0, str(folder))
        networks, self.losses = importlib.import_module("BigGAN"), importlib.import_module("losses")
        self.generator = networks.Generator(G_ch=32, dim_z=self.latent, resolution=32, G_attn="0", n_classes=10)
        self.critic = networks.Discriminator(D_ch=32, resolution=32, D_attn="0", n_classes=10)
        self.data = digits(32, 3)

    def _fake(self, generator, real):
        labels = torch.randint(10, (len(real),))
        return generator(self.noise(real), generator.shared(labels)), labels

    def critic_loss(self, generator, critic, real):
        with torch.no_grad():
            fake, labels = self._fake(generator, real)
        scores = critic(torch.cat([fake, real]), torch.cat([labels, torch.randint(10, (len(real),))]))
        return sum(self.losses.discriminator_loss(*scores.split(len(real))))

    def generator_loss(self, generator, critic, real):
        return self.losses.generator_loss(critic(*self._fake(generator, real)))


class StyleGAN2(Trainer):
    """model.py and train.py: stddev in the critic, R1 by d_r1_loss at every step, non-saturating loss."""

    repository, batch, latent, betas = "rosinality/stylegan2-pytorch", 4, 512, (0.0, 0.99)

    def __init__(self, folder):
        import torch.utils.cpp_extension

        torch.utils.cpp_extension.load = lambda *a, **k: None  # its CUDA kernels; CPUs have functions of their own there
        sys.path.insert(0, str(folder))
        model, gradfix = importlib.import_module("model"), importlib.import_module("op.conv2d_gradfix")
        names = {"d_logistic_loss", "d_r1_loss", "g_nonsaturating_loss"}
        space = {"torch": torch, "F": F, "autograd": torch.autograd, "conv2d_gradfix": gradfix}
        self.script = definitions(folder / "train.py", names, space)
        self.generator, self.critic = model.Generator(8, 512, 2), model.Discriminator(8)  # 512 channels whatever the size
        self.data = digits(8, 3)

    def critic_loss(self, generator, critic, real):
        with torch.no_grad():
            fake, _ = generator([self.noise(real)])
        real = real.detach().requires_grad_()
        real_scores = critic(real)
        loss = self.script.d_logistic_loss(real_scores, critic(fake))
        return loss + 10 / 2 * self.script.d_r1_loss(real_scores, real)

    def generator_loss(self, generator, critic, real):
        return self.script.g_nonsaturating_loss(critic(generator([self.noise(real)])[0]))


class R3GAN(Trainer):
    """Networks.py and Trainer.py: grouped residual blocks, relativistic loss, R1 and R2 at every step."""

    repository, batch, latent, betas = "brownvc/R3GAN", 8, 64, (0.0, 0.99)

    def __init__(self, folder):
        sys.path.insert(0, str(folder))
        sys.modules.setdefault("requests", types.ModuleType("requests"))  # for downloads
        sys.modules["pkg_resources"] = types.SimpleNamespace(
            parse_version=torch.torch_version.TorchVersion
        )  # gone from setuptools
        networks = importlib.import_module("R3GAN.Networks")
        self.training = importlib.import_module("R3GAN.Trainer").AdversarialTraining
        widths = {"WidthPerStage": [96, 96, 64, 48], "CardinalityPerStage": [12, 12, 8, 6], "BlocksPerStage": [1] * 4}
        back = {name: values[::-1] for name, values in widths.items()}
        self.generator = networks.Generator(self.latent, ExpansionFactor=2, **widths)
        self.critic = networks.Discriminator(ExpansionFactor=2, **back)
        self.data = digits(32, 3)

    def _losses(self, update, generator, critic, real, *more):
        """Its updates call backward themselves: what they backward is handed over instead."""
        caught, backward = [], torch.Tensor.backward
        torch.Tensor.backward = lambda loss, *a, **k: caught.append(loss)
        try:
            update(self.training(generator, critic), self.noise(real), real, None, *more)
        finally:
            torch.Tensor.backward = backward
        return caught[0]

    def critic_loss(self, generator, critic, real):
        return self._losses(self.training.AccumulateDiscriminatorGradients, generator, critic, real, 1.0)

    def generator_loss(self, generator, critic, real):
        return self._losses(self.training.AccumulateGeneratorGradients, generator, critic, real)


class CTGAN(Trainer):
    """ctgan.py: perceptrons on rows of a table in packs of ten, dropout, WGAN-GP by calc_gradient_penalty."""

    repository, batch, latent = "sdv-dev/CTGAN", 500, 128

    def __init__(self, folder):
        from sklearn.datasets import load_breast_cancer

        space = {"torch": torch} | vars(torch.nn)
        script = definitions(folder / "ctgan/synthesizers/ctgan.py", {"Discriminator", "Generator", "Residual"}, space)
        table = torch.tensor(load_breast_cancer().data, dtype=torch.float32)
        self.data = ((table - table.mean(0)) / table.std(0)).repeat(2, 1)
        columns = self.data.shape[1]
        self.generator, self.critic = (
            script.Generator(self.latent, (256, 256), columns),
            script.Discriminator(columns, (256, 256)),
        )

    def critic_loss(self, generator, critic, real):
        fake = generator(self.noise(real))
        penalty = critic.calc_gradient_penalty(real, fake, "cpu", 10)
        return critic(fake).mean() - critic(real).mean() + penalty

    def generator_loss(self, generator, critic, real):
        return -critic(generator(self.noise(real))).mean()


TRAINERS = {"wgan-gp": WganGP, "sngan": Sngan, "biggan": BigGAN, "stylegan2": StyleGAN2, "r3gan": R3GAN, "ctgan": CTGAN}


# --- what is measured ------------------------------------------------------------------------------------------------


class Training:
    """Networks and optimizers of one trainer."""

    def __init__(self, trainer, generator, critic):
        self.trainer, self.networks = trainer, {"generator": generator, "critic": critic}
        make = torch.optim.Adam
        self.optimizers = {n: make(m.parameters(), trainer.learning_rate, trainer.betas) for n, m in self.networks.items()}

    def state(self):
        return [t for m in self.networks.values() for t in (*m.parameters(), *m.buffers())]

    def copy_from(self, other):
        with torch.no_grad():
            for mine, theirs in zip(self.state(), other.state(), strict=True):
                mine.copy_(theirs)

    def gradients(self, which, real, seed):
        """Loss, and the gradients of the network that is updated, which stay in its ``.grad``."""
        torch.manual_seed(seed)
        for network in self.networks.values():
            network.zero_grad()
        loss = getattr(self.trainer, which + "_loss")(*self.networks.values(), real)
        loss.backward()
        parameters = [p for p in self.networks[which].parameters() if p.grad is not None]
        return loss.detach(), torch.cat([p.grad.flatten() for p in parameters])

    def step(self, real, seed):
        for which in ("critic", "generator"):
            self.gradients(which, real, seed)
            self.optimizers[which].step()


def distance(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def batches(trainer, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield trainer.data[torch.randperm(len(trainer.data), generator=generator)[: trainer.batch]]


def lockstep(trainer, plain, fast, steps):
    """Largest relative differences of losses and gradients from one state and one seed; the plain one's is trained."""
    worst = dict.fromkeys(("critic loss", "critic gradient", "generator loss", "generator gradient"), 0.0)
    for seed, real in enumerate(batches(trainer, steps)):
        fast.copy_from(plain)
        for which in ("critic", "generator"):
            (loss, grad), (other, other_grad) = (t.gradients(which, real, seed) for t in (plain, fast))
            difference = (loss - other).abs().item() / max(abs(loss.item()), 1.0)
            worst[which + " loss"] = max(worst[which + " loss"], difference)
            worst[which + " gradient"] = max(worst[which + " gradient"], distance(other_grad, grad))
            plain.optimizers[which].step()
            fast.copy_from(plain)
    return worst


def drift(trainer, runs, steps):
    """Relative distance of parameters from the first run's after training freely."""
    for seed, real in enumerate(batches(trainer, steps)):
        for run in runs.values():
            run.step(real, seed)
    flat = {name: torch.cat([t.flatten().float() for t in run.state()]) for name, run in runs.items()}
    first = next(iter(runs))
    return {name: distance(flat[name], flat[first]) for name in runs if name != first}


def measured(name, folder, steps, seconds):
    torch.manual_seed(0)
    trainer = TRAINERS[name](folder / TRAINERS[name].repository.split("/")[1])

    def training(change=lambda m: None):
        networks = copy.deepcopy((trainer.generator, trainer.critic))
        return Training(trainer, *[change(m) or m for m in networks])

    reports = []
    accelerated = lambda m: reports.append(fastgan.accelerate(m))  # noqa: E731

    @torch.no_grad()
    def nudged(m):
        for p in m.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)

    result = {"trainer": name, "repository": trainer.repository, "batch": trainer.batch, "steps": steps}
    result["lockstep"] = lockstep(trainer, training(), training(accelerated), steps)
    result["replaced"] = sorted({f"{r.name or '(model)'}: {r.by}" for report in reports for r in report.replaced})
    result["drift"] = drift(
        trainer, {"plain": training(), "accelerated": training(accelerated), "rounding": training(nudged)}, max(1, steps // 4)
    )
    real = next(batches(trainer, 1))
    plain, fast = training(), training(accelerated)
    for which in ("critic", "generator"):
        candidates = {
            label: lambda t=t, which=which: t.gradients(which, real, 0) for label, t in (("plain", plain), ("fastgan", fast))
        }
        times = measure.interleaved(candidates, seconds=seconds)
        result[which] = {label: measure.Spread.of(values).to_dict() for label, values in times.items()}
        result[which]["speedup"] = measure.speedup(times, "fastgan", "plain").to_dict()
        result[which]["peak"] = {label: measure.peak_memory(run) for label, run in candidates.items()}
    return result


def table(results):
    lines = [
        "| trainer | batch | critic ms, plain / fastgan | speed-up | generator speed-up | difference of losses, gradients "
        "| drift, fastgan / rounding | peak MiB of the critic's update |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        c, g, d = r["critic"], r["generator"], r["lockstep"]
        losses, gradients = (max(v for k, v in d.items() if k.endswith(end)) for end in ("loss", "gradient"))
        peak = " / ".join("?" if c["peak"][k] is None else f"{c['peak'][k] / 2**20:.0f}" for k in ("plain", "fastgan"))
        lines.append(
            f"| {r['repository']} | {r['batch']} | {c['plain']['median'] * 1e3:.1f} / {c['fastgan']['median'] * 1e3:.1f} | "
            f"{c['speedup']['median']:.2f}x | {g['speedup']['median']:.2f}x | {losses:.0e}, {gradients:.0e} | "
            f"{r['drift']['accelerated']:.0e} / {r['drift']['rounding']:.0e} | {peak} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=Path, help="folder that the clones are in")
    parser.add_argument("--trainer", choices=TRAINERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="results go here")
    parser.add_argument("--list", action="store_true", help="print how to get the repositories")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list or options.repos is None:
        print("\n".join(f"git clone --depth 1 https://github.com/{t.repository}" for t in TRAINERS.values()))
        return 0 if options.list else 2
    names = options.trainer or list(TRAINERS)
    if options.here:
        print(json.dumps(measured(names[0], options.repos, options.steps, options.seconds)))
        return 0
    results = []
    for name in names:
        command = [sys.executable, "-m", f"{__package__}.trainers", "--here", "--trainer", name, "--repos", str(options.repos)]
        command += ["--steps", str(options.steps), "--seconds", str(options.seconds)]
        found = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=measure.allocator_environment("tuned")
        )
        results.append(json.loads(found.stdout.splitlines()[-1]))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": measure.machine(), "results": results}, indent=1))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
