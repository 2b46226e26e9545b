"""
A teacher: another network whose distribution a run learns from too (Hinton et al. 2015, arXiv 1503.02531).
"""
import torch

import checkpoint
from configurator import UserError
from model import Teacher
from run import same_place


@torch.no_grad()
def ask(teacher, x, s, **inputs):
    """What the network `teacher` predicts after each of the tokens x (B, T), for the chunked loss of model.py."""
    h, weight = teacher.head_input(teacher.hidden(x, **inputs))
    return Teacher(h.flatten(0, 1), weight, teacher.cfg.softcap, s.distill_temperature, s.distill_mix)


def find_teacher(s, data, ranks):
    """The network of s.teacher in eval mode. Raises UserError unless it knows the same tokens and a context as long."""
    if same_place(s.teacher, s.out_dir):
        raise UserError(f'teacher={s.teacher}: is the out_dir of this run: name another')
    if checkpoint.is_foreign(s.teacher):
        from features.hf import reading
        ranks.from_first(lambda: reading.find(s.teacher))  # one rank downloads
    teacher, folder = checkpoint.load_model(s.teacher)
    cfg = teacher.cfg
    files = data.sources[0].files
    if cfg.arch == 'markov':
        raise UserError(f'teacher={s.teacher}: a Markov chain, takes a transformer')
    if cfg.vocab_size != s.vocab_size:
        raise UserError(f'teacher={s.teacher}: its {cfg.vocab_size:,} tokens are not the {s.vocab_size:,} of this run: '
                        f'prepare the data {checkpoint.how_to_prepare(s.teacher, folder, files)}')
    ranks.from_first(lambda: checkpoint.check_tokenizer(f'teacher={s.teacher}', s.teacher, folder, files))
    if cfg.block_size < s.block_size:
        raise UserError(f'teacher={s.teacher}: knows {cfg.block_size} positions, fewer than block_size={s.block_size}: '
                        'lower it')
    return teacher.requires_grad_(False)
