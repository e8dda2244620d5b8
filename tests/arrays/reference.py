"""Formulas of directions of arrival in NumPy and float64, each inverse computed as such."""

import numpy as np


def steering(angles, sensors):
    phases = np.pi * np.outer(np.cos(np.deg2rad(angles)), np.arange(sensors))
    return np.exp(-1j * phases)


def snapshots(generator, angles, sensors, count, snr_db=10.0, correlation=0.0):
    """Returns drawn snapshots `[N, M]`, noise of power 1."""

    def normal(*shape):
        return (generator.normal(size=shape) + 1j * generator.normal(size=shape)) / np.sqrt(2)

    own, common = normal(count, len(angles)), normal(count, 1)
    signals = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common
    return 10 ** (snr_db / 20) * signals @ steering(angles, sensors) + normal(count, sensors)


def covariance(received, forgetting=1.0, loading=0.0):
    total = loading * np.eye(received.shape[1], dtype=complex)
    for r in received:
        total = forgetting * total + np.outer(r, r.conj())
    return total


def smoothed(received, window):
    """Returns the covariance after forward and backward smoothing, one window at a time."""
    whole, sensors = covariance(received), received.shape[1]
    flip = np.eye(window)[::-1]
    starts = range(sensors - window + 1)
    parts = [whole[k : k + window, k : k + window] for k in starts]
    return sum((part + flip @ part.conj() @ flip) / 2 for part in parts) / len(parts)


def capon_filter(matrix, a):
    image = np.linalg.solve(matrix, a)
    return image / (a.conj() @ image)


def capon(matrix, responses):
    inverse = np.linalg.inv(matrix)
    return np.array([1 / (a.conj() @ inverse @ a).real for a in responses])


def music(matrix, responses, sources):
    """Returns MUSIC's spectrum by projections from a singular value decomposition."""
    u, _, _ = np.linalg.svd(matrix)
    projection = np.eye(len(u)) - u[:, :sources] @ u[:, :sources].conj().T
    return np.array([len(u) / (a.conj() @ projection @ a).real for a in responses])


def esprit(matrix, sources):
    u, _, _ = np.linalg.svd(matrix)
    rotation = np.linalg.pinv(u[:-1, :sources]) @ u[1:, :sources]
    phases = np.angle(np.linalg.eigvals(rotation))
    return np.sort(np.rad2deg(np.arccos(-phases / np.pi)))


def starts(sensors, window, rank):
    return [round(d * (sensors - window) / max(rank - 1, 1)) for d in range(rank)]


def alrd_set(received, a, window, rank, forgetting, loading):
    """Returns the filters `[N, M]` and powers `[N]` of one angle, a vector for each window."""
    sensors = received.shape[1]
    cuts = [slice(mu, mu + window) for mu in starts(sensors, window, rank)]
    phi = [a[cut] / np.sqrt(window) for cut in cuts]
    w = np.full(rank, 1 / (rank * np.sqrt(window)), complex)
    covariances = [loading * np.eye(window, dtype=complex) for _ in cuts]
    p = [np.zeros(window, complex) for _ in cuts]
    inner = loading * np.eye(rank, dtype=complex)
    filters, powers = [], []
    for r in received:
        for d, cut in enumerate(cuts):
            x = r[cut]
            covariances[d] = forgetting * covariances[d] + np.outer(x, x.conj())
            q = np.linalg.inv(covariances[d])
            others = [j for j in range(rank) if j != d]
            e = sum(w[j].conj() * (phi[j].conj() @ r[cuts[j]]) for j in others)
            c = 1 - sum(w[j].conj() * (phi[j].conj() @ a[cuts[j]]) for j in others)
            p[d] = forgetting * p[d] + x * np.conj(e)
            steered = a[cut]
            scale = np.conj(c) + steered.conj() @ q @ p[d]
            u = -q @ p[d] + scale / (steered.conj() @ q @ steered) * (q @ steered)
            w[d] = np.linalg.norm(u)
            phi[d] = u / w[d]
        z = np.array([phi[d].conj() @ r[cut] for d, cut in enumerate(cuts)])
        b = np.array([phi[d].conj() @ a[cut] for d, cut in enumerate(cuts)])
        inner = forgetting * inner + np.outer(z, z.conj())
        w = capon_filter(inner, b)
        powers.append(1 / (b.conj() @ np.linalg.inv(inner) @ b).real)
        filters.append(np.zeros(sensors, complex))
        for d, cut in enumerate(cuts):
            filters[-1][cut] += w[d] * phi[d]
    return np.array(filters), np.array(powers)


