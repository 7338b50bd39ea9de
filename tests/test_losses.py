"SoftLabelCrossEntropy beside PyTorch's own, and in learners with fastai's other callbacks"
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noisy_student.losses import (HardTargets, SoftLabelCrossEntropy, class_weights, temperature_probs,
                                  temperature_softmax)


@given(b=st.integers(1, 9), k=st.integers(2, 12), eps=st.floats(0, .9), seed=st.integers(0, 999),
       reduction=st.sampled_from(['mean', 'sum', 'none']), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equals_torch(b, k, eps, seed, reduction, dtype):
    "Integers, one-hot rows declared as labeled, and soft rows: value and gradient"
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(b, k, generator=g, dtype=dtype)
    y = torch.randint(k, (b,), generator=g)
    q = torch.randn(b, k, generator=g, dtype=dtype).softmax(-1)
    onehot = F.one_hot(y, k).to(dtype)
    cases = [(SoftLabelCrossEntropy(eps, reduction=reduction), y, y, eps),
             (SoftLabelCrossEntropy(eps, reduction=reduction), y.to(torch.int32), y, eps),
             (SoftLabelCrossEntropy(eps, labeled=b, reduction=reduction), onehot, y, eps),
             (SoftLabelCrossEntropy(eps, reduction=reduction), q, q, 0.),
             (SoftLabelCrossEntropy(eps, labeled=0, reduction=reduction), q, q, 0.)]
    for loss, targ, theirs, smoothing in cases:
        a, c = z.clone().requires_grad_(), z.clone().requires_grad_()
        ours = loss(a, targ)
        expected = F.cross_entropy(c, theirs, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        ours.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(a.grad, c.grad, rtol=1e-4, atol=1e-5)

@given(b=st.integers(1, 6), r=st.integers(1, 7), eps=st.floats(0, .5), seed=st.integers(0, 999))
def test_reference_is_longer_paper(b, r, eps, seed):
    g = torch.Generator().manual_seed(seed)
    z, q = torch.randn(b * (1 + r), 4, generator=g), torch.randn(b * (1 + r), 4, generator=g).softmax(-1)
    paper, reference = SoftLabelCrossEntropy(eps, labeled=b), SoftLabelCrossEntropy(eps, labeled=b, unlabeled_weight=r)
    torch.testing.assert_close(reference(z, q), (1 + r) * paper(z, q), rtol=1e-4, atol=1e-5)

def test_targets_are_not_changed():
    q = torch.eye(3)
    SoftLabelCrossEntropy(.1, labeled=2)(torch.randn(3, 3), q)
    assert torch.equal(q, torch.eye(3))

def test_autocast():
    "Logits in half precision, and a loss computed inside autocast, are as exact as in float32"
    torch.manual_seed(0)
    z, q = torch.randn(64, 1000).bfloat16(), torch.randn(64, 1000).softmax(-1)
    exact = SoftLabelCrossEntropy()(z.double(), q.double())
    with torch.autocast('cpu', torch.bfloat16): loss = SoftLabelCrossEntropy()(z, q)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)

def test_copies():
    loss = SoftLabelCrossEntropy(.1, labeled=3, unlabeled_weight=2.)
    z, q = torch.randn(5, 3), torch.rand(5, 3).softmax(-1)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert torch.equal(other(z, q), loss(z, q))

@pytest.mark.parametrize('kw,word', [
    (dict(label_smoothing=1.), 'label_smoothing'), (dict(label_smoothing=-.1), 'label_smoothing'),
    (dict(labeled=-1), 'labeled'), (dict(unlabeled_weight=2.), 'labeled'), (dict(labeled=2, unlabeled_weight=-1.), '0'),
    (dict(reduction='average'), 'reduction')])
def test_settings(kw, word):
    with pytest.raises(ValueError, match=word): SoftLabelCrossEntropy(**kw)

@pytest.mark.parametrize('t', [0., -1., float('nan')])
def test_temperature_range(t):
    for f in (temperature_softmax, temperature_probs):
        with pytest.raises(ValueError, match='temperature'): f(torch.rand(2, 3), t)

@given(t=st.floats(.05, 20), seed=st.integers(0, 999))
def test_temperature_keeps_order(t, seed):
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    a, b = temperature_softmax(z, t), temperature_probs(z.softmax(-1), t)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(b.sum(-1), torch.ones(4))
    assert torch.equal(b.argmax(-1), z.argmax(-1))


def learner(*cbs, train_metrics=True, soft=True):
    torch.manual_seed(0)
    y = torch.arange(32) % 3
    x = torch.randn(32, 2) + torch.eye(3)[y][:, :2] * 2
    q = (.8 * F.one_hot(y, 3) + .2 / 3) if soft else y
    dls = DataLoaders.from_dsets(list(zip(x, q)), list(zip(x, y)), bs=8, shuffle=False, device='cpu', num_workers=0)
    learn = Learner(dls, nn.Linear(2, 3), loss_func=SoftLabelCrossEntropy(), metrics=accuracy, cbs=list(cbs), lr=.1)
    learn.remove_cb(ProgressCallback)
    learn.recorder.train_metrics, learn.logger = train_metrics, lambda *a: None
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

class SeesSoft(Callback):
    "Fails if anything before the end of a training batch gets hard targets"
    order = 95
    def check(self): assert not self.training or self.learn.y.is_floating_point()
    after_pred = after_loss = before_backward = after_step = check

class Right(Callback):
    "Whether the largest logit is that of the most probable class, for each item that an epoch trains on"
    def before_epoch(self): self.found = []
    def after_pred(self):
        if self.training: self.found.append(self.pred.argmax(-1) == self.y.argmax(-1))

def test_hard_targets_change_metrics_only():
    plain, hard = learner(train_metrics=False), learner(HardTargets(), SeesSoft(), right := Right())
    for learn in (plain, hard): learn.fit(3)
    assert torch.equal(weights(plain), weights(hard))
    assert plain.recorder.losses == hard.recorder.losses
    assert hard.recorder.values[-1][1] == pytest.approx(torch.cat(right.found).float().mean().item())
    with pytest.raises(AssertionError, match='Recorder'): learner().fit(1)

def test_hard_targets_with_integers():
    learn = learner(HardTargets(), soft=False)
    learn.fit(1)
    assert learn.dls.train.one_batch()[1].dtype == torch.int64

def test_gradient_accumulation():
    plain = learner(GradientAccumulation(16), train_metrics=False)
    hard = learner(GradientAccumulation(16), HardTargets())
    for learn in (plain, hard): learn.fit(2)
    assert torch.equal(weights(plain), weights(hard))

def test_mixup():
    "fastai's MixUp mixes the losses of two integer targets, row by row"
    learn = learner(MixUp(.4), train_metrics=False, soft=False)
    before = weights(learn)
    learn.fit(1)
    assert learn.loss_func.reduction == 'mean' and not torch.equal(weights(learn), before)
    soft = learner(MixUp(.4), train_metrics=False)
    soft.fit(1)

def _mixed_batch(seed=0, n=4, m=8, k=5):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(n + m, k, generator=g), torch.randint(k, (n,), generator=g)
    return z, torch.cat([F.one_hot(y, k).float(), torch.randn(m, k, generator=g).softmax(-1)]), y

@given(b=st.integers(1, 9), k=st.integers(2, 12), eps=st.floats(0, .9), seed=st.integers(0, 999),
       reduction=st.sampled_from(['mean', 'sum', 'none']))
def test_class_weights_are_those_of_torch(b, k, eps, seed, reduction):
    "For labels, and for one-hot rows that say the same: value and gradient"
    g = torch.Generator().manual_seed(seed)
    z, y, w = torch.randn(b, k, generator=g), torch.randint(k, (b,), generator=g), torch.rand(k, generator=g) + .1
    theirs = nn.CrossEntropyLoss(w, reduction=reduction, label_smoothing=eps)
    for labeled, targ in ((None, y), (b, F.one_hot(y, k).float())):
        a, c = z.clone().requires_grad_(), z.clone().requires_grad_()
        ours, want = SoftLabelCrossEntropy(eps, labeled, reduction=reduction, weight=w)(a, targ), theirs(c, y)
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
        ours.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(a.grad, c.grad, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('unlabeled_weight', [None, 3.])
@pytest.mark.parametrize('weight', [None, torch.tensor([.5, 1., 2., 0., 4.])])
@pytest.mark.parametrize('hard', [True, False])
def test_rows_for_mixup_have_the_mean_that_was_asked_for(unlabeled_weight, weight, hard):
    "fastai sets `reduction` to 'none' in training and averages; a user's own 'none', and `get_preds`, get plain rows"
    z, q, y = _mixed_batch()
    if hard: z, q = z[:4], y
    loss = SoftLabelCrossEntropy(.1, 4, unlabeled_weight, weight=weight)
    rows = SoftLabelCrossEntropy(.1, 4, unlabeled_weight, reduction='none', weight=weight)
    want, plain = loss(z, q), rows(z, q)
    loss.reduction = 'none'
    torch.testing.assert_close(loss(z.clone().requires_grad_(), q).mean(), want)
    assert torch.equal(loss(z, q), plain) and torch.equal(rows(z.clone().requires_grad_(), q), plain)

def test_class_weights_are_for_labels_and_not_for_pseudo_labels():
    z, q, y = _mixed_batch()
    w = torch.tensor([.5, 1., 2., 3., 4.])
    rows = SoftLabelCrossEntropy(0., 4, reduction='none', weight=w)(z, q)
    plain = SoftLabelCrossEntropy(0., 4, reduction='none')(z, q)
    torch.testing.assert_close(rows, torch.cat([w[y] * plain[:4], plain[4:]]))
    torch.testing.assert_close(SoftLabelCrossEntropy(0., 4, weight=w)(z, q), rows.sum() / (w[y].sum() + 8))
    # no row is told apart
    torch.testing.assert_close(SoftLabelCrossEntropy(0., weight=w, reduction='none')(z, q)[4:],
                               -(q * w * z.log_softmax(1)).sum(1)[4:])

def test_a_batch_of_labels_without_weight_costs_nothing():
    z = torch.randn(3, 2, requires_grad=True)
    loss = SoftLabelCrossEntropy(weight=torch.tensor([0., 1.]))(z, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros(3, 2))

def test_weights_of_classes_like_scikit_learn():
    skl = pytest.importorskip('sklearn.utils.class_weight')
    y = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    want = skl.compute_class_weight('balanced', classes=torch.arange(4).numpy(), y=y.numpy())
    torch.testing.assert_close(class_weights(y, 4), torch.tensor(want).float())
    for bad, word in ((torch.rand(3), 'class indices'), ([0, 4], '0 to 3'), ([], 'integers')):
        with pytest.raises(ValueError, match=word): class_weights(bad, 4)
    with pytest.raises(ValueError, match="'balanced'"): class_weights(y, 4, 'rare')
    for bad in (torch.tensor([1., -1.]), torch.zeros(3), torch.ones(2, 2)):
        with pytest.raises(ValueError, match='weight'): SoftLabelCrossEntropy(weight=bad)
