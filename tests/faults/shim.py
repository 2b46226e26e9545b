"""
A disk and a clock that fail while a process runs: shim.c, compiled when it is first used, and its controls.

    shim = Shim(folder)                      # before the first process is started: LD_PRELOAD is inherited
    shim.fail('write', errno.EIO, 'optimizer.pt', skip=2)
    shim.hits()                              # 1 once a call has failed
    shim.pass_all()
    shim.shift(-3600)                        # their wall clock is an hour behind
"""
import mmap
import os
import struct
import subprocess
from pathlib import Path

FORMAT = struct.Struct('=qiiiiii216s')  # as struct control in shim.c
CALLS = {'open': 1, 'read': 2, 'write': 4, 'fsync': 8, 'rename': 16}


class Shim:
    """The shim of all processes that are started after this. Raises OSError without a C compiler."""

    def __init__(self, folder):
        library, control = Path(folder, 'shim.so'), Path(folder, 'shim.control')
        source = Path(__file__).with_name('shim.c')
        subprocess.run(['gcc', '-O2', '-shared', '-fPIC', '-w', '-o', library, source, '-ldl', '-pthread'],
                       check=True)
        control.write_bytes(bytes(FORMAT.size))
        os.environ |= {'LD_PRELOAD': str(library), 'SHIM': str(control)}
        with open(control, 'r+b') as f:
            self.map = mmap.mmap(f.fileno(), FORMAT.size)

    def put(self, shift, *rule):
        calls, *more = rule
        self.map[8:12] = bytes(4)  # off, while the rest changes
        self.map[12:] = FORMAT.pack(0, 0, *more)[12:]
        self.map[:8] = struct.pack('=q', shift)
        self.map[8:12] = struct.pack('=i', calls)

    def now(self):
        return FORMAT.unpack(self.map[:])

    def fail(self, call, error, path, skip=0, times=1, pid=0):
        """
        Let `times` such calls fail, after `skip` others, on files with `path` in their paths. error: errno;
        0 = a read or write does half of its work. pid: of this process alone; 0 = of all.
        """
        self.put(self.now()[0], CALLS[call], error, pid, skip, times, 0, os.fsencode(path))

    def pass_all(self):
        """No call fails any more. Returns how many have failed."""
        hits = self.hits()
        self.put(self.now()[0], 0, 0, 0, 0, 0, 0, b'')
        return hits

    def hits(self):
        return self.now()[6]

    def shift(self, seconds):
        """Set the wall clock of the processes to so many seconds after the true one."""
        self.map[:8] = struct.pack('=q', seconds)
