"""guidance.py against the dense float64 oracle, and the identities of METHOD.md."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Layer, norm
from torch.utils._python_dispatch import TorchDispatchMode

from drift_peft.tuner import guidance

SCALES = ("absolute", "gradnorm", "adaptive")
TARGETS = ("residual", "delta", "factors")
every_mode = pytest.mark.parametrize(("scale", "target"), [(s, t) for s in SCALES for t in TARGETS])
prop = settings(max_examples=30, deadline=None, derandomize=True)

sizes = st.fixed_dictionaries({
    "out": st.integers(1, 9), "in_": st.integers(1, 9), "r": st.integers(1, 5), "k": st.integers(1, 6),
    "s": st.floats(0.05, 8), "seed": st.integers(0, 2**31),
})  # fmt: skip
strengths = st.floats(0, 4)
further_adapters = st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 3)), max_size=2)  # (rank, scaling)


def random_layer(out=7, in_=5, r=3, k=3, s=2.0, seed=0, others=(), dtype=torch.float64):
    """A layer with random factors, and a random gradient (g_A, g_B); Δ and s·B·A are of about the same size."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    k = min(k, out, in_)
    U, S, Vh = torch.linalg.svd(s * randn(out, in_).double(), full_matrices=False)
    prior = {"U": U[:, :k].to(dtype), "S": S[:k].to(dtype), "Vh": Vh[:k].to(dtype)}
    extra = [(randn(q, in_), randn(out, q), t) for q, t in others]
    layer = Layer(randn(r, in_), randn(out, r), s, **prior, rank=k, others=extra)
    return layer, (randn(r, in_), randn(out, r))


def test_flat_leaves_rounding_out():
    """Of an expert that is a LoRA of rank 2, a prior of rank 4 has two directions that are rounding."""
    S = torch.tensor([[0.29, 0.26, 2.7e-8, 1.7e-8], [0.3, 0.2, 0.1, 0.05]])
    flat = guidance.spectrum(S, 0)
    assert flat[0, 2:].tolist() == [0, 0] and torch.allclose(flat[0, 0], flat[0, 1]) and (flat[1] == flat[1, 0]).all()
    torch.testing.assert_close(flat.norm(dim=-1), S.norm(dim=-1))


def direction(layers, target, dtype=torch.float64, dims=(-1,)):
    """The library's direction for a list of layers of one shape, as one batched call."""

    def batch(pick):
        stack = torch.stack([torch.as_tensor(pick(layer), dtype=torch.float64) for layer in layers]).to(dtype)
        return stack.reshape((*dims, *stack.shape[1:]))

    A, B, s = (batch(lambda layer, name=name: getattr(layer, name)) for name in ("A", "B", "s"))
    prior = [batch(lambda layer, name=name: getattr(layer, name)) for name in ("U", "S", "Vh")]
    if target == "factors":
        return guidance.factors(A, B, *guidance.balanced_targets(*prior, s))
    if target == "delta":
        return guidance.delta(A, B, s, *prior, guidance.gram_norm(*prior))
    stacked = ()
    if layers[0].others:
        A_all = batch(lambda layer: torch.cat([layer.A, *(A for A, _, _ in layer.others)]))
        B_all = batch(lambda layer: torch.cat([layer.s * layer.B, *(s * B for _, B, s in layer.others)], 1))
        stacked = A_all, B_all
    return guidance.residual(A, B, s, *prior, guidance.gram_norm(*prior), *stacked)


def biased(g, D, floor, share, a, scale):
    """g̃ = g − c·D [L, m, n], with the library's c."""
    inner = (g * D).sum((-2, -1))
    c = guidance.multiplier(guidance.gradient_norm(g), guidance.norm(D), inner, floor, share, a, scale)
    return g - guidance.column(c) * D


