"""
Does a chat model of Hugging Face answer here as in transformers, token for token? Greedy, in float32, 20
prompts in the model's own chat template; the prompt's ids and the answer, up to the token that ends it.

    pip install transformers
    python experiments/chat_exact.py --init_from=hf:FOLDER
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass

import torch
import transformers

import sample
from configurator import FilePath, configure, run_main

QUESTIONS = (
    'What is the capital of France?', 'Name three primary colours.', 'Write one sentence about the sea.',
    'How many legs does a spider have?', 'Translate "good morning" into Spanish.', 'What is 12 times 12?',
    'Who wrote Romeo and Juliet?', 'Give me a title for a story about a lost dog.', 'What is photosynthesis?',
    'List the days of the week.', 'Why is the sky blue?', 'Write a haiku about autumn.',
    'What does HTTP stand for?', 'Suggest a healthy breakfast.', 'What is the opposite of "ancient"?',
    'Write a Python function that adds two numbers.', 'Which planet is the largest?',
    'Explain gravity to a child.', 'What is the plural of "mouse"?', 'Say hello in five languages.',
)


@dataclass
class Settings:
    init_from: FilePath = 'hf:'  # hf:FOLDER, a chat model
    max_new_tokens: int = 60  # of each answer


def main():
    s = configure(Settings)
    model, tokenizer = sample.load(s.init_from)
    folder = s.init_from.removeprefix('hf:')
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal_prompts = equal_answers = tokens = ended = 0
    for question in QUESTIONS:
        messages = [{'role': 'user', 'content': question}]
        text = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        wanted_prompt = their_tokenizer(text, add_special_tokens=False).input_ids
        prompt = tokenizer.encode_special(text)
        ids = torch.tensor([wanted_prompt])
        wanted = theirs.generate(ids, max_new_tokens=s.max_new_tokens, do_sample=False)
        wanted = wanted[0, len(wanted_prompt):].tolist()
        found = []
        for drawn in sample.generate(model, [prompt], s.max_new_tokens, temperature=0,
                                     eot=tokenizer.prompt_format.ends, vocab_size=tokenizer.vocab_size):
            found.append(int(drawn))
        if found[-1] < 0:  # it ended: transformers shows the token that ended it
            found[-1] = wanted[len(found) - 1] if len(wanted) == len(found) else -1
            ended += 1
        equal_prompts += prompt == wanted_prompt
        equal_answers += found == wanted
        tokens += len(wanted)
    print(f'{len(QUESTIONS)} prompts: ids equal {equal_prompts}, answers equal {equal_answers} '
          f'({tokens} tokens, {ended} answers ended by themselves)')


if __name__ == '__main__':
    run_main(main)
