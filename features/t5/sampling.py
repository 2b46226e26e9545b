"""
Sample from models that read a source first: the special tokens around it, and a wrapper of encoder-decoders
for sample.generate().
"""
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from features.t5.objectives import MODES, check_kind, parse_denoisers
from tokenizer import PromptFormat


def prompt_format(kind, denoisers, tokenizer, bos=()):
    """The PromptFormat of a model trained with objective=kind and these denoisers."""
    check_kind(kind)
    if kind == 'causal':
        return PromptFormat(bos)
    prefix = ()
    # the end of a text after its beginning
    if kind == 'ul2' and any(d.mode == 'S' for d in parse_denoisers(denoisers)):
        first = tokenizer.vocab_size - tokenizer.more.get('reserved', 0)
        prefix = (first + MODES.index('S'),)
    return PromptFormat(bos, prefix, (tokenizer.eot,))


def source_format(tokenizer):
    """The PromptFormat of the encoder's input: it ends at least with the end-of-text token."""
    own = tokenizer.prompt_format
    return PromptFormat((), own.prefix, own.suffix or (tokenizer.eot or 0,))


def read_sources(model, tokenizer, sources, max_new_tokens):
    """
    (the decoder of an encoder-decoder that has read the sources, its prompts), for generate() of
    max_new_tokens. sources: lists of token ids.
    """
    start = decoder_start(tokenizer)
    return Decoder(model, sources, 1 + max_new_tokens), [[start]] * len(sources)


def decoder_start(tokenizer):
    """The token with which the decoder of an encoder-decoder begins."""
    bos = tokenizer.prompt_format.bos
    return bos[0] if bos else tokenizer.eot or 0


class Decoder:
    """
    The decoder of an encoder-decoder that has read a batch of sources, lists of token ids. size: tokens that
    it will read, so that a decoder with no limit has a context of this length.
    """

    @torch.no_grad()
    def __init__(self, model, sources, size=0):
        context = max(model.cfg.block_size, min(size, model.cfg.target_limit))
        self.model, self.cfg, self.sources = model, replace(model.cfg, block_size=context), sources
        self.encoded = model.encode(pad(sources, next(model.parameters()).device))

    def parameters(self):
        return self.model.parameters()

    def hidden(self, idx, cache):
        return self.model.hidden(idx, cache, self.encoded)

    def logits(self, h):
        return self.model.logits(h)


def pad(rows, device):
    """Lists of token ids → (B, S) int64, padded with -1."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1)
