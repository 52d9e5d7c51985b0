"""The trainer in two gloo processes: gradients averaged, or networks sharded."""

import os
import signal
import subprocess
import sys
import time

import pytest
import small_recipe
import torch
from ranks import on_ranks

from fastgan.training import checkpoint, missing_extras, parallel
from fastgan.training.trainer import Diverged, Trainer

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
    options = {"noise": False, "clip_gradient": 0.5, "clip_weight": 0.3}
    alone = small_recipe.trainer(None, steps=9, **options)
    alone.run()
    ours = small_recipe.trainer(out, steps=9, processes=processes, **options)
    assert any(map(parallel.is_sharded, ours.raw["generator"].parameters())) == (mode == "fsdp")
    ours.run(save_every=6, sample_every=4)
    for player, optimizer in ours.optimizers.items():  # critics are whole, what Adam keeps of them is not
        states = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(parallel.is_sharded(state) == (mode == "fsdp") for state in states), player
    assert not any(map(parallel.is_sharded, ours.raw["critic"].parameters()))
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


def one_is_told(rank, out):
    """To stop, or sees a loss that is not finite: all end after the same step."""
    processes = parallel.Processes(rank, 2)
    ours = small_recipe.trainer(out, steps=20, processes=processes)
    ours.run(sample_every=0, after_step=lambda t: setattr(t, "stopping", rank == 1 and t.done == 3))
    assert ours.done == 3 and checkpoint.found(out / "checkpoints")[-1].name == "step-00000003"
    ours, step = small_recipe.trainer(None, steps=20, processes=processes), Trainer.step

    def poisoned():
        step(ours)
        if rank == 1 and ours.done == 5:
            ours.losses["critic"] = torch.tensor(torch.nan)

    ours.step = poisoned
    with pytest.raises(Diverged, match="the loss of critic is nan at step 5"):
        ours.run(log_every=5)


def fails(*arguments):
    raise OSError(28, "No space left on device")


def everything(rank, out):
    for mode in ("ddp", "fsdp"):
        as_one_process(rank, mode, out / mode / "one")
        resumes(rank, mode, out / mode)
    one_is_told(rank, out / "told")
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
    """The running process, in a group of its own, as a terminal's foreground is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "fastgan", "train", "gan", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip


def test_the_command_under_torchrun(tmp_path):
    arguments = ["--batch-size", 8, "--steps", 4, "--save-every", 2, "--device", "cpu", "--out", tmp_path]
    process = torchrun(*arguments)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert said.count("checkpoints, samples and log.jsonl") == 1  # one of the two speaks
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to torchrun"])
def test_stopping_torchrun_saves(tmp_path, how):
    """Ctrl-C reaches every process, and then again by torchrun; a scheduler's SIGTERM only torchrun."""
    process = torchrun("--batch-size", 8, "--steps", 10**6, "--save-every", 10**6, "--device", "cpu", "--out", tmp_path)
    try:
        until = time.monotonic() + 200
        while not (tmp_path / "log.jsonl").exists() and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.1)
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (path,) = checkpoint.found(tmp_path / "checkpoints")
    assert checkpoint.load(path)[1]["step"] == int(path.name[5:]) >= 10
    assert f"stopped after step {int(path.name[5:])}; the same command with --resume goes on" in said
