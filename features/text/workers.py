"""
Tasks → tokens, in several processes.
"""
import heapq
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np

from configurator import STOP_SIGNALS
from features.text.figures import LONGEST, count_literals, longest_of
from features.text.pairs import encode_pairs, has_pairs, target_bytes
from features.text.reader import documents
from features.text.splits import divide
from prepare import encode
from tokenizer import load_tokenizer

OURS = {*STOP_SIGNALS} - {signal.SIGTERM}  # for the parent; SIGTERM is how a broken pool ends its workers
WORKER = {}  # settings and tokenizer of this process: too large to send with every task


def tokenize(task):
    """
    (tokens, notes) of a task. tokens: {side: (ids as they are stored, document starts among them, bytes of
    text)}; notes: for figures.Figures.add().
    """
    s, tokenizer = WORKER['s'], WORKER['tokenizer']
    found = documents(task, s)
    texts, places, empty = {'train': [], 'val': []}, {'train': [], 'val': []}, 0
    for where, text in found:
        if not task.side and (not text or text.isspace()):
            empty += 1
            continue
        for side, part in [(task.side, text)] if task.side else divide(text, s):
            texts[side].append(part)
            places[side].append(where)
    tokens, unknown, longest = {}, 0, []
    for side, parts in texts.items():
        ids, lengths, size = encode_texts(parts, s, tokenizer)
        starts = np.cumsum(lengths) - lengths
        if not task.starts:
            starts = starts[:0]
        if len(lengths) and not task.ends:  # the end-of-text token comes with the last part
            ids, lengths = ids[:-1], lengths - 1
        unknown += int(np.count_nonzero(ids == tokenizer.unk))
        longest += longest_of(lengths, places[side])
        tokens[side] = ids, starts, size
    notes = {'empty': empty, 'unknown': unknown, 'longest': heapq.nlargest(LONGEST, longest),
             'literal': count_literals([text for _, text in found], tokenizer)}
    return tokens, notes


def encode_texts(texts, s, tokenizer):
    """
    (ids, with an end-of-text token after each text; number of ids per text; bytes of text, for pairs those of
    the targets).
    """
    if has_pairs(s):
        return *encode_pairs(texts, tokenizer, s), target_bytes(texts)
    return *encode(texts, tokenizer, s), sum(len(text.encode()) for text in texts)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def set_up(s, description, folder):
    WORKER.update(s=s, tokenizer=load_tokenizer(description, folder))


def start_worker(*arguments):
    parent = multiprocessing.parent_process()
    threading.Thread(target=leave_with, args=[parent], daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one thread in each process
    set_up(*arguments)


def leave_with(parent):
    """End this process when its parent ends, because a killed parent cannot stop its workers."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def inherited_by_workers():
    """
    Processes that start inside leave signals that stop a run to this process. Workers get sys.path of this
    process; before that, PYTHONPATH may lead them into the working folder.
    """
    paths = os.environ.pop('PYTHONPATH', None)
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
        if paths is not None:
            os.environ['PYTHONPATH'] = paths


def in_order(tasks, num_proc, arguments):
    """
    Yield (task, tokenize(task)) in the order of the tasks, computed by processes that are initialized with
    `arguments`. Only a few tasks are in memory at a time.
    """
    if num_proc == 1:
        set_up(*arguments)
        for task in tasks:
            yield task, tokenize(task)
        return
    waiting = deque()
    with inherited_by_workers():
        # spawned, not forked: that is safe beside threads, and the same on macOS
        pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), start_worker, arguments)
    try:
        for task in tasks:
            with inherited_by_workers():
                waiting.append((task, pool.submit(tokenize, task)))
            if len(waiting) > 3 * num_proc:
                task, future = waiting.popleft()
                yield task, future.result()
        for task, future in waiting:
            yield task, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
