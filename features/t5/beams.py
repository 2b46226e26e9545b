"""
Beam search: keep several hypotheses and return the most likely text (python sample.py --num_beams=4).
"""
import torch

from configurator import UserError
from features.t5.sampling import Decoder
from sample import KVCache, NotFinite, Row, next_logits


def check_settings(s):
    """Raise ValueError for settings of sample.py that cannot be combined with num_beams."""
    if s.num_beams < 0:
        raise ValueError(f'num_beams={s.num_beams}: must not be negative')
    if len(s.adapter) > 1:
        raise ValueError(f'num_beams={s.num_beams}: searches with one adapter: give one')
    if s.stop or s.repetition_penalty != 1:
        raise ValueError(f'num_beams={s.num_beams}: a beam search does not support stop and '
                         'repetition_penalty: leave them out')


def print_best(model, tokenizer, prompt, s):
    """Print the text that a beam search finds after a prompt, with the settings of sample.py."""
    if len(prompt) + s.max_new_tokens > model.cfg.block_size + 1:
        raise UserError(f'max_new_tokens={s.max_new_tokens}: a beam search cannot go beyond the context of '
                        f'{model.cfg.block_size}: lower it')
    ids = beam_search(model, prompt, s.max_new_tokens, s.num_beams, s.length_penalty, tokenizer.ends(),
                      tokenizer.vocab_size)
    row = Row(tokenizer, prompt, ())
    pieces = [row.add(token) for token in ids if token not in tokenizer.ends()]
    print(''.join(pieces) + row.end() + '\n---------------', flush=True)


@torch.no_grad()
def beam_search(model, prompt, max_new_tokens, num_beams=4, length_penalty=1.0, eot=None, vocab_size=None):
    """
    The best continuation of a prompt (a list of token ids) that a beam search with num_beams hypotheses
    finds, a list of token ids up to and including `eot`, a token or several. The score is the log-probability
    divided by the length to the power of length_penalty (Wu et al. 2016, arXiv 1609.08144, without their 5
    and 6). The search ends when the best open hypothesis, at its present length, is no better than the worst
    of num_beams finished ones, like that of transformers (early_stopping=False).
    model: a decoder, or a sampling.Decoder of an encoder-decoder that has read one source. Raises ValueError
    for more tokens than block_size, and NotFinite if the logits are NaN or infinite.
    """
    V, device = vocab_size or model.cfg.vocab_size, next(model.parameters()).device
    size = len(prompt) + max_new_tokens
    if size - 1 > model.cfg.block_size:
        raise ValueError(f'{len(prompt)} tokens and max_new_tokens={max_new_tokens} are more than '
                         f'block_size={model.cfg.block_size}')
    if isinstance(model, Decoder):
        model = Decoder(model.model, model.sources[:1] * num_beams, size)
    cache = KVCache(model, size)
    last = torch.tensor([-1] if eot in (None, ()) else eot, device=device)
    finished = []  # (score, tokens), the best first
    tokens = torch.tensor([prompt] * num_beams, device=device)  # (beams, T)
    # The hypotheses are equal at first: only one of them counts
    scores = torch.tensor([0.0] + [-1e9] * (num_beams - 1), device=device)
    for length in range(1, max_new_tokens + 1):
        total = next_logits(model, tokens, cache)[:, :V].log_softmax(-1) + scores[:, None]  # (beams, V)
        # each beam may end in so many ways: enough go on
        best, where = total.flatten().topk(min((1 + last.numel()) * num_beams, total.numel()))
        if best[0].isnan():  # topk puts NaN first
            raise NotFinite
        rows, drawn = where // V, where % V
        ends = torch.isin(drawn, last)
        for n in ends[:num_beams].nonzero().flatten().tolist():
            written = tokens[rows[n], len(prompt):].tolist() + [drawn[n].item()]
            finished.append((best[n].item() / length ** length_penalty, written))
        finished = sorted(finished, reverse=True)[:num_beams]
        rows, drawn, scores = rows[~ends][:num_beams], drawn[~ends][:num_beams], best[~ends][:num_beams]
        tokens = torch.cat([tokens[rows], drawn[:, None]], dim=1)
        select(cache, rows)
        if len(finished) == num_beams and scores[0].item() / length ** length_penalty <= finished[-1][0]:
            return finished[0][1]
    for score, row in zip(scores.tolist(), tokens):
        finished.append((score / max_new_tokens ** length_penalty, row[len(prompt):].tolist()))
    return max(finished)[1]


def select(cache, rows):
    """Reorder a KVCache to these rows (B,) of the batch; a row may be repeated."""
    for layers in (cache.buffers, cache.source):
        for n, tensors in enumerate(layers):
            if tensors is not None:
                layers[n] = [t[rows] for t in tensors]
