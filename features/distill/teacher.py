"""
Distillation (Hinton et al. 2015, arXiv 1503.02531): train on the output distribution of a teacher model.

    loss = model(idx, targets, teacher=ask(teacher, idx, s))

The loss is (1 - mix)·cross-entropy + mix·KL(teacher ‖ student), with mix = distill_mix. The teacher's
logits are computed in chunks, like the student's.
"""
from dataclasses import dataclass

import torch

from configurator import UserError
from features.networks import is_foreign, load_model
from features.others import same_place
from model import cap


@dataclass
class Teacher:
    """The teacher's output for a batch of N tokens."""
    h: torch.Tensor  # (N, C') and
    weight: torch.Tensor  # (V padded, C'): their product is its logits, as in head_input()
    softcap: float
    mix: float

    def logits(self, first, rows, dtype):
        """Logits (rows, V padded) of `rows` tokens, starting at token number `first`; matmuls in dtype."""
        return self.h[first:first + rows].to(dtype) @ self.weight.to(dtype).T

    def divergence(self, student, teacher):
        """For logits (rows, V): KL(teacher ‖ student) (rows, 1) and its gradient (rows, V)."""
        student = student.log_softmax(1)
        teacher = cap(teacher.float(), self.softcap).log_softmax(1)
        kl = (teacher.exp() * (teacher - student)).sum(1, keepdim=True)
        return kl, student.exp() - teacher.exp()


@torch.no_grad()
def ask(teacher, x, s, **more):
    """The output of the model `teacher` for tokens x (B, T). s: Settings; more: see loss.reading()."""
    h, weight = teacher.head_input(teacher.hidden(x, **more))
    return Teacher(h.flatten(0, 1), weight, teacher.cfg.softcap, s.distill_mix)


def find_teacher(s, data, ranks):
    """
    The model of s.teacher in eval mode. Raises UserError if its tokenizer differs or its context is shorter.
    """
    if same_place(s.teacher, s.out_dir):
        raise UserError(f'teacher={s.teacher}: is the out_dir of this run: name another')
    if is_foreign(s.teacher):
        from features.hf import reading
        ranks.from_first(lambda: reading.find(s.teacher))  # one rank downloads
    teacher, folder = load_model(s.teacher)
    cfg = teacher.cfg
    files = data.sources[0].files
    if cfg.arch == 'markov':
        raise UserError(f'teacher={s.teacher}: a Markov chain, takes a transformer')
    if cfg.vocab_size != s.vocab_size:
        to_do = 'with that tokenizer'
        from features.text.folders import how_to_prepare_for  # text
        to_do = how_to_prepare_for(s.teacher, folder, files)  # text
        raise UserError(f'teacher={s.teacher}: its {cfg.vocab_size:,} tokens are not the {s.vocab_size:,} of '
                        f'this run: prepare the data {to_do}')
    from features.text.folders import check_tokenizer  # text
    ranks.from_first(lambda: check_tokenizer(f'teacher={s.teacher}', s.teacher, folder, files))  # text
    if cfg.block_size < s.block_size:
        raise UserError(f'teacher={s.teacher}: knows {cfg.block_size} positions, '
                        f'fewer than block_size={s.block_size}: lower it')
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        tensor.data = tensor.data.clone()  # not mapped from a file: if that is truncated, the system ends us
    return teacher.requires_grad_(False)
