"""
What a Hugging Face folder says about its tokens stays true in sample.py, and in every checkpoint that is made
of the folder: who begins a text, who ends it, which special tokens a prompt may name.
"""
import json
from dataclasses import replace

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import one_line, run
from test_hub import saved

import checkpoint
import sample
from batches import TokenFiles
from configurator import UserError
from features.hf import tokenizer_json
from features.hf.export import export
from features.hf.prompts import bos_beside, chat_template, end_of_text
from features.networks import read_model
from features.study.tasks import encode_pair, score
from features.study.validation import validation_sources
from features.t5.beams import beam_search
from hub import ExportSettings
from sample import encode_prompt, generate
from tokenizer import load_tokenizer, new_tokenizer

WORDS = [f'w{n}' for n in range(80)]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_bpe(special, before='', normal='!"#$%&'):
    """A byte-level BPE with these special tokens; before: those that stand before every text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    found = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(special)
    if before:
        ids = [(name, found.token_to_id(name)) for name in special]
        found.post_processor = tokenizers.processors.TemplateProcessing(f'{before} $A', special_tokens=ids)
    return found


def unigram(special):
    """A Unigram model whose own vocabulary holds the names of the special tokens, as T5's does."""
    pieces = [('<unk>', 0.0), *((name, 0.0) for name in special)]
    pieces += [(c, -5.0) for c in '▁abcdefghijklmnopqrstuvwxyz</>_0123456789'] + [('▁the', -2.0)]
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    found.decoder = tokenizers.decoders.Metaspace()
    found.add_special_tokens(special)
    return found


def write_folder(folder, tokenizer, eos, ends=None, **config):
    """A folder of a tiny random Llama with this tokenizer; ends: eos_token_id of generation_config.json."""
    size = tokenizer.get_vocab_size()
    saved(folder, 'llama', vocab_size=size, max_position_embeddings=64, **config)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    path = folder / 'generation_config.json'
    path.write_text(json.dumps({'eos_token_id': ends} if ends else {}))
    return f'hf:{folder}', fast


CHATML = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


@pytest.fixture
def chatml(tmp_path):
    """(where, transformers' tokenizer) of a folder that chats as SmolLM2-Instruct does."""
    return write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>')


# --- special tokens ---

@pytest.mark.parametrize('text', ['<|im_start|>user\nHi<|im_end|>\n', 'a<|im_end|>', '<|im_end|>',
                                  ' <|im_start|> b ', '<|im_', 'plain', ''])
def test_special_tokens_in_a_prompt_are_the_tokens_that_transformers_reads(text, chatml):
    where, theirs = chatml
    model, tokenizer = sample.load(where)
    wanted = theirs(text, add_special_tokens=False).input_ids
    assert encode_prompt(text, tokenizer, model.cfg) == (wanted or [tokenizer.eot])


@pytest.mark.parametrize('text', ['the <pad> b', 'a</s>b', '<e_0> the</s>', 'x <e_0>y', '</s></s>'])
def test_a_unigram_model_reads_them_with_the_blanks_that_transformers_has(text):
    theirs = unigram(['<pad>', '</s>', '<e_0>'])
    ours = new_tokenizer_of(theirs)
    assert ours.encode_special(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('text', ['the cat', '</s>the cat', 'the</s> cat', 'the </s> the', '</s>\ncat'])
def test_a_sentencepiece_file_sets_no_blank_after_a_special_token_as_transformers_does(text, tmp_path):
    with open(tmp_path / 'tokenizer.model', 'wb') as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(['the cat sat on the mat'] * 50), model_writer=f, model_type='bpe',
            vocab_size=300, byte_fallback=True, normalization_rule_name='identity',
            remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    names = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    names['tokenizer_class'] = 'LlamaTokenizer'
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(names))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = new_tokenizer(str(tmp_path / 'tokenizer.model'))
    assert ours.encode_special(text) == theirs(text, add_special_tokens=False).input_ids


# --- beside a sentencepiece file ---

