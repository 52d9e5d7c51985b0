"""Which tensors of a critic's output are its scores."""

import torch


def score_list(output, score_fn=None):
    """The list of score tensors in a critic's output.

    A tensor is one score tensor; a list or tuple holds several (a multi-scale critic), all of which count; a dict must
    hold exactly one tensor. Anything else needs ``score_fn(output)``, which returns one of the above.
    Raises TypeError or ValueError naming what was found.
    """
    if score_fn is not None:
        output = score_fn(output)
    if isinstance(output, torch.Tensor):
        scores = [output]
    elif isinstance(output, dict):
        scores = [v for v in output.values() if isinstance(v, torch.Tensor)]
        if len(scores) != 1:
            raise ValueError(
                f"the critic returns a dict with {len(scores)} tensors ({', '.join(map(str, output))}): "
                'say which are the scores, e.g. score_fn=lambda out: out["adv_output"]'
            )
    elif isinstance(output, (list, tuple)):
        scores = list(output)
        odd = [type(s).__name__ for s in scores if not isinstance(s, torch.Tensor)]
        if odd or not scores:
            raise TypeError(
                f"the critic returns a {type(output).__name__} holding {', '.join(odd) or 'nothing'}: "
                "say which entries are the scores with score_fn, e.g. score_fn=lambda out: out[0]"
            )
    else:
        raise TypeError(f"the critic returns {type(output).__name__}: give score_fn to pick the scores out of it")
    for s in scores:
        if not s.is_floating_point():
            raise TypeError(f"scores must be floating point, got {s.dtype}")
    return scores


def like_output(scores):
    """One tensor if there is one, else the list: the form in which losses and users get scores."""
    return scores[0] if len(scores) == 1 else scores


def per_sample(v, t):
    """(N,) as a tensor that broadcasts over t (N, ...)."""
    return v.view([-1] + [1] * (t.dim() - 1))
