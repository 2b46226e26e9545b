"""
A checkpoint behind EleutherAI's lm-evaluation-harness, with all of its tasks: pip install lm-eval.

    python eval.py harness --out_dir=out/run --tasks=lambada_openai,arc_easy
"""
import os

from configurator import UserError, whole_text
from features.study.likelihoods import CONTEXTS, score
from features.study.tasks import first_ids, score_text
from model import autocast
from sample import stream

# -----------------------------------------------------------------------------
# A network as lm-eval sees it

def evaluate(model, tokenizer, tasks, shots, limit, device, dtype, include=None):
    """
    The results of lm_eval, a dict, for a list of task names. shots: None = the default of each task. limit:
    items per task; 0 = all. include: a folder of your own tasks. Raises UserError if lm-eval is not
    installed, does not know a task, or cannot get its data.
    """
    # else lm-eval forks for its bootstrap beside torch's threads, which may hang
    from features.text.cuts import Cuts
    os.environ.setdefault('DISABLE_MULTIPROC', '1')
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('harness: lm-evaluation-harness is not installed: pip install lm-eval') from None

    contexts = Cuts(CONTEXTS)
    prompts = Cuts('prompts')
    late = Cuts('prompts, for the end of a text,')
    limits = Cuts('values of max_gen_toks')

    class Minnow(TemplateLM):
        """The methods that lm_eval calls on a model."""
        eot_token_id = tokenizer.eot or 0
        prefix_token_id = first_ids(tokenizer)[0]  # of an empty context
        tokenizer_name = tokenizer.kind

        def tok_encode(self, string, **unused):
            return tokenizer.encode(whole_text(string, 'tasks'))

        def _loglikelihood_tokens(self, requests, **unused):
            pairs = []
            for (text, _), ids, continuation in requests:  # without a text, ids is the prefix token
                pairs.append((first_ids(tokenizer, ids if text else ()), continuation))
            return score(model, pairs, device, dtype, cuts=contexts)

        def loglikelihood_rolling(self, requests, **unused):
            texts = [whole_text(request.args[0], 'tasks') for request in requests]
            return [-score_text(model, tokenizer, text, 0, device, dtype, rolling=True)[0] for text in texts]

        def generate_until(self, requests, **unused):
            return [self.generate(*request.args) for request in requests]

        def generate(self, context, options):
            asked = options.get('max_gen_toks', 256)
            stop = options.get('until', [])
            if isinstance(stop, str):
                stop = [stop]
            temperature = options.get('temperature', 0.0) if options.get('do_sample') else 0.0
            ids = first_ids(tokenizer, self.tok_encode(context))
            kept, most = fit(len(ids), asked, model.cfg.block_size)
            prompts.add(len(ids), kept)
            limits.add(asked, most)
            with autocast(device, dtype):
                pieces = stream(model, tokenizer, [ids[-kept:]], stop, max_new_tokens=most,
                                temperature=temperature)
                written = [piece for _, piece in pieces]  # one per token, and perhaps one more at the end
            late.add(kept, still_read(kept, min(len(written), most), model.cfg.block_size))
            return ''.join(written)

    manager = TaskManager(include_path=include or None)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise UserError(f'tasks: {name!r}: lm-eval has no such task: lm-eval ls tasks shows them')
    try:
        results = lm_eval.simple_evaluate(model=Minnow(), tasks=tasks, num_fewshot=shots, limit=limit or None,
                                          task_manager=manager, bootstrap_iters=1000)
    except OSError as error:
        reason = str(error).split('\n')[0]
        raise UserError('tasks: their data are not on this machine and cannot be '
                        f'fetched: {reason}') from None
    cut = [cuts.line() for cuts in (contexts, prompts, late, limits) if cuts.cut]
    if cut:
        print(f'harness: the network reads {model.cfg.block_size} tokens: ' + '; '.join(cut), flush=True)
    return results


def run(s):
    """python eval.py harness"""
    model, tokenizer, device, dtype = s.load()
    results = evaluate(model, tokenizer, s.tasks.split(','), s.shots, s.limit, device, dtype, s.include)
    from lm_eval.utils import make_table
    print(make_table(results))


# -----------------------------------------------------------------------------
# Prompts that leave no room for the text after them

def fit(length, asked, block_size):
    """
    (tokens of a prompt to read, new tokens to generate) for a prompt of `length` tokens and a task that asks
    for `asked` new ones, lm-eval's max_gen_toks.
    A prompt that fits the context is read completely. The generated text may be as long as the rest of the
    context, or half of the context if that is more; generate() then slides the context and still reads the
    end of the prompt. A prompt that is longer than the context is truncated at its beginning to leave room
    for the text, but to no less than half of the context.
    lm-eval's own models truncate every prompt to block_size - max_gen_toks tokens, and fail if none are left.
    """
    free = min(asked, block_size // 2)
    kept = length if length <= block_size else block_size - free
    return kept, min(asked, max(free, block_size + 1 - kept))


def still_read(kept, count, block_size):
    """
    Tokens of a prompt of `kept` tokens that generate() still reads when it generates number `count` of
    fit()'s new tokens.
    """
    if kept + count - 1 <= block_size:
        return kept
    return kept - (block_size + 1 - block_size // 2)  # it has slid on, once: the newer half is left
