"""
Weights & Biases (--wandb_log): the records of log.jsonl, sent there too.
"""
import logging
import os
import secrets
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from checkpoint import replace_text, writing
from configurator import UserError


def log_in():
    """
    Raise UserError if wandb is not installed or the login fails. Call it before anything is written.
    """
    if find_spec('wandb') is None:
        raise UserError('wandb_log=True: wandb is not installed: pip install wandb')
    if os.environ.get('WANDB_MODE') in ('offline', 'disabled', 'dryrun'):
        return
    import wandb
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise refused(error) from None


def start(s):
    """
    The Sender for the run of Weights & Biases that belongs to out_dir. Its id is stored there, so that a
    resumed run continues it. Raises UserError.
    """
    import wandb
    logging.raiseExceptions = False  # or wandb's own debug.log prints tracebacks where the disk is full
    path = Path(s.out_dir, 'wandb_id')
    if not path.exists():
        with writing(path, 'make room, then run the same command to resume'):
            replace_text(path, secrets.token_hex(4) + '\n')
    name = s.wandb_run_name or os.path.basename(os.path.normpath(s.out_dir))
    try:
        run = wandb.init(project=s.wandb_project, name=name, id=path.read_text().strip(), resume='allow',
                         dir=s.out_dir, config=asdict(s), allow_val_change=True)
    except wandb.Error as error:
        raise refused(error) from None
    return Sender(run, s.out_dir)


class Sender:
    """Sends records to a run of Weights & Biases. If sending fails, training continues without it."""

    def __init__(self, run, out_dir):
        self.run = run
        self.out_dir = out_dir

    def send(self, record):
        import wandb
        if self.run is None or record['step'] < self.run.step:  # it has those from before a resume already
            return
        try:
            self.run.log(record, step=record['step'])
        except (wandb.Error, OSError) as error:
            print(f'wandb_log: {error}: from here on, {os.path.join(self.out_dir, "log.jsonl")} alone',
                  flush=True)
            self.run = None


def refused(error):
    reason = str(error).rstrip('.')
    return UserError(f'wandb_log=True: {reason}: run wandb login, or set WANDB_MODE=offline')
