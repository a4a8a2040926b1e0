"""The Frechet distance against eigenvalues of the covariances' product, and nearest neighbours against a
plain blocked matrix product."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np

N_REPEATS = 5


def run(device: str) -> list[dict]:
    return [frechet(), *neighbours()]


def seconds(call, n: int = N_REPEATS) -> float:
    times = []
    for _ in range(n):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def frechet() -> dict:
    """d = 2048, 500 generated images, the reference's Gaussian cached; eigenvalues as torchmetrics takes
    them, once."""
    import torch

    from memcontrol.scoring.quality import fid, fit_gaussian

    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((5000, 2048)), 1.1 * rng.standard_normal((500, 2048)) + 0.1
    reference, covariance = fit_gaussian(real), np.cov(real.T)

    def by_eigenvalues() -> float:
        own = np.cov(generated.T)
        roots = torch.linalg.eigvals(torch.from_numpy(covariance @ own)).sqrt().real.sum().item()
        return float(
            np.square(real.mean(0) - generated.mean(0)).sum()
            + np.trace(covariance)
            + np.trace(own)
            - 2 * roots
        )

    ours, theirs = seconds(lambda: fid(reference, generated)), seconds(by_eigenvalues, 1)
    difference = abs(float(fid(reference, generated)) / by_eigenvalues() - 1)
    return {
        "what": "FID, d 2048, n 500",
        "s": ours,
        "s of the plain way": theirs,
        "plain / ours": theirs / ours,
        "note": f"relative difference {difference:.1e}",
    }


def neighbours() -> list[dict]:
    """50,000 references, 1,000 queries, d = 512."""
    import torch

    from memcontrol.data.features import REFERENCE_BLOCK, nearest

    rng = np.random.default_rng(0)
    references, queries = (rng.standard_normal((n, 512)).astype(np.float32) for n in (50_000, 1_000))

    def product() -> None:
        left = torch.from_numpy(queries)
        for start in range(0, len(references), REFERENCE_BLOCK):
            left @ torch.from_numpy(references[start : start + REFERENCE_BLOCK]).T

    rows = []
    for k in (1, 50):
        ours, plain = seconds(lambda k=k: nearest(queries, references, k)), seconds(product)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        rows.append(
            {
                "what": f"{k} nearest of 50,000",
                "s": ours,
                "s of the plain way": plain,
                "plain / ours": plain / ours,
                "note": f"peak of the process {peak:,.0f} MiB",
            }
        )
    return rows
