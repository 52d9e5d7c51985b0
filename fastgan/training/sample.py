"""``fastgan sample DIR``: draw from a trained run: new samples, text, translated, edited or interpolated pictures."""

import argparse
import sys
from pathlib import Path

from fastgan.training import missing_extras

EPILOG = """\
--text: a conditional recipe writes a line, a sample for each character (fastgan train cgan --data glyphs, then
fastgan sample out/cgan --text HELLO); stackgan draws what the text says ("a small seven").
--input: a name or path as of --data; pix2pix, srgan and cyclegan translate these pictures, shown above what becomes of them.
--edit ATTRIBUTE=VALUE: samples, and below them the same latents moved until brightness, slant, width or height is VALUE
standard deviations more; label=NAME: as another class."""


def main(argv: list[str] | None = None) -> int:
    """0 when the picture is written, 2 when it can't be."""
    parser = argparse.ArgumentParser(
        prog="fastgan sample", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a run, as fastgan train made it")
    parser.add_argument("-n", type=int, help="how many (default: 64; 8 columns, rows or lines with the options below)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", help="write or draw this")
    what.add_argument("--input", metavar="DATA", help="translate these pictures")
    what.add_argument("--edit", metavar="ATTRIBUTE=VALUE", help="samples with more of an attribute")
    what.add_argument("--interpolate", action="store_true", help="rows from one sample to another")
    parser.add_argument("--size", type=int, help="side that --input is resized to (default: the run's)")
    parser.add_argument("--out", type=Path, help="PNG file (default: DIR/samples.png), or .npz for the numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(argv)
    if arguments.n is not None and arguments.n < 1:
        parser.error(f"-n {arguments.n}: expected at least 1")
    if missing := missing_extras():
        print(f"fastgan sample: {', '.join(missing)} missing; pip install 'fastgan[train]'", file=sys.stderr)
        return 2
    import torch

    from fastgan.training import pictures, run

    try:
        recipe, config = run.load(arguments.folder, run.device(arguments.device))
        torch.manual_seed(arguments.seed)
        samples = drawn(recipe, config, arguments)
        path = arguments.out or arguments.folder / "samples.png"
        if path.suffix == ".npz":
            import numpy

            path.parent.mkdir(parents=True, exist_ok=True)
            numpy.savez(path, samples=samples.cpu().numpy())
        else:
            pictures.save(path, samples)
    except (ValueError, OSError) as error:  # their messages say what is expected
        print(f"fastgan sample: {error}", file=sys.stderr)
        return 2
    print(f"samples {tuple(samples.shape)} in {path}")
    return 0


def drawn(recipe, config: dict, arguments: argparse.Namespace):
    """What the arguments ask for: (n, C, H, W), points (n, D), or columns (n, rows, C, H, W)."""
    import torch

    from fastgan.training import data, editing

    n, name = arguments.n or (8 if arguments.text or arguments.input or arguments.edit else 64), config["recipe"]
    if arguments.edit:
        attribute, _, value = arguments.edit.partition("=")
        return editing.edit(recipe, n, attribute, value)
    if arguments.interpolate:
        return editing.interpolate(recipe, arguments.n or 8)
    with torch.no_grad():
        if arguments.text:
            if not hasattr(recipe, "write"):
                raise ValueError(f"--text: {name} does not write; cgan on glyphs does, and stackgan draws")
            return recipe.write(arguments.text, n)
        if arguments.input:
            if not hasattr(recipe, "translate"):
                raise ValueError(f"--input: {name} does not translate; pix2pix, srgan and cyclegan do")
            source = data.load(arguments.input, arguments.size or config["size"])
            images = source.__getitems__([i * len(source) // n for i in range(min(n, len(source)))])["image"]
            if images.shape[1] != recipe.source.shape[0]:
                raise ValueError(f"--input: {images.shape[1]} channels, but {name} was trained on {recipe.source.shape[0]}")
            outputs = recipe.translate(images.to(recipe.device))
            inputs = torch.nn.functional.interpolate(images.to(recipe.device), outputs.shape[2:])
            return torch.stack([inputs, outputs], 1)
        return recipe.sample(n)
