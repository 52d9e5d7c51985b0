"""The one loop that trains every recipe: turns of its players, averages, samples, logs, checkpoints."""

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import fastgan
from fastgan.critic.forget import forget

from . import checkpoint, parallel, pictures
from .data import Batches, Source
from .networks import initialise
from .parallel import local
from .recipe import Player, Recipe

SHOWN = 64  # samples in a picture of images
SHOWN_POINTS = 4000


class Diverged(RuntimeError):
    """A loss, or a parameter, is no longer finite."""


def _moving_average(decay: float):
    """torch's exponential one, of each process's part of sharded tensors."""
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    return lambda averages, values, count: update(list(map(local, averages)), list(map(local, values)), count)


class Trainer:
    """Trains ``recipe`` on ``source``.

    ``out``: folder of checkpoints, samples and log.jsonl, or None to write nothing. ``amp``: autocast, float16 with a
    GradScaler on CUDA and bfloat16 elsewhere. ``compile``: of each generator-side network, and ``critic_step(compile=True)``.
    ``processes``: what :func:`parallel.start` found. Networks are initialised from ``seed``, each process draws its own noise.
    """

    def __init__(
        self, recipe_class: type[Recipe], options, source: Source, *, batch_size: int, steps: int, seed: int = 0,
        out: Path | None = None, device: torch.device | str = "cpu", amp: bool = False, compile: bool = False,
        processes: parallel.Processes = parallel.ALONE, workers: int = 0,
    ):  # fmt: skip
        self.steps, self.out, self.seed, self.processes = steps, out, seed, processes
        self.device, self.batch_size, self.source, self.workers = torch.device(device), batch_size, source, workers
        torch.manual_seed(seed)
        self.recipe = recipe = recipe_class(options, source)
        self.raw: dict[str, nn.Module] = dict(recipe.networks)
        for module in self.raw.values():
            initialise(module, options.init)
            module.to(self.device)
            if options.fast:
                fastgan.accelerate(module)
        self.averages = {
            name: torch.optim.swa_utils.AveragedModel(
                self.raw[name], multi_avg_fn=_moving_average(options.ema), use_buffers=True
            ).eval()
            for name in (recipe.averaged if options.ema else ())
        }
        self.players = recipe.players()
        critics = {name for player in self.players if player.is_critic for name in player.networks}
        for name in (name for name in self.raw if name not in critics):  # in one order, in all processes
            processes.shard(self.raw[name])
            if name in self.averages:
                processes.shard(self.averages[name].module)
            if compile:
                self.raw[name].compile()  # in place: its other methods, and indexing, stay
        self.trainable = {name: [p for p in m.parameters() if p.requires_grad] for name, m in self.raw.items()}
        self.modes = {module: module.training for m in self.raw.values() for module in m.modules()}
        self.parameters = {
            player.name: list(dict.fromkeys(p for name in player.networks for p in self.trainable[name]))
            for player in self.players
        }
        self.optimizers = {player.name: self._optimizer(player) for player in self.players}
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.autocast = (lambda: torch.autocast(self.device.type, half)) if amp else nullcontext
        recipe.scaler = self.scaler = torch.amp.GradScaler() if amp and half == torch.float16 else None
        recipe.compile, recipe.step = compile, 0
        self.batches = self._batches()
        self.losses: dict[str, Tensor] = {}
        self.values: dict[str, float] = {}  # the losses when they were last looked at
        torch.manual_seed(seed + processes.rank)  # from here on ranks draw different noise

    def _batches(self, start: int = 0) -> Batches:
        source, p = self.recipe.training_source, self.processes
        return Batches(source, self.batch_size, self.seed, p.rank, p.world, start=start, workers=self.workers)

    def _optimizer(self, player: Player) -> torch.optim.Optimizer:
        o = self.recipe.options
        parameters = self.parameters[player.name]
        if player.is_critic:
            parameters = self.processes.parts(parameters)
        rate = o.lr_critic if player.is_critic and o.lr_critic else o.lr
        if o.optimizer == "adam":
            # one kernel for all: on the CPU a tenth of a small perceptron's step went into Adam's many
            fused = self.device.type in ("cpu", "cuda") and self.processes.mode != "fsdp"
            return torch.optim.Adam(parameters, rate, (o.beta1, o.beta2), fused=fused or None)
        if o.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, rate)
        return torch.optim.SGD(parameters, rate, momentum=o.beta1)

    # --- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step: each player's turns. ``self.losses``: the terms of each, detached, after it."""
        self.recipe.step = self.done
        self._decay()
        for player in self.players:
            if self.done % player.every == 0:
                for _ in range(player.updates):
                    self._turn(player)
        self.processes.share_buffers(self.raw.values())
        for name, average in self.averages.items():
            average.update_parameters(self.raw[name])
        self.done += 1

    done = 0  # steps
    stopping = False  # set it, and run ends after the step in progress, with a checkpoint

    def _turn(self, player: Player) -> None:
        options, optimizer = self.recipe.options, self.optimizers[player.name]
        batch = {key: value.to(self.device, non_blocking=True) for key, value in next(self.batches).items()}
        if options.flip and batch["image"].dim() == 4:
            mirrored = torch.rand(len(batch["image"]), 1, 1, 1, device=self.device) < 0.5
            batch = {key: torch.where(mirrored, x.flip(3), x) if x.dim() == 4 else x for key, x in batch.items()}
        self.recipe.networks.update(self.raw)
        for name, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(name in player.networks)
        with self.autocast():
            terms = player.loss(batch)
        loss = sum(terms.values())
        parameters = self.parameters[player.name]
        for parameter in parameters:
            parameter.grad = None
        if self.scaler:
            loss = self.scaler.scale(loss)
        loss.backward()
        self.processes.average(parameters)
        parts = optimizer.param_groups[0]["params"]  # the parameters, or of several processes this one's share
        parallel.hand_over(parameters, parts)
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if options.clip_gradient:
            nn.utils.clip_grad_norm_(parts, options.clip_gradient)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        if options.clip_weight and player.is_critic:
            with torch.no_grad():
                for parameter in parts:
                    parameter.clamp_(-options.clip_weight, options.clip_weight)
        parallel.hand_back(parameters, parts)
        self.losses.update({name: value.detach() for name, value in terms.items()})

    def _decay(self) -> None:
        share = self.recipe.options.lr_decay
        if not share:
            return
        factor = min(1.0, (self.steps - self.done) / max(1.0, share * self.steps))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    # --- the whole run -----------------------------------------------------------------------------------------------

    def run(self, *, sample_every: int = 500, save_every: int = 500, log_every: int = 10, after_step=None) -> None:
        """Train to ``steps``, or until ``stopping`` is set. ``after_step(trainer)`` is called after each. ``sample_every=0``:
        no pictures.

        Raises :class:`Diverged`, naming loss and step, and OSError where ``out`` can't be written to.
        """
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
        started, before, saved = time.perf_counter(), self.done, self.done
        board = self._tensorboard()
        while self.done < self.steps and not self.processes.any(self.stopping):
            self.step()
            last = self.done == self.steps
            log, save = self.done % log_every == 0 or last, self.done % save_every == 0 or last
            if log or save:
                self.values = self._finite()  # the only place that waits for the device
            if log:
                speed = (self.done - before) / (time.perf_counter() - started)
                self._log({"step": self.done, **self.values, "steps_per_second": round(speed, 3)}, board)
            if self.out and sample_every and (self.done % sample_every == 0 or last):
                self.picture(self.out / "samples" / f"step-{self.done:08}.png")
            if self.out and save:
                saved = self.save()
            if after_step:
                after_step(self)
        if self.out and saved < self.done:
            self.save()
        if board:
            board.close()

    def _finite(self) -> dict[str, float]:
        """The losses as numbers. Raises :class:`Diverged`."""
        values = {name: float(value) for name, value in self.losses.items()}
        bad = [
            f"the loss of {name} is {value} at step {self.done}" for name, value in values.items() if not math.isfinite(value)
        ]
        if self.processes.any(bool(bad)):  # one may see it before the others, which would wait for it
            raise Diverged(next(filter(None, self.processes.gather(bad)))[0])
        return values

    def _tensorboard(self):
        if not self.out or self.processes.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(self.out / "tensorboard", purge_step=self.done + 1)

    def _log(self, row: dict, board) -> None:
        if not self.out or self.processes.rank:
            return
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if board:
            for name, value in row.items():
                board.add_scalar(name, value, row["step"])

    def for_sampling(self) -> Recipe:
        """The recipe with its averaged networks, in evaluation mode; :meth:`step` puts the trained ones back."""
        for name, module in self.raw.items():
            average = self.averages.get(name)
            self.recipe.networks[name] = average.module if average else module.eval()
        return self.recipe

    def back_to_training(self) -> None:
        for module, training in self.modes.items():
            module.training = training

    @torch.no_grad()
    def picture(self, path: Path) -> None:
        """Samples of the averaged networks, from the same latents each time; the run's own random state stays as it is."""
        points = len(self.source.shape) == 1
        recipe, states = self.for_sampling(), checkpoint.pack_random()
        torch.manual_seed(self.seed)
        n = SHOWN_POINTS if points else SHOWN
        batch = {key: value.to(self.device) for key, value in self.source.spread(n).items()}
        samples = recipe.show(batch, n)
        checkpoint.unpack_random(states)
        self.back_to_training()
        if not self.processes.rank:
            pictures.save(path, samples, batch["image"] if points else None)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> int:
        """A checkpoint of this moment in ``out/checkpoints``; a run that resumes from it goes on as this one does.

        Raises :class:`Diverged` where a parameter is not finite: what such a checkpoint would push out is worth more.
        """
        bad = [
            name for name, parameters in self.trainable.items() if not all(p.isfinite().all() for p in map(local, parameters))
        ]
        if bad := next(filter(None, self.processes.gather(bad)), None):
            raise Diverged(f"parameters of {bad[0]} are not finite at step {self.done}")
        self._forget()
        random = self.processes.gather(checkpoint.pack_random())
        tensors = {
            "model": checkpoint.pack_modules(self.raw),
            "average": checkpoint.pack_modules({name: average.module for name, average in self.averages.items()}),
            "training": checkpoint.pack_optimizers(self.optimizers)
            | {f"rank{rank}.{key}": value for rank, states in enumerate(random) for key, value in states.items()},
        }
        state = {
            "step": self.done,
            "batches": self.batches.drawn,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "averaged": {name: int(average.n_averaged) for name, average in self.averages.items()},
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        self.processes.first(checkpoint.save, self.out / "checkpoints", self.done, tensors, state)
        return self.done

    def _forget(self) -> None:
        """Which of its ways, equal up to rounding, a critic's step takes must not depend on whether the run was interrupted."""
        for critic in (self.recipe, *self.raw.values()):
            forget(critic)

    def resume(self) -> bool:
        """Go on from the newest checkpoint in ``out``; False where there is none. ValueError where it is damaged, and where
        processes don't see the same one."""
        available = checkpoint.found(self.out / "checkpoints")
        newest = available[-1] if available else None
        if len(set(self.processes.gather(newest and newest.name))) > 1:
            raise ValueError(f"--out {self.out}: expected a folder that all processes share")
        if newest is None:
            return False
        tensors, state = checkpoint.load(newest)
        checkpoint.unpack_modules(self.raw, tensors["model"])
        checkpoint.unpack_modules({name: a.module for name, a in self.averages.items()}, tensors.get("average", {}))
        for name, count in state["averaged"].items():
            self.averages[name].n_averaged.fill_(count)
        checkpoint.unpack_optimizers(self.optimizers, tensors["training"])
        for player, optimizer in self.optimizers.items():
            parallel.cut(self.parameters[player], optimizer.param_groups[0]["params"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        self.losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["losses"].items()}
        self.batches, p = self._batches(start=state["batches"]), self.processes
        own = {key.partition(".")[2]: value for key, value in tensors["training"].items() if key.startswith(f"rank{p.rank}.")}
        if own:
            checkpoint.unpack_random(own)
        self._forget_log_after(self.done)
        return True

    def _forget_log_after(self, step: int) -> None:
        path = self.out / "log.jsonl"
        if not self.processes.rank and path.exists():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            checkpoint.write_text(path, "".join(f"{row}\n" for row in rows))
