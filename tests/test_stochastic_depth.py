"Stochastic depth and dropout on many architectures, and what is left of them after errors"
import copy

import pytest
import timm
import torch
import torchvision
from fastai.callback import core
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import lr_find  # noqa: F401, adds Learner.lr_find
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisy_student.models import create_model
from noisy_student.residual import branch_entries
from noisy_student.stochastic_depth import (ClassifierDropout, DropBranch, StochasticDepth, TrainingNoise, drop_branch,
                                            residual_blocks, survival_probs)

tv = torchvision.models
ARCHS = {  # name: (constructor, blocks, blocks with an identity skip)
    'timm resnet18': (lambda: timm.create_model('resnet18', num_classes=2), 8, 5),
    'timm bottlenecks': (lambda: timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (2, 2, 2, 2), num_classes=2, channels=(8, 8, 16, 16)), 8, 4),
    'timm efficientnet_b0': (lambda: timm.create_model('efficientnet_b0', num_classes=2), 16, 9),
    'timm efficientnet_b0 with drop paths': (
        lambda: timm.create_model('efficientnet_b0', num_classes=2, drop_path_rate=.2, drop_rate=.2), 16, 9),
    'timm convnext_atto': (lambda: timm.create_model('convnext_atto', num_classes=2), 12, 12),
    'timm vit_tiny': (lambda: timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=2, depth=3), 3, 3),
    'timm test_maxvit': (lambda: timm.create_model('test_maxvit', img_size=32, num_classes=2), 12, 8),
    'timm regnetz_005': (lambda: timm.create_model('regnetz_005', num_classes=2), 21, 17),  # 4 stages
    'torchvision resnet18': (lambda: tv.resnet18(num_classes=2), 8, 5),
    'torchvision efficientnet_b0': (lambda: tv.efficientnet_b0(num_classes=2), 16, 9),
    'fastai xresnet18': (lambda: xresnet18(n_out=2), 8, 5),
}
archs = pytest.mark.parametrize('arch', ARCHS)

def make(arch):
    torch.manual_seed(0)
    return ARCHS[arch][0]()

def image(i): return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
def label(i): return torch.tensor(i % 2)

def learner(model, cbs, items=None, path='.'):
    good = Datasets(range(4), [[image], [label]])
    dls = DataLoaders.from_dsets(items or good, good, bs=2, device='cpu', num_workers=0)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs, path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn

def snapshot(model):
    "Everything about a model that noise touches: modules by identity, settings, hooks, names of weights"
    return ([(n, id(m), type(m), getattr(m, 'p', None), getattr(m, 'drop_rate', None), len(m._forward_hooks),
              len(m._forward_pre_hooks), 'drop_path' in vars(m)) for n, m in model.named_modules()],
            list(model.state_dict()))

class noisy:
    "Noise on a model whose batch norms (and nothing else) are in eval mode"
    def __init__(self, model, *cbs): self.model, self.cbs = model, learner(model, list(cbs)).cbs[-len(cbs):]
    def __enter__(self):
        for m in self.model.modules(): m.training = not isinstance(m, _BatchNorm)
        for cb in self.cbs: cb.before_train()
    def __exit__(self, *args):
        for cb in self.cbs: cb.detach()
        self.model.eval()


@archs
def test_blocks(arch):
    blocks = residual_blocks(make(arch))
    assert (len(blocks), sum(o.identity for o in blocks)) == ARCHS[arch][1:]

@archs
def test_trains_and_is_restored(arch):
    model, seen = make(arch), []
    before = snapshot(model)
    def look(self): seen.append(snapshot(self.learn.model))
    learn = learner(model, [StochasticDepth(), ClassifierDropout(), Callback(before_batch=look)])
    learn.fit(1)
    assert snapshot(model) == before
    train, valid = seen[:2], seen[2:]
    assert all(s != before and s[1] == before[1] for s in train)
    assert len(valid) == 2 and all(s == before for s in valid)
    copy.deepcopy(model)

