"""
Did a change of the code lose the guard of a test? This script puts 60 mistakes into the core, one at a time,
and runs the few tests that should fail. It does so in this tree and in an earlier one, and prints a table.

    python experiments/core_mutants.py --check --old=OLD_TREE    # run no test: is all that is named there?
    python experiments/core_mutants.py --old=OLD_TREE --jobs=16 --write=mutants.md
    python experiments/core_mutants.py cosine warm               # this tree, mutants with one of these words

Both trees are plain folders; git is not needed. The tests first run in copies without a mistake: a selection
of tests that fails there counts for nothing. It takes 15 minutes of one core for each tree, without a GPU.
"""
import argparse
import ast
import compileall
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {'.git', '.venv', '.venv-oldest', 'out', 'data', 'wandb', '__pycache__', '.pytest_cache',
           '.ruff_cache', '.hypothesis'}


class Mutant(NamedTuple):
    name: str
    file: str  # where its code is, or was first: it is looked for in the other files too
    code: str  # occurs once; a space stands for any blanks, also for the end of a line
    mistake: str  # what takes its place
    tests: str  # a file in tests/ :: what -k takes
    old: tuple = ()  # (code, mistake) in the old tree, where they differ


# -----------------------------------------------------------------------------
# The mistakes

FIVE_AND_FIVE = 'test_train.py::ten_steps_are_five_and_five_in_a_new'

