"""
Shard weights, gradients and moments across processes (FSDP2: Zhao et al. 2023, arXiv 2304.11277; Rajbhandari
et al. 2020, arXiv 1910.02054), so that a model may be as large as the memory of all devices together. The
weights of a block are gathered for its forward and backward pass, then freed.

Checkpoints have the usual format: rank 0 gathers and writes them. So any number of processes can load them,
sharded or not, and so can sample.py and the other scripts. With torch.distributed.checkpoint every process
could write its shard, but its files are pickles and do not detect damage. The price: rank 0 needs CPU memory
for the model and its moments, 12 bytes per parameter, when it writes, and at the start, when it builds or
loads them (for a moment with two copies of the moments) and sends each rank its shard, tensor by tensor. The
other ranks start with shapes only (the meta device), except for weights of init_from, which they read and
free again. With several micro-batches, gradients are communicated after each one; otherwise every rank would
hold all of them.
"""
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from configurator import UserError
from features.moments import give_moments, moments_of


def shard_model(model, size, dtype, ranks):
    """
    Shard a Transformer on the meta device across groups of `size` ranks; give_numbers() then fills it. All
    groups hold the same (HSDP). Norms, biases and routers are not sharded and stay float32: returns these
    parameters, whose gradients share_gradients() must average.
    """
    # here, as they take a second to import, which a run on one device need not wait for
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    shape, names = (((ranks.world,), ('shard',)) if size == ranks.world
                    else ((ranks.world // size, size), ('replicate', 'shard')))
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    small = {p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith('router')}
    # bfloat16 halves what is sent; autocast would round the same weights to it. Embedding and head stay in
    # float32, and with them the residual stream
    policy = MixedPrecisionPolicy(torch.bfloat16 if dtype == 'bfloat16' else None, torch.float32,
                                  cast_forward_inputs=False)
    for block in (*model.blocks, *getattr(model, 'encoder', ())):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=small)
    fully_shard(model, mesh=mesh, ignored_params=small)
    for name in ('hidden', 'encode', 'logits'):  # what sampling calls
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    ranks.lockstep = True
    model.to_empty(device=ranks.device)
    return [p for p in model.parameters() if not is_divided(p)]


@torch.no_grad()
def give_numbers(model, tensors, ranks):
    """Fill a sharded Transformer with {name: tensor} of rank 0, including its buffers."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        t.copy_(give_out(tensors[name], t, ranks))


def give_out(t, like, ranks):
    """
    This rank's shard of the tensor t of rank 0; the other ranks know only its shape. It is sharded like
    `like` if the shapes are equal.
    """
    ranks.alive('to hand out the network')
    device = like.device if t.ndim else 'cpu'  # counts of an optimizer's steps
    t = t.to(device).contiguous() if ranks.first else torch.empty(t.shape, dtype=t.dtype, device=device)
    if is_divided(like) and t.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t, like.device_mesh, like.placements)
    dist.broadcast(t, 0)
    return t


def share_gradients(parameters, ranks):
    """Average the gradients of parameters that are not sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        mean = ranks.add_up(torch.cat([g.flatten() for g in grads])) / ranks.world
        for g, part in zip(grads, mean.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def is_divided(t):
    """Whether a tensor is a DTensor, of which each rank holds a shard."""
    return hasattr(t, 'full_tensor')


def whole(t):
    """The full tensor of a shard; all ranks must call it together."""
    return t.full_tensor() if is_divided(t) else t


def own_parts(tensors, parameters):
    """This rank's shards, as plain tensors: of full tensors sharded like the parameters, and of these."""
    from torch.distributed.tensor import distribute_tensor
    own = [distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
           for t, p in zip(tensors, parameters)]
    return [t.to_local() for t in own], [p.to_local() for p in parameters]


def clip_divided(params, most):
    """Clip the gradient norm of parameters, some of them sharded, to `most`. Returns the norm before."""
    divided = [p for p in params if is_divided(p.grad)]
    others = [p for p in params if not is_divided(p.grad)]
    norms = []
    for some in (divided, others):
        if some:
            norms.append(whole(torch.nn.utils.get_total_norm([p.grad for p in some])))
    norm = torch.stack(norms).norm()
    dist.broadcast(norm, 0)  # groups of ranks that hold the same may have added in another order
    for some in (divided, others):
        torch.nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm


def gather(tree, ranks):
    """
    Nested dicts and lists with full tensors, gathered one by one in the CPU memory of rank 0; empty ones on
    the other ranks.
    """
    def put_together(t):
        full = whole(t)
        return full.cpu() if ranks.first else full.new_empty(0)
    return tree_map_only(torch.Tensor, put_together, tree)


def group_size(shard, world):
    """The number of ranks that share one copy; all ranks for shard=True. Raises UserError."""
    size = world if shard is True else int(shard)
    if world == 1 or size < 2 or world % size:
        raise UserError(f'shard={shard}: divides the network among that many of {world} processes: '
                        'start more with torchrun, or give a divisor of at least 2')
    return size


def build_divided(build_model, s, data, start, ranks):
    """Like build_model(): the model on the CPU of rank 0, and only its shapes on the other ranks."""
    built = []
    ranks.from_first(lambda: built.append(build_model(s, data, start)))
    return built[0] if ranks.first else build_model(s, data, start, is_blank=True)


def divide(run, build_model, s, start, ranks):
    """Shard the model and the optimizer of a Run, which rank 0 has built, across all ranks."""
    from optim import make_optimizer  # optim.py imports this file
    tensors = dict([*run.model.named_parameters(), *run.model.named_buffers()])
    moments = moments_of(run.optimizer)
    recompute = run.model.recompute
    if ranks.first:
        run.model = build_model(s, run.data, start, is_blank=True)
        run.model.recompute = recompute

    def shapes_of_moments():
        return {name: {what: torch.empty_like(t, device='meta') for what, t in own.items()}
                for name, own in moments.items()}
    shapes = ranks.from_first(shapes_of_moments)
    run.undivided = shard_model(run.model, group_size(s.shard, ranks.world), s.dtype, ranks)
    give_numbers(run.model, tensors, ranks)
    run.optimizer = make_optimizer(run.model, s, run.optimizer.dtype)

    def give_part(t, parameter):
        return give_out(t, parameter, ranks)
    give_moments(run.optimizer, moments if ranks.first else shapes, give_part)