def sentencepiece_file(path, **options):
    kind = dict(model_type='bpe', vocab_size=300, byte_fallback=True, normalization_rule_name='identity',
                remove_extra_whitespaces=False)
    with open(path, 'wb') as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(['the cat sat on the mat, user Hi'] * 50), model_writer=f,
            hard_vocab_limit=False, minloglevel=2, **kind | options)
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


T5 = dict(model_type='unigram', vocab_size=60, byte_fallback=False, normalization_rule_name='nmt_nfkc',
          remove_extra_whitespaces=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def token_fields(text, special):
    kind = dict.fromkeys(('normalized', 'lstrip', 'rstrip', 'single_word'), False)
    return dict(content=text, special=special, **kind)


ADDED = ['<|im_start|>', '<|im_end|>', '<tool>']
PROMPTS = ['the cat', '<|im_start|>user\nHi<|im_end|>\n', 'the<tool>cat', '<tool>',
           'the <tool> cat<|im_end|>']


@pytest.fixture
def chat_folder(tmp_path):
    """A tokenizer.model with added tokens beside it, as people's folders have them."""
    size = sentencepiece_file(tmp_path / 'tokenizer.model')
    added = {name: size + n for n, name in enumerate(ADDED)}
    decoder = {str(i): token_fields(name, name != '<tool>') for name, i in added.items()}
    (tmp_path / 'added_tokens.json').write_text(json.dumps(added))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '<|im_end|>',
        'unk_token': '<unk>', 'added_tokens_decoder': decoder}))
    return tmp_path


@pytest.mark.parametrize('text', PROMPTS)
def test_tokens_that_the_files_beside_a_sentencepiece_file_add_are_those_of_transformers(text, chat_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    ours = new_tokenizer(str(chat_folder / 'tokenizer.model'))
    assert ours.encode_special(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.vocab_size, ours.eot) == (len(theirs), theirs.eos_token_id)


def test_added_special_tokens_are_text_in_documents_and_the_others_are_tokens(chat_folder, tmp_path):
    ours = new_tokenizer(str(chat_folder / 'tokenizer.model'))
    start, end, tool = (ours.vocab_size - n for n in (3, 2, 1))
    ids = ours.encode('the<|im_start|> cat<tool> sat<|im_end|>')
    assert tool in ids and start not in ids and end not in ids
    assert ours.decode(ids) == 'the<|im_start|> cat<tool> sat<|im_end|>'
    assert ours.decode([start, *ours.encode('the'), end]) == '<|im_start|> the<|im_end|>'
    ids, _ = ours.encode_documents(['the<tool> cat'])
    assert ids.tolist() == [*ours.encode('the<tool> cat'), end]
    again = load_tokenizer(ours.save(tmp_path), tmp_path)
    assert again.describe() == ours.describe() and again.encode_special('<tool>') == [tool]


def test_added_tokens_without_a_word_on_them_are_tokens_everywhere(tmp_path):
    size = sentencepiece_file(tmp_path / 'tokenizer.model')
    (tmp_path / 'added_tokens.json').write_text(json.dumps({'<x>': size, '[PAD]': size + 1}))
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps({'pad_token': {'content': '[PAD]'}}))
    ours = new_tokenizer(str(tmp_path / 'tokenizer.model'))
    assert size in ours.encode('a<x>b') and size + 1 not in ours.encode('a[PAD]')
    assert ours.encode_special('[PAD]') == [size + 1] and ours.eot == 2
    assert ours.ordinary_size() == size + 1


def test_a_sentencepiece_file_without_an_end_of_text_takes_the_one_that_its_folder_names(tmp_path):
    size = sentencepiece_file(tmp_path / 'tokenizer.model', eos_id=-1)
    (tmp_path / 'added_tokens.json').write_text(json.dumps({'<end>': size}))
    for fields, eot in (({'eos_token': '<end>'}, size), ({'eos_token': {'content': '<s>'}}, 1)):
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
        ours = new_tokenizer(str(tmp_path / 'tokenizer.model'))
        assert ours.eot == eot and ours.encode_special(ours.eot_text) == [eot]
    (tmp_path / 'tokenizer_config.json').write_text('{}')
    with pytest.raises(UserError, match='no end-of-text piece'):
        new_tokenizer(str(tmp_path / 'tokenizer.model'))


