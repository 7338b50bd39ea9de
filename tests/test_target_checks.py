"One class per image, from logits, of images whose view is known: what does not fit is refused before it is used."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.transforms import parent_label
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, MSELossFlat
from fastai.tabular.data import TabularDataLoaders
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import RandomCrop, Resize
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock, MaskBlock
from fastcore.basics import noop
from PIL import Image
from torch import nn

from noisy_student.datasets import ImageFileError, Split, Splits, load_image
from noisy_student.learner import noisy_student_learner
from noisy_student.network import Network
from noisy_student.pseudo_labels import predict_pseudo_labels
from noisy_student.rounds import NoisyStudent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Names of sixteen images of two classes"
    folder, rng, out = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0), []
    for i in range(16):
        file = folder/'ab'[i % 2]/f'{i}.png'
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
        out.append(str(file))
    return out

def loaders(names, target=CategoryBlock, get_y=parent_label, image=ImageBlock, **kw):
    kw.setdefault('item_tfms', Resize(16))
    return DataBlock((image, target), get_y=get_y, **kw).dataloaders(names, bs=4, num_workers=0)

def linear(*more, n=2): return nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, n), *more)

def pixels(n=40): return np.random.default_rng(1).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)

def said(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f()
    return ' '.join(str(o.message) for o in found)

TARGETS = [(MultiCategoryBlock, lambda f: [f[-5]], 'several labels'), (RegressionBlock, lambda f: len(f), 'a number'),
           (MaskBlock, lambda f: np.zeros((20, 24), np.uint8), 'a mask'), (TransformBlock, lambda f: .5, 'a number'),
           (TransformBlock, lambda f: torch.tensor([1., 1.]), 'several labels')]

@pytest.mark.parametrize('block,get_y,kind', TARGETS)
def test_targets_of_another_kind_are_refused_by_everyone(pictures, tmp_path, block, get_y, kind):
    dls = loaders(pictures, block, get_y)
    learn = Learner(dls, linear(), CrossEntropyLossFlat())
    for f in (lambda: noisy_student_learner(dls, 'resnet9_4', n_out=2), lambda: Network.of(learn, 'linear'),
              lambda: predict_pseudo_labels(learn, pictures, tmp_path/'labels')):
        with pytest.raises(ValueError, match=f'one class per image as target, got {kind}'): f()

def test_two_targets_and_a_measured_column_are_refused(pictures):
    dls = DataBlock((ImageBlock, CategoryBlock, CategoryBlock), n_inp=1, item_tfms=Resize(16),
                    getters=[noop, parent_label, parent_label]).dataloaders(pictures, bs=4, num_workers=0)
    with pytest.raises(ValueError, match='got 2 targets'): noisy_student_learner(dls, 'resnet9_4')
    table = pd.DataFrame(dict(x=np.arange(8.), y=np.arange(8.) / 7))
    dls = TabularDataLoaders.from_df(table, cont_names=['x'], y_names='y', bs=4)
    with pytest.raises(ValueError, match='got a number'): noisy_student_learner(dls, nn.Linear(1, 2), n_out=2)

def test_looking_at_targets_draws_no_random_number(pictures):
    dls, model = loaders(pictures, item_tfms=[Resize(18), RandomCrop(16)]), linear()
    def drawn(f):
        set_seed(0)
        f()
        return float(torch.rand(())), np.random.rand()
    assert drawn(lambda: noisy_student_learner(dls, model, loss_func=F.cross_entropy)) == drawn(lambda: None)

@pytest.mark.parametrize('loss', [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(), MSELossFlat(), F.mse_loss,
                                  nn.CrossEntropyLoss(torch.ones(3)), nn.KLDivLoss()])
def test_a_loss_that_does_not_fit_is_refused(pictures, loss):
    with pytest.raises(ValueError, match='loss_func must'):
        noisy_student_learner(loaders(pictures), 'resnet9_4', loss_func=loss)

def odd(pred, targ): raise TypeError # a loss that needs what is there in training only

@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss(torch.ones(2)), FocalLossFlat(), odd])
def test_other_losses_are_not(pictures, loss):
    noisy_student_learner(loaders(pictures), 'resnet9_4', loss_func=loss)

class Inside(nn.Module):
    def __init__(self): super().__init__(); self.body = linear()
    def forward(self, x): return (20 * self.body(x)).softmax(1)