@archs
@pytest.mark.parametrize('per', ['sample', 'batch'])
def test_noise_is_on_in_training(arch, per):
    model, x = make(arch), torch.randn(1, 3, 32, 32).repeat(6, 1, 1, 1)
    for p in model.parameters():  # branches that begin as zero (layer scale, last batch norm) would hide the noise
        if p.ndim == 1: nn.init.uniform_(p, .5, 1.)
    with torch.no_grad(), noisy(model, StochasticDepth(.3, per=per), ClassifierDropout(0.)):
        torch.manual_seed(1)
        out = [model(x) for _ in range(4)]
        torch.manual_seed(1)
        again = model(x)
    assert torch.equal(out[0], again)
    alike = [torch.allclose(o, o[:1].expand_as(o), rtol=1e-4, atol=1e-5) for o in out]
    assert all(alike) if per == 'batch' else not any(alike)
    assert not torch.allclose(out[0][:1], out[1][:1]) or not torch.allclose(out[1][:1], out[2][:1])
    with torch.no_grad(): assert torch.equal(model.eval()(x), model(x))

@archs
@pytest.mark.parametrize('per', ['sample', 'batch'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_skipping_changes_nothing_else(arch, per, layout):
    "With the same coins, outputs and gradients are those of the network that computes all branches"
    model, results = make(arch).to(memory_format=layout), []
    for p in model.parameters():
        if p.ndim == 1: nn.init.uniform_(p, .5, 1.)
    x = torch.randn(6, 3, 32, 32).to(memory_format=layout)
    for skip in (True, False):
        with noisy(model, StochasticDepth(.5, per=per, skip=skip)):
            torch.manual_seed(1)
            out = model(x)
            model.zero_grad()
            out.square().sum().backward()
        results.append((out.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    (a, grads), (b, others) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    for k, g in others.items():
        torch.testing.assert_close(grads[k], g, rtol=1e-3, atol=1e-3 * g.abs().max().item() + 1e-6)

@archs
def test_dropped_images_are_not_computed(arch):
    "As many images enter the first layer of every branch as survive on average, and no batch norm is left without any"
    model, rows, steps, B = make(arch), {}, 10, 20
    cb = StochasticDepth(.5)
    firsts = {f'{o.name}.{i}': (entry, p) for o, p in cb.plan(model) if p < 1
              for i, entry in enumerate(e for es in branch_entries(o) for e in es)}
    assert len(firsts) >= ARCHS[arch][2], 'every block with an identity skip leaves out work'
    for k, (entry, _) in firsts.items():
        entry.register_forward_hook(lambda m, args, out, k=k: rows.setdefault(k, []).append(len(out)))
    cb = learner(model, [cb]).cbs[-1]
    cb.before_train()
    with torch.no_grad():
        for _ in range(steps): model.train()(torch.randn(B, 3, 32, 32))
    cb.detach()
    n = steps * B
    for k, (_, p) in firsts.items():
        assert abs(sum(rows[k]) - n * p) <= 4 * (n * p * (1 - p)) ** .5, (k, rows[k], p)
    assert all(v.isfinite().all() for v in model.state_dict().values())

def test_a_dropped_batch_is_not_computed():
    "per='batch' leaves the whole branch out, and its batch norms learn nothing from a batch that was not there"
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=2)
    block = residual_blocks(model)[-1].module
    cb, rows, means = learner(model, [StochasticDepth(.5, per='batch')]).cbs[-1], [], []
    block.conv1.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    cb.before_train()
    for _ in range(30):
        before = block.bn1.running_mean.clone()
        model.train()(torch.randn(4, 3, 32, 32))
        means.append(not torch.equal(before, block.bn1.running_mean))
    cb.detach()
    assert set(rows) == {0, 4} and [bool(n) for n in rows] == means
    assert not any(o.isnan().any() for o in model.state_dict().values())

def test_one_surviving_image_has_batch_statistics():
    "A batch norm over one image of one pixel would fail: the whole batch goes through such a branch instead"
    torch.manual_seed(0)
    model = create_model('resnet9_4', 2)  # 1x1 pixels in its last block
    cb = learner(model, [StochasticDepth(.3)]).cbs[-1]
    cb.before_train()
    for _ in range(30): assert model.train()(torch.randn(2, 3, 8, 8)).isfinite().all()
    cb.detach()

def test_compiled_models_compute_everything():
    "Sizes that change from step to step would have to be compiled again and again"
    model, rows = fresh(), []
    model.blocks[-1].norm1.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    model.compile(backend='eager')
    cb = learner(model, [StochasticDepth(.5)]).cbs[-1]
    cb.before_train()
    model._compiled_call_impl, compiled = None, model._compiled_call_impl
    for _ in range(5): model(torch.randn(8, 3, 32, 32))
    model._compiled_call_impl = compiled
    cb.detach()
    assert rows == [8] * 5

@pytest.mark.parametrize('scale', ['train', 'test'])
@pytest.mark.parametrize('arch', ['timm resnet18', 'torchvision resnet18', 'torchvision efficientnet_b0',
                                  'fastai xresnet18'])
def test_block_law(arch, scale):
    "A kept branch is 1/p times that of evaluation and a dropped one is gone, in either formulation"
    model = make(arch)
    for m in model.modules():
        if isinstance(m, _BatchNorm): nn.init.uniform_(m.weight, .5, 1.5)
    cb = StochasticDepth(.5, scale=scale)
    block, p = [(o.module, p) for o, p in cb.plan(model) if o.identity][-1]
    for name in ('relu', 'act', 'act2'):  # what comes after the sum
        if hasattr(block, name): setattr(block, name, nn.Identity())
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(1, channels, 2, 2)
    with torch.no_grad():
        evaluated = block.eval()(x) - x
        with noisy(model, cb): trained = block(x.repeat(1000, 1, 1, 1)) - x
    dropped = (trained.abs() < 1e-6).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(1 - p, abs=.06)
    torch.testing.assert_close(trained[~dropped][:1], evaluated / p, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('arch', ['timm resnet18', 'timm bottlenecks', 'timm efficientnet_b0', 'torchvision resnet18',
                                  'torchvision efficientnet_b0', 'fastai xresnet18'])
def test_fold(arch):
    "With scale='test' the plain model has p times the weights that the training phase ended with"
    model, last = make(arch), {}
    def remember(self): last.update({k: v.clone() for k, v in self.learn.model.named_parameters()})
    cb = StochasticDepth(scale='test')
    learner(model, [cb, Callback(after_train=remember)]).fit(2, lr=1e-3)
    factors = {k: (v / last[k])[last[k] != 0] for k, v in model.named_parameters()}
    changed = sorted(k for k, v in factors.items() if not torch.allclose(v, torch.ones_like(v), rtol=1e-5))
    dropped = [(o.name, p) for o, p in cb.plan(model) if p < 1]
    weights = [k for k in changed if k.endswith('weight')]
    assert len(weights) == len(dropped)
    for name, p in dropped:
        inside = [k for k in weights if k.startswith(name + '.')]
        assert len(inside) == 1
        torch.testing.assert_close(factors[inside[0]], torch.full_like(factors[inside[0]], p))

@pytest.mark.parametrize('name', ['seresnet18', 'test_vit', 'test_convnext'])
def test_fold_impossible(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **(dict(img_size=32) if 'vit' in name else {}))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="scale='train'"): learner(model, StochasticDepth(scale='test')).fit(1)
    for k, v in model.state_dict().items(): torch.testing.assert_close(v, state[k])
    learner(model, StochasticDepth()).fit(1)

def test_skips_that_are_not_there():
    "A block without any skip connection must not be dropped: its branch is all there is"
    for name in ('regnetz_005', 'repvgg_a0', 'test_byobnet', 'ese_vovnet19b_dw', 'xception41'):
        for o in residual_blocks(timm.create_model(name, num_classes=2)):
            if not o.identity: continue
            convs = [m for m in o.module.modules() if isinstance(m, nn.Conv2d)]
            assert all(m.stride in (1, (1, 1)) for m in convs), (name, o.name)

def test_own_drop_paths_come_back():
    model = timm.create_model('efficientnet_b0', num_classes=2, drop_path_rate=.2)
    own = {n: (m, m.drop_prob) for n, m in model.named_modules() if type(m).__name__ == 'DropPath'}
    assert len(own) == 15
    with noisy(model, StochasticDepth(.9)):
        assert not any(type(m).__name__ == 'DropPath' for m in model.modules())
        assert min(m.survival for m in model.modules() if isinstance(m, DropBranch)) == pytest.approx(1 - .1 * 15 / 16)
    for n, (m, p) in own.items(): assert model.get_submodule(n) is m and m.drop_prob == p


class Failing(nn.Module):
    def __init__(self, model, error): super().__init__(); self.model, self.error, self.calls = model, error, 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 2: raise self.error
        return self.model(x)

class BrokenItems(list):
    def __getitem__(self, i):
        if i == 3: raise OSError('broken image')
        return super().__getitem__(i)

def fresh():
    torch.manual_seed(0)
    return timm.create_model('test_vit', img_size=32, num_classes=2)

@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()])
def test_error_in_forward(error):
    model = Failing(fresh(), error)
    before = snapshot(model)
    learn = learner(model, [ClassifierDropout(), StochasticDepth()])
    with pytest.raises(type(error)): learn.fit(1)
    assert snapshot(model) == before and '_with_events' not in vars(learn)
    learn.fit(1)  # and it goes on from there
    assert snapshot(model) == before

def test_error_in_data():
    items = BrokenItems([(torch.randn(3, 32, 32), torch.tensor(0))] * 4)
    model = fresh()
    before = snapshot(model)
    learn = learner(model, [StochasticDepth(), ClassifierDropout()], items=items)
    with pytest.raises(OSError): learn.fit(1)
    assert snapshot(model) == before and '_with_events' not in vars(learn)

@pytest.mark.parametrize('order', [-20, 0, 200])
@pytest.mark.parametrize('epoch', [0, 1])
@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'before_backward', 'after_step', 'after_train',
                                   'after_epoch', 'after_fit'])
