"FixRes on many architectures: what is frozen stays bit for bit, the rest is trained, errors leave nothing behind"
import copy
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn

from noisy_student.dataloaders import ArrayDataset, PadCropFlip, mixed_dataloaders
from noisy_student.datasets import Split, Splits, digits, load_images
from noisy_student.learner import Noise, noisy_student_learner
from noisy_student.models import create_model
from noisy_student.resolution import EpochsDL, FreezeShallow, accuracy_by_size, fix_resolution
from noisy_student.rounds import NoisyStudent

ARCHS = {  # name: (constructor, the last normalization)
    'resnet9': (lambda: create_model('resnet9_4', 2), 'body.8.convs.1.1'),
    'timm resnet18': (lambda: timm.create_model('resnet18', num_classes=2), 'layer4.1.bn2'),
    'timm efficientnet_b0': (lambda: timm.create_model('efficientnet_b0', num_classes=2), 'bn2'),
    'timm convnext_atto': (lambda: timm.create_model('convnext_atto', num_classes=2), 'head.norm'),
    'torchvision resnet18': (lambda: torchvision.models.resnet18(num_classes=2), 'layer4.1.bn2'),
    'plain': (lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), '5'),
}

STATS = ([.4, .5, .6], [.2, .3, .4])

def data(n=20, size=32, classes=('a', 'b')):
    rng = np.random.default_rng(0)
    def pile(n): return Split(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), np.arange(n) % 2)
    return Splits(pile(n), pile(0), pile(6), pile(6), list(classes))

def learner(model=None, size=32, noise=Noise.none(), **kwargs):
    set_seed(0)
    d = data(size=size)
    dls = mixed_dataloaders((d.labeled.images, d.labeled.labels), (d.valid.images, d.valid.labels), d.classes, bs=8,
                            stats=STATS, augment=[PadCropFlip(2)])
    return noisy_student_learner(dls, ARCHS['resnet9'][0]() if model is None else model, noise, **kwargs)

def state(model): return copy.deepcopy(model.state_dict())
def settings(model):
    grads = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return [(n, m.training) for n, m in model.named_modules()], grads

class Watch(Callback):
    "Notes what the network is shown and how, in training and validation"
    order = 200
    def __init__(self): self.train, self.valid, self.lrs = [], [], []
    def before_batch(self):
        batch = tuple(o.as_subclass(torch.Tensor).clone() for o in (self.x, self.y))
        (self.train if self.training else self.valid).append(batch)
        if self.training:
            self.lrs.append(self.opt.hypers[-1]['lr'])
            self.modes, self.grads = map(dict, settings(self.learn.model))

@pytest.mark.parametrize('name', ARCHS)
def test_shallow_layers_are_frozen_bit_for_bit(name):
    make, first = ARCHS[name]
    torch.manual_seed(0)
    learn = learner(make())
    before, watch = state(learn.model), Watch()
    tuned = fix_resolution(learn, data(), 40, lr=1e-2, bs=8, cbs=[watch])
    frozen, trained = FreezeShallow().plan(learn.model)
    assert trained[0] == first and not set(frozen) & set(trained)
    after, owner = tuned.model.state_dict(), {k: k.rpartition('.')[0] for k in before}
    for k in before:
        if owner[k] in trained: assert not torch.equal(before[k], after[k]), f'{k} was not trained'
        else: assert torch.equal(before[k], after[k]), f'{k} was not frozen'
    names = [n for n, _ in tuned.model.named_modules()]
    for n in names: assert watch.modes[n] == (names.index(n) >= names.index(first)), n  # dropout too is off before it
    assert all(g == (owner[k] in trained) for k, g in watch.grads.items())

@pytest.mark.parametrize('name', ARCHS)
def test_all_is_as_before_afterwards(name):
    learn = learner(ARCHS[name][0]())
    learn.model.eval()
    before, was, opt, size = state(learn.model), settings(learn.model), learn.opt, learn.dls.size
    tuned = fix_resolution(learn, data(), 40, epochs=.4, bs=8)
    assert settings(learn.model) == was and learn.opt is opt and learn.dls.size == size
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert not {id(p) for p in learn.model.parameters()} & {id(p) for p in tuned.model.parameters()}
    assert settings(tuned.model)[1] == was[1]
    assert '_with_events' not in vars(tuned) and not any(isinstance(cb, FreezeShallow) for cb in tuned.cbs)

def test_everything_trains_again_afterwards():
    tuned = fix_resolution(learner(), data(), 40, bs=8)
    before = state(tuned.model)
    with tuned.no_bar(), tuned.no_logging(): tuned.fit(1, 1e-2)
    for k, v in tuned.model.state_dict().items(): assert not torch.equal(v, before[k]), k

class Boom(Exception): pass

