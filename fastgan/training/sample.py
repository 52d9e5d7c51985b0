"""``fastgan sample DIR``: draw new samples from a trained run."""

import argparse
import sys
from pathlib import Path

from fastgan.training import missing_extras


def main(argv: list[str] | None = None) -> int:
    """0 when the picture is written, 2 when it can't be."""
    parser = argparse.ArgumentParser(prog="fastgan sample", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a run, as fastgan train made it")
    parser.add_argument("-n", type=int, default=64, help="how many")
    parser.add_argument("--out", type=Path, help="PNG file (default: DIR/samples.png), or .npz for the numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(argv)
    if missing := missing_extras():
        print(f"fastgan sample: {', '.join(missing)} missing; pip install 'fastgan[train]'", file=sys.stderr)
        return 2
    import torch

    from fastgan.training import pictures, run

    try:
        recipe, _ = run.load(arguments.folder, run.device(arguments.device))
    except (ValueError, OSError) as error:
        print(f"fastgan sample: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(arguments.seed)
    with torch.no_grad():
        samples = recipe.sample(arguments.n)
    path = arguments.out or arguments.folder / "samples.png"
    if path.suffix == ".npz":
        import numpy

        numpy.savez(path, samples=samples.cpu().numpy())
    else:
        pictures.save(path, samples)
    print(f"{arguments.n} samples in {path}")
    return 0
