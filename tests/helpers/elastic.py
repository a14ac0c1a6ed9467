"""Models whose channels are cut: the zoo's and two odd ones, with weights drawn at random; and one small traced net."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from hetfl.models.state import tensors
from hetfl.models.zoo import CNN, MLP, FedAvgCNN, FedConvCNN, PreResNet, ResNet
from hetfl.submodel.tracing.groups import trace

ratios = st.floats(0.05, 1.0)


def fixture():
    torch.manual_seed(0)
    model = FedConvCNN(10, 1, 8)
    return tensors(model), trace(model, torch.randn(2, 1, 8, 8)), model


STATE, WIDTHS, MODEL = fixture()


NAMES = [n for n, _ in MODEL.named_parameters()]


class Shuffled(nn.Module):
    """Chunk, channel shuffle, transposed and depthwise transposed convolution, a raw scale, PReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.up, self.act = nn.ConvTranspose2d(16, 10, 2, 2), nn.PReLU(10)
        self.dw = nn.ConvTranspose2d(10, 10, 2, 2, groups=10)
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        left, right = (self.norm(self.a(x)) * self.scale).chunk(2, 1)
        x = torch.cat([torch.relu(self.b(left)), right], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.dw(self.act(self.up(x))).amax((2, 3)))


class Strange(nn.Module):
    """Residual, concatenation, depthwise and grouped convolution, a squeeze-excite gate."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 20, 1)
        self.dw = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.BatchNorm2d(32)
        self.gate = nn.Linear(32, 32)
        self.c = nn.Conv2d(32, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        a = torch.relu(self.a(x))
        y = self.norm(self.dw(torch.cat([a, self.b(a)], 1)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.head(nn.functional.adaptive_avg_pool2d(self.grouped(a + self.c(y)), 1).flatten(1))


NETS = {
    "mlp": (lambda: MLP(10, 1, 8), (1, 8, 8)),
    "fedconv-cnn": (lambda: FedConvCNN(10, 1, 28), (1, 28, 28)),
    "fedavg-cnn": (lambda: FedAvgCNN(10, 1, 28, (8, 16), 64), (1, 28, 28)),
    "cnn": (lambda: CNN(10, 1, (16, 32, 64)), (1, 28, 28)),
    "preresnet18": (lambda: PreResNet(10, 3, (16, 32, 64, 128)), (3, 32, 32)),
    "resnet18": (lambda: ResNet(10, 3, (16, 32, 64, 128)), (3, 32, 32)),
    "strange": (Strange, (3, 16, 16)),
    "shuffled": (Shuffled, (3, 8, 8)),
}


def traced_net(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, *shape)
    for tensor_name, tensor in tensors(model).items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor_name.endswith("var") else torch.randn_like(tensor) * 0.1)
    return model, x, trace(model, x)


def parameters(model):
    return sum(p.numel() for p in model.parameters())
