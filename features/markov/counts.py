"""
The optimizer that trains a full Markov table by counting: --optimizer=counts. It needs a third of AdamW's
memory and no learning rate.
"""
import torch

from configurator import UserError


class Counts(torch.optim.Optimizer):
    """
    The rows of a table are the logits of softmaxes p (V, V). p.grad is minus the counts of BigramLoss: a sum
    over targets, not a mean.
    The step is the natural gradient (Amari 1998). For the frequencies q of a row, it moves straight towards
    those of a batch of n observations, q ← (1 - η) q + η counts/n, with η = n/(pseudo_counts + all n so far),
    which decays like the rates of SGD (Bottou 2010). So q is always (pseudo_counts·q₀ + all
    counts)/(pseudo_counts + all n): add-k smoothing with one number of state per row. All logits of a row
    without counts would fall equally, which does not change the softmax, so only the counted ones are
    written.
    """
    dtype = torch.float32  # as Muon has it

    def __init__(self, params, pseudo_counts):
        super().__init__([{'params': params, 'muon': False}], {})
        self.pseudo_counts = pseudo_counts

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.count(p)

    def count(self, p):
        if not self.state[p]:
            self.state[p]['seen'] = p.new_zeros(len(p))
        grad, seen = p.grad.coalesce(), self.state[p]['seen']
        (previous, following), counts = grad.indices(), -grad.values()
        rows, which = previous.unique_consecutive(return_inverse=True)
        log_sums = torch.cat([p[some].logsumexp(1) for some in rows.split(64)])  # a few rows at a time
        added = log_sums[which] + (counts / (self.pseudo_counts + seen[previous])).log()
        p[previous, following] = torch.logaddexp(p[previous, following], added)
        seen.index_add_(0, previous, counts)
        p.grad = None


def count_table(model, cfg):
    """The counting optimizer for a full Markov table. Raises UserError for any other model."""
    if model.cfg.arch != 'markov' or model.cfg.rank_embed:
        raise UserError('optimizer=counts: counts what follows what in a full Markov table: '
                        'set arch=markov and rank_embed=0, or use adamw')
    model.wte.sparse = True  # the loss hands over counts in place of a gradient
    return Counts(list(model.named_parameters()), cfg.pseudo_counts)
