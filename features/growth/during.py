"""
A network that gets more blocks while it trains (--grow_every).
"""
from dataclasses import fields

from configurator import UserError
from features.growth.networks import grow, refuse_unknown
from features.moments import give_moments, moments_of
from features.networks import read_model
from model import make_model, only_in_training
from optim import make_optimizer


def begin_growth(s, cfg):
    """
    (ModelConfig, weights) of s.grow_from, None without it. Raises UserError if the model of this ModelConfig
    cannot grow as the settings ask.
    """
    refuse_unknown(cfg, 'grown while it trains', but=('dense_layers',))
    if s.grow_to <= s.n_layer:
        raise UserError(f'grow_to={s.grow_to}: the network begins with {s.n_layer} layers: give more')
    if s.grow_every > s.max_iters and not s.minutes:
        raise UserError(f'grow_every={s.grow_every}: is more than max_iters={s.max_iters}: '
                        'the network would never grow: lower it')
    return find_reference(s, cfg) if s.grow_from else None


def short_growth(s, n_layer, step):
    """[a warning line, if the run ends before the growth does]. n_layer: number of blocks at `step`."""
    # at a checkpoint it has not grown yet
    times = (s.max_iters - 1) // s.grow_every - max(0, step - 1) // s.grow_every
    reached = min(s.grow_to, n_layer + times * s.grow_by)
    if reached == s.grow_to:
        return []
    return [f'max_iters={s.max_iters}: ends before the network has grown to grow_to={s.grow_to}: '
            f'it ends with {reached} layers']


def grow_run(run, s, ranks):
    """Add blocks to the model of a Run. The schedule continues, and the old blocks keep their moments."""
    n_layer = min(run.model.cfg.n_layer + s.grow_by, s.grow_to)
    cfg, weights, names = grow(run.model.cfg, run.model.state_dict(), n_layer, 'stack', run.reference)
    moments = moments_of(run.optimizer)
    device = run.model.wte.weight.device
    run.model = make_model(cfg, init=False)
    run.model.load_state_dict(weights)
    run.model.to(device)
    run.model.recompute = s.recompute
    run.optimizer = make_optimizer(run.model, s, run.optimizer.dtype)
    give_moments(run.optimizer, {name: moments.get(old, {}) for name, old in names.items()})
    run.wrap(s, ranks)
    run.count()
    run.interval.loads = None  # of experts in other layers
    if run.losses:  # what follows is not to be compared with what was
        run.losses.recent.clear()
    ranks.say(f'grown to {n_layer} layers, {run.model.num_params():,} parameters')


def find_reference(s, cfg):
    """
    (ModelConfig, weights) of s.grow_from, whose blocks are to be copied. Raises UserError if they do not fit.
    """
    other, weights, _ = read_model(s.grow_from)
    where = f'grow_from={s.grow_from}'
    if other.n_layer < s.grow_to:
        raise UserError(f'{where}: has {other.n_layer} blocks, fewer than grow_to={s.grow_to}: lower it')
    if cfg.sizes() != other.sizes():
        raise UserError(f'{where}: its matrices are {other.sizes()}, of this network {cfg.sizes()}: '
                        'its blocks do not fit')
    for n in range(cfg.n_layer):
        for name in cfg.sizes():
            found, own = other.rank(n, name), cfg.rank(n, name)
            if found != own:
                raise UserError(f'{where}: blocks.{n}.{name} has rank {found}, in this network {own}: '
                                'its blocks do not fit')
    free = {*only_in_training(cfg), 'n_layer', 'block_size', 'ranks', 'n_kv_head', 'head_dim', 'd_ff',
            'zero_init', 'init_std'}
    names = {field.name for config in (cfg, other) for field in fields(config)} - free
    for name in sorted(names):
        found = getattr(other, name, None)
        own = getattr(cfg, name, None)
        if found != own:
            raise UserError(f'{where}: has {name}={found}, this network {own}: its blocks do not fit')
    return other, {name: t.clone() for name, t in weights.items()}  # not mapped from a file that may be cut
