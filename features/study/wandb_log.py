"""
Weights & Biases (--wandb_log): the settings and the records of log.jsonl, sent there too, and nothing else.
"""
import dataclasses
import logging
import os
import re
import secrets
from importlib.util import find_spec
from pathlib import Path

from checkpoint import open_regular, replace_text, writing
from configurator import FilePath, UserError, options

# The settings of wandb without which it sends more: what is printed, the code, the git remote and commit, the
# command line, paths, packages, the hostname, the user and the machine; SECURITY.md lists what is left
QUIET = {
    'console': 'off',
    'save_code': False,
    'disable_git': True,
    'disable_job_creation': True,
    'x_disable_meta': True,
    'x_disable_machine_info': True,
    'x_disable_stats': True,
    'x_save_requirements': False,
    'host': '',
    'username': '',
    'email': '',
    'program': '',
    'x_executable': '',
}


def load():
    """The module wandb, which reports its own errors to nobody. Raises UserError if it is not installed."""
    os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')  # before it is imported
    found = find_spec('wandb')
    # a folder called wandb, where its runs lie, has no code
    if found is None or (found.loader is None and found.submodule_search_locations):
        raise UserError('wandb_log=True: wandb is not installed: pip install wandb')
    import wandb
    return wandb


def log_in():
    """
    Raise UserError if wandb is not installed or the login fails. Call it before anything is written.
    """
    wandb = load()
    if os.environ.get('WANDB_MODE') in ('offline', 'disabled', 'dryrun'):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise refused(error) from None


def start(s):
    """
    The Sender for the run of Weights & Biases that belongs to out_dir. Its id is stored there, so that a
    resumed run continues it. Raises UserError.
    """
    wandb = load()
    logging.raiseExceptions = False  # or wandb's own debug.log prints tracebacks where the disk is full
    name = s.wandb_run_name or os.path.basename(os.path.realpath(s.out_dir))
    try:
        run = wandb.init(project=s.wandb_project, name=name, id=run_id(s.out_dir), resume='allow',
                         dir=s.out_dir, config=without_folders(s), allow_val_change=True, settings=QUIET)
    except wandb.Error as error:
        raise refused(error) from None
    except ValueError as error:  # it does not know one of QUIET
        raise UserError(f'wandb_log=True: wandb {wandb.__version__}: {error}: use another version') from None
    return Sender(run, s)


def run_id(out_dir):
    """The id of the run in `out_dir`, eight hexadecimal digits in its file wandb_id, which may be new."""
    path = Path(out_dir, 'wandb_id')
    if not path.exists():
        with writing(path, 'make room, then run the same command to resume'):
            replace_text(path, secrets.token_hex(4) + '\n')
    with open_regular(path) as f:
        text = f.read(100).decode('utf-8', 'replace').strip()
    if not re.fullmatch('[0-9a-f]{8}', text):
        raise UserError(f'{path}: holds no id of a run: delete it to send to a new one')
    return text


# -----------------------------------------------------------------------------
# Paths: the names of the files are enough

def without_folders(s):
    """The settings as a dict, every path without the folders before its last name."""
    values = dataclasses.asdict(s)
    for field in dataclasses.fields(s):
        value = values[field.name]
        if FilePath in options(field.type):
            if isinstance(value, dict):
                names = short_names(value)
                values[field.name] = {names[path]: share for path, share in value.items()}
            elif value:
                values[field.name] = short_name(value)
    return values


def short_names(paths):
    """{path: its last name}, with a number where two are the same."""
    names = {}
    for path in paths:
        name = short_name(path)
        same = sum(re.sub(r' \(\d+\)$', '', other) == name for other in names.values())
        names[path] = f'{name} ({same + 1})' if same else name
    return names


def short_name(path):
    """hf:/home/me/SmolLM/ → hf:SmolLM"""
    start = 'hf:' if path.startswith('hf:') else ''
    return start + os.path.basename(os.path.normpath(path.removeprefix('hf:')))


class Sender:
    """Sends records to a run of Weights & Biases. If sending fails, training continues without it."""

    def __init__(self, run, s):
        self.run = run
        self.out_dir = s.out_dir
        self.names = short_names(s.dataset) if isinstance(s.dataset, dict) else {}

    def send(self, record):
        import wandb
        if self.run is None or record['step'] < self.run.step:  # it has those from before a resume already
            return
        record = {self.short_key(key): value for key, value in record.items()}
        try:
            self.run.log(record, step=record['step'])
        except (wandb.Error, OSError) as error:
            print(f'wandb_log: {error}: from here on, {os.path.join(self.out_dir, "log.jsonl")} alone',
                  flush=True)
            self.run = None

    def short_key(self, key):
        """val_loss//home/me/stories → val_loss/stories"""
        figure, slash, source = key.partition('/')
        return figure + slash + self.names.get(source, short_name(source)) if slash else key


def refused(error):
    reason = str(error).rstrip('.')
    return UserError(f'wandb_log=True: {reason}: run wandb login, or set WANDB_MODE=offline')
