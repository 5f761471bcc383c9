"""The compiled kernel and the registered operator equal the torch path, bit for bit."""

import concurrent.futures
import copy

import pytest
import torch

import karla_hf
from karla_hf import kernel
from karla_hf.modeling import fast_bitlinear_karla, straight_through_karla
from karla_hf.modeling.bitlinear_karla import BitLinear, set_packed
from karla_hf.modeling.fast_bitlinear_karla import FastBitLinear
from karla_hf.modeling.native_karla import c_function
from karla_hf.modeling.reference_bitlinear import naive_bitlinear
from karla_hf.modeling.straight_through_karla import packed_linear, ternary_linear
from karla_hf.modeling.ternary_karla import pack_ternary


needs_kernel = pytest.mark.skipif(not kernel.address("karla_bitlinear"), reason="no C compiler")
LEVELS = {"plain C": 0, "AVX2": 1, "AVX512": 2}
OP = torch.ops.karla_hf.bitlinear.default


@pytest.fixture(params=LEVELS.values(), ids=LEVELS)
def level(request):
    """Nothing better than this level runs."""
    limit = c_function("karla_limit_level", "i")
    limit(request.param)
    if c_function("karla_level", "", "i")() != request.param:
        limit(max(LEVELS.values()))
        pytest.skip("this processor has no such instructions")
    yield request.param
    limit(max(LEVELS.values()))


@needs_kernel
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [(1, 1, 4), (1, 63, 8), (2, 64, 12), (3, 65, 4), (4, 66, 60), (5, 191, 64), (67, 130, 132), (3, 2100, 20)],
)
def test_kernel_equals_torch(level, rows, width, out, dtype, norm, monkeypatch):
    monkeypatch.setattr(fast_bitlinear_karla, "MAX_ROWS", (100, 100, 100))
    layer = BitLinear(width, out, norm=norm).eval()
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    with torch.no_grad():
        ours, pair, eps = layer(x), layer.quantized_weight(), layer.eps if norm else None
        assert layer._fast[2] is not None
        kept = ternary_linear(x, *pair, eps)  # as training does it: its own product, the kernel's rows
        monkeypatch.setattr(straight_through_karla, "c_function", lambda *arguments: None)
        alone = ternary_linear(x, *pair, eps)
        assert torch.equal(ours, alone[0])
        assert all(torch.equal(a, b) for a, b in zip(kept[:3], alone[:3], strict=True))
        assert torch.equal(kept[3], alone[3]) if norm else kept[3] is alone[3] is None
        expected = naive_bitlinear(x.double(), layer.weight.double(), norm=norm)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=1e-2 * float(expected.abs().max()))


@needs_kernel
def test_integer_product_is_exact(level):
    """With whole numbers up to 127 and a scale of 1 the output is the int32 product itself."""
    x = torch.randint(-127, 128, (6, 1030))
    x[:, 5] = 127
    codes = torch.randint(-1, 2, (44, 1030), dtype=torch.int8)
    fast = FastBitLinear(pack_ternary(codes), torch.ones(1), None)
    assert torch.equal(fast(x.float()).round().int(), x.int() @ codes.int().t())


