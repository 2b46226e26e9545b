"""The laws have their published numbers, and are the minima that they say they are."""
import pytest
from conftest import one_line, run, train

from features.plan.chinchilla import LAWS, Fit, optima
from model import ModelConfig, make_model

TASKS = 2 * 684_805_492  # tokens of ROT5's plan: two epochs


def test_the_plan_of_rot5_by_all_laws():
    found = optima(tokens=TASKS)
    assert [round(params / 1e6, 1) for params, _, _ in found.values()] == [48.0, 57.4, 52.2, 68.5]
    assert (found['Chinchilla, rounded'][2] == pytest.approx(3.653e17, rel=1e-3)
            and found['Chinchilla, third fit'][2] == pytest.approx(4.72e17, rel=2e-3))
    assert all(tokens == pytest.approx(TASKS) for _, tokens, _ in found.values())


def test_the_constants_of_the_third_fit():
    assert LAWS['Chinchilla, third fit'] == pytest.approx((0.5987, 0.4516, 0.2784, 0.5484), abs=1e-4)


def test_an_optimum_is_the_lowest_loss_for_its_flops():
    fit, (params, tokens, flops) = (Fit(482.01, 2085.43, 0.3478, 0.3658),
                                    optima(flops=1e18)['the same data, fitted again'])
    assert 6 * params * tokens == pytest.approx(flops) == 1e18

    def loss(n):
        return fit.A / n ** fit.alpha + fit.B / (flops / 6 / n) ** fit.beta
    assert loss(params) < min(loss(0.98 * params), loss(1.02 * params))


def test_tokens_and_flops_lead_to_the_same_place():
    for name, (params, _, flops) in optima(tokens=1e9).items():
        assert optima(flops=flops)[name] == pytest.approx((params, 1e9, flops))


def test_train_prints_the_laws_and_a_network_and_trains_nothing(dataset, tmp_path):
    done = run('train.py', '--plan', f'--tokens={TASKS}', '--vocab_size=32502', f'--out_dir={tmp_path}/out',
               '--device=cpu', '--dtype=float32')
    assert (done.returncode == 0 and '3.653e+17' in done.stdout and '--n_layer=' in done.stdout
            and not (tmp_path / 'out').exists())
    words = ' '.join(run('train.py', '--plan', '--minutes=1', f'--dataset={dataset}', '--n_encoder_layer=3',
                         '--objective=ul2', '--device=cpu').stdout.split())
    assert 'an encoder of 3' in words


def test_a_plan_of_nothing_but_a_network_has_its_numbers_and_needs_no_data(dataset, tmp_path):
    sizes = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--device=cpu']
    nowhere = run('train.py', '--plan', *sizes, '--dataset=nowhere')
    assert 'dataset=nowhere is not there: GPT-2\'s 50,257 tokens are assumed' in nowhere.stdout
    model = make_model(ModelConfig(vocab_size=50257, n_layer=2, n_head=2, n_embd=32, block_size=32))
    assert f'parameters   {model.num_params():,}' in nowhere.stdout
    assert f'{model.flops_per_token():.3e} a token' in nowhere.stdout
    known = run('train.py', '--plan', *sizes, f'--dataset={dataset}')
    assert '64 tokens' in known.stdout and 'assumed' not in known.stdout
    chain = run('train.py', '--plan', '--arch=markov', '--vocab_size=100', '--device=cpu')
    assert ('parameters   10,000' in chain.stdout
            and 'a Markov chain of 100 tokens' in chain.stdout), chain.stderr
    for args, words in ((['--n_expert=4'], 'for each token, 4 experts'),
                        (['--n_encoder_layer=3'], '3 encoder layers, 2 layers of 32')):
        done = run('train.py', '--plan', *sizes, '--vocab_size=100', *args)
        assert done.returncode == 0 and words in done.stdout, done.stderr


def test_a_plan_of_weights_that_are_there_has_their_network(dataset, tmp_path):
    train(tmp_path / 'run', '--max_iters=1', dataset=dataset)
    done = run('train.py', '--plan', f'--init_from={tmp_path}/run', '--lora_rank=2', '--device=cpu')
    assert '2 layers of 32' in done.stdout and 'those of low-rank adapters' in done.stdout


@pytest.mark.parametrize('args, words',
                         [(['--plan', '--tokens=1e6', '--minutes=1'], 'give one of them'),
                          (['--plan', '--tokens=1e6', '--depth=3'], 'depth=3'),
                          (['--plan', '--minutes=-1'], 'minutes=-1')])
def test_plans_that_cannot_be_are_refused(args, words):
    assert words in one_line(run('train.py', *args, '--vocab_size=100'))
