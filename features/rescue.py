"""
A run that meets an error outside of its steps, as data that cannot be read, is saved before it ends.
"""
import os
from contextlib import suppress
from functools import partial

from configurator import UserError
from features.run_folders import Moved, follow
from features.sizes import is_out_of_memory
from run import OneProcess


class Trouble(UserError):
    """An error of one rank that has stopped all of them at the same place, with the same weights."""


def raise_together(error, ranks):
    """Raise Trouble on all ranks, with the error of the first that has one; None = this one has none."""
    for rank, text in enumerate(ranks.gather(error and text_of(error))):
        if text:
            is_named = rank in (0, ranks.rank)  # refuse() says which rank this is
            raise Trouble(text if is_named else f'rank {rank}: {text}')


def text_of(error):
    if not isinstance(error, OSError):
        return str(error)
    where = f'{error.filename}: ' if error.filename else ''
    return f'{where}{error.strerror or error}: check the disk, then run the same command'


def rescue(error, s, run, ranks, save):
    """
    Save the steps since the newest checkpoint, if the error leaves everything as it was after the last one.
    After Trouble, and if out_dir was renamed, all ranks save together. After another error of the system or
    of torch, such as a connection that another rank has closed, rank 0 saves alone: it can, unless the
    network is sharded. The next loss in the log is then the mean of the steps after this checkpoint.
    """
    is_alone = not isinstance(error, (Trouble, Moved))  # rank 0 tells the others that the folder was moved
    moved = run.trouble if isinstance(run.trouble, Moved) else error
    if not is_alone and run.is_whole:
        ranks.from_first(partial(settle, moved, s, run))
        run.saved = ranks.from_first(lambda: run.saved)
    if run.saved == run.step:
        write_again(run)
    if not run.is_whole or not run.step or run.saved == run.step:
        return
    if is_alone and not (isinstance(error, (OSError, RuntimeError, MemoryError)) and ranks.first):
        return
    if is_alone and ranks.lockstep:
        return
    if is_alone and ranks.world > 1:  # scale
        from features.scale.ranks import Watch  # scale
        ranks.beat(Watch.BUSY)  # scale: it may take long
        run.interval.reset()  # scale: the other ranks' part of the next loss in the log is gone
    try:
        save(s, run.step, run, OneProcess(ranks.device) if is_alone else ranks)
        if s.async_save and ranks.first:  # scale
            from features.scale import background  # scale
            background.wait()  # scale
    except (UserError, OSError, RuntimeError, MemoryError) as problem:
        ranks.say(f'the steps after the newest checkpoint are lost ({problem})')
    else:
        write_again(run)
        if run.saved == run.step:
            ranks.say(f'saved after step {run.step}, because of an error')


def write_again(run):
    """Write the records that the log lacks: the step that they are of is saved, and not made again."""
    with suppress(UserError):
        for write in getattr(run.trouble, 'records', ()):
            write()


def settle(error, s, run):
    """On rank 0: find out whether the step that was saved last is on disk, and follow a folder that moved."""
    if isinstance(error, Moved):
        follow(error, s)
        run.log.out_dir, run.log.path = s.out_dir, os.path.join(s.out_dir, 'log.jsonl')
        run.saved = None  # it may have been about to save
    elif s.async_save:  # scale
        from features.scale import background  # scale
        try:  # scale
            background.wait()  # scale
        except (UserError, OSError):  # scale
            run.saved = None  # scale


def check_memory(error, s):
    """Raise UserError for an error of torch or Python which says that memory is used up."""
    if is_out_of_memory(error):
        raise UserError('out of memory: '
                        f'lower batch_size={s.batch_size} (and raise gradient_accumulation_steps='
                        f'{s.gradient_accumulation_steps} as much to keep the step), '
                        f'block_size={s.block_size}, n_embd={s.n_embd} or n_layer={s.n_layer}') from None