MUTANTS = [
    # train.py
    Mutant('dropout is not seeded', 'train.py', 'torch.manual_seed(splitmix(s.seed, sample) % 2 ** 63)',
           'pass', FIVE_AND_FIVE, old=('torch.manual_seed(splitmix(s.seed, first) % 2 ** 63)', 'pass')),
    Mutant('the mean of the means of micro-batches', 'train.py', 'ranks.world / max(targets, 1)',
           'ranks.world / max((y >= 0).sum().item(), 1) / len(micro_batches)',
           'test_train.py::accumulation_is_the_big_batch',
           old=('else max(targets, 1)', 'else max((y >= 0).sum().item() * len(micro), 1)')),
    Mutant('a gradient of NaN is applied', 'train.py', 'math.isfinite(norm)', 'True',
           'faults/test_running.py::one_that_is_not_finite_at_the_end'),
    Mutant('the gradient is not clipped', 'train.py', 'clip_gradient(run.model, s.grad_clip or math.inf)',
           'clip_gradient(run.model, math.inf)', FIVE_AND_FIVE),
    Mutant('the scaler of float16 is not saved', 'train.py', "'scaler': run.scaler.state_dict()",
           "'scaler': {}", FIVE_AND_FIVE),
    Mutant('the highest loss is the best', 'train.py', 'loss < run.best_loss', 'loss > run.best_loss',
           'test_train.py::only_the_newest_and_the_best',
           old=("result['val_loss'] < run.best_loss", "result['val_loss'] > run.best_loss")),
    Mutant('a signal does not stop the run', 'train.py', 'stopping = done.stop', 'stopping = False',
           'test_train.py::a_signal_saves_after_the_step and 15',
           old=('norm, stopping, skipped = train_step(', 'norm, _, skipped = train_step(')),

    # model.py
    Mutant('attention is not causal', 'model.py', 'is_causal = mask is None and q.size(2) > 1',
           'is_causal = False', 'test_model.py::no_token_sees_a_later_one',
           old=('at.is_causal and at.mask is None and x.size(1) > 1', 'False')),
    Mutant('masked targets have a gradient', 'model.py', 'd.mul_(real)', 'd',
           'test_model.py::chunked_loss_and_its_gradients'),
    Mutant('masked targets count in the loss', 'model.py', 'return (nll * real).sum()', 'return nll.sum()',
           'test_model.py::masked_targets_do_not_count'),
    Mutant('a tied head has no gradient', 'model.py', '(self.wte if self.cfg.tie else self.head).weight',
           '(self.wte.weight.detach() if self.cfg.tie else self.head.weight)',
           'test_model.py::flops_are_those_that_torch_counts'),
    Mutant('rotary positions begin at 0 after a cache', 'model.py',
           'numbers, mask = cache.positions, cache.mask', 'mask = cache.mask',
           'test_model.py::kv_cache_gives_the_same_logits',
           old=('positions = cache.positions if cache is not None else slice(T)', 'positions = slice(T)')),
    Mutant('the wrong sign in the rotation', 'model.py', 'b * cos + a * sin', 'b * cos - a * sin',
           'test_model.py::rotary_positions_depend'),
    Mutant('keys of another group of heads', 'model.py', 'k.repeat_interleave(groups, dim=1)',
           'k.repeat(1, groups, 1, 1)', 'test_model.py::plain_attention_of_short_rows'),
    Mutant('low rank loses the norm', 'model.py', 'S[:rank] * (S.norm() / S[:rank].norm())', 'S[:rank]',
           'test_model.py::factors_are_balanced'),
    Mutant('padding of the vocabulary gets logits', 'model.py', 'logits.float()[..., :self.cfg.vocab_size]',
           'logits.float()', 'test_model.py::vocabularys_padding_changes_nothing'),

    # batches.py
    Mutant('each epoch has the same order', 'batches.py', 'source.rows, splitmix(self.seed, k, epoch)',
           'source.rows, splitmix(self.seed, k)', 'test_batches.py::each_epoch_has_another_order'),
    Mutant('the last row is left out', 'batches.py', '-(-(self.files.tokens - 1) // block_size)',
           '(self.files.tokens - 1) // block_size', 'test_batches.py::an_epoch_of_the_stream',
           old=('-(-(self.files.tokens - overlap) // self.objective.stride)',
                '(self.files.tokens - overlap) // self.objective.stride')),
    Mutant('targets are the inputs', 'batches.py', 'tokens[1:]', 'tokens[:-1]',
           'test_batches.py::an_epoch_of_the_stream', old=('row[read + 1:]', 'row[read:-1]')),
    Mutant('padding is a target', 'batches.py', 'np.full(shape, -1, np.int64)', 'np.zeros(shape, np.int64)',
           'test_batches.py::document_rows_are_padded',
           old=('np.full((height, self.T), -1, np.int64)', 'np.zeros((height, self.T), np.int64)')),
    Mutant('a shard is read at the place in all', 'batches.py', 'start - self.starts[shard]', 'start',
           'test_batches.py::reads_cross_shards', old=('start - int(self.starts[shard])', 'start')),
    Mutant('the hash of a token file is not compared', 'batches.py', 'if sha256 and hashlib',
           'if False and hashlib', 'test_batches.py::a_damaged_data_set_is_refused'),
    Mutant('the shares of a mixture drift', 'batches.py', '(i + 1) * share // left > before',
           '(i + 1) * share // left >= before', 'test_batches.py::weights_are_met_exactly'),
    Mutant('the loss depends on the batch size', 'batches.py', 'EVAL_ROWS * s.eval_iters',
           's.batch_size * s.eval_iters', 'test_train.py::validation_rows_do_not_depend',
           old=('numbers, nats, targets = validation_rows(source, EVAL_ROWS * s.eval_iters)',
                'numbers, nats, targets = validation_rows(source, s.batch_size * s.eval_iters)')),
    Mutant('a crop has a start token without the start', 'batches.py', 'if start >= first:',
           'if start > first:', 'test_batches.py::a_crop_has_the_start_token'),
    Mutant('all ranks read the same rows', 'batches.py', '(step * world + rank) * rows',
           'step * world * rows', 'faults/test_ranks.py::same_order_for_any_split'),
    Mutant('no dropout after an evaluation', 'batches.py', 'model.train()', 'pass',
           'test_train.py::dropout_is_on',
           old=('model.train() return losses(all_nats', 'return losses(all_nats')),

    # optim.py
    Mutant('the warm-up is one step late', 'optim.py', '(step + 1) / (warmup + 1)', 'step / (warmup + 1)',
           'test_optim.py::cosine_is_nanogpts'),
    Mutant('the cosine begins at step 0', 'optim.py', '(step - warmup) / (end - warmup)', 'step / end',
           'test_optim.py::cosine_is_nanogpts'),
    Mutant('norms and biases decay', 'optim.py', "p.ndim >= 2 and not name.endswith('.bias')", 'p.ndim >= 1',
           'test_optim.py::matrices_decay_norms'),
    Mutant('no look ahead along the momentum', 'optim.py',
           "torch._foreach_lerp_(grads, moments, group['momentum'])", 'pass',
           'test_optim.py::the_steps_are_torchs_muon'),
    Mutant('moments of another shape are left out', 'optim.py', '< sum(map(bool, moments.values()))', '< 0',
           'test_checkpoint.py::moments_go_by_name'),
    Mutant('a step that overflows float16 is made', 'optim.py', '_step_supports_amp_scaling = False',
           '_step_supports_amp_scaling = True', 'test_optim.py::a_step_that_overflows_float16'),
    Mutant('all groups have one rate', 'optim.py', "learning_rate(step, cfg, group['peak'])",
           'learning_rate(step, cfg)', 'test_optim.py::momentum_warms_up_and_every_rate'),

    # checkpoint.py
    Mutant('the hash of a checkpoint is not compared', 'checkpoint.py',
           " or sha256(path) != entry['sha256']", '', 'test_checkpoint.py::a_damaged_file_is_noticed'),
    Mutant('the best checkpoint is pruned', 'checkpoint.py',
           ' and folder != best(out_dir, is_sure=True)[0]', '',
           'test_checkpoint.py::the_best_is_never_pruned'),
    Mutant('files are not flushed', 'checkpoint.py', 'sync(path) files[name] =', 'files[name] =',
           'test_checkpoint.py::every_file_is_flushed'),
    Mutant('the folder is not flushed', 'checkpoint.py', 'sync(out_dir)', 'pass',
           'test_checkpoint.py::every_file_is_flushed'),
    Mutant('a lock is not taken', 'checkpoint.py', 'except BlockingIOError: os.close(fd) return None',
           'except BlockingIOError: return fd', 'test_prepare.py::two_runs_do_not_write_one_folder'),
    Mutant('weights that are not finite are saved', 'checkpoint.py', 'if broken:', 'if False:',
           'faults/test_running.py::not_finite_are_never_written'),

    # sample.py
    Mutant('top_p takes one token too many', 'sample.py', 'likelier >= top_p',
           'likelier - p.roll(1, -1) >= top_p', 'test_sample.py::tokens_are_drawn_with_the_probabilities',
           old=('before >= top_p', 'before - ordered.softmax(-1).roll(1, -1) >= top_p')),
    Mutant('a penalty makes negative logits likelier', 'sample.py', 'logits * repetition_penalty',
           'logits / repetition_penalty', 'test_sample.py::tokens_are_drawn_with_the_probabilities'),
    Mutant('the cache is kept when the context slides', 'sample.py', 'cache.length = 0', 'pass',
           'test_sample.py::greedy_cached_is_uncached'),
    Mutant('tokens follow the end of text', 'sample.py', 'is_prompt | is_done | ended', 'is_prompt | is_done',
           'test_sample.py::a_row_ends_with_the_end_of_text',
           old=('prompting | done | ended', 'prompting | done')),
    Mutant('a token does not see itself in the cache', 'sample.py',
           'self.slots[:self.used] <= self.positions', 'self.slots[:self.used] < self.positions',
           'test_model.py::kv_cache_gives_the_same_logits'),
    Mutant('the seed of a sample is not used', 'sample.py', 'exponential_(generator=generator)',
           'exponential_()', 'test_sample.py::the_seed_decides'),

    # prepare.py
    Mutant('validation text is trained on', 'prepare.py', "('val', text[n:])", "('val', text)",
           'test_prepare.py::shakespeare_is_cut_where'),
    Mutant('the split by hash takes half', 'prepare.py', 's.val_fraction * 2 ** 64',
           's.val_fraction * 2 ** 63', 'test_prepare.py::equal_documents_are_on_one_side'),
    Mutant('16 bits end one token early', 'prepare.py', 'tokenizer.vocab_size <= 2 ** 16',
           'tokenizer.vocab_size < 2 ** 16', 'test_prepare.py::large_vocabularies_take_32_bits'),
    Mutant('the index holds ends', 'prepare.py', 'np.cumsum(lengths) - lengths', 'np.cumsum(lengths)',
           'test_prepare.py::the_bytes_on_disk'),

    # tokenizer.py
    Mutant('no end of text between documents', 'features/text/pieces.py', ' + [tokenizer.eot]', '',
           'test_prepare.py::the_bytes_on_disk',
           old=('self.encode_long(text) + [self.eot]', 'self.encode_long(text)')),
    Mutant('the hash of a tokenizer is not compared', 'tokenizer.py',
           'if hashlib.sha256(data).hexdigest() !=', 'if None and',
           'test_tokenizer.py::a_changed_or_missing_file',
           old=('if hashlib.sha256(files[name]).hexdigest() !=', 'if None and')),
    Mutant('an id too many is decoded', 'tokenizer.py', '0 <= i < self.vocab_size',
           '0 <= i <= self.vocab_size', 'test_tokenizer.py::every_id_decodes_and_no_other'),

    # configurator.py, run.py, device.py
    Mutant('a value is cut at its last =', 'configurator.py', "arg[2:].partition('=')",
           "arg[2:].rpartition('=')", 'test_configurator.py::values_are_read_as_their_type'),
    Mutant('a fraction is rounded to an int', 'configurator.py', ' and value.is_integer()', '',
           'test_configurator.py::a_mistake_is_named'),
    Mutant('a full quota is no full disk', 'configurator.py', '(errno.ENOSPC, errno.EDQUOT, errno.EFBIG',
           '(errno.ENOSPC, errno.EFBIG', 'test_configurator.py::a_disk_that_is_full'),
    Mutant('the log loses its last line at a resume', 'checkpoint.py', "record['step'] == step > 0", 'False',
           FIVE_AND_FIVE, old=("['step'] <= step", "['step'] < step")),
    Mutant('other data go on', 'features/resuming.py',
           "list(data.fingerprint().values()) == list(state['data'].values())", 'True',
           'test_train.py::data_that_changed_under_a_run'),
    Mutant('another seed goes on', 'features/resuming.py', "'objective', 'seed', 'optimizer'",
           "'objective', 'optimizer'", 'test_train.py::an_out_dir_of_another_run',
           old=("'denoisers', 'seed', 'optimizer'", "'denoisers', 'optimizer'")),
    Mutant('bfloat16 where it is slower', 'device.py', 'gain > 1.5', 'gain > 0.5',
           'test_device.py::bfloat16_is_taken_on_a_cpu'),
]
EARLIER_NAMES = {'test_batches.py': 'test_data.py', 'test_eval.py': 'test_evaluate.py'}


