"""
What scripts leave to look at: figures and tables of any of them, and the picture of a comparison: what the arms' losses did, and where
they ended. compare.py does the reading and the counting.
"""
import csv
import os

from checkpoint import replacing, writing
from configurator import UserError

# -----------------------------------------------------------------------------
# For all scripts

def figure(width, height):
    """A Figure of so many inches. Raises UserError where matplotlib, which nothing else needs, is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("picture: matplotlib is not installed: pip install matplotlib, or --picture=''") from None
    return Figure(figsize=(width, height), layout='constrained')


def save(page, path):
    """Write a figure, its folder made. Raises UserError where it cannot be."""
    path = path if os.path.splitext(path)[1] else path + '.png'
    try:
        with writing(f'picture={path}', 'give another path, or make room'):
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with replacing(path, 'wb') as f:
                page.savefig(f, format=os.path.splitext(path)[1][1:], dpi=120)
    except ValueError as error:  # a format that matplotlib does not know
        raise UserError(f'picture={path}: {error}') from None


def write_csv(rows, path):
    """Write dicts of the same keys as a table, its folder made. Raises UserError where it cannot be."""
    with writing(f'csv={path}', 'give another path, or make room'):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with replacing(path) as f:
            out = csv.DictWriter(f, rows[0])
            out.writeheader()
            out.writerows(rows)


# -----------------------------------------------------------------------------
# A comparison

def draw(arms, path, swept=None):
    """
    Validation loss against tokens, FLOPs and seconds: the mean over the seeds with a band of its standard error, single seeds thin.
    For a sweep, {arm: (setting, [(value, final loss, its error)])}, a panel of the final loss against what was swept too.
    """
    page = figure(13 + 4 * bool(swept), 4.2)  # first, as it says what to install
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
    colours = {arm.name: '0.2' if n == 0 else f'C{(n - 1) % 10}' for n, arm in enumerate(arms)}  # the reference is grey
    page.get_layout_engine().set(w_pad=0.08)
    axes = page.subplots(1, 3 + bool(swept))
    for axis, against, label in zip(axes, ('tokens', 'flops', 'seconds'), ('tokens', 'FLOPs', 'seconds')):
        late = []  # the later four fifths of each curve: the fall before would flatten what is to be compared
        for arm in arms:
            mean, single = arm.curves(against)
            draw_arm(axis, mean, single, colours[arm.name])
            late += [point for point in mean if point[0] > mean[-1][0] / 5]
        axis.set(xscale='log', xlabel=label)
        if late:
            axis.set_xlim(left=0.95 * min(x for x, _, _ in late))
            axis.set_ylim(top=max(loss for _, loss, _ in late) + 0.05)
        left, right = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if right > 5 * left else MaxNLocator(4))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        if axis is not axes[0]:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
    axes[0].set_ylabel('validation loss (nats per token)')
    label_ends(axes[2], [(arm.loss, arm.name, colours[arm.name]) for arm in arms if arm.seeds()])
    if swept:
        draw_swept(axes[3], swept, {arm.name: arm.swept.get(swept[arm.name][0]) for arm in arms if arm.name in swept}, colours)
        axes[3].xaxis.set_minor_locator(NullLocator())
    for axis in axes:
        axis.grid(alpha=0.25, which='both', linewidth=0.5)
        axis.spines[['top', 'right']].set_visible(False)
    save(page, path)


def draw_arm(axis, mean, single, colour):
    for curve in single if len(single) > 1 else []:
        x, y, _ = zip(*curve)
        axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
    if mean:
        x, y, errors = zip(*mean)
        axis.plot(x, y, color=colour, linewidth=1.6, marker='o', markersize=3 if len(x) < 12 else 0)
        axis.plot(x[-1], y[-1], 'o', color=colour, markersize=5)
        axis.fill_between(x, [a - (e or 0) for a, e in zip(y, errors)], [a + (e or 0) for a, e in zip(y, errors)], color=colour, alpha=0.18, linewidth=0)


def label_ends(axis, ends):
    """Names and losses right of the axis, each beside the end of its curve, moved up where they would overlap."""
    (low, high), top = axis.get_ylim(), -1.0
    for loss, name, colour in sorted(ends):
        top = max((loss - low) / (high - low), top + 0.06)  # in heights of the axis
        axis.annotate(f'{name}  {loss:.3f}', (1.03, top), xycoords='axes fraction', color=colour, fontsize=9, va='center', annotation_clip=False)


def draw_swept(axis, swept, chosen, colours):
    for name, (_, curve) in swept.items():
        x, y, errors = zip(*curve)
        axis.errorbar(x, y, [e or 0 for e in errors], color=colours[name], marker='o', markersize=3.5, linewidth=1.4, capsize=2)
        for point in curve:
            if point[0] == chosen[name]:
                axis.plot(*point[:2], 'o', color=colours[name], markersize=8, fillstyle='none')
    values = sorted({x for _, curve in swept.values() for x, _, _ in curve})
    if values[0] > 0:
        axis.set_xscale('log')
    axis.set_xticks(values, [f'{x:g}' for x in values], rotation=45 if len(values) > 6 else 0)
    axis.set(xlabel=', '.join(sorted({key for key, _ in swept.values()})), ylabel='final loss; circle: the best')


def short(x):
    """2000 → 2k, 5e6 → 5M, 2e10 → 2e10, 5.2e13 → 5.2e13"""
    if x >= 1e9:
        mantissa, exponent = f'{x:.2e}'.split('e+')
        return f'{float(mantissa):g}e{int(exponent)}'
    return f'{x / 1e6:g}M' if x >= 1e6 else f'{x / 1e3:g}k' if x >= 1e3 else f'{x:g}'
