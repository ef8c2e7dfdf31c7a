"""models.layer: FanInLinear is nn.Linear with a mask, in forward, gradient and use."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.library import opcheck

from models.head import Block, HeadError
from models.layer import FanInLinear, grad_input, grad_values, scores

CONNECTIVITIES = ("shared", "private", "dense")
D, L, K, G = 24, 37, 5, 16  # 37 is no multiple of 16: the last group is padded


def layer(connectivity: str = "shared", *, seed: int = 0, **options: object) -> FanInLinear:
    """A layer with a random bias."""
    fan_in = None if connectivity == "dense" else K
    generator = torch.Generator().manual_seed(seed)
    made = FanInLinear(
        D, L, **{"fan_in": fan_in, "connectivity": connectivity, "group_size": G, "generator": generator} | options
    )
    if made.bias is not None:
        nn.init.normal_(made.bias, generator=generator)
    return made


def unpacked(sparse: FanInLinear, values: Tensor) -> Tensor:
    """The dense matrix [L, D] that `values` [N, K, G] stands for, label by label."""
    weight = torch.zeros(sparse.out_features, sparse.in_features, dtype=values.dtype)
    for label in range(sparse.out_features):
        n, g = divmod(label, values.shape[2])
        if sparse.indices is None:
            weight[label] = values[n, :, g]
        else:
            inputs = sparse.indices[n] if sparse.indices.ndim == 2 else sparse.indices[n, :, g]
            weight[label, inputs.long()] = values[n, :, g]
    return weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_equals_a_masked_linear(connectivity: str, shape: tuple[int, ...], bias: bool) -> None:
    sparse = layer(connectivity, bias=bias)
    mask = unpacked(sparse, torch.ones_like(sparse.values))
    assert mask.sum(dim=1).unique().tolist() == [D if connectivity == "dense" else K]
    linear = nn.Linear(D, L, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(unpacked(sparse, sparse.values))
        if bias:
            linear.bias.copy_(sparse.bias.flatten()[:L])
    x = torch.randn(*shape, D, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    out, expected = sparse(x), linear(same)
    assert out.shape == (*shape, L)
    torch.testing.assert_close(out, expected)
    pull = torch.randn(*shape, L)
    out.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(x.grad, same.grad)
    torch.testing.assert_close(unpacked(sparse, sparse.values.grad), linear.weight.grad * mask)
    if bias:
        torch.testing.assert_close(sparse.bias.grad.flatten()[:L], linear.bias.grad)


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_gradcheck(connectivity: str) -> None:
    sparse = layer(connectivity, dtype=torch.float64)
    x = torch.randn(2, 1, D, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return functional_call(sparse, {"values": values, "bias": bias}, (x,))

    assert gradcheck(call, (x, sparse.values, sparse.bias))
    assert gradgradcheck(call, (x, sparse.values, sparse.bias), fast_mode=True)  # along random directions: it is slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_opcheck(connectivity: str, dtype: torch.dtype) -> None:
    sparse = layer(connectivity, dtype=dtype)
    x = torch.randn(4, D, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, *sparse.bias.shape, dtype=dtype, requires_grad=True)
    opcheck(scores, (x, sparse.values, sparse.bias, sparse.indices))
    opcheck(scores, (x, sparse.values, None, sparse.indices))
    opcheck(grad_input, (grad, sparse.values, sparse.indices, D))
    opcheck(grad_values, (x, grad, sparse.values, sparse.indices))


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_compiles_without_a_graph_break(connectivity: str) -> None:
    torch.compiler.reset()
    sparse = layer(connectivity)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    for rows in (3, 1, 8):
        x = torch.randn(rows, 2, D, requires_grad=True)
        gradients = []
        for call in (sparse, compiled):
            out = call(x)
            gradients.append((out, *torch.autograd.grad(out.square().sum(), (x, sparse.values, sparse.bias))))
        for eager, traced in zip(*gradients, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(connectivity: str, dtype: torch.dtype) -> None:
    sparse = layer(connectivity, dtype=dtype)
    wide = copy.deepcopy(sparse).float()
    x = torch.randn(6, D).to(dtype).requires_grad_()
    same = x.detach().float().requires_grad_()
    out, expected = sparse(x), wide(same)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))
    pull = torch.randn(6, L).to(dtype)
    out.backward(pull)
    expected.backward(pull.float())
    for half, full in ((x.grad, same.grad), (sparse.values.grad, wide.values.grad), (sparse.bias.grad, wide.bias.grad)):
        assert half.dtype == dtype
        torch.testing.assert_close(half, full.to(dtype), rtol=2e-2, atol=2e-2)


def test_autocast_keeps_the_scores_in_fp32() -> None:
    model = nn.Sequential(nn.Linear(8, D), layer())
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_only_what_is_needed_gets_a_gradient() -> None:
    sparse = layer()
    sparse.values.requires_grad_(False)
    x = torch.randn(3, D, requires_grad=True)
    sparse(x).sum().backward()
    assert sparse.values.grad is None
    assert x.grad is not None
    assert torch.equal(sparse.bias.grad.flatten()[:L], torch.full((L,), 3.0))


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_padding_stays_zero_while_training(connectivity: str) -> None:
    sparse = layer(connectivity)
    nn.init.zeros_(sparse.bias)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        sparse(torch.randn(4, D)).square().sum().backward()
        optimizer.step()
    padding = (sparse.label_ids < 0)[:, None, :].expand_as(sparse.values)
    assert padding.any()
    assert not sparse.values[padding].any()
    assert sparse.values[~padding].all()
    assert not sparse.bias.flatten()[L:].any()


def test_an_empty_batch() -> None:
    sparse = layer()
    x = torch.randn(0, D, requires_grad=True)
    out = sparse(x)
    assert out.shape == (0, L)
    out.sum().backward()
    assert x.grad.shape == (0, D)
    assert not sparse.values.grad.any()


@pytest.mark.parametrize("connectivity", ["shared", "private"])
def test_replaces_linear_in_a_network(connectivity: str) -> None:
    """Classes are random centres in 16 dimensions: 40 classes, chance is 2.5 %."""
    torch.manual_seed(0)
    centres = torch.randn(40, 16)
    target = torch.randint(40, (600,))
    x = centres[target] + 0.3 * torch.randn(600, 16)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), FanInLinear(64, 40, fan_in=16, connectivity=connectivity))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x[:400]), target[:400])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (model(x[400:]).argmax(dim=1) == target[400:]).float().mean()
    assert accuracy > 0.9


def test_random_layers_follow_the_generator() -> None:
    one, same, other = layer(seed=1), layer(seed=1), layer(seed=2)
    assert torch.equal(one.values, same.values)
    assert torch.equal(one.indices, same.indices)
    assert not torch.equal(one.indices, other.indices)
    torch.manual_seed(5)
    first = FanInLinear(D, L, fan_in=K)
    second = FanInLinear(D, L, fan_in=K)
    torch.manual_seed(5)
    again = FanInLinear(D, L, fan_in=K)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, second.values)


def test_scores_start_with_the_variance_of_the_inputs() -> None:
    wide = FanInLinear(512, 4096, fan_in=32)
    assert wide(torch.randn(64, 512)).var().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_block_and_back(connectivity: str, dtype: torch.dtype) -> None:
    sparse = layer(connectivity, dtype=dtype)
    block = sparse.to_block()
    block.validate()
    assert (block.connectivity, block.width, block.label_ids[block.label_ids >= 0].tolist()) == (
        connectivity,
        D,
        list(range(L)),
    )
    back = FanInLinear.from_block(block)
    assert (back.in_features, back.out_features, back.values.dtype) == (D, L, dtype)
    x = torch.randn(3, D, dtype=dtype)
    assert torch.equal(back(x), sparse(x))
    for name, buffer in back.to_block().buffers.items():
        assert np.array_equal(buffer, block.buffers[name]), name
    # A block is a view of its layer; a layer is a copy of its block.
    before = back.values.detach().clone()
    block.values[...] = 0
    assert not sparse.values.any()
    assert torch.equal(back.values, before)


def test_a_block_keeps_its_own_label_order() -> None:
    labels = np.random.default_rng(0).permutation(100)[:L].astype(np.int32)
    block = Block.random(labels, width=D, connectivity="shared", fan_in=K, group_size=G, rng=np.random.default_rng(1))
    sparse = FanInLinear.from_block(block)
    assert sparse.label_ids.flatten()[:L].tolist() == labels.tolist()
    assert np.array_equal(sparse.to_block().label_ids, block.label_ids)
    restored = FanInLinear(D, L, fan_in=K, group_size=G)
    restored.load_state_dict(sparse.state_dict())
    assert np.array_equal(restored.to_block().label_ids, block.label_ids)


def test_layers_that_are_no_block() -> None:
    with pytest.raises(ValueError, match="a block has no fp64 values"):
        layer(dtype=torch.float64).to_block()
    block = layer().to_block()
    gap = block.label_ids.copy()
    gap[0, 3] = -1
    with pytest.raises(ValueError, match="slot 3 is padding although labels follow"):
        FanInLinear.from_block(Block("shared", D, "fp32", block.values, block.bias, gap, block.indices))
    quantized = Block(
        "shared", D, "int8", block.values.astype(np.int8), block.bias, block.label_ids, block.indices, np.ones_like(block.bias)
    )
    with pytest.raises(ValueError, match="int8 values has no layer; use fp32, fp16, bf16"):
        FanInLinear.from_block(quantized)
    bad = block.indices.copy()
    bad[1, 2] = D
    with pytest.raises(HeadError, match=r"indices\[1, 2\] is 24"):
        FanInLinear.from_block(Block("shared", D, "fp32", block.values, block.bias, block.label_ids, bad))


def test_state_of_a_wider_layer_is_refused() -> None:
    """Shapes agree whatever the width is, so nothing but the indices tells."""
    wide = FanInLinear(1000, L, fan_in=K, group_size=G)
    with pytest.raises(HeadError, match=r"loaded state does not fit: indices\[.*\] is \d+, the width is 24"):
        layer().load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fan_in": None}, "fan_in is missing; shared connectivity needs it"),
        ({"fan_in": 25}, "fan-in is 25, must be 1 to the width 24"),
        ({"fan_in": 5, "connectivity": "dense"}, "fan_in is 5, but dense connectivity reads all 24 inputs"),
        ({"group_size": 20}, "group size is 20, must be a multiple of 16"),
        ({"connectivity": "ring"}, "connectivity is 'ring', not one of dense, shared, private"),
        ({"out_features": 0}, "out_features is 0"),
        ({"in_features": 70_000}, "width is 70000, must be 1 to 65536"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FanInLinear(**{"in_features": D, "out_features": L, "fan_in": K} | arguments)


def test_bad_inputs() -> None:
    sparse = layer()
    with pytest.raises(ValueError, match=r"x has shape \[3, 25\], expected \[..., 24\]"):
        sparse(torch.randn(3, D + 1))
    with pytest.raises(ValueError, match=r"x is torch.float64, the layer's values are torch.float32"):
        sparse(torch.randn(3, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="x row 1 has a value that is not finite"):
        sparse(torch.tensor([[0.0] * D, [float("nan")] * D]))
