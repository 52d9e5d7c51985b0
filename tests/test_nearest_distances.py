"""Distances to nearest neighbours against all distances, sorted."""

import memory
import pytest
import torch

import fastgan
from fastgan import neighbours


def points(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sorted_distances(x, y, p=2, same=False):
    d = torch.linalg.vector_norm(x.double()[:, None] - y.double(), p, dim=2)
    if same:
        d.fill_diagonal_(torch.inf)
    return d.sort(1)


@pytest.fixture(params=[1 << 22, 600], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setitem(neighbours._TILE, "cpu", request.param)
    if request.param == 600:
        monkeypatch.setattr(neighbours, "_COLUMNS", 96)
    return request.param


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    "n, m, d, k", [(37, 203, 5, 3), (1, 1, 1, 1), (5, 1000, 2, 40), (64, 97, 33, 97), (0, 4, 3, 2), (9, 16, 0, 2)]
)
def test_the_k_smallest(tile, n, m, d, k, p):
    x, y = points(n, d), points(m, d, 1)
    want, _ = sorted_distances(x, y, p)
    got, indices = fastgan.nearest_distances(x, y, k=k, p=p, return_indices=True)
    assert got.shape == indices.shape == (n, k) and got.dtype == x.dtype
    torch.testing.assert_close(got.double(), want[:, :k], rtol=2e-6, atol=1e-6)
    assert torch.equal(got, fastgan.nearest_distances(x, y, k=k, p=p))
    own = torch.linalg.vector_norm(x[:, None] - y[indices], p, dim=2)
    torch.testing.assert_close(got, own)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize("p", [1, 2])
def test_without_itself(tile, p):
    x = points(131, 4)
    x[7] = x[100]  # a copy is a neighbour
    want, _ = sorted_distances(x, x, p, same=True)
    got, indices = fastgan.nearest_distances(x, k=3, p=p, return_indices=True)
    torch.testing.assert_close(got.double(), want[:, :3], rtol=2e-6, atol=1e-6)
    assert got[7, 0] == 0 and indices[7, 0] == 100 and indices[100, 0] == 7
    assert not (indices == torch.arange(131)[:, None]).any()


def test_copies_far_from_the_origin_are_at_distance_zero():
    y = points(500, 64) * 1e-3 + 1e4
    x = y[100:120].clone()
    distances, indices = fastgan.nearest_distances(x, y, return_indices=True)
    assert torch.equal(distances, torch.zeros(20, 1)) and torch.equal(indices[:, 0], torch.arange(100, 120))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, y = points(20, 8, dtype=dtype), points(50, 8, 1, dtype=dtype)
    want, _ = sorted_distances(x, y)
    got = fastgan.nearest_distances(x, y, k=4)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want[:, :4].to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=0)


def test_layouts_and_determinism():
    x, y = points(40, 12), points(80, 12, 1)
    want = fastgan.nearest_distances(x, y, k=2)
    assert torch.equal(fastgan.nearest_distances(x.T.contiguous().T, y.T.contiguous().T, k=2), want)
    torch.testing.assert_close(fastgan.nearest_distances(x[:1].expand(5, 12), y, k=2), want[:1].expand(5, 2))


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_with_neighbours_held_fixed(p):
    x, y = points(6, 3, dtype=torch.float64).requires_grad_(), points(9, 3, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: fastgan.nearest_distances(x, y, k=2, p=p), (x, y))
    assert torch.autograd.gradcheck(lambda x: fastgan.nearest_distances(x, k=2, p=p), (x,))
    z = x.detach().clone().requires_grad_()
    fastgan.nearest_distances(z, x.detach()).sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_points_that_are_not_finite_come_last(tile):
    x, y = points(10, 3), points(100, 3, 1)
    y[3, 1], y[50, 0] = torch.nan, torch.inf
    kept = [j for j in range(100) if j not in (3, 50)]
    torch.testing.assert_close(fastgan.nearest_distances(x, y, k=98), fastgan.nearest_distances(x, y[kept], k=98))
    all_of_them, indices = fastgan.nearest_distances(x, y, k=100, return_indices=True)
    assert set(indices[0, 98:].tolist()) == {3, 50} and not all_of_them[:, 98:].isfinite().any()
    x[4] = torch.nan
    found = fastgan.nearest_distances(x, y, k=2)
    assert found[4].isnan().all() and found[[0, 5]].isfinite().all()


def test_no_matrix_of_distances_is_kept():
    n = 12000 if points(1, 1).device.type == "cpu" else 64000  # tiles are larger on GPUs
    x, y = points(n, 4), points(n, 4, 1)
    assert memory.peak_bytes(lambda: fastgan.nearest_distances(x, y, k=5)) < n * n * 4 / 16


@pytest.mark.parametrize(
    "x, y, options, error, text",
    [
        (torch.ones(3, 2), torch.ones(3, 4), {}, ValueError, "different dimensions"),
        (torch.ones(3, 2), torch.ones(3, 2).double(), {}, TypeError, r"y.to\(x\)"),
        (torch.ones(3, 2), torch.ones(3, 2), {"k": 4}, ValueError, "from 1 to the number of other points, 3"),
        (torch.ones(3, 2), None, {"k": 3}, ValueError, "other points, 2"),
        (torch.ones(3, 2), torch.ones(3, 2), {"k": 0}, ValueError, "k is 0"),
        (torch.ones(3, 2), torch.ones(0, 2), {}, ValueError, "other points, 0"),
        (torch.ones(3, 2), torch.ones(3, 2), {"p": 3}, ValueError, "p is 3"),
        (torch.ones(3, 2, 1), torch.ones(3, 2), {}, ValueError, r"x.flatten\(1\)"),
        ([1.0], torch.ones(3, 2), {}, TypeError, "x is a list"),
    ],
)
def test_errors(x, y, options, error, text):
    with pytest.raises(error, match=text):
        fastgan.nearest_distances(x, y, **options)