def bias(layers, grads, a, scale, target, dtype=torch.float64):
    """The biased gradients (g_A [L, r, in], g_B [L, out, r])."""
    D = direction(layers, target, dtype)
    g_A, g_B = (torch.stack(g).to(dtype) for g in zip(*grads, strict=True))
    return biased(g_A, D.A, D.floor_A, D.share, a, scale), biased(g_B, D.B, D.floor_B, D.share, a, scale)


def close(got, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)


# Against the oracle


@every_mode
@prop
@given(size=sizes, a=strengths, count=st.integers(1, 3), others=further_adapters)
def test_batched_low_rank_equals_dense_one_by_one(scale, target, size, a, count, others):
    if target == "factors":  # one target for every row of A
        size = size | {"r": (k := min(size["k"], size["out"], size["in_"])), "k": k}
    size = size | {"others": others}
    made = [random_layer(**size | {"seed": size["seed"] + i}) for i in range(count)]
    layers, grads = zip(*made, strict=True)
    got_A, got_B = bias(layers, grads, a, scale, target)
    for i, (layer, (g_A, g_B)) in enumerate(made):
        expected_A, expected_B = layer.biased(g_A, g_B, a, scale, target)
        scale_of = 1 + norm(expected_A) + norm(expected_B)
        close(got_A[i], expected_A, atol=1e-8 * scale_of)
        close(got_B[i], expected_B, atol=1e-8 * scale_of)


@every_mode
def test_any_number_of_batch_dimensions(scale, target):
    made = [random_layer(seed=i) for i in range(6)]
    layers, grads = zip(*made, strict=True)
    flat = bias(layers, grads, 0.7, scale, target)
    D = direction(layers, target)
    D = guidance.Direction(*(t.unflatten(0, (2, 3)) if isinstance(t, torch.Tensor) else t for t in D))
    for name, g, expected in zip("AB", zip(*grads, strict=True), flat, strict=True):
        g = torch.stack(g).unflatten(0, (2, 3))
        floor = getattr(D, f"floor_{name}")
        close(biased(g, getattr(D, name), floor, D.share, 0.7, scale).flatten(0, 1), expected)
    one = layers[0]
    s = torch.tensor(one.s, dtype=torch.float64)
    close(guidance.gram_norm(one.U, one.S, one.Vh), torch.linalg.matrix_norm(one.delta))  # and none at all
    A_star, B_star = guidance.balanced_targets(one.U, one.S, one.Vh, s)
    close(s * B_star @ A_star, one.delta)


@every_mode
def test_single_precision_is_near_the_oracle(scale, target):
    """bf16 factors of the prior, fp32 arithmetic: what the optimizer hook does."""
    made = [random_layer(60, 40, 8, 8, seed=i, dtype=torch.float32) for i in range(3)]
    for layer, _ in made:
        layer.U, layer.Vh = layer.U.bfloat16().double(), layer.Vh.bfloat16().double()
    layers, grads = zip(*made, strict=True)
    got = bias(layers, grads, 0.8, scale, target, torch.float32)
    for i, (layer, g) in enumerate(made):
        for found, expected in zip(got, layer.biased(*g, 0.8, scale, target), strict=True):
            assert norm(found[i].double() - expected) < 1e-6 * norm(expected)


def test_nothing_of_the_weights_size_is_formed():
    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    layer, g = random_layer(200, 300, 4, 4, others=[(2, 1.0)])
    for target in TARGETS:
        seen = []
        with Largest():
            bias([layer], [g], 1.0, "adaptive", target)
        assert 0 < max(seen) <= 300 * 6


# Norms from Gram matrices


@prop
@given(size=sizes, others=further_adapters)
def test_share_is_the_residuals_part_of_delta_for_factors_that_are_not_orthonormal(size, others):
    layer, _ = random_layer(**size, others=others)
    layer.U, layer.Vh = layer.U.bfloat16().double(), layer.Vh.bfloat16().double()
    close(guidance.gram_norm(layer.U, layer.S, layer.Vh), torch.linalg.matrix_norm(layer.delta))
    share = direction([layer], "residual").share
    close(share, torch.tensor([layer.strength(1.0, "gradnorm", "residual")]), rtol=1e-6, atol=1e-6)


