"""Second moments of streamed activations, and linear systems in them, solved in float64."""

from __future__ import annotations

import torch

from .errors import BadInput

__all__ = ["Factor", "SecondMoment"]


class SecondMoment:
    """Streaming estimate of E[x x^T]: batches go in, an [m, m] matrix comes out, no activation is kept.

    Products of a batch are taken in float32 (float64 for float64 input) and summed in float64.

    Args:
        width: m, the length of each vector.
        device: Where the sum lives; it takes 8 m^2 bytes.

    Attributes:
        count: Number of vectors seen.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu"):
        self.count = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, vectors: torch.Tensor) -> None:
        """Take in `vectors` `[n, m]`, of any floating dtype.

        Raises:
            BadInput: the width is another, or a value is not finite (the sum is then unchanged).
        """
        if vectors.dim() != 2 or vectors.shape[1] != self._sum.shape[0]:
            raise BadInput(
                "vectors",
                tuple(vectors.shape),
                f"are not [n, {self._sum.shape[0]}]",
                "flatten all but the last axis",
            )
        wide = vectors.detach().to(self._sum.device, torch.promote_types(vectors.dtype, torch.float32))
        product = wide.T @ wide
        if not bool(torch.isfinite(product).all()):
            raise BadInput(
                "vectors", "NaN or infinity", "cannot be summed", "run the model in bf16 or float32"
            )
        self._sum += product
        self.count += len(vectors)

    @property
    def matrix(self) -> torch.Tensor:
        """The mean of the outer products so far, float64 `[m, m]`, exactly symmetric.

        Raises:
            BadInput: nothing was added.
        """
        if not self.count:
            raise BadInput("count", 0, "leaves no moment", "add vectors first")
        return (self._sum + self._sum.T) / (2 * self.count)


class Factor:
    """A symmetric positive definite matrix A, factorised once (Cholesky, float64) to solve A x = b often.

    Args:
        matrix: A, `[m, m]`, any floating dtype.
        ridge: This share of A's mean diagonal is added to its diagonal.

    Raises:
        BadInput: A is not square, or not positive definite.
    """

    def __init__(self, matrix: torch.Tensor, *, ridge: float = 0.0):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise BadInput("matrix", tuple(matrix.shape), "is not square", "give an [m, m] matrix")
        if not ridge >= 0:
            raise BadInput("ridge", ridge, "is negative", "give 0 or more")
        wide = matrix.detach().to(torch.float64, copy=True)
        wide.diagonal().add_(ridge * float(wide.diagonal().mean()))
        self._lower, info = torch.linalg.cholesky_ex(wide)
        floor = len(wide) * torch.finfo(torch.float64).eps * float(wide.diagonal().max())
        # Rounding lets a singular matrix through with pivots of the order of eps.
        if int(info) or float(self._lower.diagonal().square().min()) <= floor:
            raise BadInput(
                "matrix", f"{tuple(matrix.shape)}, ridge {ridge:g}", "is not positive definite",
                "take it from more samples than it has rows, or set ridge > 0 (1e-3)",
            )  # fmt: skip

    @property
    def width(self) -> int:
        """Rows of A."""
        return int(self._lower.shape[0])

    @property
    def matrix(self) -> torch.Tensor:
        """A (with its ridge), float64 `[m, m]`."""
        return self._lower @ self._lower.T

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """A^-1 right, float64, for `right` `[m]` or `[m, n]`."""
        wide = right.to(self._lower)
        if wide.dim() == 1:
            return torch.cholesky_solve(wide[:, None], self._lower)[:, 0]
        return torch.cholesky_solve(wide, self._lower)
