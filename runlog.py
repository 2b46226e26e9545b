"""
What a run writes down as it goes: log.jsonl, and Weights & Biases if asked.
"""
import dataclasses
import json
import os

from configurator import UserError
from device import process_age


class Log:
    """log.jsonl in out_dir, a JSON object a line, and Weights & Biases if asked. Only rank 0 writes."""

    def __init__(self, s, step, ranks):
        self.on, self.wandb, self.seconds, self.evaluated = ranks.first, None, 0.0, -1  # `evaluated`: step of the last evaluation
        if not self.on:
            return
        self.path = os.path.join(s.out_dir, 'log.jsonl')
        records = []
        if step and os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as f:
                records = [json.loads(line) for line in f if line.endswith('\n')]
        records = [r for r in records if r['step'] <= step]  # what came after the checkpoint happens again
        with open(self.path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r) + '\n' for r in records)
        os.replace(self.path + '.tmp', self.path)
        self.seconds = records[-1]['seconds'] if records else 0.0  # of the processes before this one
        self.evaluated = max([r['step'] for r in records if 'val_loss' in r], default=-1)
        if s.wandb_log:
            import wandb
            name = s.wandb_run_name or os.path.basename(s.out_dir)
            try:
                self.wandb = wandb.init(project=s.wandb_project, name=name, config=dataclasses.asdict(s), dir=s.out_dir)
            except wandb.Error as error:
                raise UserError(f'wandb_log=True: {error}: run wandb login, or set WANDB_MODE=offline') from None

    def write(self, step, **record):
        if self.on:
            record = {'step': step, **record, 'seconds': round(self.seconds + process_age(), 3)}
            with open(self.path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(record) + '\n')
            if self.wandb:
                self.wandb.log(record, step=step)
