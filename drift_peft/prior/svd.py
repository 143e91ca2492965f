"""Truncated SVD with its captured energy.

Δ of two language models has a slowly decaying spectrum, on which subspace iteration needs many passes over the matrix.
Randomized block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2) keeps the blocks of all passes and
needs three or four. The blocks are orthogonalized as they come, which makes it block Lanczos on AᵀA with full
reorthogonalization; it goes on until the captured energy has converged.
"""

import torch

OVERSAMPLING = 16  # columns of a block beyond the rank
EXACT_BELOW = 4  # a matrix whose shorter side is at most this many blocks costs less as a full SVD
TOLERANCE = 4.5e-3  # share of the captured energy that may be left to find, by extrapolation
ROUNDING = 1e-5  # singular values up to this part of the largest are rounding
COMPLETE = 1e-6  # share of ‖matrix‖² below which nothing is left to find


def truncated_svd(
    matrix: torch.Tensor, rank: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Best rank-k approximation U diag(S) Vh of a matrix, k = min(rank, out, in).

    Its energy is the best possible to within half a percent. Of a large matrix, singular values below √ε·S[0] (3e-4 of
    the largest in fp32) are not resolved: their energy is below the rounding of the whole.

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
    total = frobenius_norm(matrix) ** 2

    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix  # LAPACK takes five times as long on the wide one
    if tall.shape[1] <= EXACT_BELOW * (k + OVERSAMPLING):
        U, S, Vh = torch.linalg.svd(tall, full_matrices=False)
        U, S, Vh = U[:, :k], S[:k], Vh[:k]
    else:
        U, S, Vh = _block_krylov(tall, k, total, seed)
    if wide:
        U, Vh = Vh.T, U.T

    U, Vh = signed(U, Vh)
    energy = min(1.0, float(S.double().square().sum()) / total) if total else 0.0
    return U.contiguous(), S.contiguous(), Vh.contiguous(), energy


def signed(U: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [out, k] and Vh [k, in] of an SVD, which is unique up to signs: the largest entry of each column of U becomes
    positive."""
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()  # [1, k]
    return U * signs, Vh * signs.T


def frobenius_norm(matrix: torch.Tensor) -> float:
    """‖matrix‖_F, row by row: one fp32 sum over 10⁷ entries is off by 1e-4, an fp64 copy would cost memory."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1).cpu().double()))


def _block_krylov(A: torch.Tensor, k: int, total: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of A [long, short] restricted to the span V of a random block, AᵀA times it, (AᵀA)² times it, …"""
    # Drawn on the CPU, so that every device starts from the same columns.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(A.shape[1], k + OVERSAMPLING, generator=generator, dtype=torch.float32)
    block = V = torch.linalg.qr(start.to(A)).Q  # [short, d], orthonormal; one block more in each pass
    AV: list[torch.Tensor] = []  # A·V [long, d], block by block
    T = A.new_zeros(0, 0)  # (AV)ᵀAV [d, d], upper triangle
    captured: list[float] = []
    while True:
        AV.append(_product(A, block))
        right = torch.cat([left.T @ AV[-1] for left in AV])  # the columns that are new in T
        T = torch.cat([torch.nn.functional.pad(T, (0, 0, 0, block.shape[1])), right], dim=1)
        eigenvalues, P = torch.linalg.eigh(T.cpu().double(), UPLO="U")  # Rayleigh-Ritz: AᵀA restricted to V
        captured.append(float(eigenvalues[-k:].sum()))
        if _converged(captured, total) or V.shape[1] == A.shape[1]:
            break
        block = _product(A.T, AV[-1])
        # Where the block has something new, twice is enough (Parlett, The Symmetric Eigenvalue Problem, section 6.9);
        # columns that are nothing but rounding, as of a low-rank matrix, take a third pass.
        for _ in range(3):
            block = torch.linalg.qr((block - V @ (V.T @ block))[:, : A.shape[1] - V.shape[1]]).Q
        V = torch.cat([V, block], dim=1)

    P = P[:, -k:].flip(1).to(A)  # [d, k]
    AVP = sum(left @ p for left, p in zip(AV, P.split([left.shape[1] for left in AV]), strict=True))
    # An SVD of its own, since the eigenvalues of T are squares, which lose half the digits.
    U, S, rotation = torch.linalg.svd(AVP, full_matrices=False)
    return U, S, rotation @ (V @ P).T


def _product(A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """A @ X for a thin X, in the layout that runs along the rows of A in memory: a third faster."""
    return A @ X if A.is_contiguous() else (X.T @ A.T).T


def _converged(captured: list[float], total: float) -> bool:
    """Whether little is left to find, by Aitken's Δ² extrapolation of the energies captured so far."""
    if captured[-1] >= (1 - COMPLETE) * total:
        return True
    if len(captured) < 3:
        return False
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    # Growth that keeps shrinking in the ratio last/before adds up to last²/(before − last) from here on.
    return last**2 <= TOLERANCE * captured[-1] * (before - last)
