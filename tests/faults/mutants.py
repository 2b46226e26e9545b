"""
Do the tests notice when a protection is gone? Each is taken out of a copy of the code, one at a time, and the
test that is there for it has to fail.

    python tests/faults/mutants.py            # 25 of them; or with words of their tests: shard lock
"""
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# file, what is there, what is there instead, and the tests: a file and what -k takes
MUTANTS = [
    # resume
    ('train.py', "torch.manual_seed(splitmix(s.seed, sample) % 2 ** 63)", 'pass', 'faults/test_resume.py',
     'five_and_five'),
    ('features/moments.py', 'give_moments(optimizer, moments) < sum(map(bool, moments.values()))', 'False',
     'faults/test_resume.py', 'every_moment'),
    # checkpoints
    ('checkpoint.py', " or sha256(path) != entry['sha256']:", ':', 'test_checkpoint.py', 'damaged_file'),
    ('checkpoint.py', '        sync(path)\n        files[name]', '        files[name]', 'test_checkpoint.py',
     'flushed'),
    ('checkpoint.py', "    temporary = final + '.tmp'", '    temporary = final', 'faults/test_files.py',
     'killed_at_a_point'),
    ('checkpoint.py', 'elif is_sound(folder):', 'else:', 'faults/test_files.py', 'never_removed'),
    ('checkpoint.py', ' and folder != best(out_dir, is_sure=True)[0]:', ':', 'faults/test_files.py',
     'never_removed'),
    ('features/scale/background.py', "t.detach().to('cpu', copy=True)", 't.detach()', 'faults/test_files.py',
     'background_is_what_was_there'),
    ('checkpoint.py', '    if broken:', '    if False:', 'faults/test_running.py', 'never_written'),
    ('checkpoint.py', '            os.close(fd)\n            return None', '            return fd',
     'faults/test_running.py', 'second_process'),
    # what goes wrong while a run goes on
    ('train.py', ' + 0 * loss.detach()', '', 'faults/test_running.py', 'that_is_not_finite_changes_nothing'),
    ('train.py', 'is_finite = math.isfinite(norm)', 'is_finite = True', 'faults/test_running.py',
     'that_is_not_finite_changes_nothing'),
    ('batches.py', 'return batches, *sum_all(self.ranks, trouble, targets, stop)',
     'return batches, *sum_all(self.ranks, trouble, targets), stop', 'faults/test_running.py',
     'leaves_one_checkpoint and 20/'),
    ('train.py', '        if step in run.left_out:', '        if False:', 'faults/test_running.py',
     'left_those_steps_out'),
    ('features/scale/guard.py', '            if theirs[name] != one:', '            if False:',
     'faults/test_running.py', 'weights_that_differ'),
    ('features/scale/guard.py', '        if data != starts[0][1]:', '        if False:',
     'faults/test_running.py', 'other_data_or_settings'),
    ('features/scale/ranks.py', 'join(max(2.0, min(30.0, self.seconds / 4)))', 'join()',
     'faults/test_network.py', 'finds_the_run'),
    # ranks
    ('batches.py', 'first = (step * world + rank) * rows', 'first = (step + rank * 10 ** 6) * rows',
     'faults/test_ranks.py', 'same_order_for_any_split'),
    ('train.py', 'scale = ranks.world / max(targets, 1)', 'scale = 1 / max(targets, 1)',
     'faults/test_ranks.py', 'two_micro_batches'),
    ('train.py', '        share_gradients(run.undivided, ranks)  # scale\n', '', 'faults/test_shard.py',
     'one_process_to_rounding and scalars'),
    ('features/scale/shard.py',
     '        return distribute_tensor(t, like.device_mesh, like.placements)\n    dist',
     '        return torch.zeros_like(like)\n    dist', 'faults/test_shard.py',
     'one_process_to_rounding and scalars'),
    # input
    ('batches.py', 'if part.max() >= self.vocab_size:', 'if False:', 'test_batches.py',
     'damaged_data_set or fuzz'),
    ('features/text/nanogpt.py', 'if code.name not in PLAIN:', 'if False:', 'test_batches.py',
     'without_running_its_pickle'),
    ('features/resuming.py', "list(data.fingerprint().values()) == list(state['data'].values())", 'True',
     'test_train.py', 'data'),
    ('features/text/reader.py', 'if task.starts:', 'if True:', 'test_tokenfiles.py', 'together_the_whole'),
]


def survives(file, old, new, test, words):
    """Whether the tests pass without the protection."""
    with tempfile.TemporaryDirectory() as folder:
        for name in subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                                   check=True).stdout.splitlines():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        code = Path(folder, file).read_text()
        assert code.count(old) == 1, f'{file} has {code.count(old)} times {old!r}: say here what is there now'
        Path(folder, file).write_text(code.replace(old, new))
        command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', '-m',
                   'slow or not slow', f'tests/{test}', '-k', words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # anything else is no answer
        return done.returncode == 0


if __name__ == '__main__':
    chosen = [mutant for mutant in MUTANTS
              if not sys.argv[1:] or any(word in ' '.join(mutant) for word in sys.argv[1:])]
    alive = []
    for mutant in chosen:
        began = time.monotonic()
        noticed = not survives(*mutant)
        alive += [] if noticed else [mutant]
        print(f'{"noticed" if noticed else "NOT NOTICED"}: {mutant[0]}: '
              f'{mutant[1].strip()[:80]!r} ({time.monotonic() - began:.0f} s)', flush=True)
    print(f'{len(chosen) - len(alive)} of {len(chosen)} noticed')
    sys.exit(bool(alive))