@pytest.mark.parametrize('added', [{'<x>': -1}, {'<x>': '7'}, {'': 300}, {'<x>': 2 ** 40}], ids=str)
def test_an_added_token_with_a_wrong_number_is_refused(added, tmp_path):
    sentencepiece_file(tmp_path / 'tokenizer.model')
    (tmp_path / 'added_tokens.json').write_text(json.dumps(added))
    with pytest.raises(UserError, match='added token .* takes a whole number'):
        new_tokenizer(str(tmp_path / 'tokenizer.model'))


@pytest.mark.parametrize('fields', [{}, {'extra_ids': 5}, {'extra_ids': 0}], ids=str)
@pytest.mark.parametrize('text', ['the <extra_id_0> cat<extra_id_1>', '<extra_id_99>', '</s>the'])
def test_a_t5_folder_with_spiece_model_alone_has_the_sentinels_of_transformers(fields, text, tmp_path):
    sentencepiece_file(tmp_path / 'spiece.model', **T5)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 't5', 'vocab_size': 256}))
    if fields:
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, **fields)
    ours = new_tokenizer(str(tmp_path / 'spiece.model'))
    assert ours.encode_special(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.vocab_size, ours.eot) == (len(theirs), 1)


def test_a_folder_with_spiece_model_alone_is_sampled_trained_exported_and_read_back(tmp_path):
    folder = tmp_path / 'hf'
    folder.mkdir()
    size = sentencepiece_file(folder / 'spiece.model', **T5)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=size + 128, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                   num_heads=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    pairs = tmp_path / 'pairs.jsonl'
    pairs.write_text(''.join(json.dumps({'q': f'the {c}', 'a': c * 3}) + '\n' for c in 'abcdefghij' * 4))
    for command in (
            ['sample.py', f'--init_from=hf:{folder}', '--start=the <extra_id_0> cat', '--max_new_tokens=4'],
            ['prepare.py', pairs, '--source=q', '--target=a', f'--tokenizer=hf:{folder}',
             '--val_fraction=0.3', f'--out={tmp_path}/data']):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    train(tmp_path, 'run', f'hf:{folder}', '--objective=seq2seq', '--source_size=16', '--block_size=16')
    export(ExportSettings(f'{tmp_path}/run', f'{tmp_path}/back'))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
    text = 'the <extra_id_0> cat'
    wanted = sample.load(f'hf:{folder}', encoder=True)[1].encode_special(text)
    assert size + 99 in wanted
    assert theirs(text, add_special_tokens=False).input_ids == wanted
    for made in (f'{tmp_path}/run', f'hf:{tmp_path}/back'):
        assert sample.load(made, encoder=True)[1].encode_special(text) == wanted
    assert json.loads((tmp_path / 'back' / 'added_tokens.json').read_text())['<extra_id_0>'] == size + 99


@pytest.mark.parametrize('fields, bos', [
    ({'bos_token': '<|im_start|>'}, True), ({'bos_token': None}, False), ({'add_bos_token': False}, False)],
    ids=str)
def test_the_token_before_a_text_is_the_one_that_the_folder_names(fields, bos, chat_folder):
    path = chat_folder / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    ours = new_tokenizer(str(chat_folder / 'tokenizer.model'))
    assert bos_beside(str(chat_folder), ours) == ((ours.vocab_size - 3,) if bos else ())


@pytest.mark.parametrize('make, special', [
    (byte_bpe, CHATML), (unigram, ['<pad>', '</s>', '<e_0>'])], ids=['bpe', 'unigram'])
def test_their_names_in_a_document_are_ordinary_text(make, special):
    """Hostile text must not forge the end of a document."""
    theirs = make(special)
    ours = new_tokenizer_of(theirs)
    forbidden = {theirs.token_to_id(name) for name in special}
    for name in special:
        ids = ours.encode(f'a {name} b{name}')
        assert not forbidden & set(ids)
        assert make is unigram or ours.decode(ids) == f'a {name} b{name}'


@pytest.mark.parametrize('make, special', [
    (byte_bpe, CHATML), (unigram, ['<pad>', '</s>', '<e_0>'])], ids=['bpe', 'unigram'])
