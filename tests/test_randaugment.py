"""RandAugment beyond the notebook: exhaustive parity with Pillow, worker processes, pickling, device."""
import copy
import pickle

import numpy as np
import pytest
import torch
from fastai.data.core import Datasets
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.vision.core import PILImage, PILMask, TensorImage
from PIL import Image, ImageOps

from noisy_student import batch_ops
from noisy_student.randaugment import KERAS_OPS, OPS, PAPER_OPS, BatchRandAugment, RandAugment, apply_op, op_argument

torch.set_num_threads(1)
FACTORS = (-.5, 0, .1, .5, 1, 1.9, 4.96, 20)
SHIFTS = (0, .49999999, .5, -.5, 1.5, -1.5, 4, -4, 10.499999, 10.8, -10.8, 100, -270, 1e6, -1e6)
SHEARS = (0, 1e-7, .3, -.3, .5, .81, -.81, 1, -1, 3.3, -50, 1000, -1e5)
VALUES = {
    'Rotate': (0, 1e-9, 13.7, 30, -30, 45, 60, 81, -81, 90, -90, 180, 270, 359.999, 1000.3),
    'ShearX': SHEARS, 'ShearY': SHEARS, 'TranslateX': SHIFTS, 'TranslateY': SHIFTS,
    'Color': FACTORS, 'Contrast': FACTORS, 'Brightness': FACTORS, 'Sharpness': FACTORS,
    'Posterize': (-1, 0, 1, 4, 4.7, 8, 10), 'Solarize': (-5, 0, 100.5, 128, 179, 256, 691),
    'SolarizeAdd': (-50, 0, 110, 297), 'Cutout': (-2, 0, 4, 10, 108)}


def images(h, w, c):
    rng, (y, x) = np.random.default_rng(h * w), np.mgrid[:h, :w]
    half = rng.integers(0, 256, (h, w, c))
    half[:h // 2] = 3
    arrays = np.stack([rng.integers(0, 256, (h, w, c)), np.full((h, w, c), 77), half,
                       np.stack([(7 * x + 3 * y * k) % 256 for k in range(c)], -1),
                       rng.integers(100, 104, (h, w, c)), rng.integers(0, 2, (h, w, c)) * 255]).astype(np.uint8)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2), [Image.fromarray(a if c == 3 else a[..., 0]) for a in arrays]


