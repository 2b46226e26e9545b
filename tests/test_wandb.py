"""
--wandb_log sends the settings and the log, and nothing else: offline, wandb writes what it would send.
"""
import socket
import subprocess
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, run, write_dataset

from configurator import UserError
from features.study import wandb_log


def test_paths_are_sent_as_names():
    names = wandb_log.short_names(['/home/me/a/data', 'data', '/x/stories/', 'hf:/home/me/SmolLM'])
    assert list(names.values()) == ['data', 'data (2)', 'stories', 'hf:SmolLM']
    sender = wandb_log.Sender(None, SimpleNamespace(out_dir='x', dataset={'/home/me/a': 1, '/tmp/a': 2}))
    assert sender.short_key('val_loss//tmp/a') == 'val_loss/a (2)' and sender.short_key('lr') == 'lr'


@pytest.mark.parametrize('text', ['', '../../x', 'a' * 200, '\0'])
def test_an_id_that_is_none_is_refused(tmp_path, text):
    (tmp_path / 'wandb_id').write_text(text)
    with pytest.raises(UserError, match='holds no id of a run: delete it'):
        wandb_log.run_id(tmp_path)


def test_a_folder_called_wandb_is_no_module(monkeypatch):
    def folder_alone(name):
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations.append('wandb')
        return spec
    monkeypatch.setattr(wandb_log, 'find_spec', folder_alone)
    with pytest.raises(UserError, match='wandb is not installed'):
        wandb_log.load()


def test_nothing_but_settings_and_log_is_sent(tmp_path):
    pytest.importorskip('wandb')
    home = tmp_path / 'HOMESECRET'
    write_dataset(home / 'one')
    write_dataset(home / 'two', seed=1)
    (home / 'CODESECRET.py').write_text('n_layer = 1\n')
    try:
        for command in (['init', '-q'], ['remote', 'add', 'origin', 'https://REMOTESECRET.example/x.git']):
            subprocess.run(['git', *command], cwd=home, check=True)
    except OSError:  # no git here: there is no remote then
        pass
    mixture = {str(home / 'one'): 2, str(home / 'two'): 1}
    done = run(ROOT / 'train.py', home / 'CODESECRET.py', *TINY, f'--dataset={mixture}', '--max_iters=2',
               f'--out_dir={home}/run', '--wandb_log', cwd=home,
               env={'WANDB_MODE': 'offline', 'HOSTNAME': 'HOSTSECRET', 'USER': 'USERSECRET'})
    assert done.returncode == 0, done.stderr
    sent = [path for path in home.glob('run/wandb/offline-run-*/**/*')
            if path.is_file() and path.parent.name != 'logs']
    found = b''.join(path.read_bytes() for path in sent)
    assert [path.suffix for path in sent] == ['.wandb']  # no output.log, no requirements.txt, no code
    assert b'val_loss/two' in found and b'n_embd' in found
    for word in ('HOMESECRET', 'CODESECRET', 'REMOTESECRET', 'HOSTSECRET', 'USERSECRET', 'train.py', 'step 2',
                 'numpy==', '--max_iters', str(ROOT), f'"{socket.gethostname()}"'):
        assert word.encode() not in found, word
