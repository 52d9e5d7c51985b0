"""``fastgan bench``: selection, gate, limits, comparison, and that it works where fastgan is installed."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgan
from benchmarks import every_case, make_cases
from benchmarks.case import OURS, Case, check, run
from fastgan import bench, measure

X = torch.ones(1 << 12)


def case(factor=1.0, **options):
    candidates = {OURS: lambda: (factor * X.sum(),), "slow": lambda: (sum(part.sum() for part in X.split(8)),)}
    return Case("sum", "4096", "forward", lambda: candidates, lambda: (torch.tensor(4096.0).double(),), **options)


def row(low, median, high, **more):
    times = {"fastgan": {"median": 0.01, "low": 0.01, "high": 0.01}, "eager": {"median": 0.02, "low": 0.02, "high": 0.02}}
    speedup = {"eager": {"median": median, "low": low, "high": high}}
    return {
        "op": "sum", "shape": "4096", "mode": "forward", "seconds": times, "ours": "fastgan", "best": "eager",
        "speedup": speedup,
        "bytes_per_second": {"fastgan": 9e9, "stream": 1e10}, "flops_per_second": {"fastgan": 1e9}, "dtype": "float32",
        "peak_bytes": {"fastgan": 1 << 20, "eager": 2 << 20},
    } | more  # fmt: skip


def result(*rows, failed=()):
    limits = {"flops_per_second": {"float32": 4e9}, "bytes_per_second": 1e10}
    machine = measure.machine() | {"device": "cpu"}
    return {"default": {"machine": machine, "limits": limits, "cases": list(rows), "failed": list(failed)}}


RESULT = result(row(1.9, 2.0, 2.1), row(3.0, 3.1, 3.2, shape="a-rather-long-name-of-a-shape-1024x1024"))


def options(*argv):
    return bench._parser().parse_args(list(argv))


def test_cases_are_selected_by_what_they_are():
    cases = every_case()
    assert {c.kind for c in cases} == set(bench.KINDS)
    some = bench.select(cases, options("--op", "minibatch_discrimination", "--mode", "double"))
    assert [c.shape for c in some] == ["256x64x16"]
    assert {c.dtype for c in bench.select(cases, options("--dtype", "bfloat16"))} == {"bfloat16"}
    assert {c.op for c in bench.select(cases, options("--mode", "step"))} >= {"critic_step", "spectral_norm"}
    with pytest.raises(ValueError, match=r"--op nothing: there are .*critic_step"):
        bench.select(cases, options("--op", "nothing"))
    with pytest.raises(ValueError, match="together"):
        bench.select(cases, options("--op", "critic_step", "--dtype", "bfloat16"))


def test_cases_are_made_of_a_size_and_a_dtype():
    cases = every_case()

    def made(*argv):
        return bench.select(cases, options(*argv), make_cases)

    op = ("--op", "minibatch_discrimination")
    found = made(*op, "--size", "512x128x16", "--dtype", "float16", "--dtype", "float32")
    assert {(c.shape, c.dtype) for c in found} == {("512x128x16-float16", "float16"), ("512x128x16", "float32")}
    assert {c.kind for c in found} == {"fwd", "bwd", "double"}
    assert [c.kind for c in made(*op, "--size", "5x4x3", "--mode", "fwd")] == ["fwd"]
    assert made(*op, "--size", "256x64x16")[0] in cases and made(*op, "--size", "256x64x1")[0] not in cases
    assert {c.shape for c in made("--op", "minibatch_stddev", "--dtype", "bfloat16")} == {
        f"{n}x512x4x4-bfloat16" for n in (4, 16, 64)
    }
    assert [c.mode for c in made("--op", "critic_step", "--size", "ctgan-mlp-b7", "--mode", "step")] == [
        "R1+R2",
        "R1",
        "WGAN-GP",
    ]
    for argv, why in {
        (*op, "--size", "512x128"): "512x128: expected BxKxD, such as 512x128x16",
        (*op, "--size", "0x1x2"): "0x1x2: expected BxKxD",
        ("--op", "minibatch_stddev", "--size", "6x3x4x4"): "a multiple of 4",
        ("--op", "pairwise_kernel_sum", "--size", "cosine 8x8x8"): "or with one before it",
        ("--op", "critic_step", "--size", "dcgan64-bx"): "NETWORK-bBATCH, such as dcgan64-b32, with one of dcgan64",
        ("--op", "critic_step", "--dtype", "float16"): "float32",
        ("--op", "accelerate", "--size", "3x3"): "3x3: expected NETWORK-bBATCH",
        ("--size", "12x12"): "name an operator with --op",
    }.items():
        with pytest.raises(ValueError, match=why):
            made(*argv)


SMALL = {
    "minibatch_discrimination": "9x3x5",
    "minibatch_stddev": "8x3x4x4",
    "gradient_penalty": "9x3x8x8",
    "nearest_distances": "33x7",
    "pairwise_kernel_sum": "33x21x7",
    "spectral_norm": "16x8x3x3",
}


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("op", SMALL)
def test_what_is_made_passes_the_gate(op, dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)  # takes a minute for each otherwise
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pykeops" else find(name))
    for case in make_cases(op, SMALL[op], getattr(torch, dtype)):
        assert check(case, case.candidates())[OURS] < 1e-2 and case.dtype == dtype


def test_in_16_bits_torch_sets_the_limit():
    truth = torch.full((64,), 1.0, dtype=torch.float64)

    def judged(ours, theirs, dtype="bfloat16"):
        candidates = {OURS: lambda: (truth + ours,), "eager": lambda: (truth + theirs,)}
        return check(Case("x", "64", "forward", lambda: candidates, lambda: (truth,), dtype=dtype), candidates)

    assert judged(1.9e-2, 1e-2)[OURS] == pytest.approx(1.9e-2)
    with pytest.raises(AssertionError, match=r"fastgan is off by 2\.10e-02 \(limit 2\.0e-02"):
        judged(2.1e-2, 1e-2)
    with pytest.raises(AssertionError, match=r"limit 1\.0e-04"):
        judged(1.9e-2, 1e-2, "float32")


def test_rates_and_limits():
    found = run(case(moves=1 << 14, flops=4096.0), 0.01)
    ours, time = found["ours"], found["seconds"][OURS]["median"]
    assert found["bytes_per_second"][ours] == (1 << 14) / time and found["flops_per_second"][ours] == 4096 / time
    assert found["bytes_per_second"]["stream"] > 0
    assert bench.share(row(1, 2, 3), RESULT["default"]["limits"]) == (0.9, "9 GB/s")
    bound = row(1, 2, 3, bytes_per_second={}, flops_per_second={"fastgan": 2e9})
    assert bench.share(bound, RESULT["default"]["limits"]) == (0.5, "2 GFLOP/s")
    assert bench.share(row(1, 2, 3, bytes_per_second={}, flops_per_second={}), RESULT["default"]["limits"]) is None
    assert measure.multiply_add_peak(n=256, seconds=0.01) > 1e8


def test_products_are_counted_as_they_run():
    a = torch.randn(8, 16)
    run_one = lambda: (a @ a.T,)  # noqa: E731
    counted = Case(
        "product", "8", "forward", lambda: {OURS: run_one, "eager": run_one}, lambda: (a.double() @ a.double().T,), flops=-1
    )
    found = run(counted, 0.01)
    assert found["flops_per_second"][OURS] * found["seconds"][OURS]["median"] == pytest.approx(2 * 8 * 8 * 16)


def test_only_the_baselines_asked_for():
    candidates = dict(case().candidates()) | {"other": lambda: (X.sum(),)}
    three = Case("sum", "4096", "forward", lambda: candidates, lambda: (torch.tensor(4096.0).double(),))
    assert set(run(three, 0.01, ["other"])["speedup"]) == {"other"}
    assert set(run(three, 0.01, ["unknown"])["speedup"]) == {"slow", "other"}


def test_nothing_wrong_is_measured(monkeypatch, tmp_path, capsys):
    package = SimpleNamespace(__name__="benchmarks", make_cases=make_cases, every_case=lambda: [case(), case(1.1)])
    monkeypatch.setattr(bench, "_benchmarks", lambda: package)
    target, page = tmp_path / "r.json", tmp_path / "r.html"
    assert bench.main(["--seconds", "0.01", "--json", str(target), "--html", str(page)]) == 1
    (found,) = json.loads(target.read_text()).values()
    assert len(found["cases"]) == 1 and "is off by" in found["failed"][0]["why"]
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["allocator"] == measure.allocator()
    assert "is off by" in capsys.readouterr().out and "<svg" in page.read_text()


def test_regressions_beyond_the_spread(tmp_path, capsys):
    files = {}
    for name, found in {
        "before": RESULT,
        "noise": result(row(1.7, 1.93, 2.0)),
        "slower": result(row(1.5, 1.6, 1.7)),
        "failed": result(failed=[{"id": "sum-4096-forward", "why": "off"}]),
        "other": {"tuned": RESULT["default"]},
    }.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(found))

    def status(name):
        return bench.main(["--compare", str(files["before"]), str(files[name])])

    assert [status(name) for name in ("before", "noise", "slower", "failed", "other")] == [0, 0, 1, 1, 2]
    assert "slower: sum 4096 forward (default): 2.00x becomes 1.60x over eager" in capsys.readouterr().out
    assert bench.main(["--compare", str(files["before"]), str(tmp_path / "nowhere")]) == 2
    files["noise"].write_text("[1]")
    assert status("noise") == 2 and "noise.json holds no results" in capsys.readouterr().err
    elsewhere = copy.deepcopy(RESULT)
    elsewhere["default"]["machine"]["processor"] = "another"
    files["slower"].write_text(json.dumps(elsewhere))
    assert status("slower") == 0 and "different machines" in capsys.readouterr().out
    faster = copy.deepcopy(RESULT)
    faster["default"]["cases"][0]["speedup"]["eager"] = {"median": 3.0, "low": 2.9, "high": 3.1}
    assert bench.compare(RESULT, faster)[0][0][-1] == "faster"


def test_committed_results_can_be_compared():
    path = next((Path(fastgan.__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
    assert bench.main(["--compare", str(path), str(path)]) == 0


def test_it_works_where_fastgan_is_installed(tmp_path):
    """As installed: the cases are fastgan.benchmarks, and there is no folder benchmarks, nor tests, beside the package."""
    root = Path(fastgan.__file__).parents[1]
    package = tmp_path / "fastgan"
    package.mkdir()
    for path in (root / "fastgan").iterdir():
        (package / path.name).symlink_to(path)
    (package / "benchmarks").symlink_to(root / "benchmarks")
    code = (
        "import sys; sys.path = [p for p in sys.path if not p.endswith('tests')]; sys.meta_path = [f for f in sys.meta_path if "
        "'editable' not in str(f)]; import fastgan; assert fastgan.__file__.startswith(sys.argv[1]), fastgan.__file__\n"
        "from fastgan.cli import main; main(['bench', '--list'])\n"
        "assert not {'benchmarks', 'critics', 'rich', 'pytest'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert len(child.stdout.splitlines()) == len(every_case())
    assert '"fastgan.benchmarks" = "benchmarks"' in (root / "pyproject.toml").read_text()