def tensor(img): return torch.from_numpy(np.array(img)).view(*img.size[::-1], -1).permute(2, 0, 1)


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('c', (1, 3))
def test_tensor_equals_pillow(name, c):
    for h, w in ((1, 1), (2, 5), (3, 3), (7, 9), (8, 8), (32, 32), (33, 47), (224, 224)):
        batch, imgs = images(h, w, c)
        for value in VALUES.get(name, (0,)):
            for reference in (False, True):
                out = apply_op(batch, name, value, (h // 3, w // 2), reference)
                expected = torch.stack([tensor(apply_op(i, name, value, (h // 3, w // 2), reference)) for i in imgs])
                assert torch.equal(out, expected), (value, reference, h, w)


def test_autocontrast_of_every_range():
    "All 32,640 pairs of darkest and brightest value: Pillow's double arithmetic truncates some exact quotients down"
    lo, hi = np.triu_indices(256, 1)
    ramp = np.clip(np.arange(256), lo[:, None], hi[:, None]).astype(np.uint8).reshape(-1, 1, 16, 16)
    out = apply_op(torch.from_numpy(ramp), 'AutoContrast')
    scale = 255. / (hi - lo)
    expected = np.clip(np.trunc(ramp.reshape(-1, 256) * scale[:, None] + (-lo * scale)[:, None]), 0, 255)
    assert np.array_equal(out.flatten(1).numpy(), expected)
    for k in range(0, len(lo), 997):  # and the formula is Pillow's
        assert np.array_equal(np.asarray(ImageOps.autocontrast(Image.fromarray(ramp[k, 0]))).ravel(), expected[k])


def test_memory_format_type_and_input_are_kept():
    batch, _ = images(32, 32, 3)
    before = batch.clone()
    tfm = BatchRandAugment(seed=0)
    draws = tfm.draw(len(batch), (32, 32))
    out = tfm.apply(batch, draws)
    assert torch.equal(tfm.apply(batch.contiguous(memory_format=torch.channels_last), draws), out)
    assert torch.equal(batch, before)
    assert type(apply_op(TensorImage(batch), 'Rotate', 3)) is TensorImage
    assert tfm(batch[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize('make', (RandAugment, BatchRandAugment))
def test_copies_and_pickles_continue_the_stream(make):
    x = images(32, 32, 3)[1][0] if make is RandAugment else images(32, 32, 3)[0]
    tfm = make(seed=4)
    tfm(x)
    twins = copy.deepcopy(tfm), pickle.loads(pickle.dumps(tfm))
    expected = tfm(x)
    for twin in twins: assert np.array_equal(np.asarray(twin(x)), np.asarray(expected))


def test_pil_and_batch_transforms_share_their_draws():
    batch, imgs = images(32, 32, 3)
    item, whole = RandAugment(seed=9, ops=OPS), BatchRandAugment(seed=9, ops=OPS)
    for _ in range(20): assert torch.equal(tensor(item(imgs[0])), whole(batch[:1])[0])


def test_draws_for_other_images_are_refused():
    batch, _ = images(32, 32, 3)
    tfm = BatchRandAugment(seed=0)
    with pytest.raises(ValueError, match='draws for 1 images'): tfm.apply(batch[:2], tfm.draw(1, (32, 32)))


def test_only_images_are_touched():
    mask = PILMask.create(np.eye(8, dtype=np.uint8))
    assert RandAugment(ops=('Invert',))((images(8, 8, 3)[1][0], mask))[1] is mask
    soft = torch.rand(4, 3, 8, 8)  # a target may look like a batch of images
    image, target = BatchRandAugment(n=1, ops=('Invert',))((TensorImage(torch.zeros(4, 3, 8, 8)), soft), split_idx=0)
    assert torch.equal(target, soft) and (image == 1).all()
    for split_idx in (1, None): assert BatchRandAugment()(soft, split_idx=split_idx) is soft


@pytest.mark.parametrize('seed', (None, 7))
def test_worker_processes_have_their_own_streams(seed):
    "Thirty-two copies of one image, two workers, two epochs: no worker repeats the other, no epoch the one before"
    img = PILImage.create(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def epochs():
        torch.manual_seed(0)
        tfm = RandAugment(n=2, ops=('Rotate', 'TranslateX', 'ShearX'), schedule='random', seed=seed)
        dsets = Datasets(range(48), [[lambda i: img]], splits=(range(32), range(32, 48)))
        dls = dsets.dataloaders(bs=4, shuffle=False, num_workers=2, after_item=[tfm, ToTensor()],
                                after_batch=[IntToFloatTensor()], device='cpu')
        return [torch.cat([b[0] for b in dl]).as_subclass(torch.Tensor) for dl in (dls.train, dls.train, dls.valid)]

    first, second, valid = epochs()
    assert len(torch.cat([first, second]).unique(dim=0)) > 60
    assert len(valid.unique(dim=0)) == 1
    for a, b in zip((first, second, valid), epochs()): assert torch.equal(a, b)


def test_arguments_of_the_presets():
    assert KERAS_OPS == tuple(o for o in OPS[:14] if o != 'Invert') and PAPER_OPS[-1] == 'TranslateY'
    assert op_argument('TranslateX', 10, 32) == op_argument('Cutout', 10, 32) == 4
    m = np.array([0., 5, 10, 27])
    for name in OPS:  # an array of magnitudes gives what they give one by one
        for reference in (False, True):
            one_by_one = [op_argument(name, i, 96, reference) for i in m]
            assert np.array_equal(op_argument(name, m, 96, reference), one_by_one)


def test_the_way_of_other_devices_is_the_same(monkeypatch):
    "What a CPU does in a way of its own (lookup, histogram, write) equals what tensors of other devices go through"
    for c, size in ((1, (7, 9)), (3, (32, 32)), (3, (260, 260))):  # the last: blocks of one image
        batch = images(*size, c)[0].repeat(12 if size[0] < 64 else 4, 1, 1, 1)
        tfm = BatchRandAugment(n=3, m=8, ops=OPS, seed=0)
        draws = tfm.draw(len(batch), size)
        expected, before = tfm.apply(batch, draws), batch.clone()
        with monkeypatch.context() as patch:
            patch.setattr(batch_ops, '_on_cpu', lambda x: False)
            assert torch.equal(tfm.apply(batch, draws), expected)
        assert torch.equal(batch, before)
        assert tfm.apply(batch.to('meta'), draws).shape == batch.shape  # has no data: nothing may wait for any


def test_many_draws_at_once_are_those_one_by_one():
    "The arguments as the reference writes them, draw by draw, to the last bit"
    px, rotate, shear, blend = {40: 5., 100: 100 * (100 / 224)}, *(lambda m, k=k, o=o: k * m + o
                                                                   for k, o in ((30, 0), (.3, 0), (1.8, .1)))
    def argument(name, m, size, reference):
        whole = dict(Posterize=(4 * m, 1, 8), Solarize=(256 * m, 0, 256), SolarizeAdd=(110 * m, 0, np.inf),
                     Cutout=((5. if size == 40 else 40 * (size / 224)) * m, 0, np.inf))
        if name in whole:
            v, low, high = whole[name]
            return np.trunc(v) if reference else min(max(np.trunc(v), low), high)
        if name.startswith('Translate'): return px[size] * m
        if name.startswith('Shear'): return shear(m)
        if name in ('Color', 'Contrast', 'Brightness', 'Sharpness'): return blend(m)
        return rotate(m) if name == 'Rotate' else 0.
    for size, schedule, reference in ((40, 'constant', False), (100, 'growing', False), (40, 'random', True)):
        tfm = BatchRandAugment(2, 27.3, ops=OPS, schedule=schedule, reference=reference, seed=5)
        tfm.progress = .37
        twin = copy.deepcopy(tfm)
        draws, u = tfm.draw(200, (size, size + 3)), torch.rand(2, 200, 5, dtype=torch.float64,
                                                               generator=twin._generator()).numpy()
        for at in np.ndindex(2, 200):
            name, (_, k, coin, y, x) = OPS[int(u[at][0] * 16)], u[at]
            m = 27.3 * (tfm.progress if schedule == 'growing' else 1.) * (k if schedule != 'constant' else 1.)
            v = argument(name, m / 10, size, reference)
            signed = name in ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
            assert OPS[draws.op[at]] == name and draws.value[at] == (-v if signed and coin < .5 else v), (name, m)
            assert tuple(draws.center[at]) == (int(y * size), int(x * (size + 3)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_device_equals_host_and_never_synchronizes():
    for size in (32, 96):
        batch, _ = images(size, size, 3)
        tfm = BatchRandAugment(n=3, ops=OPS, seed=0)
        batch = batch.repeat(32, 1, 1, 1)
        draws = tfm.draw(len(batch), (size, size))
        expected, on_device = tfm.apply(batch, draws), batch.cuda()
        assert torch.equal(tfm.apply(on_device, draws).cpu(), expected)
        torch.cuda.set_sync_debug_mode('error')
        try: tfm.apply(on_device, draws)
        finally: torch.cuda.set_sync_debug_mode('default')
