"""
What attention does: the golden values of the definitions, matrices equal to transformers', and what a user
sees of a run.
"""
import csv
import json

import pytest
import torch
from conftest import one_line, run, train
from test_hub import ours, theirs, tokens
from test_surgery import ids, random_model

import model as networks
from features.study.attention import gradient_norms, least, mass, measure, nulls, rank, watching
from model import Transformer


def uniform(T):
    A = torch.ones(T, T).tril()
    return A / A.sum(1, keepdim=True)


# --- the definitions: originals' golden values at T = 100 ---

def test_golden_values():
    sink = torch.zeros(100, 100)
    sink[:, 0] = 1
    mixed = 0.7 * sink + 0.3 * uniform(100)
    # of the attention, not its square
    by_sum = [least(A.double().sum(0), 0.9).item() for A in (torch.eye(100), sink, mixed, uniform(100))]
    assert ([(rank(A).item(), mass(A).item()) for A in (torch.eye(100), sink, mixed, uniform(100))]
            == [(90, 90), (1, 1), (1, 1), (5, 30)])
    assert by_sum == [90, 1, 31, 60]
    assert ([(rank(uniform(T)).item(), mass(uniform(T)).item()) for T in (64, 128, 256, 512, 1024)]
            == [(5, 21), (5, 37), (6, 67), (7, 121), (7, 221)])
    harmonic = sum(1 / n for n in range(1, 101)) / 100
    assert {name: values[:2] for name, values in nulls(100).items()} == {
        'uniform': (5, 30), 'sink': (1, 1), 'identity': (90, 90)}
    assert [values[2] for values in nulls(100).values()] == pytest.approx([harmonic, 1, 0.01])