@needs_kernel
def test_zero_rows_and_nan_rows(level):
    layer = BitLinear(70, 8).eval()
    x = torch.zeros(3, 70)
    x[1, 3] = torch.nan
    with torch.no_grad():
        for y in (layer(x), layer(x.bfloat16()), torch.stack([layer(row) for row in x])):
            assert torch.equal(y[0].float(), torch.zeros(8))
            assert y[1].isnan().all()
            assert torch.equal(y[2].float(), torch.zeros(8))
        assert layer(x[:0]).shape == (0, 8)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_many_threads_may_call_at_once(threads):
    layer, x = BitLinear(300, 64).eval().to_packed(), torch.randn(40, 300)
    expected = packed_linear(x, layer.packed_weight, layer.weight_scale, layer.eps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
            fast = layer.compiled()
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                for begin, part in pool.map(lambda i: (i % 37, fast(x[i % 37 : i % 37 + 3])), range(200)):
                    assert torch.equal(part, expected[begin : begin + 3])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_the_kernel_sees_weights_that_change():
    layer, x = BitLinear(20, 8).eval(), torch.randn(3, 20)
    with torch.no_grad():
        first = layer(x)
        layer.weight.normal_()
        second = layer(x)
        assert not torch.equal(first, second)
        layer.to_packed()
        assert torch.equal(layer(x), second)
        layer.packed_weight.fill_(0b01010101)
        assert not layer(x).any()
        layer.to_trainable().train()
        given = layer.quantized_weight()
        assert torch.equal(layer(x, given), layer(x))


def packed_arguments(norm=True, dtype=torch.float32, **options):
    layer = BitLinear(64, 8, norm=norm).to_packed()
    return (
        torch.randn(2, 3, 64, dtype=dtype, **options),
        layer.packed_weight,
        layer.weight_scale,
        1e-5 if norm else None,
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_registered_operator_passes_opcheck(norm, requires_grad):
    result = torch.library.opcheck(OP, packed_arguments(norm, requires_grad=requires_grad))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("without_kernel", [False, True])
@pytest.mark.parametrize("norm", [True, False])
def test_operator_and_its_gradient_equal_naive(norm, without_kernel, monkeypatch):
    if without_kernel:
        monkeypatch.setattr(FastBitLinear, "can_run", staticmethod(lambda packed, scale: False))
    layer = BitLinear(37, 12, norm=norm)
    packed = copy.deepcopy(layer).to_packed()
    x, grad_y = torch.randn(5, 37, dtype=torch.float64, requires_grad=True), torch.randn(5, 12, dtype=torch.float64)
    eps = layer.eps if norm else None
    ours = OP(x, packed.packed_weight, packed.weight_scale, eps)
    theirs = naive_bitlinear(x, layer.weight.double(), norm)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # the packed scale is float32
    gradients = (torch.autograd.grad(y, x, grad_y)[0] for y in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        x32 = x.float()
        assert torch.equal(OP(x32, packed.packed_weight, packed.weight_scale, eps), layer.eval()(x32))


def stack(packed):
    model = torch.nn.Sequential(BitLinear(16, 24), torch.nn.SiLU(), BitLinear(24, 8, norm=False)).eval()
    set_packed(model, packed)
    return model


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_stack_compiles_to_one_graph(backend):
    model, x, grad_y = stack(True), torch.randn(3, 16, requires_grad=True), torch.randn(3, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    ours, theirs = (torch.autograd.grad(run(x), x, grad_y)[0] for run in (compiled, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", [True, False])
def test_a_stack_is_exported(packed):
    model, x = stack(packed), torch.randn(3, 16)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
    calls = [node.target for node in exported.graph.nodes if node.target is OP]
    assert len(calls) == (2 if packed else 0)


@pytest.fixture
def fresh(monkeypatch):
    """A registration that leaves the process's own alone."""
    monkeypatch.setattr(kernel, "_loaded", [])
    monkeypatch.setattr(kernel, "_define", lambda: None)


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "no C compiler"), ("false", "cannot build")])
def test_without_a_working_compiler_there_is_one_log_line(compiler, reason, fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(kernel, "backbone_cache_dir", lambda: tmp_path / "backbones")
    with caplog.at_level("INFO", logger=kernel.__name__):
        kernel.register()
    (line,) = caplog.records
    assert reason in line.getMessage()
    assert kernel.address("karla_bitlinear") == 0
    assert not list(tmp_path.rglob("*.so"))


@needs_kernel
def test_a_build_is_reused(tmp_path):
    first = kernel.build("engram", tmp_path)
    assert kernel.build("engram", tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert karla_hf.kernel is kernel