def alrd_shared(received, a, window, rank, forgetting, loading):
    """Returns the filters `[N, M]` and powers `[N]` of one angle, one basis vector for all."""
    sensors = received.shape[1]
    cuts = [slice(mu, mu + window) for mu in starts(sensors, window, rank)]
    w = np.full(rank, 1 / rank, complex)
    outer = loading * np.eye(window, dtype=complex)
    inner = loading * np.eye(rank, dtype=complex)
    steered = np.array([a[cut] for cut in cuts]).T
    filters, powers = [], []
    for r in received:
        x = np.array([r[cut] for cut in cuts]).T
        mixed = x @ w.conj()
        outer = forgetting * outer + np.outer(mixed, mixed.conj())
        phi = capon_filter(outer, steered @ w.conj())
        phi /= np.linalg.norm(phi)
        z, b = x.T @ phi.conj(), steered.T @ phi.conj()
        inner = forgetting * inner + np.outer(z, z.conj())
        w = capon_filter(inner, b)
        powers.append(1 / (b.conj() @ np.linalg.inv(inner) @ b).real)
        filters.append(np.zeros(sensors, complex))
        for d, cut in enumerate(cuts):
            filters[-1][cut] += w[d] * phi
    return np.array(filters), np.array(powers)


def jio(received, a, rank, forgetting, loading):
    """Returns the power of one angle after the last snapshot."""
    sensors = received.shape[1]
    matrix = loading * np.eye(sensors, dtype=complex)
    inner = loading * np.eye(rank, dtype=complex)
    reduction = np.eye(sensors, dtype=complex)[:, :rank]
    b = reduction.T @ a
    w = b / np.linalg.norm(b) ** 2
    for r in received:
        matrix = forgetting * matrix + np.outer(r, r.conj())
        reduction = np.outer(capon_filter(matrix, a), w.conj()) / np.linalg.norm(w) ** 2
        z, b = reduction.conj().T @ r, reduction.conj().T @ a
        inner = forgetting * inner + np.outer(z, z.conj())
        w = capon_filter(inner, b)
    return 1 / (b.conj() @ np.linalg.inv(inner) @ b).real


def cramer_rao(angles, sensors, count, snr_db, correlation):
    """Returns deviations in degrees from the Fisher information of a Gaussian covariance.

    The information of all parameters, `N tr(R^-1 dR_i R^-1 dR_j)`: directions, the real and
    imaginary parts of the covariance of sources, and the power of the noise.
    """
    sources, power = len(angles), 10 ** (snr_db / 10)
    source = power * ((1 - correlation) * np.eye(sources) + correlation)

    def matrix(theta, source, noise):
        a = steering(theta, sensors).T
        return a @ source @ a.conj().T + noise * np.eye(sensors)

    slopes, step = [], 1e-5
    for k in range(sources):
        move = step * np.eye(sources)[k]
        up, down = matrix(angles + move, source, 1), matrix(angles - move, source, 1)
        slopes.append((up - down) / (2 * step))
    for i in range(sources):
        for j in range(i, sources):
            for value in (1, 1j) if i != j else (1,):
                unit = np.zeros((sources, sources), complex)
                unit[i, j], unit[j, i] = value, np.conj(value)
                slopes.append(matrix(angles, unit, 0))
    slopes.append(np.eye(sensors, dtype=complex))
    inverse = np.linalg.inv(matrix(angles, source, 1))
    scaled = [inverse @ slope for slope in slopes]
    information = count * np.array([[np.trace(s @ t).real for t in scaled] for s in scaled])
    return np.sqrt(np.diag(np.linalg.inv(information)))[:sources]