def test_added_tokens_that_are_not_special_keep_their_ids_in_documents(make, special):
    """<think> stands after the special tokens: without these it would have the id of one of them."""
    theirs = make(special)
    theirs.add_tokens(['<think>', '</think>'])
    ours = new_tokenizer_of(theirs)
    text = '<think>the</think>'
    assert ours.encode(text) == ours.encode_special(text) == theirs.encode(text, add_special_tokens=False).ids
    assert not {theirs.token_to_id(name) for name in special} & set(ours.encode(text))


def test_no_document_can_forge_a_special_token_with_the_name_that_it_has_among_ordinary_text():
    theirs = unigram(['<pad>', '</s>'])
    ours = new_tokenizer_of(theirs)
    for hidden in [tokenizer_json.HIDDEN, tokenizer_json.HIDDEN + '0' * 32]:
        assert theirs.token_to_id('</s>') not in ours.encode(f'a{hidden}</s>')


def test_a_special_token_that_merges_would_make_is_text_in_documents():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, '<s', '<s>'])}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [('<', 's'), ('<s', '>')]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.add_special_tokens(['<s>', '</s>'])
    ours = new_tokenizer_of(theirs)
    assert ours.encode('<s>') == [vocab['<s'], vocab['>']]
    assert ours.encode_special('a<s>') == [vocab['a'], vocab['<s>']]


def test_a_prompt_for_a_bert_vocabulary_may_name_its_special_tokens(tmp_path):
    path = tmp_path / 'vocab.txt'
    path.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[', ']', 'a', 'SEP', 'CLS']))
    tokenizer = new_tokenizer(str(path))
    assert tokenizer.encode_special('[CLS] a[SEP]') == [2, 6, 3]
    assert tokenizer.encode('a[SEP]') == [6, 4, 7, 5]


def new_tokenizer_of(theirs):
    return tokenizer_json.JsonTokenizer('tokenizers', theirs.to_str().encode(), 'test')


# --- who ends a text ---

def test_the_end_of_text_is_the_one_that_the_folder_names(tmp_path):
    """Not the first of a list of usual names: here <|endoftext|> is in the vocabulary too."""
    for eos in ('<|im_end|>', '<|endoftext|>', '[STOP]'):
        folder = tmp_path / eos.strip('<|>[]')
        write_folder(folder, byte_bpe([*CHATML, '[STOP]']), eos)
        tokenizer = new_tokenizer(str(folder / 'tokenizer.json'))
        assert tokenizer.eot_text == eos
        assert tokenizer.eot == tokenizer.tokenizer.token_to_id(eos)
        again = load_tokenizer(tokenizer.describe(), str(folder))
        assert again.eot == tokenizer.eot


def test_a_text_ends_where_generate_of_transformers_stops_also_at_one_of_several_tokens(tmp_path):
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|endoftext|>', ends=[60, 61, 257])
    model, tokenizer = sample.load(where)
    assert tokenizer.prompt_format.ends == (60, 61, 257)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    stopped = 0
    for first in range(40, 60):
        wanted = network.generate(torch.tensor([[first, 10]]), max_new_tokens=30, do_sample=False)[0, 2:]
        found = []
        for token in generate(model, [[first, 10]], 30, temperature=0, eot=tokenizer.prompt_format.ends):
            found += token.tolist()
        is_ended = found[-1] < 0
        stopped += is_ended
        assert found[:-1] == wanted.tolist()[:len(found) - 1] and len(found) == len(wanted)
        assert not is_ended or wanted[-1] in (60, 61, 257)
    assert stopped


def test_a_beam_search_ends_at_each_of_several_tokens_as_in_transformers(tmp_path):
    where, _ = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|endoftext|>', ends=[60, 61, 257])
    model, tokenizer = sample.load(where)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    stopped = set()
    for first in range(40, 60):
        prompt = torch.tensor([[first, 10]])
        wanted = network.generate(prompt, max_new_tokens=20, do_sample=False, num_beams=3)
        found = beam_search(model, [first, 10], 20, 3, eot=tokenizer.ends())
        assert found == wanted[0, 2:].tolist()
        stopped |= {found[-1]} & {60, 61, 257}
    assert stopped