def test_error_in_callback(event, epoch, order):
    def boom(self):
        if self.epoch == epoch: raise RuntimeError('boom')
    bad = Callback(**{event: boom})
    bad.order = order
    model = fresh()
    before = snapshot(model)
    learn = learner(model, [StochasticDepth(), bad, ClassifierDropout()])
    with pytest.raises(RuntimeError, match='boom'): learn.fit(epoch + 1)
    assert snapshot(model) == before
    learn.remove_cb(bad)
    learn.fit(1)
    assert snapshot(model) == before and '_with_events' not in vars(learn)

@pytest.mark.parametrize('event,name', [
    ('before_epoch', 'Epoch'), ('before_epoch', 'Fit'), ('before_train', 'Train'), ('before_train', 'Epoch'),
    ('before_train', 'Fit'), ('after_pred', 'Batch'), ('after_pred', 'Train'), ('after_pred', 'Epoch'),
    ('after_pred', 'Fit')])
def test_cancel(event, name):
    error = getattr(core, f'Cancel{name}Exception')
    def cancel(self):
        if self.epoch == 0 and self.training: raise error
    model, noisy_batches = fresh(), []
    def look(self): noisy_batches.append((self.training, any(isinstance(m, DropBranch) for m in model.modules())))
    before = snapshot(model)
    canceling = Callback(**{event: cancel})
    canceling.order = 70  # as fastai's SkipToEpoch: the recorder needs its own before_epoch
    learn = learner(model, [StochasticDepth(), canceling, Callback(before_batch=look)])
    learn.training = True
    learn.fit(2)
    assert snapshot(model) == before and '_with_events' not in vars(learn)
    assert all(training == noise for training, noise in noisy_batches)

