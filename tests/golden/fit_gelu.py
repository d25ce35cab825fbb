"""Fits the polynomial in saeclip.c's gelu(): erfc(z) / 2 = t exp(-z^2) P(t), t = 1 / (1 + z / 2).

Least squares in Chebyshev's basis, reweighted until the relative error is level (Lawson).
Prints the largest relative error and P's coefficients, highest power first.
"""
import math
import numpy as np

z = np.linspace(0, 10, 20001)
t = 1 / (1 + z / 2)


def scaled_erfc(z):
    """erfc(z) exp(z^2), by its continued fraction where erfc(z) is small."""
    out = np.array([math.erfc(v) * math.exp(v * v) for v in np.minimum(z, 5)])
    far = z >= 5
    fraction = np.zeros(far.sum())
    for k in range(200, 0, -1):
        fraction = k / 2 / (z[far] + fraction)
    out[far] = 1 / (z[far] + fraction) / math.sqrt(math.pi)
    return out


def fit(degree):
    target = scaled_erfc(z) / 2 / t
    low = t.min()
    basis = np.polynomial.chebyshev.chebvander((2 * t - (1 + low)) / (1 - low), degree)
    weight = np.ones_like(z)
    for _ in range(100):
        root = np.sqrt(weight)
        c = np.linalg.lstsq(basis * (root / target)[:, None], root, rcond=None)[0]
        error = np.abs(basis @ c / target - 1)
        weight *= error / error.max() + 1e-3
        weight /= weight.sum()
    line = np.poly1d([2 / (1 - low), -(1 + low) / (1 - low)])
    result = np.poly1d([0.0])
    for coefficient in np.polynomial.chebyshev.cheb2poly(c)[::-1]:
        result = result * line + coefficient
    return error.max(), result.coeffs


for degree in (7, 8, 9):
    error, coefficients = fit(degree)
    print(degree, error, ["%.9g" % c for c in coefficients])