def test_an_end_beyond_the_vocabulary_is_refused(tmp_path):
    where, _ = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>', ends=[9999])
    done = run('sample.py', f'--init_from={where}')
    assert 'generation_config.json: eos_token_id=[9999]: takes tokens of the vocabulary' in one_line(done)


def test_a_special_token_beyond_the_vocabulary_of_the_network_is_refused_only_in_a_prompt(tmp_path):
    """A [PAD] that somebody added to the tokenizer alone."""
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>')
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path / 'hf')
    model, tokenizer = sample.load(where)
    assert tokenizer.vocab_size == model.cfg.vocab_size + 1
    assert encode_prompt('ab', tokenizer, model.cfg) == theirs('ab').input_ids
    with pytest.raises(UserError, match=r'start: \[PAD\] is beyond the 259 tokens of the network'):
        encode_prompt('a[PAD]', tokenizer, model.cfg)


def test_a_pad_token_beyond_the_vocabulary_of_the_network_does_not_stop_training(tmp_path):
    """As [PAD] in many a fine-tuned Llama: 32,001 tokens, 32,000 rows."""
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>')
    size = len(theirs)
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path / 'hf')
    (tmp_path / 'text.txt').write_text('the [PAD] cat sat\n' * 200)
    prepared = ['prepare.py', str(tmp_path / 'text.txt'), f'--tokenizer={where}']
    done = run(*prepared, f'--out={tmp_path}/data')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'data' / 'meta.json').read_text())['vocab_size'] == size
    for steps in (1, 2):  # from the folder, then resumed
        done = run('train.py', f'--init_from={where}', f'--dataset={tmp_path}/data', '--block_size=16',
                   f'--out_dir={tmp_path}/run', f'--max_iters={steps}', '--batch_size=2', '--eval_iters=1',
                   '--device=cpu')
        assert f'done: {steps} steps' in done.stdout, done.stderr
    parsed = run(*prepared, f'--out={tmp_path}/parsed', '--special_tokens=parse')
    assert 'leave out --special_tokens=parse' in one_line(parsed)


def test_an_end_of_text_beyond_the_vocabulary_of_the_network_gives_way_to_the_one_of_its_config(tmp_path):
    """An eos_token that somebody added to the tokenizer alone: eval.py stopped with an IndexError."""
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>')
    theirs.add_special_tokens({'eos_token': '<end>'})
    theirs.save_pretrained(tmp_path / 'hf')
    model, tokenizer = sample.load(where)
    ends = json.loads((tmp_path / 'hf' / 'config.json').read_text())['eos_token_id']
    assert theirs.eos_token_id == model.cfg.vocab_size
    assert (tokenizer.eot,) == tokenizer.ends() == (ends,)
    assert encode_prompt('', tokenizer, model.cfg) == [ends]


@pytest.mark.parametrize('fields', [
    {'eos_token': ['</s>']}, {'eos_token': {'content': []}}, {'eos_token': 5}, {'chat_template': ['x']},
    {'chat_template': [{'name': [], 'template': 'x'}]}, {'chat_template': [{'name': 'default'}]}])
def test_fields_of_another_kind_say_nothing(fields, tmp_path):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
    assert end_of_text(str(tmp_path), {'</s>': 0}) is None
    assert chat_template(str(tmp_path)) == ''