@pytest.mark.parametrize('error', [Boom, KeyboardInterrupt])
def test_callback_restores_after_an_exception(error):
    learn = learner()
    learn.model.body[1][1].weight.requires_grad_(False)  # the user's own choice must survive
    class Fail(Callback):
        def after_backward(self):
            assert not self.learn.model.body[0][1].training and not self.learn.model.body[0][0].weight.requires_grad
            raise error('on purpose')
    was = settings(learn.model)[1]
    for at in (Fail(), None):
        with learn.no_bar(), learn.no_logging():
            if at: pytest.raises(error, learn.fit, 1, cbs=[FreezeShallow(), at])
            else: learn.fit(1, cbs=FreezeShallow())
        assert settings(learn.model)[1] == was
        if at: assert all(m.training for m in learn.model.modules())  # as fastai leaves it
        assert '_with_events' not in vars(learn)

def test_old_gradients_and_momentum_do_not_move_what_is_frozen():
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        before = state(learn.model)
        learn.fit(1, 1e-2, wd=.1, cbs=FreezeShallow())
    for k, v in learn.model.state_dict().items():
        assert torch.equal(before[k], v) != k.startswith(('fc', 'body.8.convs.1.1')), k

@pytest.mark.parametrize('epochs, bs', [(1.5, 8), (1, 8), (.3, 8), (.01, 8), (2.25, 7), (1.5, 64), (3, 20)])
def test_images_are_the_clean_ones_and_each_is_seen_as_often_as_said(epochs, bs):
    learn, d, watch = learner(noise=Noise(1, 5, .2, .8)), data(), Watch()  # the noise of the learner is not taken over
    tuned = fix_resolution(learn, d, 48, epochs, bs=bs, cbs=[watch])
    total = max(1, round(epochs * 20))
    sizes = [len(y) for _, y in watch.train]
    assert len(sizes) == math.ceil(total / bs) == len(watch.lrs) and sum(sizes) == total
    assert max(sizes) <= bs and max(sizes) - min(sizes) <= 1
    clean, labels = tuned.dls.clean_view(load_images(d.labeled.images, 48).images), d.labeled.labels
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in STATS)
    bilinear = [Image.fromarray(o).resize((48, 48), Image.Resampling.BILINEAR) for o in d.labeled.images]
    pixels = np.stack([np.asarray(o) for o in bilinear])
    torch.testing.assert_close(clean, (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    known = {o.numpy().tobytes(): i for i, o in enumerate(clean)}
    seen = [known[o.numpy().tobytes()] for x, _ in watch.train for o in x]
    assert [int(o) for _, y in watch.train for o in y] == [int(labels[i]) for i in seen]
    assert set(np.bincount(seen, minlength=20)) <= {math.floor(total / 20), math.ceil(total / 20)}
    assert all(x.shape[-2:] == (48, 48) for x, _ in watch.train + watch.valid) and watch.valid

def test_one_schedule_over_all_steps():
    watch = Watch()
    fix_resolution(learner(), data(), 40, 2.5, lr=1e-2, bs=1, cbs=[watch])
    peak = int(np.argmax(watch.lrs))
    assert len(watch.lrs) == 50 and abs(peak - 50 * .25) <= 1 and abs(max(watch.lrs) - 1e-2) < 1e-3
    assert np.all(np.diff(watch.lrs[:peak + 1]) > 0) and np.all(np.diff(watch.lrs[peak:]) < 0)

def test_order_is_seeded():
    def order(seed):
        watch = Watch()
        tuned = fix_resolution(learner(), data(), 40, bs=8, seed=seed, cbs=[watch])
        return torch.cat([x for x, _ in watch.train]), tuned.model.state_dict()
    (a, wa), (b, wb), (c, _) = order(0), order(0), order(1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.equal(wa[k], wb[k]) for k in wa)

def test_the_result_is_an_ordinary_learner_at_the_new_size(tmp_path):
    d = data()
    tuned = fix_resolution(learner(), d, 40, bs=8)
    assert tuned.dls.size == 40 and len(tuned.dls.train) == 3 and tuned.dls.vocab == d.classes
    assert tuned.dls.train.one_batch()[0].shape == (8, 3, 40, 40)
    loss, acc = tuned.recorder.values[-1][1:]
    assert np.allclose(tuned.validate(), [loss, acc], rtol=1e-5)
    probs, targs = tuned.get_preds(dl=tuned.dls.test_dl(d.valid.images))
    assert acc == pytest.approx((probs.argmax(1).numpy() == d.valid.labels).mean())
    assert accuracy_by_size(tuned, d.valid, [40])[40] == pytest.approx(acc)
    assert len(tuned.get_preds(ds_idx=0)[0]) == 20
    assert fix_resolution(tuned, d, 48, bs=8).dls.size == 48  # and again

def test_epochs_dl_goes_on_and_makes_plain_copies():
    d = data(10)
    dl = EpochsDL(ArrayDataset(d.labeled.images, d.labeled.labels, d.classes), bs=4, epochs=.5, seed=3)
    halves = [np.asarray(dl.get_idxs()) for _ in range(4)]
    for a, b in (halves[:2], halves[2:]): assert sorted([*a, *b]) == list(range(10))
    assert torch.cat([y for _, y in dl.new()]).tolist() == d.labeled.labels.tolist()

def test_data_blocks_and_files(tmp_path):
    "A learner of fastai's own data loaders, augmented; images are files, decoded again at the larger size"
    d = data(12, size=64)
    files = []
    for i, o in enumerate(d.labeled.images):
        files.append(str(tmp_path/f'{i}.png')); Image.fromarray(o).save(files[-1])
    tfms = [*aug_transforms(), Normalize.from_stats([.5] * 3, [.25] * 3, cuda=False)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(files[i]).resize((32, 32)),
                      get_y=lambda i: 'ab'[i % 2], splitter=IndexSplitter([0, 1, 2, 3]), batch_tfms=tfms)
    dls = block.dataloaders(range(12), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, ARCHS['plain'][0](), metrics=accuracy)
    own = Splits(Split(files, d.labeled.labels), Split([]), Split(files[:4], d.labeled.labels[:4]), None, ['a', 'b'])
    watch = Watch()
    fix_resolution(learn, own, 64, 1, bs=12, cache=tmp_path/'cache', cbs=[watch])
    x = torch.cat([x for x, _ in watch.train])
    pixels = {o.numpy().tobytes() for o in ((x * .25 + .5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)}
    assert pixels == {o.tobytes() for o in d.labeled.images}  # not enlarged from 32 px
    assert list((tmp_path/'cache').glob('images-64-*.npy'))
    (tmp_path/'7.png').write_text('no image')
    with pytest.raises(ValueError, match='7.png'): fix_resolution(learn, own, 64)

def test_learner_of_a_run_and_an_exported_one(tmp_path):
    d = digits(50)
    run = NoisyStudent(d, 'resnet9_4', tmp_path/'run', recipe='digits', rounds=0, teacher_epochs=1, steps=3, size=8)
    run.fit()
    learn = run.learner()
    assert accuracy_by_size(learn, d.test, [8])[8] == run.summary.test_accuracy[0]
    tuned = fix_resolution(learn, d, 12)
    learn.export(tmp_path/'learn.pkl')
    again = fix_resolution(load_learner(tmp_path/'learn.pkl'), d, 12)
    for a, b in zip(tuned.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    assert tuned.validate() == again.validate() and tuned.dls.size == 12

def test_accuracy_by_size():
    d, learn = data(), learner()
    learn.model.train(); learn.model.fc.eval()
    was, before = settings(learn.model), state(learn.model)
    got = accuracy_by_size(learn, d.test, [24, 32, 40], bs=4)
    assert settings(learn.model) == was and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in STATS)
    learn.model.eval()
    for size, acc in got.items():
        x = torch.from_numpy(load_images(d.test.images, size).images).permute(0, 3, 1, 2) / 255
        assert acc == (learn.model((x - mean) / std).argmax(1).numpy() == d.test.labels).mean()
    with pytest.raises(ValueError, match='no images with labels'): accuracy_by_size(learn, Split(d.test.images), [32])
    with pytest.raises(ValueError, match='no images with labels'): accuracy_by_size(learn, d.test[:0], [32])

@pytest.mark.parametrize('kwargs, message', [
    (dict(size=32), 'larger than the 32 px'), (dict(size=16), 'larger than the 32 px'), (dict(epochs=0), 'epochs=0'),
    (dict(epochs=-1.5), 'epochs=-1.5'), (dict(train_from='layer4'), "'layer4' is no layer"),
    (dict(train_from=''), 'nothing to freeze'), (dict(train_from='body.0'), 'nothing to freeze')])
def test_mistakes(kwargs, message):
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match=message): fix_resolution(learn, data(), **{'size': 40, **kwargs})
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())

def test_more_mistakes():
    with pytest.raises(ValueError, match='the same'): fix_resolution(learner(), data(classes=('b', 'a')), 40)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32 * 3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match='cannot take images of 40 px'): fix_resolution(learner(flat), data(), 40)
    with pytest.raises(ValueError, match='nothing to freeze'): FreezeShallow().plan(nn.Sequential(nn.Linear(3, 2)))
    conv = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    with pytest.raises(ValueError, match='nothing to train'): FreezeShallow('2').plan(conv)
    with pytest.raises(ValueError, match='no parameters'): FreezeShallow().plan(nn.Flatten())
    loaders = DataLoaders(*[torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)])] * 2)
    learn = Learner(loaders, ARCHS['plain'][0](), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match='fastai data loaders'): fix_resolution(learn, data(), 40)
