"""Distances to nearest neighbours, streamed."""

import torch
from torch import Tensor

from fastgan._checks import check_points
from fastgan._dtypes import accumulate_dtype

__all__ = ["nearest_distances"]

# Elements of a tile of distances. On CPUs: near enough to the cache for the search, and large enough for the product, which
# reads all points of y once per row of tiles: the more coordinates they have, the more square a tile should be.
_TILE = {"cpu": 1 << 22}
_TILE_ELSEWHERE = 1 << 26
_COLUMNS = 4096  # of a tile, at least
_GROUP = 16  # columns of a tile that the search first looks at together


def _smallest(d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row and where they are, in no order. Only the k groups with the smallest minima can hold any of
    them: a pass of minima and two short searches, where one long search takes several passes."""
    rows, columns = d.shape
    groups = columns // _GROUP
    if groups < 2 * k:
        return d.topk(min(k, columns), dim=1, largest=False, sorted=False)
    even = groups * _GROUP
    # a group is every groups-th column, so that minima are taken over whole vectors
    minima = d[:, :even].view(rows, _GROUP, groups).amin(1)
    chosen = minima.topk(k, dim=1, largest=False, sorted=False).indices
    places = (chosen[:, None, :] + torch.arange(0, even, groups, device=d.device)[:, None]).flatten(1)
    if even < columns:
        places = torch.cat([places, torch.arange(even, columns, device=d.device).expand(rows, -1)], 1)
    values, which = d.gather(1, places).topk(k, dim=1, largest=False, sorted=False)
    return values, places.gather(1, which)


def _neighbours(x: Tensor, y: Tensor, k: int, p: int, same: bool) -> Tensor:
    """(N, k) rows of y that are nearest, in no order; x and y are float32 or float64, and detached."""
    n, m = len(x), len(y)
    fine = torch.isfinite(y).all(1)
    y = torch.where(fine[:, None], y, 0)
    if p == 2:
        centre = y.mean(0)  # the closer points lie to 0, the less the sum of squares and product cancels
        x, y = x - centre, y - centre
    squares = torch.where(fine, y.square().sum(1) if p == 2 else 0, torch.inf).to(x.dtype)
    tile = _TILE.get(x.device.type, _TILE_ELSEWHERE)
    columns = min(m, max(_COLUMNS if x.shape[1] <= 512 else _COLUMNS // 2, tile >> 12))
    rows = max(1, tile // columns)
    found = torch.empty(n, k, dtype=torch.long, device=x.device)
    for top in range(0, n, rows):
        part = x[top : top + rows]
        best = None
        for left in range(0, m, columns):
            right = min(m, left + columns)
            # |x|^2 is the same for a whole row
            d = (
                torch.addmm(squares[left:right], part, y[left:right].T, alpha=-2)
                if p == 2
                else torch.cdist(part, y[left:right], p=1).add_(squares[left:right])
            )
            if same and -len(d) < top - left < d.shape[1]:
                d.diagonal(top - left).fill_(torch.inf)
            values, places = _smallest(d, k)
            places = places + left
            if best is not None:
                values, places = torch.cat([best[0], values], 1), torch.cat([best[1], places], 1)
                if values.shape[1] > k:
                    values, which = values.topk(k, dim=1, largest=False, sorted=False)
                    places = places.gather(1, which)
            best = values, places
        found[top : top + rows] = best[1]
    return found


def nearest_distances(
    x: Tensor, y: Tensor | None = None, *, k: int = 1, p: int = 2, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Distances of every point of x to its k nearest points of y, nearest first.

    Improved precision and recall, density and coverage, checks for memorised training images and losses over nearest neighbours
    (Chamfer, implicit maximum likelihood) are made of it. Pairs are streamed: nothing of size N x M is kept.

    Args:
        x: (N, D) points; float16, bfloat16, float32 or float64. Half precision is computed in float32.
        y: (M, D), dtype and device of ``x``. None: x itself, where no point is its own neighbour (a copy of it is).
        k: neighbours, at most M, or N - 1 without ``y``.
        p: 2, Euclidean distance, or 1, sum of absolute differences.
        return_indices: also return which points of y they are.

    Returns:
        (N, k), dtype and device of ``x``; with ``return_indices`` (distances, indices (N, k) int64). Points of y with NaN or
        Inf come last. Neighbours are found by matrix products: of points that are equally far, up to rounding of their squared
        norms, any may be taken. Distances are computed from differences: copies are at 0. Differentiable in x and y, the
        neighbours held fixed, with gradient 0 at distance 0. Memory O(N k + (N + M) D), with gradients O(N k D).

    Raises:
        TypeError: x or y is not a floating tensor, or they differ in dtype or device.
        ValueError: shapes, k or p other than said.

    Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models"; Naeem et al.
    2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    same, others = y is None, x if y is None else y
    check_points("nearest_distances", x, others)
    if p not in (1, 2):
        raise ValueError(f"nearest_distances: p is {p!r}, expected 1 or 2")
    most = len(others) - same
    if not isinstance(k, int) or not 1 <= k <= max(most, 0):
        raise ValueError(f"nearest_distances: k is {k!r}, expected an integer from 1 to the number of other points, {most}")
    dtype = accumulate_dtype(x.dtype)
    a, b = x.to(dtype), others.to(dtype)
    with torch.no_grad():
        indices = _neighbours(a.detach(), b.detach(), k, p, same)
    grad = torch.is_grad_enabled() and (x.requires_grad or others.requires_grad)
    rows = len(a) if grad else max(1, _TILE.get(x.device.type, _TILE_ELSEWHERE) // max(1, k * a.shape[1]))
    parts = [
        torch.linalg.vector_norm(a[top : top + rows, None] - b[indices[top : top + rows]], p, dim=2)
        for top in range(0, len(a), max(1, rows))
    ]
    distances = torch.cat(parts) if parts else a.new_zeros(0, k)
    distances, order = distances.sort(dim=1)
    distances = distances.to(x.dtype)
    return (distances, indices.gather(1, order)) if return_indices else distances
