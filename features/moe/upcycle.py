"""
Convert a dense model to a mixture of experts that computes the same function (sparse upcycling, Komatsuzaki
et al. 2022, arXiv 2212.05055).

    python surgery.py upcycle --from=out/dense --out_dir=out/moe --n_expert=8
"""
import dataclasses

import torch

from configurator import UserError, check
from features import extend


def run(s):
    """python surgery.py upcycle"""
    from features.growth.runs import read, write
    old = read(s, s.from_, encoder=True)
    torch.manual_seed(s.seed)
    cfg, weights = upcycle(old.model.cfg, old.model.state_dict(), s.n_expert, s.n_expert_active,
                           s.expert_bias)
    write(s, 'upcycle', old, cfg, weights)


@torch.no_grad()
def upcycle(cfg, weights, n_expert, n_expert_active=1, expert_bias=0.0):
    """
    (ModelConfig, weights) of a mixture that computes the function of a dense model: each expert is a copy of
    its MLP, so the router's choice does not matter. The experts become different because they get different
    tokens; no noise is added.
    The output of a single active expert is multiplied by its probability, 1/n_expert at first; its output
    matrix compensates for that (He et al. 2024, arXiv 2410.07524). The weights of two or more experts sum to
    1. The routers are almost zero, but not equal. Uses torch's random numbers. Raises UserError for a model
    that is already a mixture.
    """
    from features.growth.networks import refuse_unknown
    if cfg.n_expert:
        raise UserError(f'n_expert={cfg.n_expert}: the network is a mixture of experts already: '
                        'give a dense one')
    refuse_unknown(cfg, 'made a mixture of experts and keep its function')
    new = dataclasses.replace(cfg)
    extend(new, 'moe')
    new.n_expert = n_expert
    new.n_expert_active = n_expert_active
    new.expert_bias = expert_bias
    check(new)
    scale = n_expert if n_expert_active == 1 else 1

    out = {}
    for name, t in weights.items():
        block, mlp, rest = name.partition('.mlp.')
        if not mlp:
            out[name] = t
            continue
        if rest.startswith('down.'):
            t = t * scale
        if rest.startswith('norm.'):  # one for all experts
            out[f'{block}.mlp.experts.{rest}'] = t.clone()
        else:
            out[f'{block}.mlp.experts.{rest}'] = t.repeat(n_expert, *[1] * t.ndim)  # (E, …)
        if rest == 'up.weight':  # once a block
            out[f'{block}.mlp.router'] = 1e-6 * torch.randn(n_expert, cfg.n_embd)
            if expert_bias:
                out[f'{block}.mlp.expert_bias'] = torch.zeros(n_expert)
    return new, out
