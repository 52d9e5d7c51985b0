"""Forgetting what steps have learned about a critic."""

from torch import nn

from . import engine, joint


def forget(critic) -> None:
    """What :func:`fastgan.critic_step` has found out about ``critic``, and a module's parts, is found out anew.

    Which of several ways to the same gradients a step takes depends on what earlier steps have seen. They agree up to
    rounding. A run that is to go on in another process bit for bit as in this one forgets at its checkpoint, because the
    other process knows nothing. A program of ``compile=True`` stays.
    """
    for part in critic.modules() if isinstance(critic, nn.Module) else [critic]:
        for known in (engine._PLANS, engine._REPEATED, engine._REFUSED, joint._KNOWN):
            known.pop(part, None)
