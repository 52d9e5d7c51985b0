"""Penalties that users write by hand, without double backward through zeros: :mod:`fastgan.critic.second_order` as a hook."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastgan.critic.second_order import enter, note_at_output
from fastgan.dropin.report import Replaced
from fastgan.dropin.swap import Swap, belongs_to_parametrizations

#: modules that make such operations, for the report
_MODULES = tuple(
    cls
    for name, cls in vars(nn).items()
    if name in ("ReLU", "LeakyReLU", "ReLU6", "Hardtanh", "Threshold", "PReLU", "RReLU", "Softshrink", "Hardshrink")
    or (name.startswith(("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool")))
    or name.startswith(("ReflectionPad", "ReplicationPad", "Conv", "LazyConv"))
)
BY = "second derivatives without dense zeros, those of functional calls included"


def find(model: nn.Module):
    """One swap: the hook on the model and on all parts of it that might be called by themselves."""
    weights = belongs_to_parametrizations(model)
    calls = [
        module
        for module in model.modules()
        if (module is model or next(module.children(), None) is not None)
        and module not in weights
        and type(module).forward is not nn.Module.forward
        and not isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule))
        and not hasattr(module, "_orig_mod")
        and note_at_output not in module._forward_hooks.values()
    ]

    def apply():
        for module in calls:
            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(note_at_output, with_kwargs=True, always_call=True)

    def undo():
        for module in calls:
            unhook(module)

    if calls:
        yield Swap("", type(model).__name__, BY, apply, undo)


def unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is note_at_output]:
        for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
            hooks.pop(key, None)
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is enter]:
        module._forward_pre_hooks.pop(key, None)


def modules_served(model: nn.Module) -> list[Replaced]:
    by = "second derivative without dense zeros"
    return [
        Replaced(name, parametrize.type_before_parametrizations(module).__name__, by)
        for name, module in model.named_modules()
        if isinstance(module, _MODULES)
    ]