def test_gram_norm_is_not_the_sum_of_squares():
    layer, _ = random_layer(9, 8, k=2)
    U, Vh = (torch.stack([t[0], t[0] + t[1]]) / 2**0.5 for t in (layer.U.T, layer.Vh))  # far from orthonormal
    exact = torch.linalg.matrix_norm(U.T @ torch.diag(layer.S) @ Vh)
    assert abs(layer.S.norm() - exact) > 0.05 * exact
    close(guidance.gram_norm(U.T, layer.S, Vh), exact)


@pytest.mark.parametrize("dims", [(), (6,), (2, 3)])
def test_what_a_direction_says_of_itself(dims):
    """‖X‖, its share of ‖Δ_r‖, and where rounding begins; of residuals longer and shorter than Δ_r."""
    layers = [random_layer(s=(0.5 + i) * (1, 1, -1)[i % 3], seed=i)[0] for i in range(6 if dims else 1)]
    for i, layer in enumerate(layers):
        layer.B = layer.B * (0.1, 1.0)[i % 2]
    for target in ("residual", "delta"):
        found = direction(layers, target, dims=dims)
        X = torch.tensor([norm(layer.weight_direction(target)) for layer in layers])
        share = torch.tensor([layer.strength(1.0, "gradnorm", target) for layer in layers])
        for factor, other in zip("AB", "BA", strict=True):
            floor = [1e-6 * abs(layer.s) * x * norm(getattr(layer, other)) for layer, x in zip(layers, X, strict=True)]
            close(getattr(found, f"floor_{factor}").flatten(), torch.tensor(floor), rtol=1e-6, atol=0)
        close(found.norm.flatten(), X, rtol=1e-6)
        close(torch.as_tensor(found.share).expand(dims).flatten(), share, rtol=1e-6)
        assert found.norm.shape == dims


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_share_goes_to_zero_with_the_residual(left, dtype):
    """s·B·A = (1 − left)·Δ_r: ‖X‖² is a difference of large numbers, and must neither be negative nor nan."""
    layer, g = random_layer(60, 40, 8, 8, seed=3)
    A_star, B_star = guidance.balanced_targets(layer.U, layer.S, layer.Vh, torch.tensor(layer.s))
    layer.A, layer.B = A_star, (1 - left) * B_star
    D = direction([layer], "residual", dtype)
    assert abs(float(D.share) - left) <= {torch.float32: 1e-3, torch.float64: 1e-7}[dtype]
    got_A, got_B = bias([layer], [g], 1.0, "gradnorm", "residual", dtype)
    for got, plain in ((got_A[0], g[0]), (got_B[0], g[1])):
        assert norm(got.double() - plain) <= (left + 1e-3) * norm(plain)


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e20, 1e30])
@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_gradients_whose_squares_overflow_or_vanish(scale, size):
    """These scales are homogeneous in the gradient: all that is asked of fp32 is that it can hold the result."""
    layer, g = random_layer(9, 8, 3, 3, seed=4)
    expected = bias([layer], [g], 0.7, scale, "residual", torch.float64)
    found = bias([layer], [tuple(size * each for each in g)], 0.7, scale, "residual", torch.float32)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double() / size, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_gradients_that_are_not_finite_stay_as_they_are(scale, value):
    layer, (g_A, g_B) = random_layer(9, 8, 3, 3, seed=4)
    g_A[0, 0] = value
    got_A, _ = bias([layer], [(g_A, g_B)], 0.7, scale, "residual", torch.float32)
    torch.testing.assert_close(got_A[0], g_A.float(), equal_nan=True)