@pytest.mark.parametrize('model', [linear(nn.Softmax(1)), nn.DataParallel(linear(nn.Softmax(1))), linear(nn.Sigmoid())])
def test_a_network_that_ends_in_probabilities_is_refused(pictures, tmp_path, model):
    for f in (lambda: noisy_student_learner(loaders(pictures), model), lambda: Network(model, 'x', 'ab', 16),
              lambda: noisy_student_learner(loaders(pictures), lambda n_out: model),
              lambda: predict_pseudo_labels(model, pixels(), tmp_path/'labels')):
        with pytest.raises(ValueError, match='must give logits'): f()

def test_a_softmax_that_only_the_numbers_show_is_warned_of_once(pictures, tmp_path):
    assert said(lambda: predict_pseudo_labels(Inside(), pixels(), tmp_path/'labels', bs=8)).count('its softmax') == 1
    learn = noisy_student_learner(loaders(pictures), Inside())
    def train():
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert said(train).count('its softmax') == 1
    assert 'softmax' not in said(lambda: predict_pseudo_labels(linear(nn.LogSoftmax(1)), pixels(), tmp_path/'log'))

def test_a_network_of_other_width_is_refused(pictures):
    for n in (1, 1000):
        with pytest.raises(ValueError, match='must make 2 outputs'):
            noisy_student_learner(loaders(pictures), linear(n=n))

def test_batches_of_plain_tensors_are_refused_where_something_is_to_act_on_them(pictures):
    def dls(kind):
        return loaders(pictures, image=TransformBlock, get_x=lambda f: kind(torch.rand(3, 16, 16)), item_tfms=None)
    with pytest.raises(ValueError, match='must be TensorImage for RandAugment'):
        noisy_student_learner(dls(torch.Tensor), 'resnet9_4')
    learn = noisy_student_learner(dls(TensorImage), 'resnet9_4')
    assert 'BatchRandAugment' in [type(o).__name__ for o in learn.dls.train.after_batch.fs]

# What the teacher sees

def gap(learn, names, folder): # between its labels and what `get_preds` says
    mine = np.stack(pd.read_parquet(predict_pseudo_labels(learn, names, folder)).probs.to_list()).astype(float)
    with learn.no_bar(): return abs(mine - learn.get_preds(dl=learn.dls.test_dl(names, bs=4))[0].numpy()).max()

def strong(channels=3): # a network whose outputs change with every pixel
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256 * channels, 2))
    model[1].weight.data.mul_(10)
    return model

def turned(folder, names):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, o in enumerate(names[:4]): Image.open(o).save(folder/f'{i}.jpg', exif=exif)
    return [str(folder/f'{i}.jpg') for i in range(4)]

def deep(folder, names):
    for i, o in enumerate(names[:4]):
        Image.fromarray(np.asarray(Image.open(o).convert('L')).astype(np.uint16) * 257).save(folder/f'{i}.png')
    return [str(folder/f'{i}.png') for i in range(4)]

VIEWS = dict(plain={}, cropped=dict(get_x=lambda f: PILImage.create(f).crop((0, 0, 20, 12))),
             gray=dict(image=ImageBlock(PILImageBW)), looked_up=dict(image=ImageBlock(PILImageBW), get_x=lambda f: f))

@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('pool', [lambda _, names: names, turned, deep])
def test_the_teacher_sees_what_get_preds_sees(pictures, tmp_path, view, pool):
    model = strong(1 if 'image' in VIEWS[view] else 3)
    learn = Learner(loaders(pictures, **VIEWS[view]), model, CrossEntropyLossFlat())
    assert gap(learn, pool(tmp_path, pictures), tmp_path/'labels') < 1e-3

def test_the_teacher_of_a_learner_decodes_nothing_that_acts(pictures, tmp_path):
    Image.open(pictures[0]).save(tmp_path/'0.eps')
    (tmp_path/'0.eps').rename(tmp_path/'0.png')
    learn = Learner(loaders(pictures), strong(), CrossEntropyLossFlat())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder = predict_pseudo_labels(learn, [*pictures[:2], str(tmp_path/'0.png')], tmp_path/'labels')
    assert [Path(o).name for o in pd.read_csv(next(folder.glob('_skipped*'))).item] == ['0.png']

class Flip(Callback):
    def before_batch(self): self.learn.xb = (self.xb[0].flip(-1),)