# -----------------------------------------------------------------------------
# A tree

class Tree:
    """A checkout of minnow. It knows where a mutant's code is, and the tests for it."""

    def __init__(self, name, root):
        self.name, self.root = name, Path(root).resolve()
        self.texts = {str(path.relative_to(self.root)): path.read_text(encoding='utf-8')
                      for path in [*self.root.glob('*.py'), *self.root.glob('features/**/*.py')]}

    def change(self, mutant):
        """(file, its text with the mistake). Raises ValueError unless the code is there once."""
        code, mistake = mutant.code, mutant.mistake
        if self.name == 'old' and mutant.old:
            code, mistake = mutant.old
        pattern = re.compile(r'\s+'.join(map(re.escape, code.split(' '))))
        counts = {file: len(pattern.findall(text)) for file, text in self.texts.items()}
        found = [file for file, count in counts.items() if count]
        if mutant.file in found:
            found = [mutant.file]
        if len(found) != 1 or counts[found[0]] != 1:
            where = ', '.join(f'{counts[file]} times in {file}' for file in found) or 'nowhere'
            raise ValueError(f'{code!r} is {where}')
        text = pattern.sub(lambda _: mistake, self.texts[found[0]])
        compile(text, found[0], 'exec')
        return found[0], text

    def tests(self, mutant):
        """(file, what -k takes). Raises ValueError if no test has such a name."""
        file, words = mutant.tests.split('::')
        if not (self.root / 'tests' / file).exists():
            file = EARLIER_NAMES.get(file, file)
        path = self.root / 'tests' / file
        if not path.exists():
            raise ValueError(f'there is no tests/{file}')
        names = [node.name for node in ast.parse(path.read_text(encoding='utf-8')).body
                 if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')]
        if not any(words.split()[0] in name for name in names):
            raise ValueError(f'tests/{file} has no test named {words}')
        return file, words

    def prepare(self, folder):
        """Copy the tree into a folder and compile it there: copies of that copy begin sooner."""
        self.compiled = Path(folder, self.name)
        shutil.copytree(self.root, self.compiled, ignore=lambda folder, names: SKIPPED & set(names))
        compileall.compile_dir(self.compiled, quiet=2)


def check(trees, mutants):
    """Print which code or tests are not there. Returns how many."""
    problems = 0
    for tree in trees:
        for mutant in mutants:
            for look in (tree.change, tree.tests):
                try:
                    look(mutant)
                except (ValueError, SyntaxError) as error:
                    problems += 1
                    print(f'{tree.name}: {mutant.name}: {error}')
    print(f'{len(mutants)} mutants, {len(trees)} tree(s), {problems} problem(s)')
    return problems


# -----------------------------------------------------------------------------
# Run tests

def run_tests(tree, file, words, limit, mutant=None):
    """
    Run tests of a copy of the tree, with the mutant's mistake in it. Returns (what came of it, seconds, what
    the tests say): 'passed', 'failed', 'time' (longer than `limit` seconds), or 'error' (no test ran).
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder, 'tree')
        shutil.copytree(tree.compiled, copy)
        if mutant:
            changed, text = tree.change(mutant)
            (copy / changed).write_text(text, encoding='utf-8')
            for compiled in (copy / changed).parent.glob(f'__pycache__/{Path(changed).stem}.*'):
                compiled.unlink()
        # no option of pyproject.toml and no plugin is needed
        command = [sys.executable, '-m', 'pytest', f'tests/{file}', '-k', words, '-x', '-q', '-p',
                   'no:cacheprovider', '-o', 'addopts=', '--tb=line', f'--basetemp={folder}/tmp']
        environment = os.environ | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1',
                                    'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1', 'TMPDIR': folder}
        environment.pop('PYTHONPATH', None)
        with open(Path(folder, 'said'), 'w+', encoding='utf-8', errors='replace') as said:
            process = subprocess.Popen(command, cwd=copy, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # and all that it started
                except ProcessLookupError:
                    pass
                process.wait()
            said.seek(0)
            text = said.read()
    seconds = time.monotonic() - began
    if code is None:
        return 'time', seconds, ''
    if code == 0 and re.search(r'\d+ passed', text):
        return 'passed', seconds, ''
    if code == 1 and re.search(r'\d+ (failed|error)', text):
        reasons = re.findall(r'^(?:/.*?:\d+|E  ): (.*)', text, re.MULTILINE)
        return 'failed', seconds, reasons[0][:100] if reasons else ''
    return 'error', seconds, '\n'.join(text.strip().splitlines()[-15:])


class Results:
    """What came of the tests, of all trees."""

    def __init__(self, trees, mutants):
        self.trees, self.mutants = trees, mutants
        self.sound = {}  # {(tree, tests): what run_tests() returns of them without a mistake}
        self.found = {}  # {(tree, mutant): what it returns of its tests}

    def verdict(self, tree, mutant):
        """In a word what a tree's tests say of a mutant."""
        sound = self.sound.get((tree.name, mutant.tests), [''])[0]
        if sound not in ('', 'passed'):
            return f'no answer: without it {sound}'
        result = self.found.get((tree.name, mutant.name), [''])[0]
        if result in ('passed', 'failed', 'time') and not sound:
            return 'no answer: not run without it'
        words = {'passed': 'SURVIVED', 'failed': 'killed', 'time': 'killed (time)', '': 'not run'}
        return words.get(result, result)

    def table(self):
        """The table in Markdown."""
        names = [tree.name for tree in self.trees]
        lines = [f'| mutant | file | {" | ".join(names)} | seconds | tests |',
                 f'|---|---|{"---|" * len(names)}---|---|']
        for mutant in self.mutants:
            verdicts = [self.verdict(tree, mutant) for tree in self.trees]
            times = [self.found.get((name, mutant.name), ('', 0.0))[1] for name in names]
            lines.append(f'| {mutant.name} | {mutant.file} | {" | ".join(verdicts)} | '
                         f'{" / ".join(f"{seconds:.0f}" for seconds in times)} | {mutant.tests} |')
        lines.append('')
        for tree in self.trees:
            count = sum(self.verdict(tree, mutant).startswith('killed') for mutant in self.mutants)
            lines.append(f'{tree.name}: {count} of {len(self.mutants)} killed')
        return '\n'.join(lines) + '\n'


def run_all(results, jobs, limit, within, write):
    """Run all tests, `jobs` at a time: first those without a mistake."""
    began, lock, waiting = time.monotonic(), threading.Lock(), queue.SimpleQueue()
    selections = dict.fromkeys(mutant.tests for mutant in results.mutants)
    for tests in selections:
        for tree in results.trees:
            waiting.put((tree, next(m for m in results.mutants if m.tests == tests), False))
    for mutant in results.mutants:
        for tree in results.trees:
            waiting.put((tree, mutant, True))

    def work():
        while True:
            try:
                tree, mutant, is_mutated = waiting.get_nowait()
            except queue.Empty:
                return
            left = within - (time.monotonic() - began)
            if left < 1:
                return
            if is_mutated and results.sound.get((tree.name, mutant.tests), ['passed'])[0] != 'passed':
                continue
            one = run_tests(tree, *tree.tests(mutant), min(limit, left), mutant if is_mutated else None)
            if one[0] == 'time' and time.monotonic() - began >= within - 1:
                continue  # it was cut off: no answer
            with lock:
                if is_mutated:
                    results.found[tree.name, mutant.name] = one
                    what, about = results.verdict(tree, mutant), mutant.name
                else:
                    results.sound[tree.name, mutant.tests] = one
                    what, about = one[0], f'without a mistake: {mutant.tests}'
                print(f'{time.monotonic() - began:5.0f} s  {tree.name}  {what}  {about}  ({one[1]:.1f} s)  '
                      f'{one[2]}', flush=True)
                if write:
                    Path(write).write_text(results.table(), encoding='utf-8')
    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('words', nargs='*', help='only mutants whose name, file or tests have one of these')
    parser.add_argument('--new', default=ROOT, help='the tree to judge; this one by default')
    parser.add_argument('--old', default='', help='an earlier tree to compare with')
    parser.add_argument('--jobs', type=int, default=1, help='how many run at a time')
    parser.add_argument('--limit', type=float, default=120, help='seconds for the tests of a mutant')
    parser.add_argument('--within', type=float, default=1e9, help='seconds for all; the rest is not run')
    parser.add_argument('--write', default='', help='a file for the table, in Markdown')
    parser.add_argument('--check', action='store_true', help='look for code and tests, run none')
    args = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS
               if not args.words or any(word in ' '.join(mutant[:5]) for word in args.words)]
    trees = [Tree('old', args.old)] if args.old else []
    trees.append(Tree('new', args.new))
    problems = check(trees, mutants)
    if args.check or problems:
        sys.exit(problems > 0)
    results = Results(trees, mutants)
    with tempfile.TemporaryDirectory() as folder:
        for tree in trees:
            tree.prepare(folder)
        run_all(results, args.jobs, args.limit, args.within, args.write)
    print('\n' + results.table(), end='')
    if args.write:
        Path(args.write).write_text(results.table(), encoding='utf-8')
    new = trees[-1]
    sys.exit(not all(results.verdict(new, mutant).startswith('killed') for mutant in mutants))


if __name__ == '__main__':
    main()
