"""
A checkpoint behind EleutherAI's lm-evaluation-harness, with all of its tasks: pip install lm-eval.

    python evaluate.py harness --out_dir=out/run --tasks=lambada_openai,arc_easy
"""
from configurator import UserError
from device import autocast
from sample import stream
from tasks import score, score_text


def evaluate(model, tokenizer, tasks, shots, limit, device, dtype, include=None):
    """
    lm_eval's results, a dict, of the tasks of these names; shots: None = as each task has it; include: a folder of tasks of one's own. Raises UserError
    where lm-eval is not installed or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('harness: lm-evaluation-harness is not installed: pip install lm-eval') from None

    class Minnow(TemplateLM):
        """What lm_eval asks of a model."""
        eot_token_id = tokenizer.eot or 0
        prefix_token_id = tokenizer.context()[0]  # of an empty context
        tokenizer_name = tokenizer.kind

        def tok_encode(self, string, **unused):
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **unused):
            pairs = []
            for (text, _), ids, continuation in requests:  # without a text, ids is the prefix token
                pairs.append((tokenizer.context(ids if text else ()), continuation))
            return score(model, pairs, device, dtype)

        def loglikelihood_rolling(self, requests, **unused):
            return [-score_text(model, tokenizer, request.args[0], model.cfg.block_size, device, dtype)[0] for request in requests]

        def generate_until(self, requests, **unused):
            return [self.generate(*request.args) for request in requests]

        def generate(self, context, options):
            most, stop = options.get('max_gen_toks', 256), options.get('until', [])
            ids = tokenizer.context(tokenizer.encode(context))[-max(1, model.cfg.block_size - most):]
            temperature = options.get('temperature', 0.0) if options.get('do_sample') else 0.0
            with autocast(device, dtype):
                return ''.join(piece for _, piece in stream(model, tokenizer, [ids], [stop] if isinstance(stop, str) else stop, max_new_tokens=most,
                                                            temperature=temperature))

    manager = TaskManager(include_path=include or None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f'tasks: {unknown[0]!r}: lm-eval has no such task: lm-eval ls tasks shows them')
    try:
        return lm_eval.simple_evaluate(model=Minnow(), tasks=tasks, num_fewshot=shots, limit=limit or None, task_manager=manager, bootstrap_iters=1000)
    except OSError as error:
        raise UserError(f'tasks: their data are not on this machine and cannot be fetched: {error}'.splitlines()[0]) from None
