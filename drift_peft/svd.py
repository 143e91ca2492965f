"""Truncated SVD with its captured energy.

Randomized range finder with subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4). Δ of two
language models has a slowly decaying spectrum, on which a fixed small number of iterations is not enough: the iteration
goes on until the captured energy has converged.
"""

import torch

OVERSAMPLING = 32  # columns beyond the rank, at least; they speed convergence up where the spectrum is flat
EXACT_BELOW = 6  # a matrix whose shorter side is at most this many times the rank costs less as a full SVD
MIN_ITERATIONS, MAX_ITERATIONS = 2, 40
TOLERANCE = 1e-3  # relative growth of the captured energy in one iteration; leaves less than 0.2% of it uncaptured


def truncated_svd(
    matrix: torch.Tensor, rank: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Best rank-k approximation U diag(S) Vh of a matrix, k = min(rank, out, in).

    Args:
        matrix: [out, in], any float dtype and device; computed in fp32 (fp64 stays fp64).
        rank: ceiling of the rank, at least 1.
        seed: of the random start; the same seed, device and thread count give the same result.

    Returns:
        U [out, k] and Vh [k, in] with orthonormal columns and rows, S [k] in descending order, and the captured energy
        ΣS² / ‖matrix‖_F² in [0, 1] (0 for a zero matrix). The largest entry of each column of U is positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    k = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_BELOW * k:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _subspace_iteration(matrix, k, seed)
    U, S, Vh = U[:, :k], S[:k], Vh[:k]

    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()  # [1, k]; an SVD is unique up to these
    total = frobenius_norm(matrix) ** 2
    energy = min(1.0, float(S.double().square().sum()) / total) if total else 0.0
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs.T).contiguous(), energy


def frobenius_norm(matrix: torch.Tensor) -> float:
    """‖matrix‖_F, row by row: one fp32 sum over 10⁷ entries is off by 1e-4, an fp64 copy would cost memory."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1).cpu().double()))


def _subspace_iteration(matrix: torch.Tensor, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = min(k + max(k, OVERSAMPLING), *matrix.shape)
    # Drawn on the CPU, so that every device starts from the same columns.
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
    right = start.to(matrix)  # [in, width]
    captured = 0.0
    for iteration in range(MAX_ITERATIONS):
        left = torch.linalg.qr(matrix @ right).Q  # [out, width]
        projected = left.T @ matrix  # [width, in]; its singular values approach the matrix's own from below
        previous, captured = captured, float(torch.linalg.eigvalsh(projected @ projected.T)[-k:].sum())
        if iteration + 1 >= MIN_ITERATIONS and captured - previous <= TOLERANCE * captured:
            break
        right = torch.linalg.qr(projected.T).Q
    U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    return left @ U, S, Vh
