"""Any low-rank update as a DeLoRA: the sum of r rank-1 terms of unit vectors that all have the same weight.

From a zero start, ``dW = (lambda / r) sum_i b^_i a^_i^T * c``, so ``M = dW diag(1 / c)`` must be a sum of terms of
equal weight. Let ``M = P S Q^T`` of rank k. With any X (k, n) for which ``X X^T = S``,
``M = sum_i (P x_i) (Q x_i)^T``, and both vectors of a term have norm ``|x_i|``. So n terms of the same weight exist if
X has columns of equal norm: ``X^T X`` is a symmetric matrix with the eigenvalues S, padded with zeros, and a constant
diagonal. By the Schur-Horn theorem it exists for every ``n >= k``, because a constant sequence is majorized by every
sequence of the same sum (Horn, "Doubly stochastic matrices and the diagonal of a rotation matrix", American Journal of
Mathematics 76, 1954). At most n - 1 plane rotations construct X (Bendel and Mickey 1978; for the factor itself Davies
and Higham, "Numerically stable generation of correlation matrices and their factors", BIT 40, 2000, and Dhillon,
Heath, Sustik and Tropp, "Generalized finite algorithms for constructing Hermitian matrices with prescribed diagonal and
spectrum", SIAM J. Matrix Anal. Appl. 27, 2005). The weight of a term is then ``tr(S) / n``, so lambda is
``(r / n) |M|_*``; it is M's nuclear norm if all r terms are used.
"""

import math

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import Factors
from delora_diffusers.methods import update

NEGLIGIBLE = 1e-12
"""Singular values below this fraction of the largest are rounding of float64."""
MAX_ERROR = 1e-4
"""The relative error in float32 above which a conversion is refused."""


def equal_columns(values: Tensor, count: int) -> Tensor:
    """X (k, count), float64, with ``X X^T = diag(values)`` and columns of equal norm.

    Each plane rotation of the shortest and the longest column gives one of them its final length.

    Args:
        values: (k,), positive. count: at least k.
    """
    x = torch.zeros(len(values), count, dtype=torch.float64)
    x.diagonal().copy_(values.double().sqrt())
    mean = float(values.double().sum()) / count
    for _ in range(count - 1):
        squared = x.square().sum(dim=0)
        low, high = int(squared.argmin()), int(squared.argmax())
        below, above = float(squared[low]) - mean, float(squared[high]) - mean
        if min(-below, above) <= 1e-15 * mean:
            break
        # |x_low + t x_high|^2 = mean (1 + t^2), of which the smaller root is computed without cancellation.
        product = float(x[:, low] @ x[:, high])
        root = math.sqrt(product**2 - above * below)
        t = -below / (product + math.copysign(root, product))
        cosine = 1 / math.hypot(1, t)
        first, second = x[:, low].clone(), x[:, high].clone()
        x[:, low] = cosine * (first + t * second)
        x[:, high] = cosine * (second - t * first)
    return x


def as_delora(
    name: str, factors: Factors, scale: Tensor | None, rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A (rank, in), B (out, rank) and lambda () of a DeLoRA from a zero start with the update ``b @ a``, float32.

    Empty if the update is zero: it then has no direction, and a new zero start is as good.

    If the update's rank k is less than ``rank``, the terms that it does not need are pairs that cancel, ``b a^T`` and
    ``-b a^T`` with random b and a: they are zero now and learn as a new adapter does. Spreading the update over all
    terms instead would put them into the k dimensions that it already has, and gradient steps would keep its rank.

    Rows of A and columns of B have the norms that they have in a new adapter from a frozen start. Norms do not change
    the update, but how fast training turns the vectors.

    Args:
        name: of the module, for messages. scale: c, (in,) or (), or None; see ``update.weight_norm``.
        generator: for the pairs that cancel.

    Raises:
        InputError: the rank is too small, the update changes a column whose c is zero, or columns differ so much that
            float32 cannot store the result.
    """
    b, a = factors.b.double(), factors.a.double()
    if scale is not None:
        c = scale.double().expand(a.shape[1])
        changed = (b @ a[:, c == 0]).abs().amax(dim=0) > 0
        if changed.any():
            column = int((c == 0).nonzero()[changed.nonzero()[0, 0], 0])
            raise InputError(
                f"the update of {name} changes column {column} of its weight, which is zero in the base model, so that "
                "DeLoRA's column scale cannot express it; use --weight_norm frobenius or --method lora."
            )
        a = torch.where(c == 0, 0.0, a / c.masked_fill(c == 0, 1.0))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    needed = int((s > NEGLIGIBLE * s[0]).sum())
    if needed == 0:
        return {}
    if needed > rank:
        raise InputError(f"the update of {name} has rank {needed}, more than --rank {rank}; give --rank {needed}.")
    terms = needed + (rank - needed) % 2  # what remains is an even number
    x = equal_columns(s[:needed], terms)
    left, right = q_b @ (u[:, :needed] @ x), q_a @ (vh[:needed].mT @ x)
    pairs = (rank - terms) // 2
    new_left = torch.randn(len(left), pairs, generator=generator, dtype=torch.float64)
    new_right = torch.randn(len(right), pairs, generator=generator, dtype=torch.float64)
    left = torch.nn.functional.normalize(torch.cat((left, new_left, -new_left), dim=1), dim=0)
    right = torch.nn.functional.normalize(torch.cat((right, new_right, new_right), dim=1), dim=0)
    tensors = {
        # The root mean squares of kaiming-uniform A and B; see methods.delora.initialize.
        "A": (right.mT * math.sqrt(1 / 3)).float(),
        "B": (left * math.sqrt(len(left) / (3 * rank))).float(),
        "lambda": (s[:needed].sum() * rank / terms).float(),
    }
    stored = {key: tensor.double()[None] for key, tensor in tensors.items()}
    b_stored, a_stored = update.delora_factors(stored["A"], stored["B"], stored["lambda"])
    c = torch.ones(()) if scale is None else scale.double()
    difference = Factors(torch.cat((b, -b_stored[0]), dim=1), torch.cat((a, a_stored[0])) * c)
    error = difference.norm() / Factors(b, a * c).norm()
    if not error <= MAX_ERROR:
        raise InputError(
            f"the update of {name} cannot be stored as DeLoRA in float32 (relative error {error:.1e}), because columns "
            "of its weight differ too much in size; use --weight_norm frobenius or --method lora."
        )
    return tensors


def best_factors(matrix: Tensor, rank: int) -> tuple[Factors, float]:
    """The best factors of a dense matrix (out, in) of a given rank, and the relative error in the Frobenius norm.

    The best approximation (Eckart-Young) projects the matrix on its largest singular vectors of the shorter side, which
    are eigenvectors of its Gram matrix; in float64 that is exact to far below float32's rounding, and several times
    faster than a singular value decomposition.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] < matrix.shape[1]
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    b, a = (vectors, vectors.mT @ matrix) if wide else (matrix @ vectors, vectors.mT)
    total = float(matrix.norm())
    error = float((matrix - b @ a).norm()) / total if total else 0.0
    return Factors(b.float().cpu(), a.float().cpu()), error
