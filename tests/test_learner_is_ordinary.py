"What one does with a fastai `Learner`, done with what `noisy_student_learner` gives: our loaders and fastai's own"
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import IndexSplitter
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import load_learner
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorImage, norm_types, set_seed
from fastai.vision.all import ImageBlock, PILImage, PILImageBW, Resize
from functools import partial
from torch import nn

from noisy_student.dataloaders import ArrayItem, mixed_dataloaders
from noisy_student.learner import Noise, default_noise, noisy_student_learner
from noisy_student.losses import SoftLabelCrossEntropy, class_weights
from noisy_student.models import create_model, fine_tuning_groups, split_head
from noisy_student.stochastic_depth import ClassifierDropout, StochasticDepth

matplotlib.use('agg')
import matplotlib.pyplot as plt

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture
def quiet():
    set_seed(0)
    yield
    plt.close('all')

def drawn(n=48, size=16, seed=0):
    "uint8 (n, size, size, 3) and labels: bright in the upper or in the lower half"
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.integers(0, 120, (n, size, size, 3))
    for i, c in enumerate(y): x[i, size // 2 * c:size // 2 * (c + 1)] += 100
    return x.astype(np.uint8), y

def ours(pseudo=True, bs=8, size=16, **kw):
    x, y = drawn(size=size)
    soft = np.stack([.9 - .8 * y, .1 + .8 * y], 1).astype(np.float32)
    return mixed_dataloaders((x, y), drawn(20, size, 1), ['up', 'down'], pseudo=(x, soft) if pseudo else None, bs=bs,
                             **kw)

def fastais(cls=PILImage, **kw):
    x, y = drawn(60)
    block = DataBlock((ImageBlock(cls), CategoryBlock),
                      get_x=lambda i: cls.create(x[i] if cls is PILImage else x[i, ..., 0]),
                      get_y=lambda i: ['up', 'down'][y[i]], splitter=IndexSplitter(range(48, 60)), item_tfms=Resize(16))
    return block.dataloaders(range(60), bs=8, num_workers=0, **kw)

LOADERS = dict(mixed=ours, labeled=lambda: ours(False), fastai=fastais)
every = pytest.mark.parametrize('kind', LOADERS)

def learner(kind='mixed', arch='resnet9_4', noise=Noise(1, 3, .1, .95), **kw):
    learn = noisy_student_learner(LOADERS[kind]() if isinstance(kind, str) else kind, arch, noise, **kw)
    learn.logger = lambda *_: None
    learn.remove_cb(learn.progress)
    return learn

# --- interpretation

@every
@pytest.mark.parametrize('ds_idx', [0, 1])
def test_interpretation(kind, ds_idx):
    "Also of soft targets: by their most probable class, with the losses of the soft ones"
    learn = learner(kind)
    learn.fit(1)
    i = ClassificationInterpretation.from_learner(learn, ds_idx=ds_idx)
    n = len(i.losses)
    cm = i.confusion_matrix()
    assert cm.shape == (2, 2) and cm.sum() == n
    probs, targs = learn.get_preds(dl=i.dl)
    assert not targs.is_floating_point()
    assert cm.trace() == (probs.argmax(1) == targs).sum()
    i.plot_confusion_matrix()
    i.most_confused()
    i.print_classification_report()
    losses, idx, items = i.top_losses(3, items=True)
    assert losses[0] == i.losses.max() and len(items) == 3
    i.plot_top_losses(4)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    assert len(titles) == 4 and titles[0].split('/')[2].strip() == f'{losses[0]:.2f}'
    assert all(t.split('/')[0].strip() in ('up', 'down') and t.split('/')[1].split()[0] in ('up', 'down')
               for t in titles)
    i.show_results([0, 3])

def test_what_is_picked_is_what_was_judged():
    "The images of the top losses, in a mix of both piles, have those losses"
    learn = learner(noise=Noise.none())  # as in fastai, training batches are augmented for interpretation, too
    learn.fit(1)
    i = Interpretation.from_learner(learn, ds_idx=0)
    losses, idx, items = i.top_losses(10, items=True)
    assert all(isinstance(o, ArrayItem) and o.position == k for o, k in zip(items, idx.tolist()))
    dl = learn.dls.test_dl(items, with_labels=True)
    torch.testing.assert_close(learn.get_preds(dl=dl, with_loss=True)[2].float(), losses.float(), rtol=1e-4, atol=1e-5)
    want = learn.dls.train.dataset.batch(np.array([items[0].position]))
    assert np.array_equal(items[0].image, want[0][0].permute(1, 2, 0).numpy())
    assert torch.equal(items[0].target, want[1][0])

@every
def test_show(kind):
    learn = learner(kind)
    learn.dls.show_batch(max_n=2)
    for ds_idx in (0, 1): learn.show_results(ds_idx=ds_idx, max_n=3)

# --- training

@every
def test_lr_find(kind):
    learn = learner(kind)
    before = [p.clone() for p in learn.model.parameters()]
    found = learn.lr_find(num_it=12, show_plot=False, suggest_funcs=(SuggestionMethod.Steep,))
    assert 1e-7 <= found[0] <= 10
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))