def test_nothing_of_it_in_other_uses(tmp_path):
    model = fresh()
    before = snapshot(model)
    learn = learner(model, [StochasticDepth(), ClassifierDropout()], path=tmp_path)
    for use in (learn.validate, learn.get_preds):
        use()
        assert snapshot(model) == before and '_with_events' not in vars(learn)
    learn.lr_find(num_it=15, show_plot=False)  # ends by an exception of its own
    assert snapshot(model) == before and '_with_events' not in vars(learn)
    learn.fit(1)
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model.eval()(x), model.eval()(x))
    assert any(isinstance(cb, StochasticDepth) for cb in loaded.cbs)

def test_validation_inside_training():
    "Validating in the middle of a fit neither carries the noise along nor ends the protection of later epochs"
    model, clean = fresh(), []
    def look(self):
        if not self.training: clean.append(not any(isinstance(m, DropBranch) for m in model.modules()))
    def validate(self): self.learn.get_preds(inner=True)
    def boom(self):
        if self.epoch == 1: raise RuntimeError('boom')
    before = snapshot(model)
    learn = learner(model, [StochasticDepth(), Callback(before_batch=look), Callback(after_epoch=validate),
                            Callback(before_backward=boom)])
    with pytest.raises(RuntimeError): learn.fit(2)
    assert clean and all(clean) and snapshot(model) == before

