"""
Means, standard errors and confidence intervals, as numbers and as text.

    mean, error = mean_and_error([4.0, 4.1, 4.3])                            # 4.1333, 0.0882
    mean, width, pairs = paired_difference({1: 4.0, 2: 4.1}, {1: 4.1, 2: 4.3})  # by seed, 95% interval
    mean, error = loss_and_error(nats, targets)                              # rows of a validation split
"""
import math
import statistics

import numpy as np

# -----------------------------------------------------------------------------
# Numbers

def mean_and_error(values):
    """(mean, standard error of the mean) of some numbers; for a single number the error is None."""
    values = list(values)
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(a, b):
    """
    (mean of a - b, half width of its 95% interval, number of pairs) of two {seed: value}, over the seeds that
    both have; None if they have no seed in common. The half width of a single pair is None.
    """
    differences = []
    for seed in a:
        if seed in b:
            differences.append(a[seed] - b[seed])
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    width = None
    if error is not None:
        width = error * t_quantile(len(differences) - 1)
    return mean, width, len(differences)


def t_quantile(freedom, coverage=0.95):
    """
    The t for which Student's t with this many degrees of freedom lies within ±t with probability `coverage`.
    """
    low = 0.0
    high = 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if probability_within(middle, freedom) < coverage:
            low = middle
        else:
            high = middle
    return high


def probability_within(t, freedom):
    """
    Probability that Student's t lies within ±t: Abramowitz & Stegun 26.7.3 (odd degrees of freedom) and
    26.7.4 (even), finite sums in the angle.
    """
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 if is_odd else 1, freedom - 1, 2):
        term *= n / (n + 1) * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    if is_odd:
        return 2 / math.pi * (angle + total)
    return total


PARTS = 32  # contiguous parts of a split, for the standard error of its loss


def loss_and_error(nats, targets):
    """
    (nats per token, standard error) from the summed losses `nats` and target counts `targets` of consecutive
    rows or tokens, both (N,). The error is None if only one part has targets.
    The error is computed by batch means: PARTS contiguous parts of the split are treated as independent. Rows
    are not independent, because rows of one document are similar: for unigrams on stdlib the error is 0.014
    by rows of 256 tokens, 0.028 by documents and 0.026 by parts. With fewer documents than parts it is still
    too small. This method needs no .idx file.
    """
    starts = np.unique(np.linspace(0, len(nats), PARTS, endpoint=False).astype(int))
    nats = np.add.reduceat(nats, starts)  # (parts,)
    targets = np.add.reduceat(targets, starts)
    mean = nats.sum() / targets.sum()
    parts = np.count_nonzero(targets)
    if parts < 2:
        return mean, None
    residual = nats - mean * targets
    return mean, math.sqrt(residual @ residual * parts / (parts - 1)) / targets.sum()


# -----------------------------------------------------------------------------
# Text

def show_error(error, digits=4):
    """A standard error as text; 'n/a' for None."""
    if error is None:
        return 'n/a'
    return f'{error:.{digits}f}'


def show_mean(mean, error, digits=4):
    """'4.1333 ± 0.0882'; without an error only the mean; '-' for None."""
    if mean is None:
        return '-'
    if error is None:
        return f'{mean:.{digits}f}'
    return f'{mean:.{digits}f} ± {error:.{digits}f}'


def show_interval(mean, width, digits=4):
    """
    '-0.0267 [-0.0646, +0.0113]': a difference and its 95% interval; without a width only the difference.
    """
    if width is None:
        return f'{mean:+.{digits}f}'
    return f'{mean:+.{digits}f} [{mean - width:+.{digits}f}, {mean + width:+.{digits}f}]'