@every
@pytest.mark.parametrize('opt', ['fastai', 'torch'])
def test_fine_tune(kind, opt):
    "It learns what half is bright"
    kw = {} if opt == 'fastai' else dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    learn = learner(kind, 'resnet9_8', Noise(1, 3, .1, .95), **kw)
    learn.fine_tune(8, 1e-2)
    assert learn.validate()[1] >= .8  # chance is .5
    assert all(p.requires_grad for p in learn.model.parameters())

def test_one_epoch_of_fine_tuning():
    """with the head alone first, from weights that were trained on the opposite labels: better than chance is what is
    new"""
    x, y = drawn()
    teacher = learner(mixed_dataloaders((x, 1 - y), (x, 1 - y), ['a', 'b'], bs=8, steps=40), noise=Noise.none())
    teacher.fit_one_cycle(1, 1e-2)
    assert teacher.validate()[1] > .8
    learn = learner(ours(steps=40), teacher.model, Noise(1, 3, .1, .95))
    assert learn.validate()[1] < .2
    learn.fine_tune(1, 1e-2)
    assert learn.validate()[1] > .8

@pytest.mark.parametrize('arch', ['resnet9_4', 'resnet18', 'tf_efficientnet_b0', 'convnext_atto'])
@pytest.mark.parametrize('opt', ['fastai', 'torch'])
def test_freeze(arch, opt):
    "A step after it changes the head, and of the body what normalizes, as on a `vision_learner`"
    kw = {} if opt == 'fastai' else dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    learn = learner(ours(steps=2, bs=4, size=32), arch, Noise.none(), **kw)
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(1, 1e-2)
    names = {id(p): k for k, p in learn.model.named_parameters()}
    top = {names[id(p)] for p in split_head(learn.model)[1]}
    norms = {f'{k}.{o}' for k, m in learn.model.named_modules() if isinstance(m, norm_types)
             for o in ('weight', 'bias')}
    moved = {k for k in names.values() if not torch.equal(before[k], learn.model.state_dict()[k])}
    assert moved == top | norms
    statistics = [k for k in before if k.endswith('running_mean')]
    assert all(not torch.equal(before[k], learn.model.state_dict()[k]) for k in statistics)

def test_freeze_without_batch_norms():
    learn = learner(ours(steps=2), 'resnet9_4', Noise.none(), train_bn=False)
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    learn.fit(1, 1e-2)
    assert {k for k, v in learn.model.named_parameters() if not torch.equal(v, before[k])} == {'fc.weight', 'fc.bias'}

def test_rates_differ_per_group():
    "`slice` rates reach the optimizer's groups, and a rate of 0 leaves its group alone"
    class Rates(Callback):
        def before_step(self): self.seen = [h['lr'] for h in self.opt.hypers]
    learn = learner(ours(steps=2), 'resnet18', Noise.none(), cbs=[rates := Rates()])
    learn.fit(1, slice(1e-5, 1e-3))
    assert np.allclose(rates.seen, [1e-5, 1e-4, 1e-3])
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert rates.seen[0] < rates.seen[1] < rates.seen[2]
    before = [[p.clone() for p in g] for g in fine_tuning_groups(learn.model)]
    learn.fit(1, np.array([0., 0., 1e-2]), wd=0.)
    same = [all(torch.equal(a, b) for a, b in zip(*o)) for o in zip(before, fine_tuning_groups(learn.model))]
    assert same == [True, True, False]

