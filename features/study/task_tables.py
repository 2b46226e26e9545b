"""
Results of tasks: the differences of networks, csv files and a picture.
"""
import os
from collections import Counter
from dataclasses import dataclass

from features.study.pictures import colour_of, figure, save
from features.study.stats import mean_and_error, show_error


@dataclass
class Result:
    """The result of a network on a task."""
    network: str
    task: str  # the file
    label: str  # what to call it
    items: int
    chance: float | None  # acc of random guessing
    measures: dict  # {measure: (value, standard error)}
    records: list[dict]  # of every item


def short_names(paths):
    """{path: its file name, or all of it where two files have the same name}"""
    names = {path: os.path.basename(path) for path in paths}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else path for path, name in names.items()}


def by_task(results):
    """{task: [Results of the networks, in their order]}"""
    out = {}
    for result in results:
        out.setdefault(result.task, []).append(result)
    return out


# -----------------------------------------------------------------------------
# Tables

def differences(results):
    """
    The first network minus each of the others, over the same items, with the standard error of that paired
    difference.
    """
    lines = []
    for first, *others in by_task(results).values():
        for other in others:
            for measure, (value, _) in first.measures.items():
                if measure in first.records[0]:  # perplexity is no mean of the items'
                    pairs = zip(first.records, other.records, strict=True)
                    mean, error = mean_and_error([a[measure] - b[measure] for a, b in pairs])
                    its_value, _ = other.measures[measure]
                    lines.append((first.label, measure, value, its_value, mean, error, other))
    width = max(len(line[0]) for line in lines)
    out = [f'{results[0].network} minus the others; ± is the standard error of the paired difference']
    for label, measure, value, its_value, mean, error, other in lines:
        out.append(f'{label:{width}}  {measure:8}  {value:.4f} - {its_value:.4f} = {mean:+.4f} '
                   f'± {show_error(error)}  {other.network}')
    return '\n'.join(out)


def item_rows(results):
    """A row for every item of every task, for write_csv()."""
    out = []
    for result in results:
        for record in result.records:
            empty = dict.fromkeys(('acc', 'acc_norm', 'mass', 'chosen', 'gold', 'nats'), '')
            out.append({'network': result.network, 'task': result.task} | empty | record)
    return out


def rows(results):
    """A row for every network, task and measure, for write_csv()."""
    out = []
    for result in results:
        for measure, (value, error) in result.measures.items():
            out.append({
                'network': result.network,
                'task': result.task,
                'items': result.items,
                'measure': measure,
                'value': value,
                'standard_error': '' if error is None else error,
                'chance': '' if result.chance is None or measure == 'perplexity' else result.chance,
            })
    return out


# -----------------------------------------------------------------------------
# Picture

def draw(results, path):
    """
    Plot a row for each task: acc of every network (filled), acc_norm (open) or mass (a square), with their
    standard errors, and a grey line at chance.
    """
    tasks = by_task(results)
    networks = list(dict.fromkeys(result.network for result in results))
    page = figure(8, 1.2 + 0.28 * len(tasks) * (1 + len(networks)))
    axis = page.subplots()
    styles = {
        'acc': dict(marker='o'),
        'acc_norm': dict(marker='o', fillstyle='none'),
        'mass': dict(marker='s'),
    }
    used = set()
    for row, found in enumerate(tasks.values()):
        if found[0].chance is not None:
            axis.plot([found[0].chance] * 2, [row - 0.4, row + 0.4], color='0.75', linewidth=2, zorder=1)
        for n, result in enumerate(found):
            height = row + 0.6 * ((n + 0.5) / len(found) - 0.5)
            for measure, style in styles.items():
                if measure in result.measures:
                    value, error = result.measures[measure]
                    if measure != 'acc':
                        height += 0.08  # bars beside each other
                    axis.errorbar(value, height, xerr=error or 0, color=colour_of(n + 1), linestyle='none',
                                  markersize=5, linewidth=1.2, **style)
                    used.add(measure)
    axis.set_yticks(range(len(tasks)), [found[0].label for found in tasks.values()])
    axis.set_ylim(len(tasks) - 0.4, -0.6)
    axis.set_xlabel('; '.join(f'{measure}: {words}' for measure, words in (
        ('acc', 'filled'), ('acc_norm', 'open'), ('mass', 'square')) if measure in used) + '; grey: chance')
    for n, network in enumerate(networks):
        axis.plot([], [], 'o', color=colour_of(n + 1), label=network)
    page.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    axis.grid(alpha=0.25, axis='x', linewidth=0.5)
    axis.spines[['top', 'right']].set_visible(False)
    save(page, path)