def test_each_gradient_of_a_batch_has_a_norm_of_its_own():
    g = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    found = guidance.gradient_norm(g * torch.tensor([1e-36, 1.0, 1e30, 0.0])[:, None, None])
    close(found[:3] / torch.tensor([1e-36, 1.0, 1e30]), guidance.norm(g[:3]), rtol=1e-5)
    assert found[3] == 0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_a_spectrum_keeps_its_order_and_its_norm(power):
    S = torch.tensor([[4.0, 2.0, 0.5, 0.0], [9.0, 0.9, 0.1, 0.01]], dtype=torch.float64)
    found = guidance.spectrum(S, power)
    close(found.norm(dim=1), S.norm(dim=1))
    close(found[:, :3] / found[:, :1], (S[:, :3] / S[:, :1]) ** power)
    close(guidance.spectrum(S[0], power), found[0])
    assert not guidance.spectrum(torch.zeros(2, 3), power).any()  # and no NaN
    close(guidance.spectrum(S.float() * 1e-13, power), found * 1e-13, rtol=1e-5, atol=0)
    assert found[0, 3] == 0 < found[1, 3]  # what is not there is not made, whatever the power


def test_a_cosine_is_never_beyond_one_and_zero_of_nothing():
    zero, one, much = torch.tensor([0.0, 1.0, 1.0 + 1e-6], dtype=torch.float64)
    assert guidance.cosine(one, one, much) == 1 and guidance.cosine(one, one, -much) == -1
    assert guidance.cosine(2 * one, 4 * one, one) == 1 / 8
    assert all(guidance.cosine(g, D, zero) == 0 for g, D in ((zero, one), (one, zero), (zero, zero)))


def test_a_direction_at_its_floor_is_none():
    one = torch.ones(2, dtype=torch.float64)
    floor = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert guidance.multiplier(one, one, one, floor, 1.0, 0.7, "gradnorm").tolist() == [0.7, 0.0]
    share = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert guidance.multiplier(one, one, one, 0.0, share, 1.0, "adaptive").tolist() == [0.5, 0.25]


@prop
@given(size=sizes)
def test_targets_multiply_to_delta(size):
    layer, _ = random_layer(**size)
    s = torch.tensor(layer.s, dtype=torch.float64)
    for targets in (guidance.balanced_targets, guidance.start_targets):
        A_star, B_star = targets(layer.U, layer.S, layer.Vh, s)
        close(s * B_star @ A_star, layer.delta)
    close(A_star.norm(dim=1), torch.full_like(layer.S, 3**-0.5))  # the rows of the drift start
    A_star, B_star = guidance.balanced_targets(layer.U, layer.S, layer.Vh, s)
    close(A_star.norm(dim=1), B_star.norm(dim=0))  # balanced


# Identity 1: potentials


@pytest.mark.parametrize("others", [(), ((2, 0.5), (1, 3.0))])
@pytest.mark.parametrize("target", ["delta", "residual"])
def test_absolute_is_the_gradient_of_a_potential(target, others):
    layer, _ = random_layer(seed=5, others=others)
    W, x, a = torch.randn(7, 5).double(), torch.randn(5, 11).double(), 0.3
    A, B = layer.A.clone().requires_grad_(), layer.B.clone().requires_grad_()
    rest = layer.adapters - layer.s * layer.B @ layer.A

    def loss():
        return torch.tanh((W + rest + layer.s * B @ A) @ x).square().sum()

    g = torch.autograd.grad(loss(), (A, B))
    adapters = rest + layer.s * B @ A
    if target == "delta":
        biased_loss = loss() - a * (layer.delta * adapters).sum()
    else:
        biased_loss = loss() + a / 2 * (layer.delta - adapters).square().sum()
    expected = torch.autograd.grad(biased_loss, (A, B))
    for got, want in zip(bias([layer], [g], a, "absolute", target), expected, strict=True):
        close(got[0], want)


# Identity 2: how far the gradient is moved


@pytest.mark.parametrize("target", TARGETS)
@prop
@given(seed=st.integers(0, 2**31), a=st.floats(0.01, 4), s=st.floats(0.05, 8))
def test_gradnorm_moves_by_its_share_of_the_gradients_norm(target, seed, a, s):
    layer, g = random_layer(s=s, seed=seed)
    expected = layer.strength(a, "gradnorm", target)
    for got, plain in zip(bias([layer], [g], a, "gradnorm", target), g, strict=True):
        assert norm(got[0] - plain) == pytest.approx(expected * norm(plain))