@every
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixup(kind, mix):
    learn = learner(kind, label_smoothing=.1)
    learn.fit(2, 1e-2, cbs=mix(.4))
    assert isinstance(learn.loss_func, SoftLabelCrossEntropy) and learn.loss_func.reduction == 'mean'
    assert torch.stack(learn.recorder.losses).isfinite().all()

class Unmixed(MixUp):  # lambda 1
    def before_batch(self):
        self.distrib = type('One', (), dict(sample=lambda self, shape: torch.ones(shape)))()
        super().before_batch()

@pytest.mark.parametrize('kw', [{}, dict(unlabeled_weight=3.), dict(weight=torch.tensor([1., 3.])),
                                dict(unlabeled_weight=3., weight=torch.tensor([1., 3.]))])
@pytest.mark.parametrize('kind', ['mixed', 'labeled'])
def test_mixup_that_mixes_nothing(kind, kw):
    "leaves the loss as it is"
    losses = []
    for cbs in ([], [Unmixed()]):
        set_seed(1)
        learn = learner(kind, noise=Noise.none(), loss_func=SoftLabelCrossEntropy(.1, 8, **kw), cbs=cbs)
        learn.fit(1, 0.)
        losses.append(torch.stack(learn.recorder.losses))
    torch.testing.assert_close(losses[0], losses[1])

@every
def test_half_precision(kind):
    learn = learner(kind).to_fp16()
    learn.fit(1)
    assert learn.validate()[0] > 0 and learn.model.fc.weight.dtype == torch.float32
    learn = learn.to_fp32()
    assert not any(isinstance(o, MixedPrecision) for o in learn.cbs)

def test_callbacks_that_watch(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(8, 0., cbs=EarlyStoppingCallback('accuracy', patience=1))
    assert learn.epoch < 7
    learn.fit(1, cbs=SaveModelCallback('accuracy', fname='best'))
    assert (tmp_path/'models'/'best.pth').exists()

def test_metrics():
    learn = learner(metrics=[accuracy, F1Score(average='macro')])
    learn.fit(1)
    assert learn.recorder.metric_names[3:5] == ['accuracy', 'f1_score'] and len(learn.validate()) == 3

# --- there and back

def up_or_down(i): return ['up', 'down'][i % 2]
def picture(i): return PILImage.create(drawn(60)[0][i])

@pytest.mark.parametrize('kind', ['mixed', 'fastai'])
def test_export(kind, tmp_path):
    if kind == 'fastai':  # functions that can be pickled
        block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=up_or_down,
                          splitter=IndexSplitter(range(48, 60)))
        learn = learner(block.dataloaders(range(60), bs=8, num_workers=0), class_weights=torch.tensor([1., 2.]))
    else: learn = learner(class_weights=torch.tensor([1., 2.]))
    learn.path = tmp_path
    learn.fine_tune(1)
    image = drawn(60)[0][3] if kind == 'mixed' else 3
    want = learn.predict(image)
    learn.export('net.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'net.pkl')
    again.remove_cbs([o for o in again.cbs if type(o).__name__ == 'ProgressCallback'])
    got = again.predict(image)
    assert str(got[0]) == str(want[0]) and torch.allclose(got[2], want[2], atol=1e-5)
    assert torch.equal(again.loss_func.weight, torch.tensor([1., 2.]))

def test_save_and_load(tmp_path):
    a, b = learner(path=tmp_path), learner(path=tmp_path)
    a.fine_tune(1)
    a.save('x')
    b.load('x')
    torch.testing.assert_close(a.get_preds()[0], b.get_preds()[0])

# --- what it decides

def test_class_weights():
    x, y = drawn(40)
    y = (np.arange(40) % 10 == 0).astype(int)
    w = class_weights(y, 2)
    learn = learner(mixed_dataloaders((x, y), (x, y), ['a', 'b'], bs=40), class_weights=w, noise=Noise.none())
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append((self.learn.loss_grad.detach(), self.pred.detach(), self.y))
    learn.fit(1, cbs=Look())
    loss, pred, targ = seen[0]
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(w)(pred, targ.as_subclass(torch.Tensor)))
    with pytest.raises(ValueError, match='class_weights must be None'):
        learner(class_weights=w, loss_func=nn.CrossEntropyLoss())

