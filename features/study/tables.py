"""
Arms of runs in one table: the mean loss of each, its difference to a reference, and notes about what is not
comparable.

    print(table(arms))                     # the first arm is the reference
    rows = [row(arm, arms[0]) for arm in arms]   # the same figures, for a csv file

Only finished runs count: the learning rate has decayed at the end of a run, and an unfinished run would look
worse than it is. The difference is paired by seed: two arms with the same seed see the same data in the same
order.
"""
import statistics

from features.study.runs import real_folders
from features.study.stats import mean_and_error, show_interval, show_mean

# -----------------------------------------------------------------------------
# The figures of an arm

def row(arm, reference):
    """
    The figures of an Arm and its differences from the reference, {name: number or None}: the content of the
    table and the csv file.
    """
    run = next(iter(arm.runs.values()))
    out = {
        'arm': arm.name,
        'parameters': run['parameters'],
        'block_parameters': run['blocks'],
        'trained_parameters': run['trained'],
        'seeds': len(arm.seeds()),
    }
    for key in ('tokens', 'flops', 'seconds'):
        values = values_of_all(arm, key)
        out[key] = statistics.mean(values) if values else None
    out['flops_per_token'] = None
    if out['tokens'] and out['flops'] is not None:
        out['flops_per_token'] = out['flops'] / out['tokens']
    peaks = values_of_all(arm, 'peak_memory_bytes')
    out['memory_mib'] = max(peaks) / 2 ** 20 if peaks else None
    for key in ('val_loss', 'val_bpb'):
        values = values_of_all(arm, key)
        mean, error = mean_and_error(values) if values else (None, None)
        out[key] = mean
        out[key + '_se'] = error
    difference = None
    if arm is not reference:
        difference = arm.minus(reference)
    out['difference'], out['half_width'], out['pairs'] = difference or (None, None, None)
    return out


def values_of_all(arm, key):
    """
    The values of `key` at the end of all finished runs of an arm; none unless all have it, so that all
    columns of a row are means over the same seeds.
    """
    found = arm.last(key)
    if found.keys() != arm.seeds():
        return []
    return list(found.values())


# -----------------------------------------------------------------------------
# The table

HEADS = ['arm', 'parameters', 'in blocks', 'tokens', 'FLOPs/token', 'FLOPs', 'seconds', 'MiB', 'seeds',
         'val loss', 'bits/byte']


def table(arms):
    """The table as text: a line per arm, the first one being the reference, then the notes."""
    reference = arms[0]
    rows = [HEADS + [f'minus {reference.name} [95%]']]
    for arm in arms:
        rows.append(cells(row(arm, reference)))
    widths = [max(len(text) for text in column) for column in zip(*rows)]
    lines = []
    for texts in rows:
        padded = []
        for n, (text, width) in enumerate(zip(texts, widths)):
            is_text = n == 0 or n == len(HEADS)
            padded.append(text.ljust(width) if is_text else text.rjust(width))
        lines.append('  '.join(padded).rstrip())
    return '\n'.join(lines + notes(arms))


def cells(figures):
    """The texts of a row() for the table, one per column."""
    def show(name, form):
        return '-' if figures[name] is None else format(figures[name], form)

    difference = ''
    if figures['difference'] is not None:
        difference = show_interval(figures['difference'], figures['half_width']) + f' n={figures["pairs"]}'
    return [
        figures['arm'],
        show('parameters', ','),
        show('block_parameters', ','),
        show('tokens', ',.0f'),
        show('flops_per_token', '.3g'),
        show('flops', '.3e'),
        show('seconds', '.0f'),
        show('memory_mib', '.0f'),
        str(figures['seeds']),
        show_mean(figures['val_loss'], figures['val_loss_se']),
        show_mean(figures['val_bpb'], figures['val_bpb_se']),
        difference,
    ]


# -----------------------------------------------------------------------------
# Notes: what was left out, and what is not comparable

def notes(arms):
    """Lines below the table of `arms`, the first one being the reference."""
    lines = []
    for arm in arms:
        lines += notes_on(arm, arms[0])
    runs = [run for arm in arms for run in arm.runs.values()]
    if len({validation_of(run['settings']) for run in runs}) > 1:
        lines.append('careful: not all of these were validated on the same tokens (dataset, packing, '
                     'block_size, eval_iters, objective): their losses are not comparable')
    dtypes = {arm.name: sorted({run['settings'].dtype for run in arm.runs.values()}) for arm in arms}
    if len({dtype for found in dtypes.values() for dtype in found}) > 1:
        shown = ', '.join(f'{name} {"/".join(found)}' for name, found in dtypes.items())
        lines.append(f'careful: not all of these were trained in the same dtype: {shown}')
    return lines


def notes_on(arm, reference):
    """Lines about one arm: frozen parameters, runs that do not count, seeds without a partner."""
    lines = []
    run = next(iter(arm.runs.values()))
    if run['trained'] < run['parameters']:
        lines.append(f'{arm.name}: {run["trained"]:,} of its parameters are trained')
    diverged = arm.seeds('diverged')
    if diverged:
        lines.append(f'{arm.name}: diverged: seed {listed(diverged)}')
    for seed in sorted(arm.runs.keys() - arm.seeds() - diverged):
        run = arm.runs[seed]
        steps = run['settings'].max_iters
        if steps:
            lines.append(f'{arm.name}: seed {seed} is not finished ({run["state"]} of {steps}) and left out')
        else:
            lines.append(f'{arm.name}: seed {seed} has no loss: '
                         'surgery.py measures one where it has a --dataset')
    alone = arm.seeds() ^ reference.seeds()
    if alone and arm.seeds() and reference.seeds():
        lines.append(f'{arm.name}: seed {listed(alone)} has no partner and is left out of the difference')
    return lines


def listed(seeds):
    """'1, 2, 3'"""
    return ', '.join(str(seed) for seed in sorted(seeds))


def validation_of(s):
    """The settings that determine the validation tokens and their context, as a tuple."""
    data = str(real_folders(s.dataset))
    denoisers = str(s.denoisers) if s.objective == 'ul2' else ''
    return (data, s.packing, s.block_size, s.eval_iters, s.objective, getattr(s, 'source_context', 0),
            denoisers)