@pytest.mark.parametrize("target", TARGETS)
@prop
@given(seed=st.integers(0, 2**31), a=st.floats(0.01, 4))
def test_adaptive_pushes_fully_against_and_not_at_all_along(target, seed, a):
    layer, g = random_layer(seed=seed)
    D_A, D_B = layer.directions(target)
    full = layer.strength(a, "adaptive", target)
    for size in (1e-3, 7.0):
        away = bias([layer], [(size * D_A, size * D_B)], a, "adaptive", target)  # descent would run from the expert
        close(away[0][0], (1 - full) * size * D_A)
        close(away[1][0], (1 - full) * size * D_B)
        along = bias([layer], [(-size * D_A, -size * D_B)], a, "adaptive", target)
        close(along[0][0], -size * D_A)
        close(along[1][0], -size * D_B)
    for got, plain in zip(bias([layer], [g], a, "adaptive", target, torch.float32), g, strict=True):
        assert norm(got[0].double() - plain) <= (1 + 1e-5) * a * norm(plain)  # never more than gradnorm


# Identity 3: full rank, homogeneity


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("target", ["delta", "residual"])
def test_full_rank_equals_the_dense_delta(scale, target):
    """Without any SVD on the expected side: Δ itself, as the paper has it."""
    layer, (g_A, g_B) = random_layer(7, 5, 3, 5, seed=2)
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(9)).double()
    layer.U, layer.S, layer.Vh = torch.linalg.svd(delta, full_matrices=False)
    X = delta - (layer.s * layer.B @ layer.A if target == "residual" else 0)
    share = min(1, norm(X) / norm(delta)) if target == "residual" else 1
    got = bias([layer], [(g_A, g_B)], 0.6, scale, target)
    for found, g, D in zip(got, (g_A, g_B), (layer.s * layer.B.T @ X, layer.s * X @ layer.A.T), strict=True):
        cosine = float((g * D).sum()) / (norm(g) * norm(D))
        a = {"absolute": 0.6, "gradnorm": 0.6 * share, "adaptive": 0.6 * share * (1 + cosine) / 2}[scale]
        close(found[0], g - a * (D if scale == "absolute" else D * norm(g) / norm(D)))


@every_mode
@prop
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-8, 1e8), a=st.floats(0.1, 3))
def test_homogeneity_in_the_gradient(scale, target, seed, factor, a):
    assume(abs(factor - 1) > 0.01)
    layer, g = random_layer(seed=seed)
    once = bias([layer], [g], a, scale, target)
    scaled = bias([layer], [[factor * x for x in g]], a, scale, target)
    for x, y in zip(once, scaled, strict=True):
        same = norm(y - factor * x) <= 1e-9 * norm(y)
        assert same == (scale != "absolute")


# Identity 4 and the zeros


