"""
Figures and csv files of the scripts, and the picture of a comparison: the loss curves of the arms, and where
they ended.

    page = figure(8, 4)
    save(page, 'out/page.png')
    draw(arms, 'out/compare.png')       # compare.py: tables.py has the figures
"""
import csv
import os

from checkpoint import replacing, writing
from configurator import UserError

# -----------------------------------------------------------------------------
# For all scripts

def figure(width, height):
    """A matplotlib Figure of this size in inches. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("picture: matplotlib is not installed: pip install matplotlib, "
                        "or --picture=''") from None
    return Figure(figsize=(width, height), layout='constrained')


def save(page, path):
    """Write a Figure to `path`, and make its folder. Raises UserError if that is not possible."""
    if not os.path.splitext(path)[1]:
        path += '.png'
    kind = os.path.splitext(path)[1][1:]
    try:
        with writing(f'picture={path}', 'give another path, or make room'):
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with replacing(path, 'wb', is_given=True) as f:
                page.savefig(f, format=kind, dpi=120)
    except ValueError as error:  # a format that matplotlib does not know
        raise UserError(f'picture={path}: {error}') from None


def write_csv(rows, path):
    """
    Write dicts with the same keys as a table to `path`, and make its folder. Raises UserError if that is not
    possible.
    """
    with writing(f'csv={path}', 'give another path, or make room'):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with replacing(path, is_given=True) as f:
            out = csv.DictWriter(f, rows[0])
            out.writeheader()
            out.writerows(rows)


# -----------------------------------------------------------------------------
# A comparison

def draw(arms, path, swept=None):
    """
    Plot validation loss against tokens, FLOPs and seconds: the mean over the seeds with a band of its
    standard error, and single seeds as thin lines. The first of `arms` is the reference, in grey. swept, for
    a sweep: {arm: (setting, [(value, final loss, its error)])}; it adds a panel of the final loss against the
    swept setting.
    """
    page = figure(17 if swept else 13, 4.2)  # first: it says so if matplotlib is missing
    colours = {arm.name: colour_of(n) for n, arm in enumerate(arms)}
    page.get_layout_engine().set(w_pad=0.08)
    axes = page.subplots(1, 4 if swept else 3)
    draw_curves(axes[0], arms, colours, 'tokens', 'tokens')
    draw_curves(axes[1], arms, colours, 'flops', 'FLOPs')
    draw_curves(axes[2], arms, colours, 'seconds', 'seconds')
    for axis in axes[1:3]:
        axis.sharey(axes[0])
        axis.tick_params(labelleft=False)
    axes[0].set_ylabel('validation loss (nats per token)')
    label_ends(axes[2], [(arm.loss, arm.name, colours[arm.name]) for arm in arms if arm.seeds()])
    if swept:
        chosen = {}
        for arm in arms:
            if arm.name in swept:
                setting, _ = swept[arm.name]
                chosen[arm.name] = arm.swept.get(setting)
        draw_swept(axes[3], swept, chosen, colours)
    for axis in axes:
        axis.grid(alpha=0.25, which='both', linewidth=0.5)
        axis.spines[['top', 'right']].set_visible(False)
    save(page, path)


def colour_of(n):
    """The colour of arm number n: grey for the reference, then matplotlib's ten."""
    return '0.2' if n == 0 else f'C{(n - 1) % 10}'


def draw_curves(axis, arms, colours, against, label):
    """The loss curves of all arms against 'tokens', 'flops' or 'seconds'."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    late = []  # the last four fifths of each curve: the fall before would flatten the differences
    for arm in arms:
        mean, single = arm.curves(against)
        draw_arm(axis, mean, single, colours[arm.name])
        for point in mean:
            if point[0] > mean[-1][0] / 5:
                late.append(point)
    axis.set(xscale='log', xlabel=label)
    if late:
        axis.set_xlim(left=0.95 * min(x for x, _, _ in late))
        axis.set_ylim(top=max(loss for _, loss, _ in late) + 0.05)
    left, right = axis.get_xlim()
    is_wide = right > 5 * left
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw_arm(axis, mean, single, colour):
    """The curves of an arm, as Arm.curves() returns them."""
    if len(single) > 1:
        for curve in single:
            x, y, _ = zip(*curve)
            axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
    if mean:
        x, y, errors = zip(*mean)
        low = [loss - (error or 0) for loss, error in zip(y, errors)]
        high = [loss + (error or 0) for loss, error in zip(y, errors)]
        size = 3 if len(x) < 12 else 0
        axis.plot(x, y, color=colour, linewidth=1.6, marker='o', markersize=size)
        axis.plot(x[-1], y[-1], 'o', color=colour, markersize=5)
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def label_ends(axis, ends):
    """
    Write [(loss, name, colour)] right of the axis, each beside the end of its curve, moved up where they
    would overlap.
    """
    low, high = axis.get_ylim()
    height = -1.0  # as a share of the axis
    for loss, name, colour in sorted(ends):
        height = max((loss - low) / (high - low), height + 0.06)
        axis.annotate(f'{name}  {loss:.3f}', (1.03, height), xycoords='axes fraction', color=colour,
                      fontsize=9, va='center', annotation_clip=False)


def draw_swept(axis, swept, chosen, colours):
    """
    The final loss against the swept setting, `swept` as in draw(); a circle around the `chosen` {arm: value}.
    """
    from matplotlib.ticker import NullLocator
    for name, (_, curve) in swept.items():
        x, y, errors = zip(*curve)
        axis.errorbar(x, y, [error or 0 for error in errors], color=colours[name], marker='o', markersize=3.5,
                      linewidth=1.4, capsize=2)
        for value, loss, _ in curve:
            if value == chosen[name]:
                axis.plot(value, loss, 'o', color=colours[name], markersize=8, fillstyle='none')
    values = sorted({value for _, curve in swept.values() for value, _, _ in curve})
    if values[0] > 0:
        axis.set_xscale('log')
    axis.set_xticks(values, [f'{value:g}' for value in values], rotation=45 if len(values) > 6 else 0)
    axis.xaxis.set_minor_locator(NullLocator())
    settings = sorted({setting for setting, _ in swept.values()})
    axis.set(xlabel=', '.join(settings), ylabel='final loss; circle: the best')


def short(x):
    """A number on an axis: 2000 → 2k, 5e6 → 5M, 2e10 → 2e10, 5.2e13 → 5.2e13"""
    if x >= 1e9:
        mantissa, exponent = f'{x:.2e}'.split('e+')
        return f'{float(mantissa):g}e{int(exponent)}'
    if x >= 1e6:
        return f'{x / 1e6:g}M'
    if x >= 1e3:
        return f'{x / 1e3:g}k'
    return f'{x:g}'