@pytest.mark.parametrize('cls,n', [(PILImage, 3), (PILImageBW, 1)])
def test_channels_are_those_of_the_images(cls, n):
    learn = learner(fastais(cls))
    assert split_head(learn.model)[0][0].shape[1] == n
    learn.fit(1)
    with pytest.raises(ValueError, match=f'n_in must be {n}'): learner(fastais(cls), n_in=2)

def test_looking_at_an_image_leaves_no_trace():
    "in the random numbers, and in the order of the images"
    states = []
    for look in (True, False):
        torch.manual_seed(3)
        dls, model = ours(), create_model('resnet9_4', 2)
        if look: noisy_student_learner(dls, model, Noise(1, 3, .1, .95))
        states.append((torch.get_rng_state(), dls.train.epoch))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]

@pytest.mark.parametrize('noise', [None, Noise(1, 3, .1, .95)])
def test_images_that_are_plain_tensors(noise):
    "are refused, as RandAugment would leave them alone without a word; TensorImages are not"
    x, y = drawn()
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    def dls(get_x):
        return DataBlock((TransformBlock(), CategoryBlock), get_x=get_x,
                         get_y=lambda i: int(y[i])).dataloaders(range(48), bs=8, num_workers=0)
    with pytest.raises(ValueError, match='must be TensorImage'):
        noisy_student_learner(dls(lambda i: x[i]), 'resnet9_4', noise)
    learner(dls(lambda i: x[i]), noise=Noise(randaugment_n=0, dropout=.1, survival=.9)).fit(1)
    learner(dls(lambda i: TensorImage(x[i])), noise=noise).fit(1)

def test_noise_by_capacity():
    "Never more for a smaller network, milder on small images and with weights; within range for every size"
    sizes = [10**5, 4 * 10**6, 8 * 10**6, 12 * 10**6, 20 * 10**6, 30 * 10**6, 45 * 10**6, 480 * 10**6]
    for size in (8, 32, 64, 96, 600):
        for pretrained in (False, True, 'package:x'):
            found = [default_noise(n, size, pretrained) for n in sizes]
            for a, b in zip(found, found[1:]):
                assert a.randaugment_m <= b.randaugment_m and a.dropout <= b.dropout and a.survival >= b.survival
            for o, plain in zip(found, [default_noise(n, 600) for n in sizes]):
                assert o.randaugment_m <= plain.randaugment_m
    assert default_noise(480 * 10**6, 600) == Noise()

@pytest.mark.parametrize('arch,kinds', [('resnet9_4', {ClassifierDropout, StochasticDepth}),
                                        ('vgg11', {ClassifierDropout}),
                                        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2), nn.Identity()),
                                         {ClassifierDropout})])
def test_noise_that_finds_nothing_is_left_out_by_default_only(arch, kinds):
    if not isinstance(arch, str): arch(torch.zeros(1, 3, 16, 16))
    dls = ours() if arch != 'vgg11' else mixed_dataloaders(drawn(8, 32), drawn(8, 32), ['a', 'b'], bs=4)
    learn = noisy_student_learner(dls, arch)
    assert {type(o) for o in learn.cbs} & {ClassifierDropout, StochasticDepth} == kinds
    assert 'BatchRandAugment' in [type(o).__name__ for o in learn.dls.train.after_batch.fs]
    if StochasticDepth not in kinds:
        with pytest.raises(ValueError, match='survival=1'): noisy_student_learner(dls, arch, Noise())

def test_first_loss_on_weights_is_that_of_chance(tmp_path):
    from noisy_student.models import save_weights
    file = save_weights(create_model('tf_efficientnet_b0', 9), tmp_path/'b0.safetensors')
    learn = learner(ours(steps=1), 'tf_efficientnet_b0', Noise.none(), pretrained=str(file))
    assert learn.validate()[0] == pytest.approx(np.log(2), abs=1e-5)

def test_functions_as_architectures():
    from torchvision.models import resnet18
    for arch in (resnet18, lambda n: create_model('resnet9_4', n)): learner(ours(steps=1), arch).fit(1)