@every_mode
def test_zero_strength_is_bitwise_plain(scale, target):
    layer, g = random_layer()
    for got, plain in zip(bias([layer], [g], 0.0, scale, target), g, strict=True):
        assert torch.equal(got[0], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
@pytest.mark.parametrize("target", TARGETS)
def test_zero_over_zero_leaves_the_gradient_alone(scale, target, dtype):
    layer, (g_A, g_B) = random_layer(dtype=dtype)
    zeros = torch.zeros_like(g_A), torch.zeros_like(g_B)
    for got, g in zip(bias([layer], [zeros], 1.0, scale, target, dtype), zeros, strict=True):
        assert torch.equal(got[0], g)  # g = 0
    layer.S = torch.zeros_like(layer.S)
    if target == "delta":  # Δ = 0
        for got, g in zip(bias([layer], [(g_A, g_B)], 1.0, scale, target, dtype), (g_A, g_B), strict=True):
            assert torch.equal(got[0], g)
    layer, (g_A, g_B) = random_layer(dtype=dtype)
    s = torch.tensor(layer.s, dtype=torch.float64)
    A_star, B_star = guidance.balanced_targets(layer.U, layer.S, layer.Vh, s)
    if target == "factors":  # D = 0
        layer.A, layer.B = A_star, B_star
    else:  # B = 0, so D_A = 0
        layer.B = torch.zeros_like(layer.B)
    got_A, got_B = bias([layer], [(g_A, g_B)], 1.0, scale, target, dtype)
    assert torch.equal(got_A[0], g_A)
    assert torch.equal(got_B[0], g_B) == (target == "factors")


@pytest.mark.parametrize("scale", SCALES)
def test_delta_of_zero_gives_finite_gradients(scale):
    """A residual toward Δ = 0 is −s·B·A; its share of ‖Δ‖ is 0 of 0."""
    layer, g = random_layer()
    layer.S = torch.zeros_like(layer.S)
    for target in TARGETS:
        for got, want in zip(bias([layer], [g], 1.0, scale, target), layer.biased(*g, 1.0, scale, target), strict=True):
            close(got[0], want)


def test_a_direction_below_rounding_counts_as_none():
    """B orthogonal to Δ up to rounding: D_A = s·BᵀΔ is noise, and gradnorm must not blow it up to ‖g‖."""
    layer, (g_A, _) = random_layer(7, 5, 3, 2)
    for noise, is_none in ((1e-8, True), (1e-3, False)):
        outside = torch.linalg.qr(torch.cat([layer.U, layer.B], 1)).Q[:, 2:5]
        layer.B = outside + noise * layer.U[:, :1]
        D = direction([layer], "delta")
        got = biased(g_A[None], D.A, D.floor_A, D.share, 1.0, "gradnorm")[0]
        assert torch.equal(got, g_A) == is_none
        close(got, layer.biased(g_A, torch.zeros(7, 3), 1.0, "gradnorm", "delta")[0])


def test_unknown_scale_is_an_error():
    layer, g = random_layer()
    with pytest.raises(ValueError, match="gradnrom"):
        bias([layer], [g], 1.0, "gradnrom", "delta")


def test_strength_may_differ_from_layer_to_layer():
    made = [random_layer(seed=i) for i in range(3)]
    layers, grads = zip(*made, strict=True)
    alphas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    for scale in SCALES:
        got_A, _ = bias(layers, grads, alphas, scale, "residual")
        for i, (layer, g) in enumerate(made):
            close(got_A[i], layer.biased(*g, float(alphas[i]), scale, "residual")[0])


# Identity 7: where it leads


@pytest.mark.parametrize(("drift_rank", "r"), [(2, 4), (3, 3), (4, 2)])
@pytest.mark.parametrize("start", ["drift", "random"])
def test_without_a_loss_absolute_residual_converges_to_the_truncated_delta(drift_rank, r, start):
    layer, _ = random_layer(8, 6, r, 6, s=1.5, seed=1)
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25]).double()
    k = min(drift_rank, r)
    best = layer.U[:, :k] @ torch.diag(spectrum[:k]) @ layer.Vh[:k]
    layer.A, layer.B = layer.A / 3, layer.B / 3
    if start == "drift":
        layer.A, layer.B = guidance.START_NORM * layer.Vh[:r], torch.zeros_like(layer.B)
    layer.U, layer.S, layer.Vh = layer.U[:, :drift_rank], spectrum[:drift_rank], layer.Vh[:drift_rank]
    zeros = torch.zeros_like(layer.A), torch.zeros_like(layer.B)
    for scale in ("gradnorm", "adaptive"):
        assert not any(g.any() for g in bias([layer], [zeros], 1.0, scale, "residual"))
    for _ in range(600):
        g_A, g_B = bias([layer], [zeros], 1.0, "absolute", "residual")
        layer.A, layer.B = layer.A - 0.1 * g_A[0], layer.B - 0.1 * g_B[0]
    assert norm(layer.adapters - best) < 1e-3 * norm(best)
