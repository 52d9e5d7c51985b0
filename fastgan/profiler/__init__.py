"""Where a GAN's training step spends its time and memory, how that grows with the batch, and what fastgan would gain.

=============  ==========================================================================================
``record``     watches a training loop through hooks: networks, who feeds whom, updates, penalties
``parts``      sorts what ``torch.profiler`` recorded into the parts of a GAN's step
``session``    ``fastgan.profile``: warm-up, undisturbed timing, traced iterations, results
``gains``      swaps in fastgan on captured calls and times both
``batches``    ``fastgan.profile_batches``: doubles the batch until memory ends, each size in a process of its own
``command``    ``fastgan profile``
=============  ==========================================================================================
"""

from fastgan.profiler.session import Profile as Profile
from fastgan.profiler.session import profile as profile


def profile_batches(make_step, batches="16:4096", **options):
    """See :func:`fastgan.profiler.batches.profile_batches`."""
    from fastgan.profiler.batches import profile_batches

    return profile_batches(make_step, batches, **options)