def test_of_several_chat_templates_the_default_one_is_taken_and_a_broken_file_is_refused(tmp_path):
    named = [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': 'y'}]
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': named}))
    assert chat_template(str(tmp_path)) == 'y'
    (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
    with pytest.raises(UserError, match='chat_template.jinja: not readable as text in UTF-8'):
        chat_template(str(tmp_path))


# --- what travels ---

def train(folder, name, where, *more):
    """Two steps of a run that begins with the network of `where`."""
    done = run('train.py', f'--dataset={folder}/data', f'--init_from={where}', f'--out_dir={folder}/{name}',
               '--block_size=32', '--batch_size=2', '--max_iters=2', '--eval_interval=2', '--eval_iters=1',
               '--sample_tokens=4', '--device=cpu', '--dtype=float32', *more)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_folder_says_stays_true_in_a_run_that_begins_with_it_and_in_what_is_made_of_the_run(tmp_path):
    """Training on a stream, whose rows begin anywhere; an adapter; surgery; export and back."""
    where, _ = write_folder(tmp_path / 'hf', byte_bpe(CHATML, before='<|im_start|>'), '<|im_end|>',
                            ends=[257, 258])
    wanted = sample.load(where)[1].prompt_format
    assert wanted.bos == (257,) and wanted.ends == (257, 258) and wanted.chat_template == CHAT
    text = tmp_path / 'text.txt'
    text.write_text('once upon a time there was a cat\n' * 200)
    run('prepare.py', str(text), f'--tokenizer={tmp_path}/hf/tokenizer.json', f'--out={tmp_path}/data')
    train(tmp_path, 'run', where)
    train(tmp_path, 'lora', where, '--lora_rank=2')
    train(tmp_path, 'again', tmp_path / 'run')
    assert run('surgery.py', 'inherit', f'--from={where}', '--layers=0-1', '--dataset=none',
               f'--out_dir={tmp_path}/short').returncode == 0
    export(ExportSettings(f'{tmp_path}/again', f'{tmp_path}/back'))
    assert run('surgery.py', 'combine', f'--from={where}', *[f'--adapter={tmp_path}/lora'] * 2,
               '--dataset=none', f'--out_dir={tmp_path}/both').returncode == 0
    for made in (f'{tmp_path}/run', f'{tmp_path}/again', f'{tmp_path}/lora', f'{tmp_path}/short',
                 f'{tmp_path}/both',
                 f'hf:{tmp_path}/back'):
        found = sample.load(made)[1].prompt_format
        # an exported folder names an unk_token too, which CTranslate2 needs
        names = tuple(pair for pair in found.names if pair[0] != 'unk_token')
        assert replace(found, names=names) == wanted, made
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
    assert theirs.eos_token == '<|im_end|>' and theirs.chat_template == CHAT
    fields = json.loads((tmp_path / 'back' / 'generation_config.json').read_text())
    assert fields['eos_token_id'] == [257, 258]


def test_the_end_of_documents_that_a_run_is_trained_on_ends_its_texts_too(tmp_path):
    """Also where generate() of transformers does not stop at it before the training."""
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>', ends=[60])
    text = tmp_path / 'text.txt'
    text.write_text('once upon a time there was a cat\n' * 200)
    run('prepare.py', str(text), f'--tokenizer={where}', f'--out={tmp_path}/data')
    train(tmp_path, 'run', where)
    assert sample.load(where)[1].prompt_format.ends == (60,)
    assert sample.load(f'{tmp_path}/run')[1].prompt_format.ends == (60, theirs.eos_token_id)


def test_a_resumed_run_keeps_what_it_inherited(tmp_path, chatml):
    where, _ = chatml
    text = tmp_path / 'text.txt'
    text.write_text('once upon a time there was a cat\n' * 200)
    run('prepare.py', str(text), f'--tokenizer={tmp_path}/hf/tokenizer.json', f'--out={tmp_path}/data')
    train(tmp_path, 'run', where)
    train(tmp_path, 'run', where, '--max_iters=4')
    state = checkpoint.load_state(checkpoint.find(f'{tmp_path}/run', 'last'))
    assert state['step'] == 4 and state['prompt']['chat_template'] == CHAT


def test_a_t5_goes_on_from_the_token_that_its_folder_names_in_training_too(tmp_path):
    """Not from the end of text, with which our own encoder-decoders begin."""
    folder = tmp_path / 'hf'
    tokenizer = unigram(['<pad>', '</s>'])  # 1 and 2
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                   decoder_start_token_id=1, pad_token_id=1, eos_token_id=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='</s>').save_pretrained(folder)
    pairs = tmp_path / 'pairs.jsonl'
    pairs.write_text(''.join(json.dumps({'q': f'the {c}', 'a': c * 3}) + '\n' for c in 'abcdefghij' * 4))
    done = run('prepare.py', str(pairs), '--source=q', '--target=a', f'--tokenizer=hf:{folder}',
               '--val_fraction=0.3', f'--out={tmp_path}/data')
    assert done.returncode == 0, done.stderr
    options = ['--objective=seq2seq', '--source_size=16', '--block_size=16']
    train(tmp_path, 'run', f'hf:{folder}', *options)
    train(tmp_path, 'run', f'hf:{folder}', *options, '--max_iters=4')  # resumed
    state = checkpoint.load_state(checkpoint.find(f'{tmp_path}/run', 'last'))
    assert state['prompt']['bos'] == [1] and state['prompt']['ends'] == [2]
    assert sample.load(f'{tmp_path}/run', encoder=True)[1].prompt_format.bos == (1,)
    cfg, _, _ = read_model(f'{tmp_path}/run', encoder=True)
    source, = validation_sources(f'{tmp_path}/run', cfg)
    x, _, _ = source.batch([source.row(0)])
    assert x[0, 0] == 1
    export(ExportSettings(f'{tmp_path}/run', f'{tmp_path}/back'))
    fields = json.loads((tmp_path / 'back' / 'config.json').read_text())
    assert (fields['decoder_start_token_id'], fields['eos_token_id']) == (1, 2)


# --- prepare.py ---

def test_data_are_prepared_with_the_tokenizer_of_a_folder_and_special_tokens_only_where_asked_for(tmp_path):
    where, theirs = write_folder(tmp_path / 'hf', byte_bpe(CHATML), '<|im_end|>')
    text = tmp_path / 'chats.txt'
    text.write_text('<|im_start|>user Hi<|im_end|> there\n' * 50)
    lengths = {}
    for kind in ('text', 'parse'):
        done = run('prepare.py', str(text), f'--tokenizer={where}', f'--special_tokens={kind}',
                   f'--out={tmp_path}/{kind}', '--val_fraction=0.2')
        assert done.returncode == 0, done.stderr
        meta = json.loads((tmp_path / kind / 'meta.json').read_text())
        assert meta['eot'] == theirs.eos_token_id
        files = TokenFiles(str(tmp_path / kind), 'train')
        ids = files.read(0, files.tokens - 1).tolist()
        specials = {theirs.convert_tokens_to_ids(name) for name in CHATML}
        assert bool(specials & set(ids)) == (kind == 'parse')
        lengths[kind] = len(ids)
    assert lengths['parse'] < lengths['text']


def test_the_name_of_a_folder_that_is_not_there_is_refused(tmp_path):
    done = run('prepare.py', __file__, f'--tokenizer=hf:{tmp_path}/none', f'--out={tmp_path}/data')
    assert 'no such directory' in one_line(done)


# --- tasks ---

def test_an_empty_context_is_the_bos_token_that_the_folder_names_as_in_lm_eval(tmp_path):
    """Whether or not the tokenizer writes it before a text: BLiMP's sentences have no context."""
    pytest.importorskip('lm_eval')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    for before in ('', '<|im_start|>'):
        folder = tmp_path / f'hf{len(before)}'
        where, theirs = write_folder(folder, byte_bpe(CHATML, before), '<|im_end|>')
        theirs.bos_token = '<|im_start|>'
        theirs.save_pretrained(folder)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
        lm = HFLM(pretrained=network, tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
                  batch_size=1, device='cpu')
        model, tokenizer = sample.load(where)
        pairs = [('', 'Anna sees herself.'), ('the cat', ' sat')]
        wanted = lm.loglikelihood([Instance('loglikelihood', {}, pair, 0) for pair in pairs])
        ids = [encode_pair(tokenizer, *pair) for pair in pairs]
        found = score(model, ids, torch.device('cpu'), 'float32')
        for ours, its in zip(found, wanted):
            assert ours[0] == pytest.approx(its[0], rel=1e-5)


def test_a_number_of_an_added_token_that_is_too_long_is_one_line(chat_folder):
    (chat_folder / 'tokenizer_config.json').write_text(json.dumps({
        'added_tokens_decoder': {'9' * 5000: token_fields('<tool>', False)}}))
    with pytest.raises(UserError, match='added token .* takes a whole number'):
        new_tokenizer(str(chat_folder / 'tokenizer.model'))
