"""Accelerated critics in other people's training loops; skipped where these are not installed."""

import logging
import warnings

import pytest
import torch
from test_accelerate import Everything, pair, twins

import fastgan


def steps(model, optimizer, backward, count=3):
    for k in range(count):
        real, fake = pair(seed=k)
        optimizer.zero_grad()
        x = (0.3 * real + 0.7 * fake).requires_grad_(True)
        scores = model(x)
        (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        backward(model(fake).mean() - model(real).mean() + 10 * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean())
        optimizer.step()


def assert_same(ours, plain):
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_hugging_face_accelerate():
    accelerate = pytest.importorskip("accelerate")
    ours, plain, _ = twins(Everything)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (ours, plain)]
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, prepared_optimizer = accelerator.prepare(ours, optimizers[0])
    steps(prepared, prepared_optimizer, accelerator.backward)
    steps(plain, optimizers[1], torch.Tensor.backward)
    assert_same(accelerator.unwrap_model(prepared), plain)
    # accelerated after it was prepared: the same modules, the same optimizer
    late = twins(Everything)[1]
    prepared, prepared_optimizer = accelerator.prepare(late, torch.optim.Adam(late.parameters(), 1e-3))
    fastgan.accelerate(prepared)
    steps(prepared, prepared_optimizer, accelerator.backward)
    assert_same(late, plain)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package, tmp_path):
    lightning = pytest.importorskip(package)
    logging.getLogger(package).setLevel(logging.ERROR)

    class Gan(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.critic = Everything().double()

        def configure_optimizers(self):
            return torch.optim.Adam(self.critic.parameters(), 1e-3)

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            steps(self.critic, optimizer, self.manual_backward, 1)

    def fit(model):
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(3, 1)))
        return model

    plain, ours = fit(Gan()), Gan()
    report = fastgan.accelerate(ours)
    assert "critic.mbd" in {r.name for r in report.replaced}
    fit(ours)
    assert_same(ours.critic, plain.critic)
