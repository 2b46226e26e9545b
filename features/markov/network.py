"""
First-order Markov chains: the next token depends only on the previous one.

    model = make_model(ModelConfig(arch='markov', vocab_size=257))                  # a table of logits (V, V)
    model = make_model(ModelConfig(arch='markov', vocab_size=257, rank_embed=64))   # its low-rank factors
"""
import torch
import torch.nn as nn

from features.markov.settings import MarkovConfig
from model import ChunkedCrossEntropy, ModelConfig, cap


class BigramLoss(torch.autograd.Function):
    """
    Sum of -log softmax(table[previous])[target]. It reads each row of the table that occurs once, and holds
    only a few rows at a time.
    The gradient of a row that occurs n times is n·softmax(row) - counts of the next tokens, and the softmax
    can be computed from the table. So backward returns only the counts: a sparse (V, V) tensor of -counts,
    one entry per token, which is summed over micro-batches and ranks like a gradient; optimizer=counts uses
    it. At V = 29k and 5,500 targets that is 0.1 MB; the rows would take 170 MB, a dense gradient 3,363 MB.
    sparse=False: the dense gradient, for any other optimizer.
    """
    @staticmethod
    def forward(ctx, table, previous, targets, sparse):  # (V, V), (N,), (N,)
        rows, which = previous.unique(return_inverse=True)  # (U,), (N,)
        ctx.save_for_backward(table, previous, targets)
        ctx.sparse = sparse
        # a few at a time: 7 MB at V = 29k
        log_sums = torch.cat([table[some].logsumexp(1) for some in rows.split(64)])
        return (log_sums[which] - table[previous, targets]).sum()

    @staticmethod
    def backward(ctx, grad):
        table, previous, targets = ctx.saved_tensors
        minus = -grad.expand(len(targets))  # (N,)
        if ctx.sparse:
            entries = torch.stack([previous, targets])  # (2, N)
            counts = torch.sparse_coo_tensor(entries, minus, table.shape, check_invariants=False)
            return counts, None, None, None
        dense = torch.zeros_like(table)
        rows, counts = previous.unique(return_counts=True)  # (U,), (U,)
        for some, n in zip(rows.split(64), counts.split(64)):
            dense[some] = table[some].softmax(1) * (n[:, None] * grad)
        dense.index_put_((previous, targets), minus, accumulate=True)
        return dense, None, None, None


class Markov(nn.Module):
    """
    A first-order Markov chain with the interface of Transformer. The logits of the next token are a row of a
    table (V, V), one row per previous token. With rank_embed = R, the table is a product (V, R)·(R, V). It
    needs two factors, because E·Eᵀ is symmetric and could not tell ab from ba.
    """

    def __init__(self, cfg, init=True):  # init=False: the weights will be loaded
        super().__init__()
        ModelConfig.check(cfg)
        MarkovConfig.check(cfg)
        if not cfg.vocab_size:
            raise ValueError('vocab_size=0: set it to the number of tokens of the data')
        self.cfg = cfg
        self.recompute = False  # there is nothing to compute again
        V, R = cfg.vocab_size, cfg.rank_embed
        # empty: nn.Embedding would fill it at once, 8 s for 841M numbers. The gradient of a full table is
        # sparse if wte.sparse is set (counts.py); DDP reads that attribute too
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, R or V), freeze=False)
        self.drop = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(R, V, bias=False) if R else None
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    def hidden(self, idx, cache=None):
        """What logits() takes of each token: (B, T, R), of a full table idx itself. The cache stays empty."""
        return idx if self.head is None else self.drop(self.wte(idx))

    def logits(self, h):
        """h (…, R), or token ids (…) of a full table → logits (…, vocab_size) in float32."""
        if self.head is None:
            return self.wte.weight[h].float()
        return cap(self.head(h).float(), self.cfg.softcap)

    def compile(self, *args, **kwargs):
        """Does nothing, because the sizes in forward() differ between batches."""

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0):
        """Like Transformer.forward()."""
        if targets is None:
            return self.logits(self.hidden(idx))
        real = targets >= 0  # no token needs its neighbours, so padding is left out before it costs anything
        idx, targets = idx[real], targets[real]  # (N,)
        if self.head is None:
            if label_smoothing:
                raise ValueError(f'label_smoothing={label_smoothing}: '
                                 'a full Markov table has none: set it to 0')
            loss = BigramLoss.apply(self.wte.weight, idx, targets, self.wte.sparse)
        else:
            loss = ChunkedCrossEntropy.apply(self.hidden(idx), self.head.weight, targets, self.cfg.vocab_size,
                                             self.cfg.softcap, label_smoothing, torch.is_grad_enabled())
        return loss if reduction == 'sum' else loss / len(targets)

    @torch.no_grad()
    def init_weights(self):
        """
        Logits of deviation 1: the table or the embedding is normal, the head uniform in ±1/sqrt(R). The first
        loss of a table is ln V + 1/2.
        """
        nn.init.normal_(self.wte.weight)
        if self.head is not None:
            nn.init.uniform_(self.head.weight, -self.cfg.rank_embed ** -0.5, self.cfg.rank_embed ** -0.5)

    def num_params(self, active=False):
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of training on one token: those of the head; a table lookup has none."""
        return 6 * self.cfg.rank_embed * self.cfg.vocab_size