class Sharper(Callback):
    def after_pred(self): self.learn.pred = self.pred * 2

class FlipInTraining(Callback):
    def before_batch(self):
        if self.training: self.learn.xb = (self.xb[0].flip(-1),)

class ChannelsLast(Callback):
    def before_batch(self): self.learn.xb = tuple(o.contiguous(memory_format=torch.channels_last) for o in self.xb)

def test_callbacks_that_change_what_is_seen_are_refused_and_others_are_not(pictures, tmp_path):
    learn = Learner(loaders(pictures), strong(), CrossEntropyLossFlat())
    for i, cb in enumerate((Flip, Sharper)):
        with learn.added_cbs(cb()), pytest.raises(ValueError, match=f'got {cb.__name__}'):
            predict_pseudo_labels(learn, pictures, tmp_path/f'{i}')
    with learn.added_cbs([FlipInTraining(), ChannelsLast()]): assert gap(learn, pictures, tmp_path/'labels') < 1e-3

# Images and labels

@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm', 'a.jp2'])
def test_sixteen_bits_are_scaled_by_their_white_and_not_by_the_brightest_pixel(tmp_path, name):
    values = np.array([[0, 200, 255, 257], [4095, 30_000, 65_000, 65_535]] * 8, dtype=np.uint16).repeat(4, 1)
    Image.fromarray(values).save(tmp_path/name, **(dict(irreversible=False) if name == 'a.jp2' else {}))
    assert (np.asarray(load_image(tmp_path/name))[..., 0] == (values / 257).round()).all()
    Image.fromarray(np.minimum(values, 255)).save(tmp_path/name)
    assert np.asarray(load_image(tmp_path/name)).max() == 1

@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_numbers_without_a_white_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path/'a.tif')
    with pytest.raises(ImageFileError, match='which of them is white'): load_image(tmp_path/'a.tif')

@pytest.mark.parametrize('labels', [[0, .7, 1], [0, 1, np.nan], ['0', '1', '1'], [0, 1, None]])
def test_labels_that_are_no_positions_are_refused(labels):
    with pytest.raises(ValueError, match='labels must be whole numbers'): Split(list('abc'), labels)

def test_whole_labels_of_any_type_are_taken():
    for labels in ([0., 1., 1.], pd.Series([0, 1, 1], dtype='Int64'), torch.tensor([0, 1, 1]), [False, True, True]):
        assert Split(list('abc'), labels).labels.tolist() == [0, 1, 1]

def splits(images, classes, valid=None):
    labeled = Split(images[:4], [0, 1, 0, 1])
    return Splits(labeled, Split(images[4:]), valid or labeled, None, classes)

def test_a_class_has_one_name_whatever_its_type():
    assert splits(pixels(8), [1, 2.]).classes == splits(pixels(8), ['1', '2']).classes == ['1', '2']
    for twice in (['crane', 'crane'], [1, '1'], [1., 1]):
        with pytest.raises(ValueError, match='different names'): splits(pixels(8), twice)

def test_a_file_is_listed_once_whatever_way_it_is_spelled(tmp_path):
    names = [str(tmp_path/o) for o in ('a', 'b', 'c', 'x/../a', 'e', 'f')]
    with pytest.raises(ValueError, match="twice with the labels 'cat' and 'dog'"): splits(names, ['cat', 'dog'])
    names = [str(tmp_path/o) for o in ('a', 'b', 'c', 'd', 'e', './e')]
    with pytest.raises(ValueError, match='unlabeled images must be different files'): splits(names, ['cat', 'dog'])

def test_what_can_be_known_is_said_before_training(tmp_path):
    images = pixels(12)
    one = Split(images[:2], [0, 0])
    text = said(lambda: NoisyStudent(splits(images, ['cat', 'dog'], one), ['resnet9_4'], tmp_path/'run', rounds=1,
                                     epochs=1, force=True, progress=lambda *_: None))
    assert "no validation image of class 'dog'" in text
    names = [f'{o}.png' for o in 'abcd'] + ['caf\udce9.png']
    with pytest.raises(ValueError, match=r"must be UTF-8.*caf\\udce9") as e:
        NoisyStudent(splits(names, ['cat', 'dog']), ['resnet9_4'], tmp_path/'other', rounds=1, size=16)
    str(e.value).encode('ascii')
    assert not (tmp_path/'other'/'round_0').exists()
