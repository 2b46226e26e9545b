"""
The loads of experts during training: count them, balance them (expert_bias), and report them.
"""


def count_loads(run, ranks):
    """
    Add the tokens per expert in the last step, of all ranks, to those of the interval, and update
    expert_bias.
    """
    loads = run.model.take_loads()  # (layers, E) int64
    if ranks.world > 1:
        ranks.add_up(loads)
    is_frozen = run.base is not None  # beside adapters
    if not is_frozen and not run.in_a_row:  # a skipped step changes nothing
        run.model.balance(loads)
    run.interval.loads = loads if run.interval.loads is None else run.interval.loads + loads


def shares_of(loads):
    """(each expert's share of its layer's tokens as nested lists, the same as text) of loads (layers, E)."""
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1)
    rounded = [[round(share, 4) for share in layer] for layer in shares.tolist()]
    return rounded, f'experts {shares.min():.0%} to {shares.max():.0%}'
