"""The trainer in two gloo processes: gradients averaged, or networks sharded."""

import os
import subprocess
import sys

import pytest
import small_recipe
import torch
from ranks import on_ranks

from fastgan.training import checkpoint, missing_extras, parallel

pytestmark = pytest.mark.skipif(bool(missing_extras()), reason=f"the extra train is not installed: {missing_extras()}")


def numbers(trainer):
    """All parameters, buffers, averages and optimizer states, whole."""
    averages = {name: average.module for name, average in trainer.averages.items()}
    found = {f"model.{key}": value for key, value in checkpoint.pack_modules(trainer.raw).items()}
    found |= {f"average.{key}": value for key, value in checkpoint.pack_modules(averages).items()}
    found |= {f"training.{key}": value for key, value in checkpoint.pack_optimizers(trainer.optimizers).items()}
    return {key: value.clone() for key, value in found.items()}


def same_on_all(processes, found):
    for other in processes.gather(found):
        assert other.keys() == found.keys()
        assert all(torch.equal(value, other[key]) for key, value in found.items())


def as_one_process(rank, mode, out):
    """Without noise and batch norm, two processes with half a batch each do what one does with all of it."""
    processes = parallel.Processes(rank, 2, mode)
    alone = small_recipe.trainer(None, steps=9, noise=False, clip_gradient=0.5)
    alone.run()
    ours = small_recipe.trainer(out, steps=9, noise=False, clip_gradient=0.5, processes=processes)
    assert any(map(parallel.is_sharded, ours.raw["generator"].parameters())) == (mode == "fsdp")
    ours.run(save_every=6, sample_every=4)
    expected, got = numbers(alone), numbers(ours)
    assert got.keys() == expected.keys()
    assert not any(key.startswith("training.encoder.2") for key in got)  # nobody's loss asked for its second half
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=2e-6, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    same_on_all(processes, got)


def resumes(rank, mode, out):
    """With noise and batch norm: all processes hold the same, and what goes on from a checkpoint becomes the same."""
    processes = parallel.Processes(rank, 2, mode)
    whole = small_recipe.trainer(out / "whole", steps=10, processes=processes)
    whole.run(save_every=4, sample_every=0)
    expected = numbers(whole)
    same_on_all(processes, expected)
    assert len({float(value.sum()) for value in processes.gather(torch.rand(4))}) == 2  # noise differs

    def break_off(trainer):
        if trainer.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_recipe.trainer(out / "part", steps=10, processes=processes).run(
            save_every=4, sample_every=0, after_step=break_off
        )
    again = small_recipe.trainer(out / "part", steps=10, processes=processes)
    assert again.resume() and again.done == 4
    again.run(save_every=4, sample_every=0)
    got = numbers(again)
    assert all(torch.equal(value, got[key]) for key, value in expected.items())
    with pytest.raises(ValueError, match="all processes share"):
        small_recipe.trainer(out / ("part" if rank else "nowhere"), processes=processes).resume()


def disk_full(rank, out):
    """What fails in the first process fails in all, with its message."""
    processes = parallel.Processes(rank, 2)
    checkpoint.save_file = fails
    with pytest.raises(OSError, match=r"could not be written.*No space left"):
        small_recipe.trainer(out, steps=2, processes=processes).run(sample_every=0)


def fails(*arguments):
    raise OSError(28, "No space left on device")


def everything(rank, out):
    for mode in ("ddp", "fsdp"):
        as_one_process(rank, mode, out / mode / "one")
        resumes(rank, mode, out / mode)
    disk_full(rank, out / "full")


def test_two_processes(tmp_path):
    """One start of processes for all of it: that is what takes time."""
    on_ranks(everything, tmp_path)
    assert checkpoint.found(tmp_path / "ddp" / "one" / "checkpoints")[-1].name == "step-00000009"
    # sharded networks leave whole checkpoints: one process reads them
    alone = small_recipe.trainer(tmp_path / "fsdp" / "one", noise=False)
    assert alone.resume() and alone.done == 9


def test_fsdp_needs_processes():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        parallel.start(torch.device("cpu"), "fsdp")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "fastgan", "train", "gan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def test_the_command_under_torchrun(tmp_path):
    arguments = ["--batch-size", 8, "--steps", 4, "--save-every", 2, "--device", "cpu", "--out", tmp_path]
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoints, samples and log.jsonl") == 1  # one of the two speaks
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
