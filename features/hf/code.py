"""
Export the code of a model with its weights: model.py without the features that the model does not use, and
the files of those that it uses, in one folder, as transformers needs them.
"""
import os
import re

from configurator import ROOT


def write_code(folder, cfg):
    """Write the files that modeling_minnow.py needs for the model of a ModelConfig into `folder`."""
    used = {}  # {feature: its files}
    if cfg.n_expert:  # moe
        used['moe'] = ['network', 'settings']  # moe
    if cfg.rope_scaling:
        used['hf'] = ['rotary']
    if cfg.position == 'relative':  # t5
        used['t5'] = ['positions']  # t5
    files = {'features/hf/modeling_minnow.py': 'modeling_minnow.py', 'model.py': 'model.py'}
    for feature, parts in used.items():
        for part in parts:
            files[f'features/{feature}/{part}.py'] = f'{feature}_{part}.py'
    for path, name in files.items():
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            text = f.read()
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            f.write(without(text, used))


def without(text, used):
    """
    The text of a file without the lines of encoders and of features not in `used`. Its imports are local.
    """
    features = set(os.listdir(os.path.join(ROOT, 'features'))) - set(used)
    lines = []
    for line in text.split('\n'):
        mark = re.search(r'  # (\w+)(: .*)?$', line)
        if mark is None or mark[1] not in features and mark[2] != ': encoder':
            lines.append(line)
    text = re.sub(r'from features\.(\w+)\.(\w+) import', r'from .\1_\2 import', '\n'.join(lines))
    return re.sub(r'^from model import', 'from .model import', text, flags=re.MULTILINE)