def test_attach_is_required():
    class Nothing(TrainingNoise): pass
    with pytest.raises(NotImplementedError, match='Nothing'): learner(fresh(), Nothing()).fit(1)


HEADS = {  # name: (constructor, whether the model's own dropout layer is used)
    'functional': (lambda: timm.create_model('efficientnet_b0', num_classes=2, drop_rate=.9), False),
    'timm vit': (lambda: timm.create_model('test_vit', img_size=32, num_classes=2), True),
    'timm convnext': (lambda: timm.create_model('test_convnext', num_classes=2, drop_rate=.9), True),
    'timm deit, two heads': (
        lambda: timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, num_classes=2, depth=1), True),
    'torchvision resnet18': (lambda: tv.resnet18(num_classes=2), False),
    'torchvision efficientnet_b0': (lambda: tv.efficientnet_b0(num_classes=2), True),
    'torchvision squeezenet': (lambda: tv.squeezenet1_1(num_classes=2), True),
    'fastai xresnet18': (lambda: xresnet18(n_out=2), True),
}

@pytest.mark.parametrize('name', HEADS)
def test_dropout_once(name):
    torch.manual_seed(0)
    model = HEADS[name][0]().eval()
    before, p = snapshot(model), 0.7
    last = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, 'kernel_size', 0) == (1, 1)][-1]
    seen = []
    handle = last.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    x = torch.randn(8, 3, *([64, 64] if 'squeezenet' in name else [32, 32]))
    with torch.no_grad():
        model(x)
        with noisy(model, ClassifierDropout(p)):
            own = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p == p]
            assert bool(own) == HEADS[name][1]
            others = [m for m in model.modules() if isinstance(m, nn.Dropout) and m not in own]
            for m in others: m.eval()
            model(x)
    handle.remove()
    clean, dropped = seen
    kept = dropped != 0
    live = clean != 0  # ReLU features may be 0 already
    assert (kept & live).sum() / live.sum() == pytest.approx(1 - p, abs=.05)
    torch.testing.assert_close(dropped[kept], clean[kept] / (1 - p), rtol=1e-4, atol=1e-5)
    assert snapshot(model) == before

@pytest.mark.parametrize('p', [-.1, 1., 1.5])
def test_dropout_range(p):
    with pytest.raises(ValueError, match=r'\[0, 1\)'): ClassifierDropout(p)

@pytest.mark.parametrize('kw', [dict(last=0.), dict(last=1.1), dict(rule='linear'), dict(per='row'),
                                dict(scale='both')])
def test_settings(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): StochasticDepth(**kw)

def test_no_blocks():
    with pytest.raises(ValueError, match=r'SqueezeNet has no residual block.*Noise\(survival=1\.\)'):
        learner(tv.squeezenet1_1(num_classes=2), StochasticDepth()).fit(1)
    with pytest.raises(ValueError, match='n_blocks'): survival_probs(0)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_reaches_kept_samples_only(dtype):
    torch.manual_seed(0)
    x = torch.ones(200, 3, dtype=dtype, requires_grad=True)
    y = drop_branch(x, .5)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(x.grad, y.detach())

def test_autocast():
    model = fresh()
    with noisy(model, StochasticDepth(), ClassifierDropout()), torch.autocast('cpu', torch.bfloat16):
        out = model(torch.randn(2, 3, 32, 32))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
