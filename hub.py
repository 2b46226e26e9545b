"""
Export to Hugging Face folders: GPT-2, GPTBigCode (StarCoder), Llama (TinyLlama, SmolLM, OpenLLaMA), T5, or
minnow's own class.

    python hub.py export --out_dir=out/run --to=FOLDER                # for transformers, vLLM, llama.cpp
    python hub.py export --out_dir=out/run --to=FOLDER --as=custom    # any decoder, with its code
    python hub.py export --out_dir=out/lora --to=FOLDER               # an adapter, for PEFT

All scripts load these folders, and also Mistral's, as hf:FOLDER: --init_from=hf:FOLDER.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass
from typing import Literal

from configurator import FilePath, run_main
from features.commands import configure_command
from features.hf import export


@dataclass
class ExportSettings:
    out_dir: FilePath = ''  # a run (its best checkpoint) or a checkpoint; '' = the last run under out/
    to: FilePath = ''  # folder to write; it must not exist yet
    as_: Literal['stock', 'custom'] = 'stock'  # stock: a class of transformers; custom: minnow's own class
    # for any decoder; its code is copied into the folder
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # dtype of the exported weights

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.to:
            raise ValueError('to: is not given: python hub.py export --out_dir=out/run --to=FOLDER')


COMMANDS = {'export': (export.run, ExportSettings)}


def main():
    command, s = configure_command(COMMANDS)
    command(s)


if __name__ == '__main__':
    run_main(main)