@pytest.mark.parametrize('deviation, ranks, masses', [(1, 20, 33), (4, 32, 34)])
def test_golden_values_of_random_logits(deviation, ranks, masses):
    logits = deviation * torch.randn(50, 100, 100, generator=torch.Generator().manual_seed(0))
    A = logits.masked_fill(torch.ones(100, 100, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert abs(rank(A).double().mean() - ranks) < 3 and abs(mass(A).double().mean() - masses) < 3


def test_the_columns_that_count_are_the_largest_wherever_they_are():
    A = torch.zeros(10, 10)
    A[:, 7] = 1
    assert (mass(A) == 1 and mass(A.flip(1)) == 1 and least(torch.tensor([0.5, 0.1, 0.4]), 0.9) == 2
            and least(torch.tensor([1.0, 0.0]), 1.0) == 1)


# --- the matrices ---

@pytest.mark.parametrize('kind, settings',
                         [('gpt2', {}), ('gpt2', dict(scale_attn_by_inverse_layer_idx=True)),
                          ('llama', dict(num_key_value_heads=2))], ids=str)
def test_attention_is_that_of_transformers(kind, settings, tmp_path):
    model = theirs(kind, attn_implementation='eager', **settings)
    model.save_pretrained(tmp_path)
    seen, logits = [], ours(tmp_path)(tokens())
    with torch.no_grad(), watching(seen.append):
        watched = ours(tmp_path)(tokens())
    wanted = model(tokens(), output_attentions=True).attentions
    assert len(seen) == len(wanted) == 3
    for A, B in zip(seen, wanted):
        torch.testing.assert_close(A, B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(watched, logits, rtol=1e-5, atol=1e-5)  # watching changes nothing


def test_watching_ends_even_with_an_error():
    before = networks.attend
    with pytest.raises(ZeroDivisionError), watching(print):
        raise ZeroDivisionError
    assert networks.attend is before


def test_the_figures_are_means_over_sequences_whatever_the_batches():
    model, x = random_model(n_head=4), torch.cat([ids(), ids().flip(0).roll(1, 1)])
    for p in model.blocks.parameters():
        p.data *= 3  # not uniform
    together, apart = measure(model, [x]), measure(model, x.split(1))
    assert len(together) == 8 and all(a == pytest.approx(b) for a, b in zip(together, apart))
    seen = []
    with torch.no_grad(), watching(seen.append):
        model(x)
    A = seen[1][:, 2]  # layer 1, head 2
    r = next(r for r in together if (r['layer'], r['head']) == (1, 2))
    assert (r['rank'] == pytest.approx(rank(A).double().mean().item())
            and r['mass'] == pytest.approx(mass(A).double().mean().item()))
    assert (r['averaged_rank'], r['averaged_mass']) == (rank(A.double().mean(0)).item(),
                                                        mass(A.double().mean(0)).item())


def test_zero_logits_are_the_uniform_null_and_the_gradients_are_autograds():
    model = random_model(bias=True, rank_qk=8, qk_norm=False)
    x, y = ids(), ids().roll(-1, 1)
    loss = model(torch.cat([x, x]), torch.cat([y, y]))
    wanted = torch.autograd.grad(loss, [model.blocks[1].attn.k.down.weight, model.blocks[1].attn.k.up.weight])
    # the last batch is smaller
    found = gradient_norms(model, [(torch.cat([x, x[:1]]), torch.cat([y, y[:1]])), (x[1:], y[1:])])
    assert found[1][1] == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-4)
    for block in model.blocks:
        block.attn.q.up.weight.data.zero_()
        block.attn.q.up.bias.data.zero_()
    for record in measure(model, [x]):
        figures = record['rank'], record['mass'], record['first']
        assert figures == pytest.approx(nulls(32)['uniform'])


def test_the_share_on_the_first_token_is_a_mean_over_positions_and_sequences():
    model, seen = random_model(), []
    x = ids()
    with watching(seen.append):
        model.hidden(x)
    found = [record['first'] for record in measure(model, [x[:1], x[1:]])]
    assert found == pytest.approx([A[:, head, :, 0].mean().item() for A in seen for head in range(2)])


# --- as a user runs it ---

def test_the_command_names_lazy_layers_and_draws(dataset, tmp_path):
    train(tmp_path / 'run', '--block_size=64', dataset=dataset)
    args = ['attention', f'--out_dir={tmp_path}/run', '--sequences=20', '--length=48',
            f'--csv={tmp_path}/a.csv', f'--picture={tmp_path}/a.png']
    done = run('analyze.py', *args, '--lazy=40')
    assert done.returncode == 0, done.stderr
    assert ('lazy layers, of MaxRank up to 40: 0, 1' in done.stdout
            and '20 sequences of 48 tokens' in done.stdout and 'uniform' in done.stdout)
    assert (tmp_path / 'a.png').stat().st_size > 10_000
    rows = list(csv.DictReader(open(tmp_path / 'a.csv')))
    assert len(rows) == 4 and all(1 <= float(r['rank']) <= 48 and float(r['grad_q']) > 0 for r in rows)
    averaged = run('analyze.py', *args, '--batch_averaged')
    ranks = [[float(line.split()[1]) for line in text.splitlines() if line[:1].isdecimal()]
             for text in (done.stdout, averaged.stdout)]
    assert len(ranks[0]) == 2 and all(a < b for a, b in zip(ranks[1], ranks[0])) and 'none' in averaged.stdout


def test_what_cannot_be_analysed_is_one_line(dataset, tmp_path):
    train(tmp_path / 'run', dataset=dataset)
    theirs('gpt2', vocab_size=64).save_pretrained(tmp_path / 'hf')
    for where, args, words in [('run', ['--length=33'], 'length=33: the network'),
                               ('run', ['--length=1'], 'at least 1 sequence of 2 tokens'),
                               ('run', ['--tau=0'], 'tau=0'), ('run', ['--length=32', '--sequences=9999'],
                                                               'windows of 32 tokens to validate on'),
                               ('nowhere', [], 'no such directory'),
                               ('run', ['--dataset=nowhere', '--length=9'], 'no such data set')]:
        assert words in one_line(run('analyze.py', 'attention', f'--out_dir={tmp_path}/{where}',
                                     f'--picture={tmp_path}/a.png', *args))
    hub = ['attention', f'--out_dir=hf:{tmp_path}/hf', '--length=32', '--sequences=8', '--picture=']
    assert 'give --dataset=NAME' in one_line(run('analyze.py', *hub))
    assert (run('analyze.py', *hub, f'--dataset={dataset}').returncode == 0
            and isinstance(ours(tmp_path / 'hf'), Transformer))
    assert not (tmp_path / 'a.png').exists()


def test_rows_of_conversations_are_one_line(tmp_path):
    with open(tmp_path / 'chat.jsonl', 'w') as f:
        for n in range(30):
            turns = [{'role': 'user', 'content': f'hi {n}'}, {'role': 'assistant', 'content': 'hello'}]
            f.write(json.dumps({'messages': turns}) + '\n')
    done = run('prepare.py', tmp_path / 'chat.jsonl', '--messages', '--tokenizer=byte', '--val_fraction=0.4',
               f'--out={tmp_path}/chat')
    assert done.returncode == 0, done.stderr
    theirs('gpt2', vocab_size=257, n_positions=64).save_pretrained(tmp_path / 'hf')
    done = run('analyze.py', 'attention', f'--out_dir=hf:{tmp_path}/hf', f'--dataset={tmp_path}/chat',
               '--length=60', '--sequences=1', '--picture=')
    assert 'holds conversations, several in a row' in one_line(done)
